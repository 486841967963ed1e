"""What a search flags by, as a figure a class, a threshold and in words."""

from typing import NamedTuple

import numpy as np

from sklearn_backdoor.reverse._anomaly import anomaly_indices
from sklearn_backdoor.reverse._record import SearchRecord

_RATIO = 0.25  # B3D's


class Rule(NamedTuple):
    """What a search flags by: a column of the table, a threshold, and in words."""

    column: str
    threshold: float
    words: str


def rule_of(engineer):
    """Return the rule that a search flags by.

    Parameters
    ----------
    engineer : reverse engineer or SearchRecord
        Fitted.

    Returns
    -------
    Rule
        ``column`` is "p_corrected", "anomaly_index" or "relative", which is the norm
        over the median of all classes.
    """
    record = SearchRecord.from_engineer(engineer)
    if record.threshold is not None:
        words = f"anomaly index of a small norm above {record.threshold:g}"
        return Rule("anomaly_index", record.threshold, words)
    if record.alpha is None:
        return Rule("relative", _RATIO, "norm below a quarter of the median")
    report = record.report_
    n_searches = 1 if report is None else report["method"].nunique()
    corrected = f", corrected for {n_searches} searches," * (n_searches > 1)
    words = f"p-value{corrected} below {record.alpha:g}"
    return Rule("p_corrected", record.alpha, words)


def figures_of(engineer):
    """Return the figure of each class that the rule compares with its threshold.

    Parameters
    ----------
    engineer : reverse engineer or SearchRecord
        Fitted.

    Returns
    -------
    ndarray of shape (n_classes,)
        P-values, corrected where several searches ran; anomaly indices, negative where
        the norm is not below the median, which is never flagged; or norms over the
        median. NaN where the statistic says nothing.
    """
    column = rule_of(engineer).column
    if column == "p_corrected":
        return np.array(engineer.p_values_, dtype=float)
    index = np.array(engineer.anomaly_indices_, dtype=float)
    judged = ~np.isnan(index)
    if not judged.any():
        return index
    norms = np.array(engineer.norms_, dtype=float)[judged]
    converged = np.array(engineer.converged_, dtype=bool)[judged]
    if column == "anomaly_index":
        _, below = anomaly_indices(norms, converged)
        index[judged] *= np.where(below, 1, -1)
        return index
    norms[~converged] = norms[converged].max()  # censored: as large at least
    index[judged] = norms / np.median(norms)
    return index
