"""Neural Cleanse in flight: the neurons that the estimated trigger raises."""

import math

import numpy as np

from sklearn_backdoor._validation import check_number
from sklearn_backdoor.detectors._base import BaseDetector
from sklearn_backdoor.embedding import resolve_trigger
from sklearn_backdoor.reverse import NCReverseEngineer


class NCActivationDetector(BaseDetector):
    """Score an image by the neurons that the estimated trigger raises most.

    The penultimate neurons are ranked by how much the trigger raises their mean
    activation on clean images of all classes but the target's; the mean activation of
    the first few, for the image as it arrives, is the score.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    trigger : Trigger, reverse engineer or None, default=None
        A trigger value needs ``target_class``; a reverse engineer is cloned and
        fitted. None takes ``NCReverseEngineer(victim)``.
    target_class : label, default=None
        Where the trigger leads. With a reverse engineer, None takes the class that it
        finds.
    fraction : float in 0...1, default=0.01
        Of the penultimate neurons that are kept, rounded up; one at least.
    fpr : float in 0...1, default=0.05
        Fraction of clean images of the target class that may reach ``threshold_``.
    threshold : float, default=None
        A mean activation; None sets it by ``fpr``.
    random_state : int, RandomState instance or None, default=0
        Of the default reverse engineer.

    Attributes
    ----------
    trigger_ : Trigger
        By which the neurons were ranked.
    target_class_ : label
        Where it leads.
    engineer_ : reverse engineer or None
        Fitted; None where ``trigger`` is a value.
    neurons_ : ndarray of shape (n_kept,) of int
        Columns of the victim's features, the most raised first.
    threshold_ : float
        Images that score this or more count as triggered.
    clean_scores_ : ndarray of shape (n_clean,)
        Of the clean images that set it: of the target class, and classified to it.
    victim_ : VictimNetwork
        Fitted.
    classes_ : ndarray of shape (n_classes,)
        The victim's labels, in logit order.
    image_shape_ : tuple (n_channels, height, width)
        Other shapes are refused from now on.
    n_passes_per_image_ : int
        Forward passes that a score takes: 1.

    Notes
    -----
    The source gives neither the images to rank the neurons on nor a threshold. Here:

    - The rise is measured on images of all classes but the target's, which the trigger
      is meant for.
    - Neurons are the victim's features, pooled where the layer is convolutional.
    - The threshold is set on clean images of the target class, since triggered images
      have to be told from these.

    References
    ----------
    Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: identifying and
    mitigating backdoor attacks in neural networks. S&P 2019, §VI-A.
    """

    def __init__(
        self,
        victim,
        trigger=None,
        *,
        target_class=None,
        fraction=0.01,
        fpr=0.05,
        threshold=None,
        random_state=0,
    ):
        self.victim = victim
        self.trigger = trigger
        self.target_class = target_class
        self.fraction = fraction
        self.fpr = fpr
        self.threshold = threshold
        self.random_state = random_state

    def _check_params(self):
        check_number(self.fraction, "fraction", 0, 1)

    def _find_target(self, X, y):
        trigger = self.trigger
        if trigger is None:
            trigger = NCReverseEngineer(self.victim, random_state=self.random_state)
        self.trigger_, target_class, self.engineer_ = resolve_trigger(
            trigger, self.target_class, X, y, classes=self.classes_
        )
        return target_class

    def _learn(self, X, y):
        sources = y != self.target_class_
        if not sources.any():
            raise ValueError(
                f"all {len(X)} images of D_Defense are of target class "
                f"{self.target_class_}, so there is none on which to measure what the "
                "trigger raises. Add clean images of other classes."
            )
        clean, stamped = (
            self.victim_.transform(images).mean(axis=0)
            for images in (X[sources], self.trigger_.embed(X[sources]))
        )
        rise = stamped - clean
        # rounded first: 0.07 * 100 is a little more than 7
        n_kept = max(1, math.ceil(round(self.fraction * len(rise), 6)))
        self.neurons_ = np.argsort(-rise, kind="stable")[:n_kept]
        self.n_passes_per_image_ = 1

    def _scores(self, X):
        return self.victim_.transform(X)[:, self.neurons_].mean(axis=1)
