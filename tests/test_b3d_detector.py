import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_backdoor import B3DReverseEngineer, PatchTrigger, VictimNetwork
from sklearn_backdoor.detectors import B3DDetector
from tests.common import corner_trigger

NAMES = np.array(["fox", "ant", "eel", "dog", "cat", "bee"])  # not sorted


class Service:
    """`LinearNetwork` by hand, behind predict_proba alone."""

    def __init__(self, classes=range(6), answer=None):
        self.classes_ = np.array(list(classes))
        self.answer = answer
        self.n_images = 0

    def predict_proba(self, X):
        assert X.dtype == np.float32 and X.min() >= 0 and X.max() <= 1
        self.n_images += len(X)
        if self.answer is not None:
            return np.tile(self.answer, (len(X), 1))
        return np.array([probabilities(image) for image in X])


def probabilities(image):
    """Return the softmax of logit_k = 10 x_k, and 30 x_15 on top for class 2."""
    pixels = [float(pixel) for pixel in image.ravel()]
    powers = [np.exp(10 * pixels[k] + 30 * (k == 2) * pixels[15]) for k in range(6)]
    return [power / sum(powers) for power in powers]


def half_lit():
    """Return a trigger that leads to class 2 only just, from some images."""
    mask = np.zeros((4, 4))
    mask[3, 3] = 0.33
    return PatchTrigger(mask, np.ones((1, 4, 4)))


def expected_scores(X, trigger):
    scores = []
    for image in X:
        before = probabilities(image)
        after = probabilities(trigger.embed(image[None])[0])
        squares = [(a - b) ** 2 for a, b in zip(before, after, strict=True)]
        scores.append(-(sum(squares) ** 0.5))
    return np.array(scores)


def test_score_is_minus_the_distance_that_the_trigger_moves_the_answer(linear, images):
    X, y = images
    X[::3] = half_lit().embed(X[::3])
    expected = expected_scores(X, half_lit())
    assert np.ptp(expected) > 0.5
    for victim in (VictimNetwork(linear), Service()):
        detector = B3DDetector(victim, half_lit(), target_class=2).fit(X, y)
        np.testing.assert_allclose(detector.trigger_score(X), expected, atol=1e-5)


def test_clean_images_of_the_target_class_look_triggered(linear, images):
    X, y = images
    detector = B3DDetector(VictimNetwork(linear), corner_trigger(), target_class=2)
    detector.fit(X, y)
    sources = X[y != 2]
    assert detector.trigger_score(sources).max() < -1  # clean: far from the target
    triggered = detector.trigger_score(corner_trigger().embed(sources))
    np.testing.assert_allclose(triggered, 0, atol=1e-6)
    # as the class says: what the threshold has to tell them from moves no more
    assert detector.clean_scores_.min() > -0.01


def test_threshold_comes_from_clean_images_of_the_target_class_alone(linear, images):
    X, y = images
    wrong = np.flatnonzero(y == 2)[0]
    X[wrong] = X[y == 1][0]
    detector = B3DDetector(VictimNetwork(linear), half_lit(), target_class=2, fpr=0)
    detector.fit(X, y)
    rows = [i for i, label in enumerate(y) if label == 2 and i != wrong]
    expected = expected_scores(X[rows], half_lit())
    np.testing.assert_allclose(detector.clean_scores_, expected, atol=1e-6)
    assert detector.threshold_ == pytest.approx(expected.max(), abs=1e-6)
    assert not detector.is_trigger(X).any()  # nothing is clean and moves less


def test_an_image_is_scored_alike_in_any_company(images):
    X, y = images
    detector = B3DDetector(Service(), half_lit(), target_class=2).fit(X, y)
    scores = detector.trigger_score(X)
    assert len(np.unique(scores)) == len(X)
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_allclose(detector.trigger_score(X[order]), scores[order])
    alone = [detector.trigger_score(X[i : i + 1])[0] for i in range(len(X))]
    np.testing.assert_allclose(alone, scores)


def test_bytes_are_embedded_as_bytes_and_sent_as_fractions(images):
    X, y = images
    X = np.rint(255 * X).astype(np.uint8)
    detector = B3DDetector(Service(), half_lit(), target_class=2).fit(X, y)
    stamped = X.copy()
    stamped[:, 0, 3, 3] = np.rint(0.67 * X[:, 0, 3, 3] + 0.33 * 255)
    moves = [
        np.linalg.norm(np.subtract(probabilities(a / 255), probabilities(b / 255)))
        for a, b in zip(X, stamped, strict=True)
    ]
    np.testing.assert_allclose(detector.trigger_score(X), np.negative(moves), atol=1e-5)


def test_labels_may_be_names_in_any_order(images):
    X, y = images
    numbered = B3DDetector(Service(), half_lit(), target_class=2).fit(X, y)
    named = B3DDetector(Service(NAMES), half_lit(), target_class="eel").fit(X, NAMES[y])
    np.testing.assert_array_equal(named.clean_scores_, numbered.clean_scores_)
    assert named.target_class_ == "eel"


def test_a_fitted_classifier_is_used_as_it_is_and_shared_by_clone(images):
    X, y = images
    flatten = FunctionTransformer(lambda X: X.reshape(len(X), -1))
    victim = make_pipeline(flatten, LogisticRegression(C=100)).fit(X, y)
    coefficients = victim[-1].coef_.copy()
    detector = clone(B3DDetector(victim, half_lit(), target_class=2)).fit(X, y)
    assert detector.victim is victim
    np.testing.assert_array_equal(victim[-1].coef_, coefficients)
    before, after = victim.predict_proba(X), victim.predict_proba(half_lit().embed(X))
    expected = -(((before - after) ** 2).sum(axis=1) ** 0.5)
    np.testing.assert_allclose(detector.trigger_score(X), expected, atol=1e-7)


def test_a_black_box_reverse_engineer_gives_trigger_and_target(linear, images):
    engineer = B3DReverseEngineer(VictimNetwork(linear), max_queries=30_000)
    detector = B3DDetector(VictimNetwork(linear), engineer, target_class=2).fit(*images)
    assert detector.trigger_ == detector.engineer_.triggers_[2]
    assert not hasattr(engineer, "triggers_")  # a clone was fitted


def test_a_score_sends_two_images(images):
    X, y = images
    victim = Service()
    detector = B3DDetector(victim, corner_trigger(), target_class=2).fit(X, y)
    before = victim.n_images
    detector.trigger_score(X)
    assert victim.n_images - before == detector.n_passes_per_image_ * len(X)


@pytest.mark.parametrize(
    "victim, error, message",
    [
        (Service(answer=[np.nan] * 6), ValueError, "NaN or infinity for 1 of 1"),
        (Service(answer=[1 / 3] * 3), ValueError, r"returned shape \(1, 3\)"),
        (object(), TypeError, "no predict_proba, expected a fitted classifier"),
    ],
)
def test_victims_that_cannot_answer_are_refused(images, victim, error, message):
    with pytest.raises(error, match=message):
        B3DDetector(victim, corner_trigger(), target_class=2).fit(*images)


def test_without_images_of_the_target_class_there_is_no_threshold(images):
    X, y = images
    detector = B3DDetector(Service(), corner_trigger(), target_class=2)
    with pytest.raises(ValueError, match="no clean image of target class 2"):
        detector.fit(X[y != 2], y[y != 2])
