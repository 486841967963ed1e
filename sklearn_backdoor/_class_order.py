"""Whether the classes stand in the order of the network's logits."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import confusion_matrix

_LEAST, _GAIN = 0.5, 0.2  # right in another order, and by how much more than in this


def check_class_order(labels, y, classes):
    """Refuse classes in another order than the logits, and name the right one.

    Folders are read in alphabetical order, and few networks were trained so. The wrong
    order goes unnoticed through a whole search, which then names the wrong class.

    Parameters
    ----------
    labels : array-like of shape (n_samples,)
        The network's labels of clean images.
    y : array-like of shape (n_samples,)
        Their true labels.
    classes : list of str
        In logit order, as far as is known.

    Raises
    ------
    ValueError
        If the network would be right on at least half of the images, and on a fifth of
        them more, were the classes in another order.
    """
    counts = confusion_matrix(y, labels, labels=classes)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    own = np.trace(counts) / len(y)
    best = counts[rows, columns].sum() / len(y)
    if best < _LEAST or best - own < _GAIN:
        return
    order = ",".join(np.array(classes)[rows[np.argsort(columns)]])
    raise ValueError(
        f"the network is right on {own:.0%} of the clean images, but would be on "
        f"{best:.0%} were the classes in another order: its logits do not go by the "
        f'order given. Try --classes "{order}".'
    )
