"""The report's figures of the search: a row a class, and why there is no verdict."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from sklearn_backdoor.reverse._anomaly import is_informative


class ClassRow(NamedTuple):
    """What a search found for one class; ``others`` is the median of its norms."""

    label: Any
    method: str
    trigger: Any
    norm: float
    others: float
    success_rate: float
    converged: bool
    reason: str
    anomaly_index: float
    p_value: float
    flagged: bool
    guarded: bool

    @property
    def is_patch(self):
        """Tell whether the trigger replaces pixels, so that norms count pixels."""
        return hasattr(self.trigger, "mask")

    @property
    def is_shift(self):
        """Tell, by the search's name, whether norms are of shifts in the network."""
        return "neuron" in self.method.lower()


class Doubt(NamedTuple):
    """A search in which too few classes converged, and the commonest reason."""

    method: str
    n_converged: int
    n_classes: int
    reason: str


def class_rows(record, guarded):
    """Tabulate a search's findings, the most suspicious class first.

    Parameters
    ----------
    record : SearchRecord
    guarded : collection of labels
        Classes that a guard defends.

    Returns
    -------
    list of ClassRow
        Flagged classes first, in the search's order, then by p-value and norm.
    """
    labels = record.classes_.tolist()
    flagged = record.target_classes_.tolist()
    methods = record.methods_ or [record.method] * len(labels)
    rows = [
        ClassRow(
            label,
            methods[number],
            record.triggers_[number],
            float(record.norms_[number]),
            _median(record, methods[number]),
            float(record.success_rates_[number]),
            bool(record.converged_[number]),
            record.reasons_[number],
            float(record.anomaly_indices_[number]),
            float(record.p_values_[number]),
            label in flagged,
            label in guarded,
        )
        for number, label in enumerate(labels)
    ]

    def suspicion(row):
        place = flagged.index(row.label) if row.flagged else len(flagged)
        p = np.nan_to_num(row.p_value, nan=1.0)
        small = row.norm / row.others if row.converged and row.others else np.inf
        return place, p, small

    return sorted(rows, key=suspicion)


def _median(record, method):
    """Return the median norm of a search; a class not converged counts as large."""
    norms, converged = record.norms_, record.converged_
    if record.report_ is not None:
        rows = record.report_[record.report_["method"] == method]
        norms, converged = rows["norm"], rows["converged"]
    return float(np.median(np.where(converged, norms, np.inf)))


def doubts(record):
    """Say which searches had too little to compare, and why.

    Parameters
    ----------
    record : SearchRecord

    Returns
    -------
    list of Doubt
    """
    groups = [(record.method, record.converged_, record.reasons_)]
    if record.report_ is not None:
        groups = [
            (name, rows["converged"].to_numpy(), rows["reason"])
            for name, rows in record.report_.groupby("method", sort=False)
        ]
    found = []
    for name, converged, reasons in groups:
        if not is_informative(np.ones(len(converged)), converged):
            rest = Counter(np.array(reasons, dtype=object)[~converged])
            reason = rest.most_common(1)[0][0] if rest else ""
            found.append(Doubt(name, int(converged.sum()), len(converged), reason))
    return found
