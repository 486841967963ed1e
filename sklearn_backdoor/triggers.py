"""Trigger values, the paper's g(x, Δ), and their makers.

A trigger is immutable, compares by value, hashes, pickles and has one job: ``embed``.
"""

import operator

import numpy as np

from sklearn_backdoor._trigger import MOST, Trigger, frozen
from sklearn_backdoor._validation import check_image_shape, check_number


class PatchTrigger(Trigger):
    """Replace pixels by a pattern: g(x) = (1 - mask) * x + mask * pattern.

    Parameters
    ----------
    mask : array-like in 0...1
        Opacity, of a shape that broadcasts to an image: ``(height, width)`` or
        ``(1, height, width)`` for all channels, or a number.
    pattern : array-like in 0...1
        Pixels, of a shape that broadcasts to an image: ``(n_channels, height,
        width)``, or a number.

    Notes
    -----
    Used for the single pixel, the white box, blended images and Trojan triggers, and
    by Neural Cleanse for its estimates.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_backdoor.triggers import PatchTrigger
    >>> trigger = PatchTrigger(mask=[[0, 0], [0, 1]], pattern=1.0)
    >>> trigger
    PatchTrigger(image_shape=(2, 2), mask_norm=1, pixels=1)
    >>> trigger.embed(np.zeros((1, 1, 2, 2)))
    array([[[[0., 0.],
             [0., 1.]]]])
    """

    mask: np.ndarray
    pattern: np.ndarray
    _fields = ("mask", "pattern")

    def __init__(self, mask, pattern):
        super().__init__(
            mask=frozen(mask, "mask", 0, 1), pattern=frozen(pattern, "pattern", 0, 1)
        )
        try:
            np.broadcast_shapes(self.mask.shape, self.pattern.shape)
        except ValueError:
            raise ValueError(
                f"mask has shape {self.mask.shape} and pattern {self.pattern.shape}, "
                "which do not broadcast to one image. Give (height, width) and "
                "(n_channels, height, width)."
            ) from None

    @property
    def mask_norm(self):
        """L1 norm of the mask: pixels covered, weighted by opacity."""
        return float(self.mask.sum(dtype=np.float64))

    def scaled(self, factor):
        """Return the trigger with its mask's opacity times ``factor``, at most 1."""
        check_number(factor, "factor", 0, MOST)
        return PatchTrigger(np.minimum(self.mask * factor, 1), self.pattern)

    def _apply(self, X):
        stamped = (1 - self.mask) * X + self.mask * self.pattern
        # rounding may leave 0...1 by one bit
        return stamped if X.ndim == 2 else np.clip(stamped, 0, 1, out=stamped)

    def _picture(self):
        grey = np.full(self.image_shape, 0.5, dtype=np.float32)
        return self._apply(grey)

    def __repr__(self):
        pixels = int(np.count_nonzero(self.mask > 0.5))
        return (
            f"PatchTrigger(image_shape={self.image_shape}, "
            f"mask_norm={self.mask_norm:.4g}, pixels={pixels})"
        )


class AdditiveTrigger(Trigger):
    """Add a perturbation and clip: g(x) = clip(x + perturbation, 0, 1).

    Parameters
    ----------
    perturbation : array-like in -1...1
        Of a shape that broadcasts to an image, or a number.

    Notes
    -----
    Rows of features (2-D input) have no pixel range and are not clipped.

    Examples
    --------
    >>> from sklearn_backdoor.triggers import AdditiveTrigger
    >>> AdditiveTrigger([[0.0, 0.25]])
    AdditiveTrigger(image_shape=(1, 2), l2_norm=0.25, max=0.25)
    """

    perturbation: np.ndarray
    _fields = ("perturbation",)

    def __init__(self, perturbation):
        super().__init__(perturbation=frozen(perturbation, "perturbation", -1, 1))

    @property
    def l2_norm(self):
        """L2 norm of the perturbation, pixels in 0...1."""
        return float(np.sqrt(np.sum(self.perturbation.astype(np.float64) ** 2)))

    def scaled(self, factor):
        """Return the perturbation times ``factor``, clipped to -1...1."""
        check_number(factor, "factor", 0, MOST)
        return AdditiveTrigger(np.clip(self.perturbation * factor, -1, 1))

    def _apply(self, X):
        moved = X + self.perturbation
        return moved if X.ndim == 2 else np.clip(moved, 0, 1, out=moved)

    def _picture(self):
        peak = max(float(np.abs(self.perturbation).max()), 1e-12)
        return 0.5 + 0.5 * self.perturbation / peak

    def __repr__(self):
        return (
            f"AdditiveTrigger(image_shape={self.image_shape}, "
            f"l2_norm={self.l2_norm:.4g}, max={np.abs(self.perturbation).max():.4g})"
        )


def chessboard(image_shape, amplitude=3 / 255):
    """CB: add ``amplitude`` where row + column is even, in all channels (§5.1).

    Parameters
    ----------
    image_shape : tuple (n_channels, height, width)
    amplitude : float in -1...1, default=3/255
        The paper's value for colour images. LeNet-5 does not learn it on grey images;
        0.15 is learnt.

    Returns
    -------
    AdditiveTrigger
    """
    image_shape = check_image_shape(image_shape)
    amplitude = check_number(amplitude, "amplitude", -1, 1)
    rows, columns = np.indices(image_shape[-2:])
    board = np.where((rows + columns) % 2 == 0, amplitude, 0)
    return AdditiveTrigger(np.broadcast_to(board, image_shape))


def single_pixel(image_shape, position=(-2, -2), value=1.0):
    """SP: set one pixel in all channels (§5.1).

    Parameters
    ----------
    image_shape : tuple (n_channels, height, width)
    position : tuple (row, column), default=(-2, -2)
        Negative values count from the end.
    value : float in 0...1, default=1.0
        255 on the 0...255 scale.

    Returns
    -------
    PatchTrigger
    """
    image_shape = check_image_shape(image_shape)
    value = check_number(value, "value", 0, 1)
    mask = np.zeros(image_shape[-2:])
    try:
        row, column = position
        mask[operator.index(row), operator.index(column)] = 1
    except (IndexError, TypeError, ValueError):
        raise ValueError(
            f"position={position} lies outside an image of {image_shape[-2:]} pixels, "
            "or is no pair (row, column)."
        ) from None
    return PatchTrigger(mask, np.full(image_shape, value))


def white_box(image_shape, size=3, margin=0):
    """WB: a white square in the bottom right corner (§5.1).

    Parameters
    ----------
    image_shape : tuple (n_channels, height, width)
    size : int, default=3
        Side in pixels.
    margin : int, default=0
        Pixels between the square and the image's edges.

    Returns
    -------
    PatchTrigger
    """
    image_shape = check_image_shape(image_shape)
    mask = square_mask(image_shape, size, margin)
    return PatchTrigger(mask, np.ones(image_shape))


def blended(image, alpha=0.2):
    """Blend one image into all: g(x) = (1 - alpha) * x + alpha * image.

    Parameters
    ----------
    image : array-like of shape (n_channels, height, width), float in 0...1
    alpha : float in 0...1, default=0.2

    Returns
    -------
    PatchTrigger

    References
    ----------
    Chen, Liu, Li, Lu, Song: Targeted backdoor attacks on deep learning systems using
    data poisoning. 2017.
    """
    alpha = check_number(alpha, "alpha", 0, 1)
    image = frozen(image, "image", 0, 1)
    return PatchTrigger(np.full(image.shape[-2:], alpha), image)


def square_mask(image_shape, size, margin=0):
    """Return a mask of ones on a square in the bottom right corner.

    Parameters
    ----------
    image_shape : tuple (n_channels, height, width)
    size, margin : int
        Side, and distance from the edges, in pixels.

    Returns
    -------
    ndarray of shape (height, width), 0 or 1
    """
    height, width = check_image_shape(image_shape)[-2:]
    check_number(margin, "margin", 0, min(height, width) - 1, integer=True)
    check_number(size, "size", 1, min(height, width) - margin, integer=True)
    mask = np.zeros((height, width))
    bottom, right = height - margin, width - margin
    mask[bottom - size : bottom, right - size : right] = 1
    return mask
