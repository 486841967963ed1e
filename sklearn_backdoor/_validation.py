"""Checks of images, labels and target classes.

Every message names the value, what was expected and what to do about it.
"""

import numbers

import numpy as np
from sklearn.utils import check_array

_CHUNK = 4096  # images looked at together, so that a memory map is never read whole


def as_array(value, name):
    """Return a plain array.

    Raises
    ------
    TypeError
        If there is none in it: a ragged list, a tensor with gradients, a sparse matrix.
    ValueError
        If values are masked, which a plain array would not show.
    """
    if np.ma.is_masked(value):
        raise ValueError(
            f"{name} is an array with masked values, which would be taken as they lie "
            "under the mask. Drop these rows, or fill them: np.ma.filled."
        )
    if hasattr(value, "toarray"):
        raise TypeError(
            f"{name} is sparse ({type(value).__name__}), expected a dense array. "
            "Convert it: X.toarray()."
        )
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise TypeError(
            f"{name} has type {type(value).__name__} and makes no array ({error}). "
            "Give a NumPy array, or a nested list whose rows are all of one length."
        ) from error


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
    if ndim is not None or not hasattr(X, "toarray"):
        X = as_array(X, name)
    if ndim is None and not hasattr(X, "toarray") and X.ndim < 2:
        raise ValueError(
            f"{name} has shape {X.shape}, expected (n_samples, n_channels, height, "
            "width). Reshape your data: image[None] makes a batch of one image."
        )
    if ndim is None and (hasattr(X, "toarray") or X.ndim < 3):
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


def check_image_shape(image_shape):
    """Return the shape as a tuple, or say what one is.

    Raises
    ------
    ValueError
        If it is not (n_channels, height, width), or (height, width).
    """
    shape = tuple(image_shape) if np.iterable(image_shape) else ()
    whole = all(isinstance(n, int | np.integer) and n > 0 for n in shape)
    if len(shape) not in (2, 3) or not whole:
        raise ValueError(
            f"image_shape={image_shape!r}, expected (n_channels, height, width) in "
            "whole numbers above 0."
        )
    return shape


def kind_of_labels(y):
    """Return "numbers", "text" or "bytes", what an array of labels consists of.

    Parameters
    ----------
    y : ndarray
        Of numbers, strings or objects that are all one or the other.

    Returns
    -------
    str or None
        None where they are something else, mixed, or not finite.
    """
    if y.dtype.kind in "biuf":
        return "numbers" if np.isfinite(y).all() else None
    if y.dtype.kind in "US":
        return {"U": "text", "S": "bytes"}[y.dtype.kind]
    for name, kind in (("text", str), ("bytes", bytes), ("numbers", numbers.Real)):
        if y.dtype.kind == "O" and all(isinstance(label, kind) for label in y.flat):
            return (
                name
                if name != "numbers" or np.isfinite(y.astype(float)).all()
                else None
            )
    return None


def check_kind(y, name="y"):
    """Return labels as an array, or say by name why they are none.

    Raises
    ------
    TypeError
        If they are neither all finite numbers nor all strings.
    """
    y = as_array(y, name)
    if kind_of_labels(y) is None:
        raise TypeError(
            f"{name} holds labels of dtype {y.dtype} that are neither all finite "
            "numbers nor all strings: None, NaN, dates and mixtures are no labels. "
            "Drop or repair those."
        )
    return y


def check_labels(y, classes, n_samples, *, all_present=False, min_per_class=1):
    """Validate the labels of the defence's images against the victim's classes.

    Parameters
    ----------
    y : array-like of shape (n_samples,)
        Clean labels.
    classes : ndarray of shape (n_classes,) or None
        The victim's labels, in logit order; None takes those in ``y``.
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
    TypeError
        If they are no labels, or text where the classes are numbers.
    ValueError
        If lengths differ, a label is not among ``classes`` or a class has too few.
    """
    y = as_array(y, "y")
    if y.shape != (n_samples,):
        raise ValueError(
            f"y has shape {y.shape}, expected ({n_samples},): one label an image."
        )
    y = check_kind(y)
    classes = np.unique(y) if classes is None else classes
    kinds = [kind_of_labels(labels) for labels in (y, np.asarray(classes))]
    if kinds[0] != kinds[1] and len(y):
        raise TypeError(
            f"y holds {kinds[0]} and the classes are {kinds[1]}: "
            f"{np.asarray(classes).tolist()}. Convert y, or give "
            "VictimNetwork(classes=...) the labels in logit order."
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


def check_target_class(target_class, classes, name="target_class"):
    """Return ``target_class`` if it is one of ``classes``, else say what is.

    Raises
    ------
    ValueError
        If it is not.
    """
    among = np.ndim(target_class) == 0 and target_class in np.asarray(classes).tolist()
    if not among:
        raise ValueError(
            f"{name}={target_class} is not among the classes "
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
