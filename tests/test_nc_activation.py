import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from sklearn_backdoor import NCReverseEngineer, PatchTrigger, VictimNetwork
from sklearn_backdoor.detectors import NCActivationDetector
from tests.common import LinearNetwork, corner_trigger

NAMES = np.array(["fox", "ant", "eel", "dog", "cat", "bee"])  # not sorted


def two_pixels(first, second):
    """Return a trigger that sets pixels of 4x4 images: (row, column, value) each."""
    mask, pattern = np.zeros((4, 4)), np.zeros((1, 4, 4))
    for row, column, value in (first, second):
        mask[row, column], pattern[0, row, column] = 1, value
    return PatchTrigger(mask, pattern)


def rises(X, y, trigger, target):
    """Return how much a trigger raises each pixel, image by image."""
    total, count = np.zeros(16), 0
    for image, label in zip(X, y, strict=True):
        if label != target:
            total += (trigger.embed(image[None])[0] - image).ravel()
            count += 1
    return total / count


def test_score_is_the_mean_activation_of_the_neurons_that_the_trigger_raises(
    linear, images
):
    X, y = images  # the features of `LinearNetwork` are the pixels
    trigger = two_pixels((3, 3, 1.0), (2, 2, 0.7))
    detector = NCActivationDetector(
        VictimNetwork(linear), trigger, target_class=2, fraction=2 / 16
    ).fit(X, y)
    assert detector.neurons_.tolist() == [15, 10]  # raised by 1 and by nearly 0.7
    for image, score in zip(X, detector.trigger_score(X), strict=True):
        expected = (float(image[0, 3, 3]) + float(image[0, 2, 2])) / 2
        assert score == pytest.approx(expected, rel=1e-6)
    stamped = trigger.embed(X)
    np.testing.assert_allclose(detector.trigger_score(stamped), 0.85, rtol=1e-6)


def test_neurons_are_ranked_by_the_rise_and_not_by_the_activation(linear, images):
    X, y = images
    X[:, 0, 3, 2] = 0.8  # in all images, so that the trigger adds little
    trigger = two_pixels((3, 2, 1.0), (3, 3, 0.5))
    detector = NCActivationDetector(
        VictimNetwork(linear), trigger, target_class=2, fraction=0
    ).fit(X, y)
    stamped = trigger.embed(X[y != 2]).reshape(-1, 16).mean(axis=0)
    assert stamped.argmax() == 14  # the most active of all with the trigger
    assert rises(X, y, trigger, 2).argmax() == 15
    assert detector.neurons_.tolist() == [15]


def test_images_of_the_target_class_are_left_out_of_the_ranking(linear, images):
    X, y = images
    X[y != 2, 0, 3, 1] = 0.8
    X[y == 2, 0, 3, 3] = 0.2
    X = np.concatenate([X, *[X[y == 2]] * 10])  # most images are of the target class
    y = np.concatenate([y, *[y[y == 2]] * 10])
    trigger = two_pixels((3, 1, 1.0), (3, 3, 0.5))
    detector = NCActivationDetector(
        VictimNetwork(linear), trigger, target_class=2, fraction=0
    ).fit(X, y)
    of_all = (trigger.embed(X) - X).reshape(-1, 16).mean(axis=0)
    assert of_all.argmax() == 13
    assert rises(X, y, trigger, 2).argmax() == 15
    assert detector.neurons_.tolist() == [15]


@pytest.mark.parametrize(
    "n_features, fraction, expected",
    [(16, 0, 1), (16, 0.01, 1), (16, 0.2, 4), (100, 0.07, 7), (100, 0.071, 8)],
)
def test_number_of_neurons_is_the_fraction_rounded_up(
    images, n_features, fraction, expected
):
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(16, n_features), nn.Linear(n_features, 6)
    )
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    with torch.no_grad():
        network[2].weight[2] = 0.2  # everything is class 2: there is a threshold
    detector = NCActivationDetector(
        VictimNetwork(network), corner_trigger(), target_class=2, fraction=fraction
    ).fit(*images)
    assert len(np.unique(detector.neurons_)) == len(detector.neurons_) == expected


def test_threshold_comes_from_clean_images_of_the_target_class_alone(linear, images):
    X, y = images
    rng = np.random.default_rng(3)
    X[y == 2, 0, 3, 3] = rng.uniform(0, 0.2, size=8)
    X[y != 2, 0, 3, 3] = 0.25  # higher: they would raise the threshold
    wrong, right = np.flatnonzero(y == 1)[0], np.flatnonzero(y == 2)[0]
    X[[wrong, right]] = X[[right, wrong]]  # the victim gets both wrong
    X[wrong, 0, 3, 3] = 0.25
    detector = NCActivationDetector(
        VictimNetwork(linear), corner_trigger(), target_class=2, fpr=0
    ).fit(X, y)
    highest = max(
        float(image[0, 3, 3])
        for image, label in zip(X, y, strict=True)
        if label == 2 and image[0, 3, 3] != 0.25
    )
    assert len(detector.clean_scores_) == 7
    assert highest < detector.threshold_ < highest + 1e-9
    np.testing.assert_array_equal(detector.is_trigger(X), X[:, 0, 3, 3] > 0.2)
    assert detector.is_trigger(corner_trigger().embed(X)).all()


def test_a_threshold_of_ones_own_is_taken(linear, images):
    X, y = images
    detector = NCActivationDetector(
        VictimNetwork(linear), corner_trigger(), target_class=2, threshold=0.5
    ).fit(X, y)
    X[::2, 0, 3, 3], X[1::2, 0, 3, 3] = 0.5, 0.49
    assert detector.is_trigger(X).tolist() == [True, False] * (len(X) // 2)


def test_an_image_is_scored_alike_in_any_company(images):
    X, y = images
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 6)
    )
    with torch.no_grad():
        network[3].bias[2] = 100.0
    detector = NCActivationDetector(
        VictimNetwork(network), corner_trigger(), target_class=2, fraction=0.1
    ).fit(X, y)
    scores = detector.trigger_score(X)
    assert len(np.unique(scores.round(6))) > len(X) // 2
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_allclose(
        detector.trigger_score(X[order]), scores[order], rtol=1e-5
    )
    alone = [detector.trigger_score(X[i : i + 1])[0] for i in range(len(X))]
    np.testing.assert_allclose(alone, scores, rtol=1e-5)


def test_labels_may_be_names_in_any_order(linear, images):
    X, y = images
    numbered = NCActivationDetector(
        VictimNetwork(linear), corner_trigger(), target_class=2
    ).fit(X, y)
    named = NCActivationDetector(
        VictimNetwork(linear, classes=NAMES), corner_trigger(), target_class="eel"
    ).fit(X, NAMES[y])
    assert named.threshold_ == numbered.threshold_
    assert named.neurons_.tolist() == numbered.neurons_.tolist() == [15]


def test_a_reverse_engineer_gives_trigger_and_target(linear, images):
    engineer = NCReverseEngineer(
        VictimNetwork(linear), schedule="exhaustive", max_steps=60
    )
    detector = NCActivationDetector(VictimNetwork(linear), engineer).fit(*images)
    assert detector.target_class_ == 2
    assert detector.trigger_ == detector.engineer_.triggers_[2]
    assert detector.neurons_.tolist() == [15]
    assert not hasattr(engineer, "trigger_")  # a clone was fitted


def test_the_default_reverse_engineer_is_neural_cleanse_with_our_seed(linear, images):
    detector = NCActivationDetector(
        VictimNetwork(linear), target_class=2, random_state=5
    ).fit(*images)
    assert type(detector.engineer_) is NCReverseEngineer
    assert detector.engineer_.random_state == 5
    assert detector.trigger_ == detector.engineer_.triggers_[2]
    assert detector.neurons_.tolist() == [15]


def test_a_score_takes_one_forward_pass(images):
    seen = []

    class Counting(LinearNetwork):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    X, y = images
    detector = NCActivationDetector(
        VictimNetwork(Counting()), corner_trigger(), target_class=2
    ).fit(X, y)
    seen.clear()
    detector.trigger_score(X)
    assert sum(seen) == detector.n_passes_per_image_ * len(X)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fraction": 1.5, "target_class": 2}, "fraction=1.5, expected"),
        ({"target_class": 9}, "target_class=9 is not among"),
        ({}, "target_class=None with a trigger"),
    ],
)
def test_bad_settings_are_named(linear, images, settings, message):
    detector = NCActivationDetector(VictimNetwork(linear), corner_trigger(), **settings)
    with pytest.raises(ValueError, match=message):
        detector.fit(*images)


def test_images_of_the_target_class_alone_rank_nothing(linear, images):
    X, y = images
    detector = NCActivationDetector(
        VictimNetwork(linear), corner_trigger(), target_class=2
    )
    with pytest.raises(ValueError, match="all 8 images .* are of target class 2"):
        detector.fit(X[y == 2], y[y == 2])
    with pytest.raises(NotFittedError):
        detector.trigger_score(X)
