"""ASR, TPR, FPR and SIA as scikit-learn metrics on the class of origin.

An evaluation set holds triggered images of the source classes and clean images of the
target class t, nothing else. ``y_true`` is the class of origin: t for a clean image.
"""

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.base import clone
from sklearn.metrics import log_loss
from sklearn.utils import check_consistent_length

from sklearn_backdoor._validation import (
    as_array,
    check_kind,
    check_number,
    check_target_class,
    kind_of_labels,
)


def asr_score(y_true, y_pred, *, target_class):
    """Compute the attack success rate P(f(x) = t | y != t).

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Class of origin of triggered images; those of the target class do not count.
    y_pred : array-like of shape (n_samples,)
        The **victim's** labels.
    target_class : label
        The attacker's t.

    Returns
    -------
    float in 0...1

    Raises
    ------
    TypeError, ValueError
        If labels are none, or there is no triggered image.
    """
    y_true, y_pred = _labels(target_class, y_true=y_true, y_pred=y_pred)
    hits, among = y_pred == target_class, y_true != target_class
    return _rate("asr", hits, among, target_class)


def tpr_score(y_true, y_pred, *, target_class):
    """Compute the true positive rate P(ŷ != t | y != t) of detected triggers.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Class of origin; t for clean images.
    y_pred : array-like of shape (n_samples,)
        The defence's labels.
    target_class : label
        The attacker's t.

    Returns
    -------
    float in 0...1

    Raises
    ------
    TypeError, ValueError
        If labels are none, or there is no triggered image.
    """
    y_true, y_pred = _labels(target_class, y_true=y_true, y_pred=y_pred)
    hits, among = y_pred != target_class, y_true != target_class
    return _rate("tpr", hits, among, target_class)


def fpr_score(y_true, y_pred, *, target_class):
    """Compute the false positive rate P(ŷ != t | y = t) on clean target images.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Class of origin; t for clean images.
    y_pred : array-like of shape (n_samples,)
        The defence's labels.
    target_class : label
        The attacker's t.

    Returns
    -------
    float in 0...1; lower is better

    Raises
    ------
    TypeError, ValueError
        If labels are none, or there is no clean image.
    """
    y_true, y_pred = _labels(target_class, y_true=y_true, y_pred=y_pred)
    hits, among = y_pred != target_class, y_true == target_class
    return _rate("fpr", hits, among, target_class)


def sia_score(y_true, y_pred, *, target_class):
    """Compute the source inference accuracy P(ŷ = y | y != t).

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Class of origin; t for clean images.
    y_pred : array-like of shape (n_samples,)
        The defence's labels.
    target_class : label
        The attacker's t.

    Returns
    -------
    float in 0...1

    Raises
    ------
    TypeError, ValueError
        If labels are none, or there is no triggered image.
    """
    y_true, y_pred = _labels(target_class, y_true=y_true, y_pred=y_pred)
    hits, among = y_pred == y_true, y_true != target_class
    return _rate("sia", hits, among, target_class)


def origin_log_loss(y_true, y_proba, *, target_class, labels):
    """Compute the log-loss of the class of origin.

    A smooth score to choose settings by: with 100 images a class, no false alarm says
    only that FPR is at most 0.037.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Class of origin; t for clean images.
    y_proba : array-like of shape (n_samples, n_classes)
        Probabilities of the classes of origin.
    target_class : label
        Not used; here for `make_trigger_scorer`.
    labels : array-like of shape (n_classes,)
        The columns of ``y_proba``, in any order.

    Returns
    -------
    float, 0 or more; lower is better

    Raises
    ------
    TypeError, ValueError
        If labels or probabilities are none, or do not fit each other.
    """
    (y_true,) = _labels(target_class, y_true=y_true)
    labels, y_proba = check_kind(labels, "labels"), as_array(y_proba, "y_proba")
    expected = len(y_true), len(labels)
    if y_proba.shape != expected or not np.isfinite(y_proba).all():
        raise ValueError(
            f"y_proba has shape {y_proba.shape}, expected {expected} without NaN: a "
            "row an image, a column a label."
        )
    order = np.argsort(labels)
    return log_loss(y_true, y_proba[:, order], labels=labels[order])


def detection_report(
    y_true, y_pred, *, target_class, victim_labels, is_trigger=None, confidence=0.95
):
    """Tabulate TPR, FPR and SIA with counts and Wilson intervals.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Class of origin; t for clean images.
    y_pred : array-like of shape (n_samples,)
        The defence's labels.
    target_class : label
        The attacker's t.
    victim_labels : array-like of shape (n_samples,)
        The victim's own labels f(w). Headline rates are over images with f(w) = t.
    is_trigger : array-like of bool, shape (n_samples,), default=None
        The defence's decisions; None takes f(w) = t and ŷ != t.
    confidence : float in 0...1, default=0.95
        Of the intervals.

    Returns
    -------
    pandas.DataFrame
        Rows ``tpr, fpr, sia`` (over images with f(w) = t), then ``tpr_all, fpr_all``
        (over all images, by ``is_trigger``) and ``sia_all``; columns ``score, low,
        high, n``. A rate over no image is NaN.

    Raises
    ------
    TypeError, ValueError
        If labels are none, or lengths differ.
    """
    check_number(confidence, "confidence", 0, 1)
    y_true, y_pred, victim_labels = _labels(
        target_class, y_true=y_true, y_pred=y_pred, victim_labels=victim_labels
    )
    sent = victim_labels == target_class
    if is_trigger is None:
        is_trigger = sent & (y_pred != target_class)
    is_trigger = as_array(is_trigger, "is_trigger")
    if is_trigger.ndim:
        check_consistent_length(victim_labels, is_trigger)
    if is_trigger.shape != sent.shape or not np.isin(is_trigger, (False, True)).all():
        raise ValueError(
            f"is_trigger has shape {is_trigger.shape} and dtype {is_trigger.dtype}, "
            f"expected {len(sent)} times True or False."
        )
    is_trigger = is_trigger.astype(bool)
    clean = y_true == target_class
    rows = {
        "tpr": (y_pred != target_class, ~clean & sent),
        "fpr": (y_pred != target_class, clean & sent),
        "sia": (y_pred == y_true, ~clean & sent),
        "tpr_all": (is_trigger, ~clean),
        "fpr_all": (is_trigger, clean),
        "sia_all": (y_pred == y_true, ~clean),
    }
    table = {}
    for name, (hit, among) in rows.items():
        n_hits, n = int(np.sum(hit & among)), int(np.sum(among))
        table[name] = [
            n_hits / n if n else np.nan,
            *wilson_interval(n_hits, n, confidence),
            n,
        ]
    return pd.DataFrame.from_dict(
        table, orient="index", columns=["score", "low", "high", "n"]
    )


def wilson_interval(n_hits, n, confidence=0.95):
    """Return the Wilson score interval of a rate.

    Parameters
    ----------
    n_hits, n : int
        Hits among n images.
    confidence : float in 0...1, default=0.95

    Returns
    -------
    low, high : float
        NaN where n is 0.
    """
    if n == 0:
        return np.nan, np.nan
    interval = binomtest(n_hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def make_trigger_scorer(
    metric,
    trigger,
    target_class,
    *,
    victim=None,
    greater_is_better=True,
    response_method="predict",
):
    """Make a scorer that embeds the trigger into the held-out fold, then scores.

    Scoring on clean folds would mean nothing: no image of them carries a trigger.

    Parameters
    ----------
    metric : callable
        ``metric(y_true, response, target_class=...)``, such as `sia_score`; with
        ``response_method="predict_proba"`` it also gets ``labels=classes_``, as
        `origin_log_loss` wants.
    trigger : Trigger
        Embedded into every image whose label is not ``target_class``.
    target_class : label
        Where the trigger leads.
    victim : VictimNetwork, default=None
        Where given, only images that it sends to the target class are scored.
    greater_is_better : bool, default=True
        Give False for `fpr_score` and `origin_log_loss`; the sign is turned.
    response_method : {"predict", "predict_proba"}, default="predict"
        What the metric is fed.

    Returns
    -------
    callable
        ``scorer(estimator, X, y)`` on raw images, for ``GridSearchCV(scoring=...)``.
    """
    return _TriggerScorer(
        metric, trigger, target_class, victim, greater_is_better, response_method
    )


class _TriggerScorer:
    def __init__(self, metric, trigger, target_class, victim, greater, response_method):
        self.metric = metric
        self.trigger = trigger
        self.target_class = target_class
        self.victim = victim
        self.sign = 1 if greater else -1
        self.response_method = response_method

    def __call__(self, estimator, X, y):
        X, y = np.asarray(X), np.asarray(y)
        check_target_class(self.target_class, y)
        embedded = X.copy()
        sources = y != self.target_class
        embedded[sources] = self.trigger.embed(X[sources])
        response = getattr(estimator, self.response_method)(embedded)
        if self.victim is not None:
            sent = clone(self.victim).fit(embedded).predict(embedded)
            sent = sent == self.target_class
            response, y = response[sent], y[sent]
        extra = {}
        if self.response_method == "predict_proba":
            extra["labels"] = estimator.classes_
        value = self.metric(y, response, target_class=self.target_class, **extra)
        return self.sign * value

    def __repr__(self):
        return (
            f"make_trigger_scorer({self.metric}, {self.trigger!r}, "
            f"{self.target_class!r})"
        )


def _rate(name, hits, among, target_class):
    """Return the share of hits among images; refuse if there are none of these."""
    if not among.any():
        kind = "clean target" if name == "fpr" else "triggered"
        raise ValueError(
            f"{name} needs {kind} images, but y_true (the class of origin) holds "
            f"none for target_class={target_class}. Check y_true and target_class."
        )
    return float(np.mean(hits[among]))


def _labels(target_class, **arrays):
    """Return arrays of labels that are of one length, and of the target's kind."""
    if np.ndim(target_class) != 0:
        raise ValueError(f"target_class={target_class!r}, expected one label.")
    found = {name: check_kind(array, name) for name, array in arrays.items()}
    for name, labels in found.items():
        if labels.ndim != 1 and labels.shape[1:] != (1,):
            raise ValueError(
                f"{name} has shape {labels.shape}, expected one label an image."
            )
    target = check_kind([target_class], "target_class")
    kinds = {
        name: kind_of_labels(labels)
        for name, labels in {**found, "target_class": target}.items()
        if len(labels)
    }
    if len(set(kinds.values())) > 1:
        kinds_said = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise TypeError(
            f"labels of different kinds are never equal: {kinds_said}. Convert them."
        )
    check_consistent_length(*found.values())
    return [labels.ravel() for labels in found.values()]
