"""Checks of images, labels and target classes.

Every message names the value, what was expected and what to do about it.
"""

import numbers

import numpy as np
from sklearn.utils import check_array

_CHUNK = 4096  # images looked at together, so that a memory map is never read whole


def check_images(
    X, *, image_shape=None, ndim=None, allow_empty=False, pixels=True, name="X"
):
    """Validate images without copying them.

    Parameters
    ----------
    X : array-like of shape (n_samples, *image_shape)
        ``uint8`` in 0...255 or floating point in 0...1. Two-dimensional input is
        taken as rows of features, which have no pixel range.
    image_shape : tuple of int, default=None
        The shape that an earlier ``fit`` saw.
    ndim : int, default=None
        Required number of dimensions (4 for a network).
    allow_empty : bool, default=False
        Whether zero images pass.
    pixels : bool, default=True
        Whether to look at every pixel; False leaves `check_pixels` to a caller that
        goes through the images in parts.
    name : str, default="X"
        What the messages call the array.

    Returns
    -------
    X : ndarray
        The same memory as a plain array.

    Raises
    ------
    TypeError
        If the dtype is neither ``uint8`` nor floating point.
    ValueError
        If the shape, the range or the number of images is wrong.
    """
    if not hasattr(X, "toarray"):
        X = np.asarray(X)
    if ndim is None and getattr(X, "ndim", 0) < 3 or hasattr(X, "toarray"):
        X = check_array(X, ensure_min_samples=int(not allow_empty), input_name=name)
        if image_shape is not None:
            _check_shape(X, image_shape, name)
        return X
    if ndim == 4 and X.ndim != 4:
        raise ValueError(
            f"{name} has shape {X.shape}, expected (n_samples, n_channels, height, "
            "width). Reshape your data: images[:, None] adds a channel axis to grey "
            "images, image[None] makes a batch of one image."
        )
    _check_shape(X, image_shape, name, images=ndim == 4)
    if len(X) == 0 and not allow_empty:
        raise ValueError(
            f"{name} has shape {X.shape} and holds no image: give at least one."
        )
    _check_dtype(X, name)
    if pixels:
        check_pixels(X, name)
    return X


def _check_shape(X, image_shape, name, images=False):
    shape = X.shape[1:]
    if 0 in shape:
        raise ValueError(f"{name} has shape {X.shape}: these images have no pixels.")
    channels_last = images and shape[-1] in (1, 3, 4) and shape[0] > 4
    remedy = " Transpose channels-last images with X.transpose(0, 3, 1, 2)."
    if image_shape is not None and shape != tuple(image_shape):
        raise ValueError(
            f"{name} holds images of shape {shape}, but the estimator was fitted on "
            f"images of shape {tuple(image_shape)}. Resize or convert them, or fit "
            "again." + (remedy if channels_last else "")
        )
    if channels_last:
        raise ValueError(
            f"{name} has shape {X.shape}, which looks like channels last; expected "
            f"(n_samples, n_channels, height, width).{remedy}"
        )


def _check_dtype(X, name):
    if X.dtype != np.uint8 and X.dtype.kind != "f":
        raise TypeError(
            f"{name} has dtype {X.dtype}, expected uint8 (0 to 255) or floating point "
            "(0 to 1). Convert it: X.astype('uint8') or X.astype('float32') / 255."
        )


def check_pixels(X, name="X"):
    """Refuse floating point images with pixels outside 0...1.

    Parameters
    ----------
    X : ndarray of shape (n_samples, *image_shape)
        ``uint8``, which cannot be wrong, or floating point.
    name : str, default="X"
        What the messages call the array.

    Raises
    ------
    ValueError
        If one is NaN, infinite, below 0 or above 1.
    """
    if X.dtype == np.uint8:
        return
    for start in range(0, len(X), _CHUNK):
        chunk = X[start : start + _CHUNK]
        low, high = chunk.min(), chunk.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(
                f"Input {name} contains NaN or infinity: expected finite pixels. "
                "Drop or repair those images (np.isfinite finds them)."
            )
        if low < 0 or high > 1:
            raise ValueError(
                f"{name} holds floating point pixels from {low:.4g} to {high:.4g}, "
                "expected 0 to 1. Divide 0...255 images by 255, or pass them as "
                "uint8; normalisation (mean, standard deviation) belongs inside the "
                "network."
            )


def check_labels(y, classes, n_samples, *, all_present=False, min_per_class=1):
    """Validate the labels of the defence's images against the victim's classes.

    Parameters
    ----------
    y : array-like of shape (n_samples,)
        Clean labels.
    classes : ndarray of shape (n_classes,)
        The victim's labels, in logit order.
    n_samples : int
        Number of images.
    all_present : bool, default=False
        Whether every class needs ``min_per_class`` images.
    min_per_class : int, default=1
        The fewest images a class that will do.

    Returns
    -------
    y : ndarray of shape (n_samples,)

    Raises
    ------
    ValueError
        If lengths differ, a label is not among ``classes`` or a class has too few.
    """
    y = np.asarray(y)
    if y.shape != (n_samples,):
        raise ValueError(
            f"y has shape {y.shape}, expected ({n_samples},): one label an image."
        )
    unknown = np.setdiff1d(y, classes)
    if len(unknown):
        raise ValueError(
            f"y holds labels {unknown.tolist()} that the victim does not know; its "
            f"classes are {classes.tolist()}. Relabel y, or give "
            "VictimNetwork(classes=...) the labels in logit order."
        )
    if all_present:
        counts = [int(np.sum(y == label)) for label in classes]
        short = [
            f"{label!r}: {count}"
            for label, count in zip(classes.tolist(), counts, strict=True)
            if count < min_per_class
        ]
        if short:
            raise ValueError(
                f"D_Defense needs at least {min_per_class} clean image(s) of every "
                f"class; too few of {', '.join(short)}. Add clean images of these "
                "classes."
            )
    return y


def check_target_class(target_class, classes):
    """Return ``target_class`` if it is one of ``classes``, else say what is.

    Raises
    ------
    ValueError
        If it is not.
    """
    if not np.any(np.asarray(classes) == target_class):
        raise ValueError(
            f"target_class={target_class} is not among the classes "
            f"{np.asarray(classes).tolist()}. Choose one of these."
        )
    return target_class


def check_number(value, name, low, high=np.inf, *, integer=False):
    """Return ``value`` if it is a number in ``[low, high]``.

    Raises
    ------
    TypeError
        If it is no number, or no integer where one is asked for.
    ValueError
        If it lies outside the range.
    """
    kind = numbers.Integral if integer else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(
            f"{name}={value!r} has type {type(value).__name__}, expected "
            f"{'an integer' if integer else 'a number'} from {low} to {high}."
        )
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}, expected a value from {low} to {high}.")
    return value
