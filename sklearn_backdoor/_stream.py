"""Going through images in parts, so that memory does not grow with their number."""

import numpy as np

_IMAGES = 2048  # together: enough that the cost of a call per part does not show
_VALUES = 2**22  # of their features: 32 MB in float64


def parts(n_samples, batch_size, n_features):
    """Yield slices of whole batches, so that batches are those of one long pass.

    Parameters
    ----------
    n_samples : int
        Where 0, one empty slice comes.
    batch_size : int
        Images a forward pass.
    n_features : int
        What an image becomes.

    Yields
    ------
    slice
    """
    n_images = min(_IMAGES, _VALUES // n_features)
    step = batch_size * max(1, n_images // batch_size)
    for start in range(0, max(n_samples, 1), step):
        yield slice(start, min(start + step, n_samples))


def gather(n_samples, answers):
    """Join what is said about each part.

    Parameters
    ----------
    n_samples : int
        Rows of all parts together.
    answers : iterable of (slice, tuple of ndarray)
        At least one; dtypes and shapes are those of the first.

    Returns
    -------
    list of ndarray of shape (n_samples, ...)
    """
    whole: list = []
    for rows, arrays in answers:
        if not whole:
            whole = [np.empty((n_samples, *a.shape[1:]), a.dtype) for a in arrays]
        for joined, array in zip(whole, arrays, strict=True):
            joined[rows] = array
    return whole
