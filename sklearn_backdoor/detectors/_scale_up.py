"""SCALE-UP: a backdoor's label survives brightening, an object's does not."""

import numpy as np

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.detectors._base import BaseDetector

_CHUNK = 1024  # scaled images that are held at once


class SCALEUPDetector(BaseDetector):
    """Flag images that keep their label when all pixels are multiplied.

    The scaled prediction consistency (SPC) is the fraction of scales n for which
    f(clip(n x, 0, 1)) = f(x). Nothing of the victim is used but its labels.

    Unlike `BackdoorGuard` it needs no reverse-engineered trigger. In return, it does
    not infer the source class, its threshold has to be set, and an image takes
    1 + ``len(scales)`` forward passes instead of one.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    scales : sequence of float, default=(3, 5, 7, 9, 11)
        Factors above 1.
    standardise : bool, default=True
        Whether the score is (SPC - mu_c) / sigma_c, where mean and standard deviation
        are those of clean images of the predicted class c: the source's data-limited
        version. False leaves the SPC itself: the data-free one.
    fpr : float in 0...1, default=0.05
        False positive rate on the clean images that the threshold is set for.
    threshold : float, default=None
        Taken as it is where given; 0.5 is the published one, with and without
        ``standardise``.
    target_class : label, default=None
        Sets the threshold on clean images of this class alone that the victim gets
        right: those that are judged where only images sent to a known target are.

    Attributes
    ----------
    victim_ : VictimNetwork
        Fitted.
    classes_ : ndarray of shape (n_classes,)
        The victim's labels, in logit order.
    means_, deviations_ : ndarray of shape (n_classes,)
        Of the SPC, 0...1, for each predicted class; only with ``standardise=True``.
    clean_scores_ : ndarray of shape (n_calibration,)
        Scores of the clean images that set the threshold: fractions in 0...1, or
        standard deviations.
    threshold_ : float
        Images that score as high are flagged.
    n_passes_per_image_ : int
        Forward passes an image: 1 + ``len(scales)``.

    Notes
    -----
    Images of pure black and white do not change when scaled: their SPC is 1.

    Deviations from the source:

    - Scale 1, which the published script includes, always agrees and is refused; its
      uniform noise is left out.
    - Mean and standard deviation are taken from clean images that the victim gets
      right; a class with one such image or none takes those of all classes together.
    - A standard deviation of 0 is replaced by that of all classes together, or, where
      this is 0 too, by the smallest step of the SPC, 1 / ``len(scales)``.

    References
    ----------
    Guo, Li, Chen, Guo, Sun, Liu: SCALE-UP: An efficient black-box input-level backdoor
    detection via analyzing scaled prediction consistency. ICLR 2023.
    """

    def __init__(
        self,
        victim,
        *,
        scales=(3, 5, 7, 9, 11),
        standardise=True,
        fpr=0.05,
        threshold=None,
        target_class=None,
    ):
        self.victim = victim
        self.scales = scales
        self.standardise = standardise
        self.fpr = fpr
        self.threshold = threshold
        self.target_class = target_class

    def _check_params(self):
        if not hasattr(self.scales, "__len__") or len(self.scales) == 0:
            raise ValueError(
                f"scales={self.scales!r}, expected a sequence of one factor or more, "
                "such as (3, 5, 7, 9, 11)."
            )
        for position, scale in enumerate(self.scales):
            name = f"scales[{position}]"
            if check_number(scale, name, 1, np.finfo(np.float32).max) == 1:
                raise ValueError(
                    f"{name}=1 does not change an image, so that its label always "
                    "agrees. Give factors above 1."
                )

    def _learn(self, X, y):
        self.n_passes_per_image_ = 1 + len(self.scales)
        if not self.standardise:
            return
        labels, agreements = self._count_agreements(X)
        right = labels == y
        if not right.any():
            raise ValueError(
                "the victim gets no image of D_Defense right, so there is nothing "
                "to standardise by. Check the labels y, or set standardise=False."
            )
        self._learn_moments(labels[right], agreements[right])

    def _learn_moments(self, labels, agreements):
        # in whole agreements: of equal fractions, rounding makes a deviation above 0
        pooled = agreements.std() or 1.0
        moments = []
        for label in self.classes_:
            of_class = agreements[labels == label]
            if len(of_class) <= 1:
                moments.append((agreements.mean(), pooled))
            else:
                moments.append((of_class.mean(), of_class.std() or pooled))
        self.means_, self.deviations_ = np.array(moments).T / len(self.scales)

    def _scores(self, X):
        return self._standardised(*self._count_agreements(X))

    def _standardised(self, labels, agreements):
        consistency = agreements / len(self.scales)
        if not self.standardise:
            return consistency
        order = np.argsort(self.classes_)
        c = order[np.searchsorted(self.classes_, labels, sorter=order)]
        return (consistency - self.means_[c]) / self.deviations_[c]

    def _count_agreements(self, X):
        """Return the labels f(x), and for how many scales they stay."""
        labels = self.victim_.predict(X)
        agreements = np.zeros(len(X), dtype=int)
        for start in range(0, len(X), _CHUNK):
            rows = slice(start, start + _CHUNK)
            images = to_tensor(X[rows]).numpy()
            for scale in self.scales:
                scaled = np.clip(scale * images, 0, 1)
                agreements[rows] += self.victim_.predict(scaled) == labels[rows]
        return labels, agreements
