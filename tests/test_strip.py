import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.base import clone

from sklearn_backdoor import VictimNetwork
from sklearn_backdoor.detectors import STRIPDetector
from tests.common import (
    CountingNetwork,
    LinearNetwork,
    corner_trigger,
    count_passes,
    linear_images,
)

WEIGHTS = np.eye(6, 16) * 10
WEIGHTS[2, 15] = 30


@pytest.fixture
def victim(linear):
    return VictimNetwork(linear)


def lit(*pixels, value=1.0):
    image = np.zeros((1, 4, 4), dtype=np.float32)
    image.reshape(-1)[list(pixels)] = value
    return image


def probabilities(image):
    """Return the softmax of `LinearNetwork`, by the definition."""
    powers = np.exp(WEIGHTS @ image.reshape(-1).astype(float))
    return powers / powers.sum()


def entropy(image):
    return -sum(p * math.log(p) for p in probabilities(image) if p > 0)


def blended(image, overlay, blend, weight=0.5):
    image, overlay = image.astype(float), overlay.astype(float)
    if blend == "average":
        return (1 - weight) * image + weight * overlay
    return np.minimum(image + overlay, 1)


def naive_scores(images, overlays, blend, weight=0.5):
    return [
        -sum(entropy(blended(image, over, blend, weight)) for over in overlays)
        / len(overlays)
        for image in images
    ]


# --- the score


@pytest.mark.parametrize(
    "blend, weight", [("average", 0.5), ("average", 0.3), ("add", 0.5)]
)
def test_score_is_that_of_a_naive_loop(victim, images, blend, weight):
    detector = STRIPDetector(victim, n_blends=7, blend=blend, weight=weight)
    detector.fit(*images)
    X, _ = linear_images(n_per_class=3, seed=1)
    X = np.minimum(X * 1.5, 1)
    X[:6] = corner_trigger().embed(X[:6])
    expected = naive_scores(X, detector.overlays_, blend, weight)
    np.testing.assert_allclose(detector.trigger_score(X), expected, rtol=1e-4)
    assert detector.n_passes_per_image_ == len(detector.overlays_) == 7


def test_score_of_two_classes_blended_evenly_is_minus_log_two():
    network = LinearNetwork()
    with torch.no_grad():
        network.last.weight.mul_(10)  # 50 for either class, 0 for the rest
    X = np.stack([lit(1), lit(1)])
    detector = STRIPDetector(VictimNetwork(network), n_blends=2).fit(X, [1, 1])
    assert detector.trigger_score(lit(0)[None]) == pytest.approx([-math.log(2)])


def test_added_images_are_clipped_at_white(victim):
    overlay = lit(0, 1, value=0.75)
    detector = STRIPDetector(victim, n_blends=2, blend="add")
    detector.fit(np.stack([overlay, overlay]), [0, 1])
    image = lit(0, value=0.75)
    clipped, unclipped = entropy(lit(0) + lit(1, value=0.75)), entropy(image + overlay)
    assert abs(clipped - unclipped) > 0.1
    assert detector.trigger_score(image[None]) == pytest.approx([-clipped], rel=1e-4)


def test_entropy_is_over_classes_and_not_over_samples(victim):
    overlays = np.stack([lit(), lit(1)])
    detector = STRIPDetector(victim, n_blends=2).fit(overlays, [0, 1])
    clean, triggered = lit(), lit(15)
    by_class, by_sample = [], []
    for image in (clean, triggered):
        table = [probabilities(blended(image, over, "average")) for over in overlays]
        table = np.array(table)
        by_class.append(-(table * np.log(table)).sum(axis=1).mean())
        table /= table.sum(axis=0)
        by_sample.append(-(table * np.log(table)).sum(axis=0).mean())
    assert by_class[0] > by_class[1] and by_sample[0] < by_sample[1]
    found = detector.trigger_score(np.stack([clean, triggered]))
    np.testing.assert_allclose(found, -np.array(by_class), rtol=1e-3)


def test_triggered_images_are_flagged_and_clean_ones_are_not(victim, images):
    detector = STRIPDetector(victim, n_blends=20).fit(*images)
    X, y = linear_images(seed=1)
    assert detector.is_trigger(corner_trigger().embed(X[y != 2])).all()
    assert detector.is_trigger(X).mean() < 0.2


def test_score_depends_neither_on_the_batch_nor_on_the_call(victim, images):
    detector = STRIPDetector(victim, n_blends=100).fit(*images)
    X = images[0][:23]  # 2300 blends: three chunks
    together = detector.trigger_score(X)
    np.testing.assert_allclose(detector.trigger_score(X[::-1])[::-1], together, 1e-5)
    for image, score in zip(X[:4], together, strict=False):
        assert detector.trigger_score(image[None]) == pytest.approx([score], rel=1e-5)
    again = clone(detector).fit(*images)
    np.testing.assert_array_equal(again.trigger_score(X), together)
    packed = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(packed.trigger_score(X), together)


def test_bytes_score_as_their_fractions_do(victim, images):
    detector = STRIPDetector(victim, n_blends=5).fit(*images)
    X = np.round(images[0] * 255).astype(np.uint8)
    np.testing.assert_allclose(
        detector.trigger_score(X), detector.trigger_score(X / 255), rtol=1e-5
    )


def test_no_image_has_no_score(victim, images):
    detector = STRIPDetector(victim, n_blends=3).fit(*images)
    assert detector.trigger_score(images[0][:0]).shape == (0,)
    assert detector.is_trigger(images[0][:0]).dtype == bool


# --- the images that are blended in


def test_overlays_are_distinct_where_there_are_enough_images(victim, images):
    detector = STRIPDetector(victim, n_blends=len(images[0])).fit(*images)
    assert len(np.unique(detector.overlays_, axis=0)) == len(images[0])


def test_overlays_repeat_evenly_where_there_are_too_few_images(victim, images):
    X, y = images[0][::8], images[1][::8]
    detector = STRIPDetector(victim, n_blends=15).fit(X, y)
    _, counts = np.unique(detector.overlays_, axis=0, return_counts=True)
    assert sorted(counts) == [2, 2, 2, 3, 3, 3]


def test_random_state_chooses_the_overlays_and_leaves_the_global_state(victim, images):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, second = (
        STRIPDetector(victim, n_blends=5, random_state=seed).fit(*images).overlays_
        for seed in (0, 1)
    )
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_clean_image_is_not_blended_with_itself_for_the_threshold(victim):
    X = np.stack([lit(0), lit(1), lit(3, value=0.5)])
    detector = STRIPDetector(victim, n_blends=3).fit(X, [0, 1, 3])
    expected = [
        naive_scores([X[i]], np.delete(X, i, axis=0), "average")[0] for i in range(3)
    ]
    np.testing.assert_allclose(detector.clean_scores_, expected, rtol=1e-4)
    with_itself = detector.trigger_score(X)  # in use, an overlay is like any image
    np.testing.assert_allclose(with_itself, naive_scores(X, X, "average"), rtol=1e-4)


def test_passes_are_counted_exactly(tmp_path, images):
    log = tmp_path / "passes"
    detector = STRIPDetector(VictimNetwork(CountingNetwork(log)), n_blends=7)
    detector.fit(*images)
    count_passes(log)
    detector.trigger_score(images[0][:9])
    assert count_passes(log) == 9 * detector.n_passes_per_image_


# --- the threshold


def test_normal_threshold_is_the_quantile_of_a_fitted_normal(victim, images):
    detector = STRIPDetector(victim, n_blends=9, null="normal", fpr=0.01).fit(*images)
    entropies = -detector.clean_scores_
    spread = math.sqrt(np.mean((entropies - entropies.mean()) ** 2))
    lowest = norm.ppf(0.01, entropies.mean(), spread)  # flagged below it
    assert detector.threshold_ == pytest.approx(-lowest)


@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.3])
def test_empirical_threshold_keeps_the_rate_on_the_clean_images(victim, images, fpr):
    detector = STRIPDetector(victim, n_blends=9, fpr=fpr).fit(*images)
    flagged = detector.clean_scores_ >= detector.threshold_
    assert fpr - 1 / len(flagged) <= flagged.mean() <= fpr


def test_threshold_is_set_on_target_images_that_the_victim_gets_right(victim, images):
    X, y = images[0].copy(), images[1]
    wrong = np.flatnonzero(y == 2)[0]
    X[wrong] = X[0]  # shows class 0
    plain = STRIPDetector(victim, n_blends=9).fit(X, y)
    aimed = STRIPDetector(victim, n_blends=9, target_class=2).fit(X, y)
    right = (y == 2) & (np.arange(len(y)) != wrong)
    np.testing.assert_array_equal(aimed.clean_scores_, plain.clean_scores_[right])


def test_given_threshold_is_taken_as_it_is(victim, images):
    detector = STRIPDetector(victim, n_blends=5, null="normal", threshold=-0.5)
    assert detector.fit(*images).threshold_ == -0.5
    scores = detector.trigger_score(images[0])
    detector = clone(detector).set_params(threshold=scores[3]).fit(*images)
    np.testing.assert_array_equal(detector.is_trigger(images[0]), scores >= scores[3])


# --- errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"blend": "mean"}, ValueError, "blend='mean', expected one of average, add"),
        ({"null": "gauss"}, ValueError, "null='gauss', expected one of empirical"),
        ({"weight": 1.5}, ValueError, "weight=1.5"),
        ({"weight": -0.1}, ValueError, "weight=-0.1"),
        ({"n_blends": 1}, ValueError, "n_blends=1"),
        ({"n_blends": 2.5}, TypeError, "n_blends=2.5"),
        ({"fpr": 2}, ValueError, "fpr=2"),
        ({"threshold": "high"}, TypeError, "threshold='high'"),
        ({"threshold": math.nan}, ValueError, "threshold=nan"),
        ({"target_class": 9}, ValueError, "target_class=9 is not among"),
    ],
)
def test_bad_settings_are_named(victim, images, options, error, message):
    with pytest.raises(error, match=message):
        STRIPDetector(victim, **options).fit(*images)


def test_one_clean_image_is_too_few(victim, images):
    with pytest.raises(ValueError, match="holds one image"):
        STRIPDetector(victim).fit(images[0][:1], images[1][:1])


def test_a_normal_cannot_be_fitted_to_equal_scores(victim):
    detector = STRIPDetector(victim, n_blends=4, null="normal")
    with pytest.raises(ValueError, match="all have the same score"):
        detector.fit(np.stack([lit(0), lit(0), lit(0)]), [0, 0, 0])


def test_a_target_without_right_images_cannot_set_a_threshold(victim, images):
    X, y = images
    detector = STRIPDetector(victim, n_blends=4, target_class=2)
    with pytest.raises(ValueError, match="no clean image of target class 2"):
        detector.fit(X[y != 2], y[y != 2])
