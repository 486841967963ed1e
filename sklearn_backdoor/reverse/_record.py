"""What a finished search found, as a value that outlives the search."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor.reverse._neural_cleanse import (
    _ALPHA,
    _THRESHOLD,
    NCReverseEngineer,
)
from sklearn_backdoor.reverse._search import ImagePasses
from sklearn_backdoor.triggers import Trigger

_ARRAYS = (
    "classes_",
    "norms_",
    "success_rates_",
    "converged_",
    "anomaly_indices_",
    "p_values_",
    "target_classes_",
)


@dataclass(frozen=True, eq=False)
class SearchRecord:
    """An immutable record of a finished search: its findings, without victim or data.

    It has the fitted attributes of a reverse engineer under the same names, so that
    pictures and reports work on either. A guard that was loaded from disk holds one as
    ``engineer_``; given as a guard's ``trigger``, it stands for the search, which is
    then not run again.

    Parameters
    ----------
    method : str
        Class name of the reverse engineer.
    classes_ : ndarray of shape (n_classes,)
        Labels in logit order; all below are in this order.
    triggers_ : tuple of n_classes Trigger
    norms_ : ndarray of shape (n_classes,)
        L1 of a mask or L2 of a perturbation, pixels in 0...1.
    success_rates_ : ndarray of shape (n_classes,) in 0...1
    converged_ : ndarray of bool, shape (n_classes,)
    reasons_ : tuple of n_classes str
        Why a search did not converge; else empty.
    anomaly_indices_ : ndarray of shape (n_classes,)
        NaN where the statistic says nothing; as ``p_values_``.
    p_values_ : ndarray of shape (n_classes,) in 0...1
    methods_ : tuple of n_classes str, or None
        `AutoReverseEngineer`: the search that each class's entry is from.
    target_classes_ : ndarray
        Classes flagged, the most anomalous first.
    verdict_ : {"backdoored", "nothing found", "inconclusive"}
    n_image_passes_ : ImagePasses (forward, backward)
    report_ : pandas.DataFrame or None
        `AutoReverseEngineer`: a row a search and class.
    alpha : float in 0...1, or None
        Classes with a p-value below were flagged; None where it did not go by p-values.
    threshold : float or None
        Classes with an anomaly index above, and a norm below the median, were flagged;
        None where it did not go by anomaly indices.

    Notes
    -----
    ``alpha`` and ``threshold`` are those in force, defaults included; an engineer's own
    parameter of that name may be None.
    """

    method: str
    classes_: np.ndarray
    triggers_: tuple[Trigger, ...]
    norms_: np.ndarray
    success_rates_: np.ndarray
    converged_: np.ndarray
    reasons_: tuple[str, ...]
    anomaly_indices_: np.ndarray
    p_values_: np.ndarray
    methods_: tuple[str, ...] | None
    target_classes_: np.ndarray
    verdict_: str
    n_image_passes_: ImagePasses
    report_: pd.DataFrame | None
    alpha: float | None
    threshold: float | None

    def __post_init__(self):
        for name in _ARRAYS:
            array = np.array(getattr(self, name))
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __repr__(self):
        return (
            f"SearchRecord(method={self.method!r}, verdict_={self.verdict_!r}, "
            f"target_classes_={self.target_classes_.tolist()})"
        )

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    @property
    def target_class_(self):
        """The most anomalous class, or None where none was flagged."""
        return self.target_classes_[0] if len(self.target_classes_) else None

    @property
    def trigger_(self):
        """Its trigger, or None."""
        if not len(self.target_classes_):
            return None
        return self.triggers_[np.flatnonzero(self.classes_ == self.target_class_)[0]]

    @property
    def image_shape_(self):
        """Shape (n_channels, height, width) of the images that were searched."""
        return self.triggers_[0].image_shape

    @classmethod
    def from_engineer(cls, engineer):
        """Take the record of a fitted reverse engineer.

        Parameters
        ----------
        engineer : reverse engineer or SearchRecord
            Fitted; in a ``FrozenEstimator`` or not. A record is returned as it is.

        Returns
        -------
        SearchRecord

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the engineer was not fitted.
        """
        while isinstance(engineer, FrozenEstimator):
            engineer = engineer.estimator
        if isinstance(engineer, SearchRecord):
            return engineer
        check_is_fitted(engineer)
        alpha, threshold = _limits(engineer)
        methods = getattr(engineer, "methods_", None)
        report = getattr(engineer, "report_", None)
        return cls(
            method=type(engineer).__name__,
            triggers_=tuple(engineer.triggers_),
            reasons_=tuple(engineer.reasons_),
            methods_=None if methods is None else tuple(methods),
            verdict_=engineer.verdict_,
            n_image_passes_=engineer.n_image_passes_,
            report_=None if report is None else report.copy(),
            alpha=alpha,
            threshold=threshold,
            **{name: getattr(engineer, name) for name in _ARRAYS},
        )


def _limits(engineer):
    """Return the p-value and the anomaly index that flag a class, or None for each."""
    if not isinstance(engineer, NCReverseEngineer):
        return getattr(engineer, "alpha", None), None
    if engineer.threshold is None and engineer.schedule == "fast":
        return _ALPHA, None
    return None, _THRESHOLD if engineer.threshold is None else engineer.threshold
