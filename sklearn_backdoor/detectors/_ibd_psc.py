"""IBD-PSC: a backdoor's confidence survives amplified batch-norm parameters."""

import warnings

import numpy as np
import torch
from scipy.special import softmax
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_backdoor._exclusive import evaluation_mode
from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.detectors._base import BaseDetector


class IBDPSCDetector(BaseDetector):
    """Flag images that stay confident when the last batch-norm layers are amplified.

    The parameter-oriented scaling consistency (PSC) is the mean, over versions of the
    victim in which gamma and beta of the last few batch-norm layers are multiplied by
    ``scale``, of the softmax probability of the label that the victim itself gives.

    Unlike `BackdoorGuard` it needs no reverse-engineered trigger. In return, it does
    not infer the source class, its threshold has to be set, an image takes
    1 + ``n_models`` forward passes instead of one, and the network must have
    batch-norm layers.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    n_models : int, default=5
        Amplified versions; fewer where there are too few layers.
    scale : float of at least 1, default=1.5
        Factor of gamma and beta.
    max_error : float in 0...1, default=0.6
        k is the smallest number of amplified layers with a higher error rate than this
        on D_Defense.
    start : {0, 1}, default=1
        The first version amplifies k + ``start`` layers: 1 is the published code's, 0
        the paper's wording.
    fpr : float in 0...1, default=0.05
        False positive rate on the clean images that the threshold is set for.
    threshold : float, default=None
        Taken as it is where given; 0.9 is the published one.
    target_class : label, default=None
        Sets the threshold on clean images of this class alone that the victim gets
        right: those that are judged where only images sent to a known target are.

    Attributes
    ----------
    victim_ : VictimNetwork
        Fitted.
    classes_ : ndarray of shape (n_classes,)
        The victim's labels, in logit order.
    layers_ : list of str
        Names of the batch-norm layers, the last one executed first.
    n_amplified_ : list of int
        How many of the first ``layers_`` each version amplifies.
    clean_scores_ : ndarray of shape (n_calibration,)
        Scores, probabilities in 0...1, of the clean images that set the threshold.
    threshold_ : float
        Images that score as high are flagged.
    n_passes_per_image_ : int
        Forward passes an image: 1 + the number of versions.

    Warns
    -----
    UserWarning
        From ``fit``, if no number of layers makes the error rate high enough; the
        last versions that there can be are then taken.

    Notes
    -----
    Deviations from the source:

    - Layers count in the order in which they are executed, not registered; one that is
      executed more than once counts by its last time. Batch norm of any dimension
      counts; without learnt gamma and beta it does not.
    - Where there are too few layers after the k-th, there are fewer versions, never two
      alike.

    References
    ----------
    Hou, Feng, Hua, Luo, Zhang, Li: IBD-PSC: Input-level backdoor detection via
    parameter-oriented scaling consistency. ICML 2024.
    """

    def __init__(
        self,
        victim,
        *,
        n_models=5,
        scale=1.5,
        max_error=0.6,
        start=1,
        fpr=0.05,
        threshold=None,
        target_class=None,
    ):
        self.victim = victim
        self.n_models = n_models
        self.scale = scale
        self.max_error = max_error
        self.start = start
        self.fpr = fpr
        self.threshold = threshold
        self.target_class = target_class

    def _check_params(self):
        check_number(self.n_models, "n_models", 1, integer=True)
        check_number(self.scale, "scale", 1, np.finfo(np.float32).max)
        check_number(self.max_error, "max_error", 0, 1)
        check_number(self.start, "start", 0, 1, integer=True)

    def _learn(self, X, y):
        self.layers_ = self._find_layers(X[:2])
        self.n_amplified_ = self._choose_versions(X, y)
        self.n_passes_per_image_ = 1 + len(self.n_amplified_)

    def _find_layers(self, X):
        network = self.victim_.network_
        calls: list[str] = []
        handles = [
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
            for name, module in network.named_modules()
            if isinstance(module, _BatchNorm) and module.weight is not None
        ]
        try:
            self.victim_.decision_function(X)
        finally:
            for handle in handles:
                handle.remove()
        if not calls:
            raise ValueError(
                "the network executes no batch-norm layer with learnt gamma and beta, "
                "so there is nothing to amplify. Use STRIPDetector or SCALEUPDetector, "
                "which take any network."
            )
        return list(dict.fromkeys(reversed(calls)))

    def _choose_versions(self, X, y):
        n_layers = len(self.layers_)
        for k in range(1, n_layers):
            found = self.classes_[self._logits(X, k).argmax(axis=1)]
            if np.mean(found != y) > self.max_error:
                first = k + self.start
                return list(range(first, min(first + self.n_models, n_layers + 1)))
        versions = list(range(max(1, n_layers - self.n_models + 1), n_layers + 1))
        warnings.warn(
            f"amplifying fewer than all {n_layers} batch-norm layer(s) by "
            f"scale={self.scale} never gives an error rate above max_error="
            f"{self.max_error} on D_Defense; the last {versions[0]} to {versions[-1]} "
            "are amplified, and scores may tell little. Raise scale, or lower "
            "max_error.",
            UserWarning,
            stacklevel=4,  # the caller of fit
        )
        return versions

    def _scores(self, X):
        rows = np.arange(len(X))
        label = self.victim_.decision_function(X).argmax(axis=1)
        total = sum(
            softmax(self._logits(X, n_layers), axis=1)[rows, label]
            for n_layers in self.n_amplified_
        )
        return total / len(self.n_amplified_)

    def _logits(self, X, n_layers):
        """Return the logits with the last ``n_layers`` layers amplified."""
        opened, size = self.victim_._opened, self.victim_.batch_size
        logits = []
        with evaluation_mode(opened.network), torch.no_grad():
            amplified = {
                f"network.{layer}.{name}": self.scale * value
                for layer in self.layers_[:n_layers]
                for name, value in opened.network.get_submodule(
                    layer
                ).named_parameters()
            }
            for start in range(0, len(X), size):
                images = to_tensor(X[start : start + size], self.victim_.device_)
                # by module, also where two share their parameters
                found, _ = functional_call(
                    opened, amplified, (images,), tie_weights=False
                )
                logits.append(found.double().cpu().numpy())
        return self._check_finite(np.concatenate(logits))

    def _check_finite(self, logits):
        if not np.isfinite(logits.max(axis=1)).all():
            raise ValueError(
                f"the network overflows with batch norm amplified by scale="
                f"{self.scale}. Lower scale, or use float32."
            )
        return logits
