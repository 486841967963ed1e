"""What guards one target class: features to the class of origin (§4.2)."""

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_backdoor.classifier import BackdoorTriggerClassifier, seeded_clone


def default_classifier(n_per_class=100):
    """Make the guard's own classifier: discriminant features, then the densities.

    Parameters
    ----------
    n_per_class : int, default=100
        Images of the rarest class in D_Defense.

    Returns
    -------
    Pipeline
        Unfitted; a place to start a grid search from.

    Notes
    -----
    Settings by cross-validated log-loss on D_Defense (``python -m benchmarks settings``
    and ``levers``): full covariances in the few discriminant directions are better than
    `BackdoorTriggerClassifier`'s own diagonal ones, which hold up on raw features. With
    few images the directions fit these too well, so that densities have to be wider:
    ``reg_covar`` is 10 below 20 images a class, 3 below 100, else 1.
    """
    reg_covar = 1.0 if n_per_class >= 100 else 3.0 if n_per_class >= 20 else 10.0
    density = GaussianMixture(3, covariance_type="full", reg_covar=reg_covar)
    return make_pipeline(
        StandardScaler(),
        LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto"),
        BackdoorTriggerClassifier(density),
    )


def fit_defender(classifier, Z, y, target_class, random_state):
    """Fit a clone of the classifier for one target class.

    Parameters
    ----------
    classifier : estimator or None
        None takes `default_classifier`.
    Z : ndarray of shape (n_samples, n_features)
        Features of clean target images, and of triggered images of all other classes.
    y : ndarray of shape (n_samples,)
        Class of origin.
    target_class : label
        For the messages.
    random_state : int, RandomState instance or None
        Of parts whose own is None.

    Returns
    -------
    estimator
        Fitted.

    Raises
    ------
    TypeError
        If it can score no class.
    ValueError
        If the images of a class have the same features.
    """
    labels, counts = np.unique(y, return_counts=True)
    for label in labels.tolist():
        if np.all(np.ptp(Z[y == label], axis=0) == 0):
            raise ValueError(
                f"all images of class {label} have identical features: the images are "
                f"identical, or the trigger for target class {target_class} covers "
                "them. The defence needs at least three different images a class."
            )
    if classifier is None:
        classifier = default_classifier(counts.min())
    if isinstance(classifier, type) or not hasattr(classifier, "get_params"):
        raise TypeError(
            f"classifier={classifier!r} is no estimator, expected such as "
            "default_classifier() or BackdoorTriggerClassifier()."
        )
    classifier = seeded_clone(classifier, random_state)
    last = classifier[-1] if isinstance(classifier, Pipeline) else classifier
    if not (hasattr(last, "log_likelihood") or hasattr(last, "predict_proba")):
        raise TypeError(
            f"classifier ends in {type(last).__name__}, expected one with "
            "log_likelihood or predict_proba, such as BackdoorTriggerClassifier."
        )
    try:
        return classifier.fit(Z, y)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"the discriminant step cannot separate the features for target class "
            f"{target_class} ({error}): it needs at least three different images a "
            "class. Add images, or give a classifier without "
            "LinearDiscriminantAnalysis."
        ) from error


def origin_scores(classifier, Z):
    """Return a log-likelihood (or log-probability) a class; finite.

    Parameters
    ----------
    classifier : estimator
        Fitted by `fit_defender`.
    Z : ndarray of shape (n_samples, n_features)

    Returns
    -------
    ndarray of shape (n_samples, n_classes)
        In the order of the classifier's ``classes_``.
    """
    last = classifier
    if isinstance(classifier, Pipeline):
        *_, (_, last) = classifier.steps
        if len(classifier.steps) > 1:
            Z = classifier[:-1].transform(Z)
    if hasattr(last, "log_likelihood"):
        return last.log_likelihood(Z)
    return np.log(np.maximum(last.predict_proba(Z), np.finfo(np.float64).tiny))
