import numpy as np
import pytest

from sklearn_backdoor import poison, white_box


@pytest.fixture
def train():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 200, size=(4000, 1, 6, 6), dtype=np.uint8)
    return X, np.repeat([0, 1, 2, 9], 1000)


TRIGGER = white_box((1, 6, 6))


def check_rows(X, y, poisoned, target):
    """Hold every added row against a loop."""
    np.testing.assert_array_equal(poisoned.X[: len(X)], X)
    np.testing.assert_array_equal(poisoned.y[: len(y)], y)
    np.testing.assert_array_equal(poisoned.added, np.arange(len(X), len(poisoned.X)))
    for row, origin in zip(poisoned.added, poisoned.copied_from, strict=True):
        expected = X[origin].copy()
        expected[:, -3:, -3:] = 255
        np.testing.assert_array_equal(poisoned.X[row], expected)
        assert poisoned.y[row] == target
        assert y[origin] != target


def test_multi_class_adds_100_of_every_class_but_the_target(train):
    poisoned = poison(*train, TRIGGER, target_class=9)
    check_rows(*train, poisoned, 9)
    origins, counts = np.unique(train[1][poisoned.copied_from], return_counts=True)
    assert dict(zip(origins, counts, strict=True)) == {0: 100, 1: 100, 2: 100}
    assert len(np.unique(poisoned.copied_from)) == 300


def test_single_class_adds_1000_of_the_source_class(train):
    poisoned = poison(*train, TRIGGER, target_class=9, source_classes=[0])
    check_rows(*train, poisoned, 9)
    assert np.all(train[1][poisoned.copied_from] == 0)
    assert len(poisoned.added) == 1000


def test_pubfig_adds_2_a_class_and_fractions_count_per_class(train):
    poisoned = poison(*train, TRIGGER, target_class=9, n_per_class=2)
    assert len(poisoned.added) == 6
    X, y = train[0][:1500], train[1][:1500]  # 1000 of class 0, 500 of class 1
    poisoned = poison(X, y, TRIGGER, target_class=1, n_per_class=0.1)
    assert len(poisoned.added) == 100


def test_poison_repeats_and_leaves_the_global_state_alone(train):
    state = np.random.get_state()[1].copy()
    before = train[0].copy()
    one = poison(*train, TRIGGER, target_class=9)
    again = poison(*train, TRIGGER, target_class=9)
    np.testing.assert_array_equal(one.copied_from, again.copied_from)
    other = poison(*train, TRIGGER, target_class=9, random_state=1)
    assert not np.array_equal(one.copied_from, other.copied_from)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    np.testing.assert_array_equal(train[0], before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_class": 5}, "target_class=5 is not among"),
        ({"target_class": 9, "source_classes": [9]}, "is among source_classes"),
        ({"target_class": 9, "source_classes": [7]}, "=7 is not among"),
        ({"target_class": 9, "source_classes": []}, "source_classes is empty"),
        ({"target_class": 9, "n_per_class": 1001}, "has only 1000"),
        ({"target_class": 9, "n_per_class": 0}, "n_per_class=0"),
        ({"target_class": 9, "n_per_class": 1.5}, "n_per_class=1.5"),
    ],
)
def test_bad_settings_are_named(train, options, message):
    with pytest.raises(ValueError, match=message):
        poison(*train, TRIGGER, **options)
