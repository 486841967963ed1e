"""Shared checks: scikit-learn's where they hold, image versions of the main ones."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor import VictimNetwork
from tests.common import feature_estimators, image_estimators, linear_images

METHODS = (
    "predict",
    "predict_proba",
    "decision_function",
    "transform",
    "predict_and_transform",
    "trigger_score",
    "is_trigger",
)


@pytest.mark.parametrize(
    "estimator, expected",
    feature_estimators(),
    ids=lambda value: type(value).__name__,
)
def test_scikit_learns_checks_on_rows_of_features(estimator, expected, capsys):
    results = check_estimator(
        estimator, expected_failed_checks=expected, on_skip=None, on_fail="raise"
    )
    statuses = Counter(result["status"] for result in results)
    with capsys.disabled():
        print(f"\n{type(estimator).__name__}: scikit-learn checks {dict(statuses)}")
    assert statuses["passed"] >= 40
    failed = {r["check_name"] for r in results if r["status"] == "xfail"}
    assert failed == set(expected)


@pytest.fixture(params=image_estimators(), ids=lambda value: type(value).__name__)
def estimator(request):
    return clone(request.param)


def answers(estimator, X):
    """Collect what every method returns, as arrays."""
    found = {}
    for name in METHODS:
        method = getattr(estimator, name, None)
        if method is not None:
            value = method(X)
            parts = value if isinstance(value, tuple) else (value,)
            found.update({f"{name} {i}": np.asarray(p) for i, p in enumerate(parts)})
    assert found
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_fit_is_idempotent(estimator):
    X, y = linear_images()
    assert_equal(answers(estimator.fit(X, y), X), answers(estimator.fit(X, y), X))


def test_fit_returns_self_and_does_not_change_parameters(estimator):
    X, y = linear_images()
    before = estimator.get_params(deep=False)
    assert estimator.fit(X, y) is estimator
    after = estimator.get_params(deep=False)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_clones_answer_alike_and_are_unfitted(estimator):
    X, y = linear_images()
    expected = answers(estimator.fit(X, y), X)
    twin = clone(estimator)
    with pytest.raises(NotFittedError):
        check_is_fitted(twin)
    assert_equal(answers(twin.fit(X, y), X), expected)


def test_pickles_answer_alike(estimator):
    X, y = linear_images()
    expected = answers(estimator.fit(X, y), X)
    assert_equal(answers(pickle.loads(pickle.dumps(estimator)), X), expected)


def test_rows_do_not_influence_each_other(estimator):
    X, y = linear_images()
    estimator.fit(X, y)
    whole = answers(estimator, X)
    order = np.random.default_rng(0).permutation(len(X))
    shuffled = answers(estimator, X[order])
    single = [answers(estimator, X[i : i + 1]) for i in range(0, len(X), 6)]
    for name, value in whole.items():
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(shuffled[name], value[order], **tolerance)
        rows = np.concatenate([part[name] for part in single])
        np.testing.assert_allclose(rows, value[::6], **tolerance)


def test_unfitted_estimators_say_so(estimator):
    X, _ = linear_images()
    for name in METHODS:
        if hasattr(estimator, name):
            with pytest.raises(NotFittedError):
                getattr(estimator, name)(X)


def test_input_is_left_alone(estimator):
    X, y = linear_images()
    kept = X.copy(), y.copy()
    X.flags.writeable = y.flags.writeable = False
    answers(estimator.fit(X, y), X)
    np.testing.assert_array_equal(X, kept[0])
    np.testing.assert_array_equal(y, kept[1])


def test_global_random_states_are_left_alone(estimator):
    X, y = linear_images()
    states = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    first = answers(estimator.fit(X, y), X)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.random.get_rng_state(), states[1])
    np.random.rand(3), torch.rand(3)  # noqa: NPY002
    assert_equal(answers(estimator.fit(X, y), X), first)


def test_lists_and_other_labels_work(estimator):
    X, y = linear_images()
    estimator.fit(X.astype(float).tolist(), y.tolist())
    assert len(answers(estimator, X[:2])) > 0


def test_other_shapes_and_bad_pixels_are_refused(estimator):
    X, y = linear_images()
    estimator.fit(X, y)
    names = ("predict", "transform", "trigger_score")
    method = next(getattr(estimator, n) for n in names if hasattr(estimator, n))
    for bad, message in (
        (np.zeros((2, 1, 4, 5)), "fitted on images of shape"),
        (np.zeros((2, 2, 4, 4)), "fitted on images of shape"),
        (np.zeros((2, 16)), "shape|features|dim"),
        (np.full((1, 1, 4, 4), np.nan), "NaN"),
        (np.full((1, 1, 4, 4), 3.0), "expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            method(bad)
    with pytest.raises(TypeError, match="dtype"):
        method(np.zeros((1, 1, 4, 4), dtype=np.int32))


def test_parameters_are_keyword_only_but_the_first_ones(estimator):
    first = {
        "BackdoorGuard": 3,
        "NCActivationDetector": 2,
        "B3DDetector": 2,
        "NCPatcher": 2,
    }.get(type(estimator).__name__, 1)
    with pytest.raises(TypeError):
        type(estimator)(*[None] * (first + 1))


def test_reprs_are_short_enough_to_read(estimator):
    if not isinstance(estimator, VictimNetwork):
        assert type(estimator).__name__ in repr(estimator)
    assert len(repr(estimator)) < 2000
