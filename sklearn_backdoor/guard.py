"""The whole defence as one classifier."""

import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin
from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor._defender import default_classifier, fit_defender, origin_scores
from sklearn_backdoor._guard_files import GuardFilesMixin
from sklearn_backdoor._guard_module import GuardModuleMixin
from sklearn_backdoor._notebook import NotebookMixin
from sklearn_backdoor._stream import gather
from sklearn_backdoor._validation import (
    check_images,
    check_labels,
    check_number,
    check_target_class,
)
from sklearn_backdoor.classifier import log_ratio, seeded_clone
from sklearn_backdoor.embedding import check_engineer
from sklearn_backdoor.reverse import AutoReverseEngineer, SearchRecord
from sklearn_backdoor.triggers import Trigger
from sklearn_backdoor.victim import check_victim

__all__ = ["BackdoorGuard", "default_classifier"]


class BackdoorGuard(
    NotebookMixin,
    GuardFilesMixin,
    GuardModuleMixin,
    MetaEstimatorMixin,
    ClassifierMixin,
    BaseEstimator,
):
    """Guard a victim in flight: accept its labels, or infer the source class.

    ``fit`` finds the target class and its trigger (or takes them), embeds the trigger
    into clean images of all other classes, and learns what they look like in the
    victim's features. For an image that the victim sends to the target class,
    ``predict`` then gives the target (accepted), or the class that the triggered image
    really belongs to; labels of all other images pass. Where no class is flagged, every
    label passes: see ``verdict_``. A memory-mapped array of any length is gone through
    in parts, and threads may share a guard.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    trigger : Trigger, reverse engineer, SearchRecord or None, default=None
        A trigger value needs ``target_class``; a reverse engineer is cloned and
        fitted; the record of a search stands for it. None takes
        ``AutoReverseEngineer(victim)``: patches, additive perturbations, neurons, and
        what batch-norm or the weights remember.
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
    engineer_ : reverse engineer, SearchRecord or None
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
    n_images_ : int
        Images in D_Defense.

    Notes
    -----
    Threads and processes give bit-identical answers where torch and BLAS compute with
    as many threads: sums are rounded by how they are split.

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
        y = check_labels(
            y, victim.classes_, len(X), all_present=True, min_per_class=fewest
        )
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
        self.n_images_ = len(X)
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
        engineer = self._search(X, y)
        if np.asarray(engineer.classes_).tolist() != classes.tolist():
            raise ValueError(
                f"trigger is a search over the classes {engineer.classes_.tolist()}, "
                f"but the victim's are {classes.tolist()}. Search with this victim."
            )
        estimates = {
            label: trigger.scaled(self.strength)
            for label, trigger in zip(classes.tolist(), engineer.triggers_, strict=True)
        }
        if self.target_class is not None:
            targets, verdict = [self.target_class], "backdoored"
        else:
            targets, verdict = engineer.target_classes_.tolist(), engineer.verdict_
        return engineer, verdict, {target: estimates[target] for target in targets}

    def _search(self, X, y):
        """Return a finished search: the record given, or a fitted engineer."""
        engineer = self.trigger
        if isinstance(engineer, SearchRecord):
            return engineer
        if engineer is None:
            engineer = AutoReverseEngineer(self.victim, random_state=self.random_state)
        engineer = check_engineer(engineer)
        return seeded_clone(engineer, self.random_state).fit(X, y)

    def _fit_classifier(self, victim, X, y, trigger, target):
        # §4.2: D~_c = g(D_c, Δ^) for c != t; clean D_t; features; one density a class
        sources = y != target
        embedded = X.copy()
        embedded[sources] = trigger.embed(X[sources])
        Z = victim.transform(embedded)
        return fit_defender(self.classifier, Z, y, target, self.random_state)

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
        return self._answer(X, self._origins)[0]

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
        return self._answer(X, self._trigger_score)[0]

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
        return self._answer(X, lambda labels, Z: self._origins(labels, Z) != labels)[0]

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
        return self._answer(X, self._proba)[0]

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
        labels, origins, scores, likelihoods = self._answer(
            X,
            lambda labels, _: labels,
            self._origins,
            self._trigger_score,
            self._likelihoods,
        )
        table = pd.DataFrame(
            {
                "victim_label": labels,
                "is_trigger": origins != labels,
                "label": origins,
                "trigger_score": scores,
            }
        )
        names = [f"log_likelihood_{label}" for label in self.classes_]
        return table.join(pd.DataFrame(likelihoods, columns=names))

    def _answer(self, X, *questions):
        """Return an array for each function of labels and features, in one pass."""
        check_is_fitted(self)
        shape = self.victim_.image_shape_
        X = check_images(X, image_shape=shape, ndim=4, allow_empty=True, pixels=False)
        answers = (
            (rows, [question(labels, Z) for question in questions])
            for rows, labels, Z in self.victim_.stream(X)
        )
        return gather(len(X), answers)

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
                yield target, rows, origin_scores(classifier, Z[rows])

    def _proba(self, labels, Z):
        proba = (labels[:, None] == self.classes_).astype(np.float64)
        for target, rows, scores in self._judge(labels, Z):
            proba[rows] = softmax(self._by_victim(scores, target), axis=1)
        return proba

    def _likelihoods(self, labels, Z):
        likelihoods = np.full((len(labels), len(self.classes_)), np.nan)
        for target, rows, scores in self._judge(labels, Z):
            likelihoods[rows] = self._by_victim(scores, target)
        return likelihoods

    def _trigger_score(self, labels, Z):
        score = np.zeros(len(labels))
        for target, classifier in self.classifiers_.items():
            rows = labels == target
            if target == self.target_class_:
                rows = ~np.isin(labels, self.target_classes_) | rows
            if rows.any():
                scores = origin_scores(classifier, Z[rows])
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
