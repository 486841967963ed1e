"""The whole defence as one classifier."""

import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor._validation import (
    check_images,
    check_labels,
    check_number,
    check_target_class,
)
from sklearn_backdoor.classifier import (
    BackdoorTriggerClassifier,
    log_ratio,
    seeded_clone,
)
from sklearn_backdoor.embedding import check_engineer
from sklearn_backdoor.reverse import AutoReverseEngineer
from sklearn_backdoor.triggers import Trigger
from sklearn_backdoor.victim import check_victim


class BackdoorGuard(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """Guard a victim in flight: accept its labels, or infer the source class.

    ``fit`` finds the target class and its trigger (or takes them), embeds the trigger
    into clean images of all other classes, and learns what they look like in the
    victim's features. For an image that the victim sends to the target class,
    ``predict`` then gives the target (accepted), or the class that the triggered image
    really belongs to; labels of all other images pass. Where no class is flagged, every
    label passes: see ``verdict_``.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    trigger : Trigger, reverse engineer or None, default=None
        A trigger value needs ``target_class``; a reverse engineer is cloned and
        fitted. None takes ``AutoReverseEngineer(victim)``: patches and additive
        perturbations.
    classifier : estimator or None, default=None
        From features to the class of origin; cloned once a target class. None takes
        `default_classifier`: ``StandardScaler``, ``LinearDiscriminantAnalysis`` as a
        transformer, then `BackdoorTriggerClassifier`. The paper's own is the same
        without the step in the middle.
    target_class : label, default=None
        With a trigger value: where it leads. With a reverse engineer: defend this class
        alone, flagged or not.
    strength : float, default=1.2
        Multiple of the estimated trigger that is embedded: an estimate is the smallest
        that works, an attacker's own is stronger. 1 is the paper's. A trigger value is
        taken as it is.
    random_state : int, RandomState instance or None, default=0
        Of the default reverse engineer, and of parts of the classifier whose own
        random state is None.

    Attributes
    ----------
    victim_ : VictimNetwork
        Fitted.
    classes_ : ndarray of shape (n_classes,)
        The victim's labels, in logit order.
    engineer_ : reverse engineer or None
        Fitted; None where a trigger was given.
    verdict_ : {"backdoored", "nothing found", "inconclusive"}
        The reverse engineer's; "backdoored" where the trigger or the target was given.
    target_classes_ : ndarray
        Defended classes, the most anomalous first; may be empty.
    target_class_ : label or None
        The first of them.
    triggers_ : dict from label to Trigger
        One a defended class.
    classifiers_ : dict from label to estimator
        One a defended class, fitted.

    References
    ----------
    Li, Xiang, Miller, Kesidis: Test-time detection of backdoor triggers for poisoned
    deep neural networks, §4. The discriminant step is ours.
    """

    def __init__(
        self,
        victim,
        trigger=None,
        classifier=None,
        *,
        target_class=None,
        strength=1.2,
        random_state=0,
    ):
        self.victim = victim
        self.trigger = trigger
        self.classifier = classifier
        self.target_class = target_class
        self.strength = strength
        self.random_state = random_state

    def fit(self, X, y):
        """Find target and trigger, then fit one classifier a target class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            D_Defense: clean images, ``uint8`` in 0...255 or floating point in 0...1.
        y : array-like of shape (n_samples,)
            Their labels; every class of the victim, three images each at least for the
            default classifier.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If images, labels, victim, trigger and classifier do not fit each other.
        """
        X = check_images(X, ndim=4)
        check_number(self.strength, "strength", 0, 1e6)
        victim = check_victim(self.victim).fit(X, y)
        fewest = 3 if self.classifier is None else 2  # the discriminant step needs 3
        check_labels(y, victim.classes_, len(X), all_present=True, min_per_class=fewest)
        y = np.asarray(y)
        engineer, verdict, triggers = self._find_triggers(X, y, victim.classes_)
        classifiers = {
            target: self._fit_classifier(victim, X, y, trigger, target)
            for target, trigger in triggers.items()
        }
        self.victim_ = victim
        self.classes_ = victim.classes_
        self.engineer_ = engineer
        self.verdict_ = verdict
        self.triggers_ = triggers
        self.classifiers_ = classifiers
        self.target_classes_ = np.array(list(triggers), dtype=self.classes_.dtype)
        self.target_class_ = self.target_classes_[0] if triggers else None
        return self

    def _find_triggers(self, X, y, classes):
        """Return the reverse engineer, its verdict and a trigger a target class."""
        if self.target_class is not None:
            check_target_class(self.target_class, classes)
        if isinstance(self.trigger, Trigger):
            if self.target_class is None:
                raise ValueError(
                    "target_class=None with a trigger value: name the class that the "
                    "trigger leads to, or leave trigger out to search for both."
                )
            return None, "backdoored", {self.target_class: self.trigger}
        if self.trigger is None:
            engineer = AutoReverseEngineer(self.victim, random_state=self.random_state)
        else:
            engineer = check_engineer(self.trigger)
        engineer = seeded_clone(engineer, self.random_state).fit(X, y)
        estimates = {
            label: trigger.scaled(self.strength)
            for label, trigger in zip(classes.tolist(), engineer.triggers_, strict=True)
        }
        if self.target_class is not None:
            targets, verdict = [self.target_class], "backdoored"
        else:
            targets, verdict = engineer.target_classes_.tolist(), engineer.verdict_
        return engineer, verdict, {target: estimates[target] for target in targets}

    def _fit_classifier(self, victim, X, y, trigger, target):
        # §4.2: D~_c = g(D_c, Δ^) for c != t; clean D_t; features; one density a class
        sources = y != target
        embedded = X.copy()
        embedded[sources] = trigger.embed(X[sources])
        Z = victim.transform(embedded)
        for label in victim.classes_.tolist():
            if np.all(np.ptp(Z[y == label], axis=0) == 0):
                raise ValueError(
                    f"all images of class {label} have identical features: the images "
                    f"are identical, or the trigger for target class {target} covers "
                    "them. The defence needs at least three different images a class."
                )
        classifier = self.classifier
        if classifier is None:
            classifier = default_classifier(np.unique(y, return_counts=True)[1].min())
        classifier = seeded_clone(classifier, self.random_state)
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
                f"{target} ({error}): it needs at least three different images a "
                "class. Add images, or give a classifier without "
                "LinearDiscriminantAnalysis."
            ) from error

    def predict(self, X):
        """Return accepted labels or inferred source classes, in one forward pass.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`, triggered or not.

        Returns
        -------
        ndarray of shape (n_samples,)
            The victim's label where it is no target class, or is accepted; else the
            inferred source class.
        """
        labels, Z = self._look(X)
        return self._origins(labels, Z)

    def trigger_score(self, X):
        """Return max over c != t of log L_c - log L_t; above 0 means trigger.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
            Finite for every image, but it means something only where the victim says
            a target class; for other images it goes by ``target_class_``. 0 everywhere
            if no class is defended.
        """
        labels, Z = self._look(X)
        return self._trigger_score(labels, Z)

    def is_trigger(self, X):
        """Return which images carry the trigger: the victim says t, its density not.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of bool, shape (n_samples,)
        """
        labels, Z = self._look(X)
        return self._origins(labels, Z) != labels

    def predict_proba(self, X):
        """Return the probability of each class of origin.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_classes) in 0...1
            In the order of ``classes_``: the classifier's under equal priors where the
            victim says a target class, else 1 for the victim's label.
        """
        labels, Z = self._look(X)
        proba = (labels[:, None] == self.classes_).astype(np.float64)
        for target, rows, scores in self._judge(labels, Z):
            proba[rows] = softmax(self._by_victim(scores, target), axis=1)
        return proba

    def inspect(self, X):
        """Return all that there is to say about each image.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        pandas.DataFrame
            A row an image: ``victim_label``, ``is_trigger``, ``label``,
            ``trigger_score``, then ``log_likelihood_<class>``, NaN where the victim
            does not say a target class.
        """
        labels, Z = self._look(X)
        origins = self._origins(labels, Z)
        likelihoods = np.full((len(labels), len(self.classes_)), np.nan)
        for target, rows, scores in self._judge(labels, Z):
            likelihoods[rows] = self._by_victim(scores, target)
        table = pd.DataFrame(
            {
                "victim_label": labels,
                "is_trigger": origins != labels,
                "label": origins,
                "trigger_score": self._trigger_score(labels, Z),
            }
        )
        names = [f"log_likelihood_{label}" for label in self.classes_]
        return table.join(pd.DataFrame(likelihoods, columns=names))

    def _look(self, X):
        check_is_fitted(self)
        return self.victim_.predict_and_transform(X)

    def _origins(self, labels, Z):
        """Return accepted labels or inferred source classes."""
        origins = labels.copy()
        for target, rows, scores in self._judge(labels, Z):
            classes = self.classifiers_[target].classes_
            origins[rows] = classes[scores.argmax(axis=1)]
        return origins

    def _judge(self, labels, Z):
        """Yield target class, rows that the victim sends there, and their scores."""
        for target, classifier in self.classifiers_.items():
            rows = np.flatnonzero(labels == target)
            if len(rows):
                yield target, rows, _origin_scores(classifier, Z[rows])

    def _trigger_score(self, labels, Z):
        score = np.zeros(len(labels))
        for target, classifier in self.classifiers_.items():
            rows = labels == target
            if target == self.target_class_:
                rows = ~np.isin(labels, self.target_classes_) | rows
            if rows.any():
                scores = _origin_scores(classifier, Z[rows])
                score[rows] = log_ratio(scores, classifier.classes_, target)
        return score

    def _by_victim(self, scores, target):
        """Put the classifier's columns (sorted labels) into the victim's order."""
        columns = np.searchsorted(self.classifiers_[target].classes_, self.classes_)
        return scores[:, columns]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        return tags


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


def _origin_scores(classifier, Z):
    """Return a log-likelihood (or log-probability) a class; finite."""
    last = classifier
    if isinstance(classifier, Pipeline):
        *_, (_, last) = classifier.steps
        if len(classifier.steps) > 1:
            Z = classifier[:-1].transform(Z)
    if hasattr(last, "log_likelihood"):
        return last.log_likelihood(Z)
    return np.log(np.maximum(last.predict_proba(Z), np.finfo(np.float64).tiny))
