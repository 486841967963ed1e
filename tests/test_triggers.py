import copy
import pickle

import numpy as np
import pytest
from sklearn.base import clone

from sklearn_backdoor import (
    AdditiveTrigger,
    PatchTrigger,
    TriggerEmbedder,
    blended,
    chessboard,
    single_pixel,
    white_box,
)
from sklearn_backdoor._validation import check_images

SHAPES = [(1, 8, 8), (3, 7, 9), (4, 5, 5)]


@pytest.fixture
def X():
    return np.random.default_rng(0).random((6, 3, 7, 9))


def naive_patch(X, mask, pattern):
    stamped = np.empty_like(X)
    for i, image in enumerate(X):
        for c, h, w in np.ndindex(image.shape):
            m = mask[h, w]
            stamped[i, c, h, w] = (1 - m) * image[c, h, w] + m * pattern[c, h, w]
    return stamped


def test_patch_equals_a_loop_over_pixels(X):
    rng = np.random.default_rng(1)
    mask = rng.random((7, 9)).astype(np.float32)
    pattern = rng.random((3, 7, 9)).astype(np.float32)
    stamped = PatchTrigger(mask, pattern).embed(X)
    np.testing.assert_allclose(stamped, naive_patch(X, mask, pattern), atol=1e-6)


def test_additive_clips_at_the_pixel_range(X):
    stamped = AdditiveTrigger(np.full((3, 7, 9), 0.75)).embed(X)
    np.testing.assert_allclose(stamped, np.minimum(X + 0.75, 1))
    stamped = AdditiveTrigger(np.full((3, 7, 9), -0.75)).embed(X)
    np.testing.assert_allclose(stamped, np.maximum(X - 0.75, 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_chessboard_is_on_where_row_plus_column_is_even(shape):
    perturbation = chessboard(shape, 3 / 255).perturbation
    for c, h, w in np.ndindex(shape):
        expected = 3 / 255 if (h + w) % 2 == 0 else 0
        assert perturbation[c, h, w] == np.float32(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_single_pixel_changes_one_pixel_in_all_channels(shape):
    stamped = single_pixel(shape, position=(1, 2)).embed(np.zeros((1, *shape)))
    assert stamped.sum() == shape[0]
    assert np.all(stamped[0, :, 1, 2] == 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_white_box_is_the_bottom_right_square(shape):
    stamped = white_box(shape).embed(np.zeros((1, *shape), dtype=np.uint8))
    assert np.all(stamped[0, :, -3:, -3:] == 255)
    assert (stamped == 255).sum() == 9 * shape[0]


def test_blended_follows_worked_numbers():
    trigger = blended(np.full((1, 1, 3), 0.5), alpha=0.2)
    stamped = trigger.embed(np.array([0.0, 1.0, 0.4]).reshape(1, 1, 1, 3))
    np.testing.assert_allclose(stamped.ravel(), [0.1, 0.9, 0.42], atol=1e-7)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "trigger", [white_box((3, 7, 9)), chessboard((3, 7, 9), 0.3)], ids=["patch", "add"]
)
def test_embed_keeps_dtype_and_leaves_the_input_alone(X, dtype, trigger):
    images = (X * (255 if dtype == np.uint8 else 1)).astype(dtype)
    before = images.copy()
    images.flags.writeable = False
    stamped = trigger.embed(images)
    assert stamped.dtype == dtype and stamped.shape == images.shape
    np.testing.assert_array_equal(images, before)
    assert not np.shares_memory(stamped, images)


def test_uint8_is_rounded_not_truncated():
    trigger = PatchTrigger(0.5, 1.0)  # 100/255 -> 177.5/255
    assert trigger.embed(np.full((1, 1, 1, 1), 100, np.uint8)).item() == 178
    trigger = PatchTrigger(0.3, 1.0)  # 100 -> 146.5
    expected = round(0.7 * 100 + 0.3 * 255 + 1e-4)
    assert trigger.embed(np.full((1, 1, 1, 1), 100, np.uint8)).item() == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rounding_never_leaves_the_pixel_range(dtype):
    rng = np.random.default_rng(0)
    X = np.ones((20, 1, 8, 8), dtype=dtype)
    for _ in range(20):
        stamped = PatchTrigger(rng.random((8, 8)), np.ones((1, 8, 8))).embed(X)
        assert stamped.max() <= 1
        check_images(stamped)


def test_scalars_fit_any_shape_and_rows_of_features(X):
    assert PatchTrigger(0.5, 1).embed(X).shape == X.shape
    rows = np.array([[-3.0, 5.0]])
    np.testing.assert_allclose(AdditiveTrigger(0.5).embed(rows), [[-2.5, 5.5]])
    assert PatchTrigger(0.5, 1).embed(X[:0]).shape == (0, 3, 7, 9)


def test_triggers_are_immutable_values():
    one, same, other = white_box((1, 8, 8)), white_box((1, 8, 8)), white_box((1, 8, 9))
    assert one == same and hash(one) == hash(same) and one != other
    assert one != chessboard((1, 8, 8))
    assert len({one, same, other}) == 2
    with pytest.raises(AttributeError, match="immutable"):
        one.mask = other.mask
    with pytest.raises(AttributeError, match="immutable"):
        del one.mask
    with pytest.raises(ValueError, match="read-only"):
        one.mask[0, 0] = 1


def test_a_trigger_does_not_share_memory_with_its_maker():
    mask = np.zeros((4, 4), dtype=np.float32)
    trigger = PatchTrigger(mask, np.ones((1, 4, 4)))
    mask[:] = 1
    assert trigger.mask_norm == 0


def test_triggers_survive_pickle_copy_and_clone():
    trigger = chessboard((3, 8, 8))
    again = pickle.loads(pickle.dumps(trigger))
    assert again == trigger and not again.perturbation.flags.writeable
    assert copy.deepcopy(trigger) is trigger
    assert clone(TriggerEmbedder(trigger, target_class=1)).trigger == trigger


def test_negative_zero_equals_zero_and_hashes_alike():
    one, other = AdditiveTrigger([[0.0, 0.5]]), AdditiveTrigger([[-0.0, 0.5]])
    assert one == other and hash(one) == hash(other)


def test_norms_follow_their_definitions():
    assert white_box((3, 8, 8)).mask_norm == 9  # one mask for all channels
    assert AdditiveTrigger([[0.3, -0.4]]).l2_norm == pytest.approx(0.5)


def test_repr_is_one_readable_line():
    assert repr(white_box((1, 28, 28))) == (
        "PatchTrigger(image_shape=(1, 28, 28), mask_norm=9, pixels=9)"
    )
    assert "l2_norm=0.5," in repr(AdditiveTrigger([[0.3, -0.4]]))


@pytest.mark.parametrize(
    "channels, shape", [(1, (8, 8)), (3, (8, 8, 3)), (4, (8, 8, 3))]
)
def test_to_image_can_be_shown(channels, shape):
    for trigger in (white_box((channels, 8, 8)), chessboard((channels, 8, 8))):
        image = trigger.to_image()
        assert image.shape == shape
        assert image.min() >= 0 and image.max() <= 1
    assert white_box((1, 8, 8)).to_image()[7, 7] == 1
    assert white_box((1, 8, 8)).to_image()[0, 0] == 0.5


def test_to_image_of_a_shapeless_trigger_says_what_to_do():
    with pytest.raises(ValueError, match="is no image"):
        PatchTrigger(0.5, 1).to_image()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PatchTrigger(2, 0), "mask ranges from 2 to 2"),
        (lambda: PatchTrigger(0, np.nan), "pattern ranges from nan"),
        (lambda: PatchTrigger(0, 255), "Divide"),
        (lambda: AdditiveTrigger(3), "perturbation ranges from 3"),
        (lambda: white_box((1, 8, 8), size=9), "size=9, expected a value from 1 to 8"),
        (lambda: white_box((1, 8, 8), margin=8), "margin=8"),
        (lambda: single_pixel((1, 8, 8), position=(8, 0)), "outside an image"),
        (lambda: single_pixel((1, 8, 8), position=5), "no pair"),
        (lambda: single_pixel((1, 8, 8), position=[[3, 3]]), "no pair"),
        (lambda: PatchTrigger(np.ones((3, 3)), np.ones((1, 4, 4))), "not broadcast"),
        (lambda: blended(np.ones((1, 8, 8)), alpha=1.2), "alpha=1.2"),
        (lambda: chessboard((1, 8, 8), 3), "amplitude=3"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_image_shape_is_refused(X):
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\).*\(3, 7, 9\)"):
        white_box((1, 8, 8)).embed(X)
    with pytest.raises(ValueError, match="0 to 1"):
        white_box((3, 7, 9)).embed(X * 255)


def test_scaled_triggers_are_as_a_loop_makes_them():
    rng = np.random.default_rng(0)
    mask, pattern = rng.random((3, 4)), rng.random((2, 3, 4))
    scaled = PatchTrigger(mask, pattern).scaled(1.5)
    for i in range(3):
        for j in range(4):
            assert scaled.mask[i, j] == pytest.approx(min(1.5 * mask[i, j], 1))
    np.testing.assert_array_equal(scaled.pattern, pattern.astype(np.float32))
    moved = AdditiveTrigger([[-0.9, 0.2]]).scaled(1.5)
    np.testing.assert_allclose(moved.perturbation, [[-1, 0.3]], rtol=1e-6)
    assert PatchTrigger(mask, pattern).scaled(1) == PatchTrigger(mask, pattern)
    for trigger in (PatchTrigger(mask, pattern), moved):
        with pytest.raises(ValueError, match="factor=-0.1"):
            trigger.scaled(-0.1)
