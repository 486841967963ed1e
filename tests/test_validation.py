import numpy as np
import pytest

from sklearn_backdoor._validation import (
    check_images,
    check_labels,
    check_number,
    check_target_class,
)

GOOD = np.full((3, 1, 4, 4), 0.5, dtype=np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
def test_good_images_pass_without_a_copy(dtype):
    X = GOOD.astype(dtype)
    assert np.shares_memory(check_images(X, ndim=4), X)


def test_memory_maps_read_only_and_strided_arrays_pass(tmp_path):
    X = np.memmap(tmp_path / "X", np.uint8, "w+", shape=(5, 1, 4, 4))
    X.flags.writeable = False
    assert check_images(X).shape == X.shape
    assert check_images(GOOD[::2]).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_in_every_chunk(bad):
    X = np.zeros((5000, 1, 2, 2), dtype=np.float32)
    X[4999, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        check_images(X)


@pytest.mark.parametrize("value, shown", [(1.5, "1.5"), (-0.25, "-0.25"), (255, "255")])
def test_floats_outside_0_to_1_are_refused_with_the_remedy(value, shown):
    X = GOOD.copy()
    X[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"{shown}.*Divide 0...255 images by 255"):
        check_images(X)


def test_integers_other_than_uint8_are_refused():
    with pytest.raises(TypeError, match="dtype int64, expected uint8"):
        check_images(GOOD.astype(np.int64))


def test_channels_last_is_named():
    with pytest.raises(ValueError, match="channels last.*transpose"):
        check_images(np.zeros((2, 32, 32, 3), dtype=np.uint8), ndim=4)
    with pytest.raises(ValueError, match="fitted on images of shape.*channels-last"):
        check_images(
            np.zeros((2, 32, 32, 3), dtype=np.uint8), image_shape=(3, 32, 32), ndim=4
        )


def test_wrong_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"expected \(n_samples, n_channels"):
        check_images(np.zeros((4, 4)), ndim=4)
    with pytest.raises(ValueError, match="image.None. makes a batch of one"):
        check_images(GOOD[0], ndim=4)


def test_no_image_is_refused_unless_allowed():
    with pytest.raises(ValueError, match="no image"):
        check_images(GOOD[:0])
    assert len(check_images(GOOD[:0], allow_empty=True)) == 0


def test_labels_are_checked_against_classes():
    classes = np.arange(3)
    with pytest.raises(ValueError, match=r"labels \[7\].*\[0, 1, 2\]"):
        check_labels([0, 7], classes, 2)
    with pytest.raises(ValueError, match="one label an image"):
        check_labels([0], classes, 2)
    with pytest.raises(ValueError, match="too few of 2: 0"):
        check_labels([0, 1], classes, 2, all_present=True)


def test_target_class_and_numbers_are_checked():
    with pytest.raises(ValueError, match=r"target_class=7 is not among.*\[0, 1\]"):
        check_target_class(7, [0, 1])
    with pytest.raises(TypeError, match="alpha='x' has type str"):
        check_number("x", "alpha", 0, 1)
    with pytest.raises(TypeError, match="expected an integer"):
        check_number(1.5, "n", 0, integer=True)
    with pytest.raises(ValueError, match="alpha=2, expected a value from 0 to 1"):
        check_number(2, "alpha", 0, 1)
    with pytest.raises(ValueError, match="alpha=nan"):
        check_number(float("nan"), "alpha", 0, 1)
