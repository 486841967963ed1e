"""What all reverse engineers share: validation, the loop over classes, the verdict."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from sklearn_backdoor._torch import to_tensor, torch_generator
from sklearn_backdoor._validation import check_images, check_labels
from sklearn_backdoor.reverse._anomaly import anomaly_indices
from sklearn_backdoor.triggers import Trigger
from sklearn_backdoor.victim import check_victim


class ImagePasses(NamedTuple):
    """Images that went through the network, forward and backward."""

    forward: int
    backward: int


class SearchResult(NamedTuple):
    """What the search for one candidate target class found."""

    trigger: Trigger
    norm: float
    success_rate: float
    converged: bool
    passes: ImagePasses


class BaseReverseEngineer(TransformerMixin, BaseEstimator, ABC):
    """Search a trigger for each class, then ask which is abnormally small.

    A subclass implements ``_search_class``.
    """

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
            If images, labels, victim or settings do not fit each other.
        """
        self._check_params()
        X = check_images(X, ndim=4)
        victim = check_victim(self.victim).fit(X, y)
        classes = victim.classes_
        y = check_labels(y, classes, len(X), all_present=True, min_per_class=2)

        # images of the candidate itself prove nothing and are left out
        seeds = check_random_state(self.random_state).randint(
            2**31 - 1, size=len(classes)
        )
        results = []
        with (
            victim.differentiable() as logits,
            tqdm(total=len(classes), disable=None if self.verbose else True) as bar,
        ):
            for index, label in enumerate(classes):
                bar.set_description(f"{type(self).__name__}, class {label}")
                images = to_tensor(X[y != label], victim.device_)
                generator = torch_generator(int(seeds[index]))
                result = self._search_class(logits, images, index, generator, bar)
                results.append(result)
                bar.set_postfix(success=result.success_rate, norm=result.norm)
                bar.update()

        self.image_shape_ = X.shape[1:]
        self.victim_ = victim
        self.classes_ = classes
        self._conclude(results)
        return self

    def _conclude(self, results):
        triggers, norms, rates, converged, passes = zip(*results, strict=True)
        self.triggers_ = list(triggers)
        self.norms_ = np.array(norms)
        self.success_rates_ = np.array(rates)
        self.converged_ = np.array(converged)
        self.n_image_passes_ = ImagePasses(*map(sum, zip(*passes, strict=True)))
        self.anomaly_indices_, below = anomaly_indices(self.norms_, self.converged_)
        flagged = np.flatnonzero(below & (self.anomaly_indices_ > self.threshold))
        flagged = flagged[np.argsort(-self.anomaly_indices_[flagged], kind="stable")]
        self.target_classes_ = self.classes_[flagged]
        if len(flagged):
            self.verdict_ = "backdoored"
        elif np.isnan(self.anomaly_indices_).all():
            self.verdict_ = "inconclusive"
        else:
            self.verdict_ = "nothing found"
        self.target_class_ = self.classes_[flagged[0]] if len(flagged) else None
        self.trigger_ = self.triggers_[flagged[0]] if len(flagged) else None

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

    def _check_params(self):
        """Validate the settings of the search."""

    @abstractmethod
    def _search_class(self, logits, images, target, generator, bar):
        """Search a trigger that sends images to one class.

        Parameters
        ----------
        logits : callable
            From images (tensor) to logits, differentiable.
        images : torch.Tensor of shape (n_samples, n_channels, height, width)
            Clean, float32 in 0...1, none of the target class.
        target : int
            Index of the candidate target class.
        generator : torch.Generator
            All randomness of this class's search.
        bar : tqdm
            For progress.

        Returns
        -------
        SearchResult
        """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.target_tags.required = True
        return tags
