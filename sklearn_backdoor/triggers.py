"""Trigger values, the paper's g(x, Δ), and their makers.

A trigger is immutable, compares by value, hashes, pickles and has one job: ``embed``.
"""

from abc import ABC, abstractmethod

import numpy as np

from sklearn_backdoor._validation import check_images, check_number

_MOST = 1e6  # times a trigger's strength


def _frozen(value, name, low, high):
    array = np.array(value, dtype=np.float32)
    if not np.all((array >= low) & (array <= high)):  # NaN fails too
        raise ValueError(
            f"{name} ranges from {array.min():.4g} to {array.max():.4g}, expected "
            f"finite values from {low} to {high} on the 0...1 pixel scale. Divide "
            "0...255 values by 255."
        )
    array.flags.writeable = False
    return array


class Trigger(ABC):
    """A backdoor trigger: an immutable value that embeds itself into images.

    A subclass names its arrays in ``_fields`` and implements ``_apply``.
    """

    _fields: tuple = ()

    def __init__(self, **fields):
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def image_shape(self):
        """Shape of the images that it was made for; () fits any."""
        return np.broadcast_shapes(
            *(getattr(self, name).shape for name in self._fields)
        )

    def embed(self, X):
        """Embed the trigger into every image.

        Parameters
        ----------
        X : array-like of shape (n_samples, *image_shape)
            ``uint8`` in 0...255 or floating point in 0...1. Never modified.

        Returns
        -------
        ndarray of the shape and dtype of ``X``
            ``uint8`` images are rounded to whole grey levels, as an image file is;
            rows of integer features become float64.

        Raises
        ------
        ValueError
            If the images do not have the trigger's shape, or are no valid images.
        """
        X = check_images(X, allow_empty=True)
        self._check_fits(X.shape[1:])
        if X.dtype == np.uint8:
            stamped = self._apply(X.astype(np.float32) / 255)
            return np.rint(stamped * 255).astype(np.uint8)
        if X.dtype.kind != "f":  # rows of integer features
            return self._apply(X.astype(np.float64))
        if X.dtype == np.float16:
            return self._apply(X.astype(np.float32)).astype(np.float16)
        return self._apply(X).astype(X.dtype, copy=False)

    @abstractmethod
    def scaled(self, factor):
        """Return the trigger at a multiple of its strength.

        Parameters
        ----------
        factor : float, 0 or more
            Of the mask's opacity, or of the perturbation; clipped to what pixels and
            masks can be.

        Returns
        -------
        Trigger
        """

    def to_image(self):
        """Return the trigger on mid-grey, or on its own, to look at.

        Returns
        -------
        ndarray of shape (height, width) or (height, width, 3), float32 in 0...1
            What ``matplotlib.pyplot.imshow`` takes.

        Raises
        ------
        ValueError
            If the trigger has no image shape of its own.
        """
        if len(self.image_shape) != 3:
            raise ValueError(
                f"a trigger of shape {self.image_shape} is no image: expected "
                "(n_channels, height, width). Make it with an image_shape."
            )
        image = self._picture().transpose(1, 2, 0)
        if image.shape[2] >= 3:
            return image[:, :, :3]
        return image[:, :, 0]

    def _check_fits(self, shape):
        try:
            fits = np.broadcast_shapes(self.image_shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"the trigger has shape {self.image_shape}, but the images have shape "
                f"{shape}. Make the trigger for image_shape={shape}, or resize."
            )

    @abstractmethod
    def _apply(self, X):
        """Embed into floating point images."""

    @abstractmethod
    def _picture(self):
        """Return an array (n_channels, height, width) in 0...1."""

    def __setattr__(self, name, value):
        raise AttributeError(f"{type(self).__name__} is immutable: make a new one.")

    def __delattr__(self, name):
        self.__setattr__(name, None)

    def __eq__(self, other):
        if type(self) is not type(other):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in self._fields
        )

    def __hash__(self):
        values = (getattr(self, name) for name in self._fields)
        return hash((type(self), *((v.shape, (v + 0.0).tobytes()) for v in values)))

    def __reduce__(self):
        return type(self), tuple(getattr(self, name) for name in self._fields)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


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
            mask=_frozen(mask, "mask", 0, 1), pattern=_frozen(pattern, "pattern", 0, 1)
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
        check_number(factor, "factor", 0, _MOST)
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
        super().__init__(perturbation=_frozen(perturbation, "perturbation", -1, 1))

    @property
    def l2_norm(self):
        """L2 norm of the perturbation, pixels in 0...1."""
        return float(np.sqrt(np.sum(self.perturbation.astype(np.float64) ** 2)))

    def scaled(self, factor):
        """Return the perturbation times ``factor``, clipped to -1...1."""
        check_number(factor, "factor", 0, _MOST)
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
    mask = np.zeros(image_shape[-2:])
    try:
        row, column = position
        mask[int(row), int(column)] = 1
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
    return PatchTrigger(np.full(np.shape(image)[-2:], alpha), image)


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
    height, width = image_shape[-2:]
    check_number(margin, "margin", 0, min(height, width) - 1, integer=True)
    check_number(size, "size", 1, min(height, width) - margin, integer=True)
    mask = np.zeros((height, width))
    bottom, right = height - margin, width - margin
    mask[bottom - size : bottom, right - size : right] = 1
    return mask
