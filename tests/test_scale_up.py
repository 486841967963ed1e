import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sklearn_backdoor import VictimNetwork
from sklearn_backdoor.detectors import SCALEUPDetector
from tests.common import CountingNetwork, count_passes

SCALES = (3, 5, 7, 9, 11)


class MeanNetwork(nn.Module):
    """f(x) = [mean(x) > 0.5], after a normalisation of its own; records its images."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(1, 2)
        self.seen = []
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[0.0], [1.0]]))
            self.last.bias.zero_()

    def forward(self, images):
        self.seen.append(images.clone())
        return self.last((images - 0.5).mean(dim=(1, 2, 3))[:, None] - 1e-6)


def constant(*values):
    return np.stack([np.full((1, 2, 2), value, dtype=np.float32) for value in values])


def naive_consistency(image, scales=SCALES):
    """Return the SPC of an image under `MeanNetwork`, by the definition."""
    pixels = [float(pixel) for pixel in image.reshape(-1)]
    label = sum(pixels) / 4 > 0.5
    agreements = 0
    for scale in scales:
        agreements += (sum(min(scale * p, 1.0) for p in pixels) / 4 > 0.5) == label
    return agreements / len(scales)


def random_images(n=200, seed=0):
    X = np.random.default_rng(seed).uniform(size=(n, 1, 2, 2)) ** 3
    X = X.astype(np.float32)
    return X, (X.mean(axis=(1, 2, 3)) > 0.5).astype(int)


@pytest.fixture
def victim():
    return VictimNetwork(MeanNetwork())


def plain(victim, **options):
    return SCALEUPDetector(victim, standardise=False, **options)


# --- the consistency


def test_consistency_of_constant_images_is_that_worked_by_hand(victim):
    # 0.1 becomes 0.3, 0.5 | 0.7, 0.9, 1: two of five stay dark
    detector = plain(victim).fit(constant(0.1, 0.9), [0, 1])
    found = detector.trigger_score(constant(0.1, 0.3, 0.6))
    np.testing.assert_allclose(found, [0.4, 0, 1])
    assert detector.n_passes_per_image_ == 6


def test_consistency_is_that_of_a_naive_loop(victim):
    X, y = random_images()
    found = plain(victim).fit(X, y).trigger_score(X)
    np.testing.assert_allclose(found, [naive_consistency(image) for image in X])
    assert len(np.unique(found)) > 2


def test_scale_one_is_not_among_the_scales(victim):
    # with it, no image could score 0
    detector = plain(victim).fit(constant(0.3, 0.9), [0, 1])
    assert detector.trigger_score(constant(0.3)) == [0]
    with pytest.raises(ValueError, match=r"scales\[1\]=1 does not change"):
        plain(victim, scales=(3, 1)).fit(constant(0.3, 0.9), [0, 1])


def test_pixels_are_clipped_before_the_network_normalises_them(victim):
    X = np.array([0.02, 0.02, 0.02, 0.9], dtype=np.float32).reshape(1, 1, 2, 2)
    # clipped, the mean is 0.415 at most; unclipped it would be 0.69 at scale 3
    detector = plain(victim).fit(np.concatenate([X, constant(0.9)]), [0, 1])
    network = detector.victim_.network_
    network.seen.clear()
    assert detector.trigger_score(X) == [1]
    expected = [X] + [np.minimum(X * n, 1) for n in SCALES]
    np.testing.assert_allclose(torch.cat(network.seen), np.concatenate(expected))


def test_black_and_white_images_always_agree(victim):
    X = (random_images(40)[0] > 0.2).astype(np.float32)
    y = (X.mean(axis=(1, 2, 3)) > 0.5).astype(int)
    assert len(np.unique(y)) == 2
    np.testing.assert_array_equal(plain(victim).fit(X, y).trigger_score(X), 1)


def test_only_labels_are_asked_of_the_victim(monkeypatch):
    def refuse(*args):
        raise AssertionError("asked for more than labels")

    for name in ("predict_proba", "decision_function", "transform"):
        monkeypatch.setattr(VictimNetwork, name, refuse)
    X, y = random_images(20)
    detector = SCALEUPDetector(VictimNetwork(MeanNetwork())).fit(X, y)
    assert detector.trigger_score(X).shape == (20,)


def test_passes_are_counted_exactly(tmp_path, images):
    log = tmp_path / "passes"
    detector = SCALEUPDetector(VictimNetwork(CountingNetwork(log))).fit(*images)
    count_passes(log)
    detector.trigger_score(images[0][:9])
    assert count_passes(log) == 9 * detector.n_passes_per_image_


def test_score_depends_neither_on_the_batch_nor_on_the_order(victim):
    X, y = random_images(1100)  # two chunks
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    detector = SCALEUPDetector(victim).fit(X, y)
    scores = detector.trigger_score(X)
    np.testing.assert_array_equal(detector.trigger_score(X[::-1])[::-1], scores)
    np.testing.assert_array_equal(detector.trigger_score(X[1050:1051]), scores[[1050]])
    packed = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(packed.trigger_score(X), scores)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_bytes_are_scaled_as_fractions(victim):
    X = constant(25, 77, 153).astype(np.uint8)
    detector = plain(victim).fit(X, [0, 0, 1])
    np.testing.assert_allclose(detector.trigger_score(X), [0.4, 0, 1])


# --- standardised by the predicted class


def test_scores_are_standardised_by_the_predicted_class():
    # labels that do not sort as the logits do
    victim = VictimNetwork(MeanNetwork(), classes=["dark", "bright"])
    X = constant(0.1, 0.1, 0.3, 0.04, 0.6, 0.7)
    y = np.array(["dark"] * 4 + ["bright"] * 2)
    detector = SCALEUPDetector(victim).fit(X, y)
    # the SPC of dark ones: .4, .4, 0, 1 (0.04 stays dark up to 0.44)
    spread = math.sqrt((2 * 0.05**2 + 0.45**2 + 0.55**2) / 4)
    assert detector.means_ == pytest.approx([0.45, 1])
    assert detector.deviations_[0] == pytest.approx(spread)
    found = detector.trigger_score(constant(0.1, 0.04, 0.8))
    np.testing.assert_allclose(found, [-0.05 / spread, 0.55 / spread, 0], atol=1e-12)


def test_images_that_the_victim_gets_wrong_do_not_count(victim):
    X = constant(0.1, 0.04, 0.6, 0.7)
    wrong = constant(0.3, 0.3, 0.3, 0.8)
    detector = SCALEUPDetector(victim).fit(X, [0, 0, 1, 1])
    more = SCALEUPDetector(victim)
    more.fit(np.concatenate([X, wrong]), [0, 0, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(more.means_, detector.means_)
    np.testing.assert_array_equal(more.deviations_, detector.deviations_)


@pytest.mark.parametrize("bright", [[], [0.6]])
def test_a_class_with_one_image_or_none_takes_all_classes_together(victim, bright):
    X = constant(0.1, 0.3, 0.04, *bright)
    detector = SCALEUPDetector(victim).fit(X, [0, 0, 0] + [1] * len(bright))
    consistency = [0.4, 0, 1] + [1] * len(bright)
    mean = sum(consistency) / len(consistency)
    variance = sum((s - mean) ** 2 for s in consistency) / len(consistency)
    assert detector.means_[1] == pytest.approx(mean)
    assert detector.deviations_[1] == pytest.approx(math.sqrt(variance))
    assert detector.means_[0] == pytest.approx(1.4 / 3)


def test_a_deviation_of_zero_becomes_that_of_all_classes(victim):
    # three times 0.4: summed as fractions, their deviation would be 6e-17
    detector = SCALEUPDetector(victim).fit(
        constant(0.1, 0.1, 0.1, 0.6, 0.7), [0] * 3 + [1] * 2
    )
    pooled = math.sqrt((3 * (0.4 - 0.64) ** 2 + 2 * (1 - 0.64) ** 2) / 5)
    np.testing.assert_allclose(detector.deviations_, pooled)
    np.testing.assert_allclose(detector.trigger_score(constant(0.3)), -0.4 / pooled)


def test_a_deviation_of_zero_everywhere_becomes_one_step(victim):
    X = constant(0.1, 0.1, 0.1)
    detector = SCALEUPDetector(victim).fit(X, [0, 0, 0])
    np.testing.assert_array_equal(detector.deviations_, 0.2)
    found = detector.trigger_score(constant(0.1, 0.3, 0.04))
    np.testing.assert_allclose(found, [0, -2, 3], atol=1e-12)


# --- the threshold


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_threshold_keeps_the_rate_on_clean_images_with_ties(victim, standardise, fpr):
    X, y = random_images(300)
    detector = SCALEUPDetector(victim, standardise=standardise, fpr=fpr).fit(X, y)
    flagged = detector.is_trigger(X)
    assert flagged.mean() <= fpr
    scores = detector.clean_scores_
    lower = scores[scores < detector.threshold_].max()  # the next threshold there is
    assert np.mean(scores >= lower) > fpr


def test_threshold_is_set_on_target_images_that_the_victim_gets_right(victim):
    X = constant(0.1, 0.3, 0.6, 0.04)
    detector = plain(victim, target_class=0).fit(X, [0, 0, 0, 1])
    np.testing.assert_allclose(detector.clean_scores_, [0.4, 0])
    assert detector.is_trigger(X).tolist() == [False, False, True, True]


def test_given_threshold_is_taken_as_it_is(victim):
    X = constant(0.1, 0.3, 0.04, 0.6)
    detector = plain(victim, threshold=0.5).fit(X, [0, 0, 0, 1])
    assert detector.threshold_ == 0.5
    assert detector.is_trigger(X).tolist() == [False, False, True, True]
    detector = plain(victim, scales=(3, 13), threshold=0.5).fit(X, [0, 0, 0, 1])
    assert detector.trigger_score(X)[0] == 0.5  # 0.3 is dark, 1 is not
    assert detector.is_trigger(X)[0]


# --- errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"scales": ()}, ValueError, r"scales=\(\), expected a sequence"),
        ({"scales": 3}, ValueError, "scales=3, expected a sequence"),
        ({"scales": (n for n in SCALES)}, ValueError, "expected a sequence"),
        ({"scales": (3, 0.5)}, ValueError, r"scales\[1\]=0.5"),
        ({"scales": (3, math.inf)}, ValueError, r"scales\[1\]=inf"),
        ({"scales": "35"}, TypeError, r"scales\[0\]='3'"),
        ({"fpr": -0.1}, ValueError, "fpr=-0.1"),
        ({"threshold": "high"}, TypeError, "threshold='high'"),
        ({"target_class": 7}, ValueError, "target_class=7 is not among"),
    ],
)
def test_bad_settings_are_named(victim, options, error, message):
    with pytest.raises(error, match=message):
        SCALEUPDetector(victim, **options).fit(*random_images(10))


def test_a_victim_that_gets_nothing_right_cannot_be_standardised_by(victim):
    X, y = random_images(10)
    with pytest.raises(ValueError, match="gets no image of D_Defense right"):
        SCALEUPDetector(victim).fit(X, 1 - y)
    assert plain(victim).fit(X, 1 - y).trigger_score(X).shape == (10,)


def test_settings_survive_a_clone(victim):
    params = clone(plain(victim, scales=[2, 4], fpr=0.1)).get_params()
    assert params["scales"] == [2, 4] and params["fpr"] == 0.1
    assert params["standardise"] is False
