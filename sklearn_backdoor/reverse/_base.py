"""What all reverse engineers share: validation, the tasks, the verdict."""

import os
import warnings
from abc import ABC, abstractmethod
from contextlib import contextmanager

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor._notebook import NotebookMixin
from sklearn_backdoor._torch import processor_has_bfloat16, to_tensor
from sklearn_backdoor._validation import check_images, check_labels, check_number
from sklearn_backdoor.reverse._anomaly import PATCH_SD, anomaly_indices, p_values
from sklearn_backdoor.reverse._run import Prepared, Run
from sklearn_backdoor.reverse._search import ImagePasses, Task
from sklearn_backdoor.victim import check_victim

_GROUP = 5  # tasks in one batch: fixed, so that n_jobs changes no result
_FEW = 5  # images a class
_BFLOAT16_PARITY = 0.98
_BIG = 1_000_000  # parameters; bfloat16 does not pay below


class BaseReverseEngineer(NotebookMixin, TransformerMixin, BaseEstimator, ABC):
    """Search a trigger for each class, then ask which is abnormally small.

    A subclass implements ``_open_search`` and ``_flag``, and may change the methods
    between them.
    """

    @property
    def _null(self):
        """Distribution of the norms of classes that are no targets."""
        return "log-normal"

    @property
    def _prior_sd(self):
        """Usual standard deviation of their logarithms."""
        return PATCH_SD

    def fit(self, X, y):
        """Search a trigger for each candidate target class and reach a verdict.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            D_Defense: clean images, ``uint8`` in 0...255 or floating point in 0...1.
        y : array-like of shape (n_samples,)
            Their labels; every class of the victim, two images each at least.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If images, labels, victim or settings do not fit each other, if the victim
            answers one class for everything, or if ``checkpoint_dir`` belongs to
            another search.
        """
        run = Run(self, self._prepare(X, y))
        results = self._search(run)
        self._conclude(run, results)
        self._finish(run, results)
        self.n_image_passes_ = run.passes
        return self

    def _prepare(self, X, y):
        """Check settings, images, labels and victim against each other."""
        self._check_running()
        self._check_params()
        X = check_images(X, ndim=4)
        victim = self._open_victim(X, y)
        classes = victim.classes_
        y = check_labels(y, classes, len(X), all_present=True, min_per_class=2)
        _warn_of_few(y)
        order = np.argsort(classes)  # logit order may differ from sorted
        y = order[np.searchsorted(classes[order], y)]
        n_forward = _check_answers(victim, X, y)
        bfloat16, n_more = self._choose_precision(victim, X)
        return Prepared(victim, X, y, bfloat16, ImagePasses(n_forward + n_more, 0))

    def _check_running(self):
        """Check what changes no result."""
        if self.n_jobs is not None:
            check_number(self.n_jobs, "n_jobs", -np.inf, integer=True)
        if not isinstance(self.checkpoint_dir, str | os.PathLike | None):
            raise TypeError(
                f"checkpoint_dir={self.checkpoint_dir!r} has type "
                f"{type(self.checkpoint_dir).__name__}, expected a path or None."
            )

    def _open_victim(self, X, y):
        return check_victim(self.victim).fit(X, y)

    def _choose_precision(self, victim, X):
        """Return whether to use bfloat16, and the forward passes that this took."""
        return (False, 0) if self._is_exact() else _bfloat16_holds(victim, X)

    def _shares(self):
        """Return what another engineer has to equal to share what was prepared."""
        return type(self)._open_victim, self._is_exact()

    def _is_exact(self):
        """Tell whether the search insists on full precision."""
        return False

    def _search(self, run):
        """Search every class; return a SearchResult a class."""
        n_classes = len(run.victim.classes_)
        return run(self._grouped([Task(target) for target in range(n_classes)]))

    def _grouped(self, tasks):
        """Split tasks into those that share a batch."""
        return [tasks[i : i + _GROUP] for i in range(0, len(tasks), _GROUP)]

    def _conclude(self, run, results):
        self.image_shape_ = run.X.shape[1:]
        self.victim_ = run.victim
        self.classes_ = run.victim.classes_
        self.triggers_ = [result.trigger for result in results]
        self.norms_ = np.array([result.norm for result in results])
        self.success_rates_ = np.array([result.success_rate for result in results])
        self.converged_ = np.array([result.converged for result in results])
        self.reasons_ = [result.reason for result in results]
        judged = np.array([result.judged for result in results])
        self.anomaly_indices_ = np.full(len(results), np.nan)
        self.anomaly_indices_[judged], _ = anomaly_indices(
            self.norms_[judged], self.converged_[judged]
        )
        self.p_values_ = self._p_values(results, judged)
        self._set_verdict(self._flag())

    def _p_values(self, results, judged):
        p = np.full(len(results), np.nan)
        p[judged] = self._compare(
            [result for result in results if result.judged], len(results)
        )
        return p

    def _compare(self, results, n_candidates):
        """Return a p-value for each result, against those that are for reference."""
        return p_values(
            [result.norm for result in results],
            [result.converged for result in results],
            null=self._null,
            prior_sd=self._prior_sd,
            n_candidates=n_candidates,
            reference=np.array([result.reference for result in results]),
        )

    def _set_verdict(self, flagged):
        self.target_classes_ = self.classes_[flagged]
        if len(flagged):
            self.verdict_ = "backdoored"
        elif not self._is_conclusive():
            self.verdict_ = "inconclusive"
        else:
            self.verdict_ = "nothing found"
        self.target_class_ = self.classes_[flagged[0]] if len(flagged) else None
        self.trigger_ = self.triggers_[flagged[0]] if len(flagged) else None

    def _is_conclusive(self):
        """Tell whether the statistic that flags says anything."""
        return not np.isnan(self.p_values_).all()

    def _finish(self, run, results):
        """Do what is to be done for the classes flagged."""

    def transform(self, X):
        """Embed ``trigger_`` into every image.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of the shape and dtype of ``X``

        Raises
        ------
        ValueError
            If no target class was flagged, so that there is no trigger.
        """
        check_is_fitted(self)
        X = check_images(X, image_shape=self.image_shape_, ndim=4, allow_empty=True)
        if self.trigger_ is None:
            raise ValueError(
                f"no target class was flagged (verdict: {self.verdict_!r}), so there "
                "is no trigger to embed. triggers_ holds the estimate for each class."
            )
        return self.trigger_.embed(X)

    @contextmanager
    def _oracle(self, victim, bfloat16):
        """Open the network; yield a function from images to scores."""
        with victim.differentiable(bfloat16=bfloat16) as logits:
            yield logits

    @abstractmethod
    def _check_params(self):
        """Validate the settings of the search."""

    @abstractmethod
    def _open_search(self, problem, tasks, generators, stage, **options):
        """Return the Search for some tasks at a stage of the schedule."""

    @abstractmethod
    def _flag(self):
        """Return the positions of the target classes, the most anomalous first."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.target_tags.required = True
        return tags


def _warn_of_few(y):
    labels, counts = np.unique(y, return_counts=True)
    if counts.min() < _FEW:
        warnings.warn(
            f"D_Defense has only {counts.min()} image(s) of class "
            f"{labels[counts.argmin()]}: a trigger that fits so few may be smaller "
            "than one that works, for clean classes too, so the verdict is less sure. "
            "Add clean images if you can.",
            stacklevel=3,
        )


def _check_answers(victim, X, y):
    """Refuse a victim that cannot be searched; return the forward passes it took."""
    classes = victim.classes_
    labels = victim.predict(X)
    if len(np.unique(labels)) == 1:
        raise ValueError(
            f"the victim answers class {labels[0]} for all {len(X)} images of "
            "D_Defense, so that no trigger can be told from none. Are its weights "
            "loaded, and is the normalisation that it was trained with inside it?"
        )
    accuracy = np.mean(labels == classes[y])
    if accuracy < min(0.5, 2 / len(classes)):
        warnings.warn(
            f"the victim is right on {accuracy:.0%} of D_Defense: the labels, their "
            "order (VictimNetwork(classes=...)) or the normalisation may be wrong, and "
            "then the verdict means little.",
            stacklevel=3,
        )
    return len(X)


def _bfloat16_holds(victim, X):
    """Return whether bfloat16 pays and gives the same labels, and the passes taken."""
    network = victim.network_
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    on_processor = victim.device_.type == "cpu"  # not tried on other devices
    if n_parameters < _BIG or not on_processor or not processor_has_bfloat16():
        return False, 0
    images = to_tensor(X[:: -(-len(X) // 64)], victim.device_)
    with torch.no_grad():
        with victim.differentiable() as logits:
            exact = logits(images).argmax(1)
        with victim.differentiable(bfloat16=True) as logits:
            rounded = logits(images)
    same = (rounded.argmax(1) == exact).float().mean()
    holds = bool(same >= _BFLOAT16_PARITY) and not rounded.isnan().any()
    return bool(holds), 2 * len(images)
