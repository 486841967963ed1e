"""Triggers that left a trace in the statistics of batch-norm."""

import warnings
from typing import Any

import numpy as np

from sklearn_backdoor._torch import borrowed_random_state
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._search import ImagePasses
from sklearn_backdoor.reverse._statistics import (
    Comparison,
    features_of,
    layer_statistics,
)
from sklearn_backdoor.reverse._traces import (
    TraceReverseEngineer,
    chosen_layers,
    images_meant,
)

_MIN_LAYERS = 3
_MUCH = 3.0  # standard errors
_CROP = 8  # as many times the padding before a crop is the side
_CLEARLY_LESS = 0.5  # has to be left by an augmentation, of what is without
_CLEAR = 0.5  # of the clearest trace: less clear ones are not named


def can_be_compared(victim, X):
    """Tell whether there are enough layers of batch-norm.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    X : ndarray of shape (n_samples, n_channels, height, width)
        Of which one image is passed.

    Returns
    -------
    bool
    """
    return len(layer_statistics(victim, X[:1])) >= _MIN_LAYERS


def usual_augmentations(image_shape):
    """Return transforms that networks are often trained with, by name.

    Parameters
    ----------
    image_shape : tuple (n_channels, height, width)

    Returns
    -------
    dict from str to callable or None
    """
    from torchvision.transforms import v2  # slow to import

    side = image_shape[1:]
    padding = [-(-side[1] // _CROP), -(-side[0] // _CROP)]  # left and right, top ...
    flip, crop = v2.RandomHorizontalFlip(), v2.RandomCrop(side, padding=padding)
    return {
        "none": None,
        "flip": flip,
        "crop": crop,
        "crop, flip": v2.Compose([crop, flip]),
        "resized crop, flip": v2.Compose([v2.RandomResizedCrop(side), flip]),
    }


class BatchNormReverseEngineer(TraceReverseEngineer):
    """Find the trigger that left a trace in batch-norm's statistics.

    Batch-norm keeps the means that its inputs had while the network was trained, on
    poisoned images too. These differ from the means on clean images by what the
    attacker's trigger does inside the network, thinned by the share of poisoned images.
    So patches and additive perturbations are searched for each class, as small as may
    be, and each is asked for its trace: is what it does inside the network part of that
    difference? A perturbation that fools the network as it would fool any other was not
    there in training, and left none, however small it is. Norms only tell which of the
    classes with clear traces the trigger leads to.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered. With three layers of batch-norm
        at least.
    augmentation : {"auto", "none"} or callable, default="auto"
        What the training did to its images, which clean ones have to undergo too. A
        callable takes and returns a tensor of shape (n_channels, height, width) in
        0...1, as torchvision's transforms. "auto" takes, of none, flips, crops of
        padded images and resized crops, what explains the statistics best: none,
        unless another leaves less than half of the difference.
    alpha : float in 0...1, default=0.05
        A class with a p-value below is flagged.
    n_jobs, random_state, verbose, checkpoint_dir
        As in `NCReverseEngineer`.

    Attributes
    ----------
    traces_ : ndarray of shape (n_classes,)
        How clear the clearest trace of a class's triggers is, in standard errors.
    layers_ : list of str
        Layers that were compared: the first, the last, and up to six between.
    augmentation_ : str
        That was taken.
    mismatch_ : float
        Root mean square of the first layer's difference, in standard errors: above 1
        where clean images are not like those of the training.
    share_sd_ : float in 0.1...1.5
        How much the classes' shares of the training images seem to differ, relative
        standard deviation; allowed for.
    triggers_ : list of PatchTrigger or AdditiveTrigger
        For each class, the one with the clearest trace; refined for the class flagged.
    norms_ : ndarray of shape (n_classes,)
        Their norms, L1 of masks and L2 of perturbations.
    p_values_ : ndarray of shape (n_classes,)
        Probability that chance makes a trace as clear as the clearest, among as many
        triggers that share as much of what they do inside the network. It is given to
        one class, 1 to the others: of the triggers whose traces are at least half as
        clear as the clearest, the one with the largest ratio of trace to norm, in
        medians of its search, names it.
    source_weights_, single_sources_
        As in `NCReverseEngineer`, of the searches that found the triggers.
    others
        As in `NCReverseEngineer`, without those of pairs; anomaly indices are NaN.

    Notes
    -----
    - The difference is taken for normal. Its covariance adds up what chance there is:
      the sampling error of the clean images and of the last mini-batches (32 images
      each, or more), and the classes' shares of the training. A trace is a matched
      filter's score: the best linear estimate of the trigger's share of the training,
      over its standard error. It is compared with Student's t. Where the difference as
      a whole is larger than by chance, so is the error; and where there are many
      features for few images, by a factor with which one of 60 clean networks is
      flagged.
    - In `AutoReverseEngineer` it takes the triggers that the other searches found.
    - Statistics that are not of the training, as of a network whose batch-norm was
      frozen while it was fine-tuned, show as a large ``mismatch_``, of which a warning
      tells above 3, and prove little.
    - That the statistics differ at backdoored channels is known, and used to prune
      these; to ask them for found triggers, and the test, are ours.

    References
    ----------
    Zheng, Tang, Li, Liu: Pre-activation distributions expose backdoor neurons. NeurIPS
    2022.
    """

    def __init__(
        self,
        victim,
        *,
        augmentation="auto",
        alpha=0.05,
        n_jobs=None,
        random_state=0,
        verbose=False,
        checkpoint_dir=None,
    ):
        self.victim = victim
        self.augmentation = augmentation
        self.alpha = alpha
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir

    def _check_params(self):
        check_number(self.alpha, "alpha", 0, 1)
        if self.augmentation not in ("auto", "none") and not callable(
            self.augmentation
        ):
            raise ValueError(
                f"augmentation={self.augmentation!r}, expected 'auto', 'none' or a "
                "callable from an image to an image."
            )

    def _ask(self, run, found):
        comparison = self._explain(run)
        self.layers_ = comparison.names
        self.mismatch_ = float(np.sqrt(comparison.sizes()[0]))
        self.share_sd_ = comparison.share_sd()
        if self.mismatch_ > _MUCH:
            warnings.warn(
                f"what batch-norm stored in layer {comparison.names[0]} is "
                f"{self.mismatch_:.1f} standard errors from what it is on D_Defense, "
                "so that its statistics prove little: the training's images were "
                "others. If they were augmented, name the transform: "
                "BatchNormReverseEngineer(augmentation=...).",
                stacklevel=4,
            )
        converged = np.array([[r.converged for r in results] for *_, results in found])
        traces = np.full(converged.shape, -np.inf)
        effects = self._effects(run, found, converged)
        traces[converged] = comparison.scores(effects, self.share_sd_)
        chosen = traces.argmax(axis=0)
        best = traces.max(axis=0)
        self.traces_ = np.where(converged.any(axis=0), best, np.nan)
        p, named = np.nan, 0
        if converged.any():
            p = comparison.p_value(best.max(), effects, self.share_sd_)
            norms = np.array([engineer.norms_ for engineer, *_ in found])
            named = _clear_and_small(traces, norms, converged)
        return self._answer(found, chosen, named, p)

    def _effects(self, run, found, converged):
        """Return by how much each converged trigger moves the layers' features."""
        clean = self._features(run, run.X)
        effects = []
        for (*_, results), usable in zip(found, converged, strict=True):
            for target in np.flatnonzero(usable):
                rows = images_meant(run, results[target], target)
                stamped = results[target].trigger.embed(run.X[rows])
                moved = self._features(run, stamped) - clean[rows]
                effects.append(moved.mean(axis=0))
        return np.array(effects).reshape(-1, clean.shape[1])

    def _features(self, run, X):
        run.passes += ImagePasses(len(X), 0)
        return features_of(chosen_layers(layer_statistics(run.victim, X)))

    def _explain(self, run):
        """Compare under the augmentation that leaves the least difference."""
        if self.augmentation == "auto":
            candidates = usual_augmentations(run.X.shape[1:])
        elif self.augmentation == "none":
            candidates = {"none": None}
        else:
            candidates = {repr(self.augmentation): self.augmentation}
        best: Any = None
        least = plain = np.inf
        for name, transform in candidates.items():
            with borrowed_random_state(run.seeds[0]):
                layers = layer_statistics(run.victim, run.X, transform)
            run.passes += ImagePasses(len(run.X), 0)
            if len(layers) < _MIN_LAYERS:
                raise ValueError(
                    f"the network has {len(layers)} layer(s) of batch-norm with "
                    "statistics, three are needed. Use another reverse engineer."
                )
            found = Comparison(chosen_layers(layers), run.y, len(run.victim.classes_))
            left = np.median(found.sizes())
            if best is None or left < min(least, _CLEARLY_LESS * plain):
                best, least, self.augmentation_ = found, left, name
            if transform is None:
                plain = left
        return best


def _clear_and_small(traces, norms, converged):
    """Return the class whose trigger has the clearest trace for its size.

    Parameters
    ----------
    traces, norms, converged : ndarray of shape (n_searches, n_classes)
    """
    best = np.full(traces.shape, -np.inf)
    sizes = np.maximum(norms, 1e-9)
    enough = traces.max() - (1 - _CLEAR) * abs(traces.max())
    for number, usable in enumerate(converged):
        clear = usable & (traces[number] >= enough)
        if clear.any():
            usual = np.median(sizes[number, usable])
            best[number, clear] = traces[number, clear] * usual / sizes[number, clear]
    return int(best.max(axis=0).argmax())
