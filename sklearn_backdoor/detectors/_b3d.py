"""B3D in flight: how far the estimated trigger moves the victim's answer."""

import numpy as np
from sklearn.base import clone

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor.detectors._base import BaseDetector
from sklearn_backdoor.embedding import resolve_trigger
from sklearn_backdoor.reverse._b3d import BlackBox, _open_victim


class B3DDetector(BaseDetector):
    """Score an image by how little the estimated trigger moves the victim's answer.

    The score is minus the L2 distance between the probabilities of the image and of the
    image with the trigger: an image that carries the trigger already hardly moves.
    **It may fail where it matters**: clean images of the target class hardly move
    either, since the trigger leads to where they are.

    Parameters
    ----------
    victim : VictimNetwork or fitted classifier
        A `VictimNetwork` is cloned. Anything else that has ``predict_proba`` and
        ``classes_`` is **used as it is**, as in `B3DReverseEngineer`.
    trigger : Trigger or reverse engineer
        A trigger value needs ``target_class``; a reverse engineer, such as
        ``B3DReverseEngineer(victim)``, is cloned and fitted.
    target_class : label, default=None
        Where the trigger leads. With a reverse engineer, None takes the class that it
        finds.
    fpr : float in 0...1, default=0.05
        Fraction of clean images of the target class that may reach ``threshold_``.
    threshold : float, default=None
        Minus a distance; None sets it by ``fpr``.

    Attributes
    ----------
    trigger_ : Trigger
        What is embedded.
    target_class_ : label
        Where it leads.
    engineer_ : reverse engineer or None
        Fitted; None where ``trigger`` is a value.
    threshold_ : float
        Images that score this or more count as triggered.
    clean_scores_ : ndarray of shape (n_clean,), in -sqrt(2)...0
        Of the clean images that set it: of the target class, and classified to it.
    victim_ : object with ``predict`` and ``predict_proba``
        All that is seen of the victim.
    classes_ : ndarray of shape (n_classes,)
        The victim's labels, in logit order.
    image_shape_ : tuple (n_channels, height, width)
        Other shapes are refused from now on.
    n_passes_per_image_ : int
        Images sent to ``predict_proba`` for a score: 2.

    Notes
    -----
    `clone` shares the victim, which otherwise would lose what it learnt.

    Deviations from the source:

    - The distance is L2; what the source takes is not known to us.
    - The threshold is set on clean images of the target class, since triggered images
      have to be told from these.

    References
    ----------
    Dong, Yang, Deng, Pang, Xiao, Su, Zhu: Black-box detection of backdoor attacks with
    limited information and data. ICCV 2021, §3.
    """

    def __init__(self, victim, trigger, *, target_class=None, fpr=0.05, threshold=None):
        self.victim = victim
        self.trigger = trigger
        self.target_class = target_class
        self.fpr = fpr
        self.threshold = threshold

    def _open_victim(self, X, y):
        return BlackBox(_open_victim(self.victim, X, y))

    def _find_target(self, X, y):
        self.trigger_, target_class, self.engineer_ = resolve_trigger(
            self.trigger, self.target_class, X, y, classes=self.classes_
        )
        return target_class

    def _learn(self, X, y):
        self._ask(X[:1])  # a victim without answers is refused before all else
        self.n_passes_per_image_ = 2

    def _scores(self, X):
        before, after = (self._ask(images) for images in (X, self.trigger_.embed(X)))
        return -np.linalg.norm(before - after, axis=1)

    def _ask(self, X):
        probabilities = self.victim_.predict_proba(to_tensor(X).numpy())
        bad = ~np.isfinite(probabilities).all(axis=1)
        if bad.any():
            raise ValueError(
                f"the victim's predict_proba returned NaN or infinity for {bad.sum()} "
                f"of {len(X)} images, first for image {np.flatnonzero(bad)[0]}: an "
                "image without an answer cannot be scored. Repair the victim."
            )
        return probabilities

    def __sklearn_clone__(self):
        params = self.get_params(deep=False)
        shared = {"victim": params.pop("victim")}
        return type(self)(**shared, **clone(params, safe=False))
