"""Data poisoning: D_train -> poisoned D_train (§5.1)."""

from typing import NamedTuple

import numpy as np
from sklearn.utils import check_random_state

from sklearn_backdoor._validation import (
    check_images,
    check_kind,
    check_labels,
    check_number,
    check_target_class,
)
from sklearn_backdoor.triggers import Trigger


class PoisonedSet(NamedTuple):
    """A poisoned training set.

    Attributes
    ----------
    X : ndarray of shape (n_samples + n_added, *image_shape)
        The training images as they were, then the added ones.
    y : ndarray of shape (n_samples + n_added,)
        Labels; the added images carry the target class.
    added : ndarray of int, shape (n_added,)
        Rows of ``X`` that the attack added.
    copied_from : ndarray of int, shape (n_added,)
        The row of the training set behind each added image.
    """

    X: np.ndarray
    y: np.ndarray
    added: np.ndarray
    copied_from: np.ndarray


def poison(
    X,
    y,
    trigger,
    *,
    target_class,
    source_classes="all",
    n_per_class=None,
    random_state=0,
):
    """Add triggered copies of training images under the target class's label.

    Parameters
    ----------
    X : array-like of shape (n_samples, *image_shape)
        Training images.
    y : array-like of shape (n_samples,)
        Training labels.
    trigger : Trigger
        What is embedded.
    target_class : label
        The label that the added images get.
    source_classes : "all" or list of labels, default="all"
        Where images are copied from; never the target class.
    n_per_class : int, float or None, default=None
        Images copied from each source class: a number, or a fraction in (0, 1) of its
        training images. None is the paper's: 1000 from a single source class, 100
        from each of several. On PubFig the paper takes 2.
    random_state : int, RandomState instance or None, default=0
        Which images are copied.

    Returns
    -------
    PoisonedSet
        Named tuple (X, y, added, copied_from).

    Raises
    ------
    TypeError, ValueError
        If images, labels or trigger are none, a class is unknown, the target is among
        the sources or a source class has too few images.
    """
    X = check_images(X)
    y = check_labels(y, None, len(X))
    classes = np.unique(y)
    if not isinstance(trigger, Trigger):
        raise TypeError(
            f"trigger has type {type(trigger).__name__}, expected a trigger, such as "
            "PatchTrigger(mask, pattern)."
        )
    check_target_class(target_class, classes)
    if isinstance(source_classes, str) and source_classes == "all":
        sources = classes[classes != target_class]
    else:
        sources = np.unique(check_kind(source_classes, "source_classes"))
        if len(sources) == 0:
            raise ValueError(
                "source_classes is empty: name at least one class, or give 'all'."
            )
        for source in sources.tolist():
            check_target_class(source, classes, "source_classes")
        if target_class in sources.tolist():
            raise ValueError(
                f"target_class={target_class} is among source_classes="
                f"{sources.tolist()}: images of the target class need no trigger. "
                "Leave it out."
            )
    if n_per_class is None:
        n_per_class = 1000 if len(sources) == 1 else 100

    random_state = check_random_state(random_state)
    draws = []
    for source in sources:
        rows = np.flatnonzero(y == source)
        n_copies = _n_copies(n_per_class, len(rows), source)
        draws.append(random_state.choice(rows, n_copies, replace=False))
    copied_from = np.concatenate(draws)

    added = len(X) + np.arange(len(copied_from))
    labels = np.full(len(copied_from), target_class, dtype=y.dtype)
    return PoisonedSet(
        np.concatenate([X, trigger.embed(X[copied_from])]),
        np.concatenate([y, labels]),
        added,
        copied_from,
    )


def _n_copies(n_per_class, n_available, source):
    if isinstance(n_per_class, float):
        check_number(n_per_class, "n_per_class", np.nextafter(0, 1), 1)
        return max(1, round(n_per_class * n_available))
    check_number(n_per_class, "n_per_class", 1, integer=True)
    if n_per_class > n_available:
        raise ValueError(
            f"n_per_class={n_per_class}, but source class {source} has only "
            f"{n_available} training images. Choose fewer, or a fraction such as 0.1."
        )
    return n_per_class
