"""The report's figures of the guard: on D_Defense, and on what was checked."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.model_selection import StratifiedKFold

from sklearn_backdoor._defender import origin_scores
from sklearn_backdoor.classifier import log_ratio
from sklearn_backdoor.metrics import detection_report

_N_FOLDS = 5
_N_FEATURES = 1024  # above, a fold costs the discriminant step many seconds


class Defence(NamedTuple):
    """How a guard judges D_Defense, the estimated trigger in all other classes.

    ``n_folds`` is 0 where the images are judged by the densities fitted to them;
    ``sent`` marks those that the victim sends to ``target``.
    """

    target: Any
    n_folds: int
    y: np.ndarray
    Z: np.ndarray
    sent: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    rates: pd.DataFrame

    def n_images(self, *, clean, sent=False):
        """Return how many images are clean or triggered, and sent to the target."""
        rows = (self.y == self.target) == clean
        return int(np.sum(rows & self.sent if sent else rows))


class Check(NamedTuple):
    """How a guard judges the images to check; rows are positions among these."""

    table: pd.DataFrame
    names: list
    origins: np.ndarray | None
    flagged: np.ndarray  # the highest score first
    rates: dict  # from target class to DataFrame; empty without origins

    def rows_sent(self, target):
        """Return the rows that the victim sends to a class."""
        return np.flatnonzero(self.table["victim_label"] == target)


def judge_defence(guard, target, X, y):
    """Judge D_Defense with the trigger embedded, each fold by the others' densities.

    Parameters
    ----------
    guard : BackdoorGuard
        Fitted.
    target : label
        One of its target classes.
    X : ndarray of shape (n_samples, n_channels, height, width)
        D_Defense, ``uint8`` in 0...255 or floating point in 0...1.
    y : ndarray of shape (n_samples,)
        Its labels.

    Returns
    -------
    Defence
    """
    sources = y != target
    embedded = X.copy()
    embedded[sources] = guard.triggers_[target].embed(X[sources])
    said, Z = guard.victim_.predict_and_transform(embedded)
    likelihoods, n_folds = _held_out(guard.classifiers_[target], Z, y)
    classes = guard.classifiers_[target].classes_
    labels = classes[likelihoods.argmax(axis=1)]
    scores = log_ratio(likelihoods, classes, target)
    rates = detection_report(y, labels, target_class=target, victim_labels=said)
    return Defence(target, n_folds, y, Z, said == target, labels, scores, rates)


def _held_out(classifier, Z, y):
    """Return scores by folds, or those of ``classifier`` where images are too few."""
    fewest = int(np.unique(y, return_counts=True)[1].min())
    most = _N_FOLDS if Z.shape[1] <= _N_FEATURES else 2
    n_folds = min(most, fewest)
    scores = np.empty((len(y), len(classifier.classes_)))
    try:
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=0)
        for train, test in folds.split(Z, y):
            part = clone(classifier).fit(Z[train], y[train])
            scores[test] = origin_scores(part, Z[test])
    except (ValueError, np.linalg.LinAlgError):  # too few, or too much alike
        return origin_scores(classifier, Z), 0
    return scores, n_folds


def check_images_by(guard, X, names, origins=None):
    """Judge images of which nothing is known, or their class of origin.

    Parameters
    ----------
    guard : BackdoorGuard
        Fitted.
    X : ndarray of shape (n_samples, n_channels, height, width)
        As in `judge_defence`.
    names : list of str
        Of their files.
    origins : ndarray of shape (n_samples,), default=None
        Classes of origin, where known.

    Returns
    -------
    Check
    """
    table = guard.inspect(X)
    flagged = np.flatnonzero(table["is_trigger"])
    order = np.argsort(-table["trigger_score"].to_numpy()[flagged], kind="stable")
    rates = {}
    if origins is not None:
        for target in guard.target_classes_.tolist():
            rates[target] = detection_report(
                origins,
                table["label"],
                target_class=target,
                victim_labels=table["victim_label"],
            )
    return Check(table, names, origins, flagged[order], rates)
