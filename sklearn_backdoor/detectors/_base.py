"""What all rival detectors share: a score, and a threshold from clean images."""

from abc import ABC, abstractmethod

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor._notebook import NotebookMixin
from sklearn_backdoor._validation import (
    check_images,
    check_labels,
    check_number,
    check_target_class,
)
from sklearn_backdoor.victim import check_victim


class BaseDetector(NotebookMixin, BaseEstimator, ABC):
    """Score images, the higher the likelier a trigger, and set a threshold.

    A subclass implements ``_learn`` and ``_scores``.
    """

    def fit(self, X, y):
        """Learn from clean images, and set the threshold on them.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            D_Defense: clean images, ``uint8`` in 0...255 or floating point in 0...1.
        y : array-like of shape (n_samples,)
            Their labels.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If images, labels, victim and settings do not fit each other.
        """
        try:
            return self._fit(X, y)
        except BaseException:  # a fit that fails leaves it unfitted, half or whole
            for name in set(vars(self)) - set(self.get_params(deep=False)):
                delattr(self, name)
            raise

    def _fit(self, X, y):
        X = check_images(X, ndim=4)
        check_number(self.fpr, "fpr", 0, 1)
        if self.threshold is not None:
            check_number(self.threshold, "threshold", -np.inf)
        self._check_params()
        victim = self._open_victim(X, y)
        y = check_labels(y, victim.classes_, len(X))
        self.victim_ = victim
        self.classes_ = victim.classes_
        self.image_shape_ = X.shape[1:]
        self.target_class_ = self._find_target(X, y)
        self._learn(X, y)
        rows = np.flatnonzero(self._is_calibration(X, y))
        self.clean_scores_ = self._score_clean(X, rows)
        self.threshold_ = self._set_threshold()
        return self

    def _open_victim(self, X, y):
        victim = check_victim(self.victim)
        # perturbed images never come twice: keeping their passes would fill the disk
        return victim.set_params(memory=None).fit(X, y)

    def _check_params(self):
        """Validate the detector's own settings."""

    def _find_target(self, X, y):
        """Return the target class, or None where it does not matter."""
        if self.target_class is not None:
            check_target_class(self.target_class, self.classes_)
        return self.target_class

    def _is_calibration(self, X, y):
        """Tell which clean images set the threshold: the kind that is judged in use."""
        if self.target_class_ is None:
            return np.ones(len(X), dtype=bool)
        rows = y == self.target_class_
        if rows.any():
            rows[rows] = self.victim_.predict(X[rows]) == self.target_class_
        if not rows.any():
            raise ValueError(
                f"D_Defense has no clean image of target class {self.target_class_} "
                "that the victim gets right, so there is nothing to set a threshold "
                "on. Add images of this class."
            )
        return rows

    def _set_threshold(self):
        """Return the smallest score that at most ``fpr`` of the clean images reach."""
        if self.threshold is not None:
            return float(self.threshold)
        highest = np.quantile(self.clean_scores_, 1 - self.fpr, method="inverted_cdf")
        return float(np.nextafter(highest, np.inf))

    def trigger_score(self, X):
        """Return a score an image; higher means more likely a trigger.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        check_is_fitted(self, "threshold_")
        X = check_images(X, image_shape=self.image_shape_, ndim=4, allow_empty=True)
        if len(X) == 0:
            return np.empty(0)
        return self._scores(X)

    def is_trigger(self, X):
        """Return which images score ``threshold_`` or more.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of bool, shape (n_samples,)
            Whatever the victim's label: a backdoor that missed the target counts too.
        """
        return self.trigger_score(X) >= self.threshold_

    @abstractmethod
    def _learn(self, X, y):
        """Learn what the score needs from clean images."""

    def _score_clean(self, X, rows):
        """Return the scores of some of the images that were learnt from."""
        return self._scores(X[rows])

    @abstractmethod
    def _scores(self, X):
        """Return a score an image."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.target_tags.required = True
        return tags
