"""What every trigger is: a value that embeds itself into images."""

from abc import ABC, abstractmethod

import numpy as np

from sklearn_backdoor._notebook import picture_html, png_of
from sklearn_backdoor._validation import as_array, check_images

MOST = 1e6  # times a trigger's strength


def frozen(value, name, low, high):
    """Return a read-only float32 copy of numbers in ``[low, high]``.

    Raises
    ------
    TypeError, ValueError
        If they are none, or lie outside.
    """
    array = as_array(value, name)
    if array.dtype.kind not in "biuf" or array.size == 0:
        raise TypeError(
            f"{name} is an array of dtype {array.dtype} and shape {array.shape}, "
            f"expected numbers from {low} to {high}, one a pixel."
        )
    array = np.array(array, dtype=np.float32)
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

    def _repr_png_(self):
        return png_of(self)

    def _repr_html_(self):
        return picture_html(self, repr(self))

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
