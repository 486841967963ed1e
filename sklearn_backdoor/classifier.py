"""The paper's detector: one density a class, the likeliest class is the origin."""

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.mixture import GaussianMixture
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_X_y, validate_data

from sklearn_backdoor._likelihood import LikelihoodScorer
from sklearn_backdoor._validation import as_array, check_target_class

_LOWEST = np.finfo(np.float64).min / 4


class BackdoorTriggerClassifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """Infer the class of origin by the largest likelihood (§4.2).

    Fit it on features of clean images of the target class and of triggered images of
    all others, each labelled with the class that it came from. For features of an image
    that the victim sends to the target class t, ``predict`` gives t (accepted) or the
    source class. There is no threshold.

    Parameters
    ----------
    density : estimator with ``fit`` and ``score_samples``, default=None
        Cloned once a class. None takes ``GaussianMixture(2, covariance_type="diag",
        reg_covar=1.0)``, which holds up with few samples and many features that are
        standardised, or scaled to a within-class variance near one.
    target_class : label, default=None
        Needed by `trigger_score` and `is_trigger` alone.
    random_state : int, RandomState instance or None, default=0
        Handed to densities whose own random state is None.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Sorted labels.
    densities_ : list of estimators
        Fitted, in the order of ``classes_``.
    n_features_in_ : int
        Number of features seen in `fit`.

    Notes
    -----
    Classes have equal prior probability: the likelihoods are compared as they are.

    References
    ----------
    Li, Xiang, Miller, Kesidis: Test-time detection of backdoor triggers for poisoned
    deep neural networks, §4.2.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_backdoor import BackdoorTriggerClassifier
    >>> Z = np.array([[0.0], [1.0], [9.0], [10.0]])
    >>> clf = BackdoorTriggerClassifier(target_class=1).fit(Z, [0, 0, 1, 1])
    >>> clf.predict([[0.5], [9.5]])
    array([0, 1])
    >>> clf.is_trigger([[0.5], [9.5]])
    array([ True, False])
    """

    def __init__(self, density=None, *, target_class=None, random_state=0):
        self.density = density
        self.target_class = target_class
        self.random_state = random_state

    def fit(self, X, y):
        """Fit one density a class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Features, standardised.
        y : array-like of shape (n_samples,)
            Class of origin.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a class has too few samples for the density, or the target is missing.
        """
        _check_features(X)
        as_array(y, "y")  # scikit-learn takes masked values as they lie
        Z, y = check_X_y(X, y, dtype=np.float64, ensure_min_samples=2, estimator=self)
        check_classification_targets(y)
        classes = np.unique(y)
        if self.target_class is not None:
            check_target_class(self.target_class, classes)
        densities = [self._fit_density(Z[y == label], label) for label in classes]
        validate_data(self, X, skip_check_array=True)  # remembers names and number
        self.classes_ = classes
        self.densities_ = densities
        self._score = LikelihoodScorer(densities)
        return self

    def _fit_density(self, X, label):
        density = self.density
        if density is None:
            density = GaussianMixture(2, covariance_type="diag", reg_covar=1.0)
        if isinstance(density, type) or not hasattr(density, "score_samples"):
            raise TypeError(
                f"density={density!r}, expected an estimator with fit and "
                "score_samples, such as GaussianMixture()."
            )
        density = seeded_clone(density, self.random_state)
        n_components = getattr(density, "n_components", 1)
        if isinstance(n_components, int | np.integer) and len(X) < n_components:
            raise ValueError(
                f"class {label} has n_samples={len(X)}, fewer than the density's "
                f"n_components={n_components}. Add images of this class, or give "
                "density=GaussianMixture(n_components=1, ...)."
            )
        try:
            return density.fit(X)
        except ValueError as error:
            raise ValueError(
                f"the density of class {label} could not be fitted to "
                f"n_samples={len(X)} with {X.shape[1]} features: {error}"
            ) from error

    def log_likelihood(self, X):
        """Return log L_c, the log-likelihood under each class's density.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Columns in the order of ``classes_``, also for two classes.
        """
        check_is_fitted(self)
        _check_features(X)
        scores = self._score(validate_data(self, X, dtype=np.float64, reset=False))
        return np.maximum(scores, _LOWEST)  # some densities give -inf: keep it finite

    def predict(self, X):
        """Return the likeliest class of origin.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        scores = self.log_likelihood(X)
        return self.classes_[scores.argmax(axis=1)]

    def predict_proba(self, X):
        """Return the posterior of the class of origin under equal priors.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes) in 0...1
        """
        return softmax(self.log_likelihood(X), axis=1)

    def decision_function(self, X):
        """Return log-likelihoods; for two classes, second minus first.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes), or (n_samples,) for two classes
        """
        scores = self.log_likelihood(X)
        if len(self.classes_) == 2:
            return scores[:, 1] - scores[:, 0]
        return scores

    def trigger_score(self, X):
        """Return max over c != t of log L_c - log L_t; above 0 means trigger.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)

        Raises
        ------
        ValueError
            If ``target_class`` is None.
        """
        check_is_fitted(self)
        self._check_target()
        return log_ratio(self.log_likelihood(X), self.classes_, self.target_class)

    def _check_target(self):
        if self.target_class is None:
            raise ValueError(
                "trigger_score and is_trigger need target_class: set it before fit to "
                "the class that the backdoor leads to."
            )

    def is_trigger(self, X):
        """Return whether another class than the target is likelier.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of bool, shape (n_samples,)
        """
        check_is_fitted(self)
        self._check_target()
        return self.predict(X) != self.target_class


def _check_features(X):
    """Refuse what scikit-learn would turn into numbers: masked values and dates."""
    if np.ma.is_masked(X):
        as_array(X, "X")
    if getattr(getattr(X, "dtype", None), "kind", "f") in "mM":
        raise TypeError(f"X has dtype {X.dtype}, expected features, that is numbers.")


def log_ratio(scores, classes, target_class):
    """Return the best score of the other classes minus that of the target's.

    Parameters
    ----------
    scores : ndarray of shape (n_samples, n_classes)
        Log-likelihoods.
    classes : ndarray of shape (n_classes,)
        Labels of the columns.
    target_class : label

    Returns
    -------
    ndarray of shape (n_samples,)
    """
    of_target = classes == target_class
    others = scores[:, ~of_target].max(axis=1, initial=-np.inf)
    return others - scores[:, of_target][:, 0]


def seeded_clone(estimator, random_state):
    """Clone, and hand ``random_state`` to all whose own is None."""
    twin = clone(estimator)
    unset = {
        name: random_state
        for name, value in twin.get_params().items()
        if name.split("__")[-1] == "random_state" and value is None
    }
    if unset:  # a FrozenEstimator has none, and its set_params returns nothing
        twin.set_params(**unset)
    return twin
