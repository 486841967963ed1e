"""STRIP: a trigger survives blending with other images, an object does not."""

import numpy as np
from scipy.special import entr
from scipy.stats import norm
from sklearn.utils import check_random_state

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.detectors._base import BaseDetector

BLENDS = ("average", "add")
NULLS = ("empirical", "normal")
_CHUNK = 1024  # blended images that are held at once


class STRIPDetector(BaseDetector):
    """Flag images whose label stays certain when other images are blended in.

    The score is minus the mean entropy (natural logarithm) over classes of the
    victim's softmax, over blends with clean images.

    Unlike `BackdoorGuard` it needs no reverse-engineered trigger. In return, it does
    not infer the source class, its threshold has to be set, and an image takes
    ``n_blends`` forward passes instead of one.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    n_blends : int, default=100
        Clean images that each image is blended with; two at least.
    blend : {"average", "add"}, default="average"
        "average" is the paper's: (1 - ``weight``) times the image plus ``weight`` times
        the clean image. "add" is the published code's: their sum, clipped to 0...1.
    weight : float in 0...1, default=0.5
        The clean image's weight; only with ``blend="average"``.
    null : {"empirical", "normal"}, default="empirical"
        Where the threshold comes from: a quantile of the clean images' scores, or of a
        normal distribution fitted to them. The published code takes the latter at
        ``fpr=0.01``.
    fpr : float in 0...1, default=0.05
        False positive rate on the clean images that the threshold is set for.
    threshold : float, default=None
        Taken as it is where given: minus an entropy, thus not positive.
    target_class : label, default=None
        Sets the threshold on clean images of this class alone that the victim gets
        right: those that are judged where only images sent to a known target are.
    random_state : int, RandomState instance or None, default=0
        Which clean images are blended in.

    Attributes
    ----------
    victim_ : VictimNetwork
        Fitted.
    classes_ : ndarray of shape (n_classes,)
        The victim's labels, in logit order.
    overlays_ : ndarray of shape (n_blends, n_channels, height, width), float32 in 0...1
        The clean images that are blended in.
    clean_scores_ : ndarray of shape (n_calibration,)
        Scores, in nats, of the clean images that set the threshold.
    threshold_ : float
        Images that score as high are flagged.
    n_passes_per_image_ : int
        Forward passes an image: ``n_blends``.

    Notes
    -----
    Deviations from the source:

    - The clean images to blend with are drawn once, in ``fit``, instead of afresh for
      each image: a score depends neither on the batch nor on the call.
    - Where D_Defense has fewer than ``n_blends`` images, each is taken about equally
      often.
    - An image of D_Defense is not blended with itself when the threshold is set, since
      no image is in use; its mean is then over fewer blends.

    References
    ----------
    Gao, Xu, Wang, Chen, Ranasinghe, Nepal: STRIP: A defence against trojan attacks on
    deep neural networks. ACSAC 2019, §4.
    """

    def __init__(
        self,
        victim,
        *,
        n_blends=100,
        blend="average",
        weight=0.5,
        null="empirical",
        fpr=0.05,
        threshold=None,
        target_class=None,
        random_state=0,
    ):
        self.victim = victim
        self.n_blends = n_blends
        self.blend = blend
        self.weight = weight
        self.null = null
        self.fpr = fpr
        self.threshold = threshold
        self.target_class = target_class
        self.random_state = random_state

    def _check_params(self):
        check_number(self.n_blends, "n_blends", 2, integer=True)
        check_number(self.weight, "weight", 0, 1)
        if self.blend not in BLENDS:
            raise ValueError(
                f"blend={self.blend!r}, expected one of {', '.join(BLENDS)}."
            )
        if self.null not in NULLS:
            raise ValueError(f"null={self.null!r}, expected one of {', '.join(NULLS)}.")

    def _learn(self, X, y):
        if len(X) < 2:
            raise ValueError(
                "D_Defense holds one image, which would be blended with itself. Give "
                "at least two clean images, better a hundred."
            )
        order = check_random_state(self.random_state).permutation(len(X))
        rows = np.resize(order, self.n_blends)  # repeats only where there are too few
        self.overlays_ = to_tensor(X[rows]).numpy()
        self._overlay_rows = rows
        self.n_passes_per_image_ = self.n_blends

    def _score_clean(self, X, rows):
        return self._scores(X[rows], rows)

    def _scores(self, X, rows=None):
        """Return minus the mean entropy; ``rows`` says which of D_Defense X are."""
        n_pairs = len(X) * len(self.overlays_)
        totals, counts = np.zeros(len(X)), np.zeros(len(X))
        for start in range(0, n_pairs, _CHUNK):
            pairs = np.arange(start, min(start + _CHUNK, n_pairs))
            image, overlay = np.divmod(pairs, len(self.overlays_))
            if rows is not None:
                differ = self._overlay_rows[overlay] != rows[image]
                image, overlay = image[differ], overlay[differ]
            blended = self._blend(to_tensor(X[image]).numpy(), self.overlays_[overlay])
            entropies = entr(self.victim_.predict_proba(blended)).sum(axis=1)
            np.add.at(totals, image, entropies)
            np.add.at(counts, image, 1)
        return -totals / counts

    def _blend(self, images, overlays):
        if self.blend == "average":
            return (1 - self.weight) * images + self.weight * overlays
        return np.clip(images + overlays, 0, 1)

    def _set_threshold(self):
        if self.threshold is not None or self.null == "empirical":
            return super()._set_threshold()
        if np.ptp(self.clean_scores_) == 0:
            raise ValueError(
                f"null='normal' cannot be fitted: the {len(self.clean_scores_)} clean "
                "image(s) for the threshold all have the same score. Choose "
                "null='empirical', or give more clean images."
            )
        mean, deviation = norm.fit(self.clean_scores_)
        return float(norm.isf(self.fpr, mean, deviation))
