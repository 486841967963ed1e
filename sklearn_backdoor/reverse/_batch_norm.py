"""What poisoned images left behind in the statistics of batch-norm."""

import warnings
from typing import Any

import numpy as np

from sklearn_backdoor._torch import borrowed_random_state, to_tensor
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._additive import DETECTION_RATE
from sklearn_backdoor.reverse._anomaly import rank_by_p
from sklearn_backdoor.reverse._fast import FastReverseEngineer
from sklearn_backdoor.reverse._forms import AdditiveSearch
from sklearn_backdoor.reverse._search import ImagePasses, Task
from sklearn_backdoor.reverse._statistics import (
    Comparison,
    chance_of,
    layer_statistics,
    replay,
)

_N_IMAGES = 64  # on which a difference is replayed
_REPLAYED = 20.0  # times: what a twentieth of the training images left, as in all
_N_DRAWS = 60  # differences of chance
_MIN_LAYERS = 3
_N_LAYERS = 6  # of those between the first and the last
_MUCH = 3.0  # standard errors
_CROP = 8  # as many times the padding before a crop is the side
_CLEARLY_LESS = 0.5  # has to be left by an augmentation, of what is without


def can_be_compared(victim, X):
    """Tell whether there are layers between the first and the last of batch-norm.

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


class BatchNormReverseEngineer(FastReverseEngineer):
    """Find the target class by what poisoned images left in batch-norm's statistics.

    Batch-norm keeps the means that its inputs had while the network was trained, on
    poisoned images too. Where these differ from the means on clean images, the
    difference is what the trigger does inside the network, thinned by the share of
    poisoned images. Replayed twentyfold on clean images it leads them to the attacker's
    target; a difference of chance leads nowhere. Faint patterns over the whole image
    betray themselves so, and patches by the last layer, in which more images are taken
    for the target than the layers before it account for: without a search, and where
    none can tell a trigger from the perturbations that fool any network.

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
        Classes with a p-value below are flagged.
    n_jobs, random_state, verbose, checkpoint_dir
        As in `NCReverseEngineer`.

    Attributes
    ----------
    layers_ : list of str
        Layers whose difference was replayed: up to six between the first and the last,
        and the last.
    replays_ : ndarray of shape (n_layers, n_classes) in 0...1
        Mean probability of each class, on images of others, with a layer's difference
        added twentyfold.
    augmentation_ : str
        That was taken.
    mismatch_ : float
        Root mean square of the first layer's difference, in standard errors: above 1
        where clean images are not like those of the training. The null of the next
        layers is as much wider.
    share_sd_ : float in 0.1...1.5
        How much the classes' shares of the training images seem to differ, relative
        standard deviation: the null of the last layer allows for it.
    triggers_ : list of AdditiveTrigger
        For each class, the perturbation that `AdditiveReverseEngineer` finds for all
        sources with mini-batches of 16; refined for flagged classes.
    norms_ : ndarray of shape (n_classes,)
        Their L2 norms. The verdict does not depend on them.
    p_values_ : ndarray of shape (n_classes,)
        Probability that a difference of chance leads as many images to one class, for
        the layer with the smallest, corrected for the number of layers; 1 where no
        trigger was found.
    others
        As in `NCReverseEngineer`.

    Notes
    -----
    - Each layer is replayed by what the layers before it do not explain, so that more
      images of a class in the training, which show in all layers, are told from images
      that only the last ones take for it.
    - Chance is drawn for each network anew, 60 times a layer: the sampling error of the
      clean images and of the last mini-batches (32 images each, or more), and shares of
      classes that differ by a tenth, in the last layer by ``share_sd_``; wider where
      earlier layers differ by more than that. These and the factor of 20 were chosen by
      attacks of one seed and 60 clean networks, none of which is flagged at 0.01.
    - Little poison moves the means too little: where patches of one source class are a
      twentieth of the training images, most stay unseen.
    - Statistics that are not of the training, as of a network whose batch-norm was
      frozen while it was fine-tuned, show as a large ``mismatch_``, of which a warning
      tells above 3, and prove little.
    - That the statistics differ at backdoored channels is known, and used to prune
      these; that they point to the target, and the test, are ours.

    References
    ----------
    Zheng, Tang, Li, Liu: Pre-activation distributions expose backdoor neurons. NeurIPS
    2022.
    """

    _kind = AdditiveSearch
    sources = "all"
    success_rate = None
    max_steps = 60
    batch_size = 16

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
        super()._check_params()
        check_number(self.alpha, "alpha", 0, 1)
        if self.augmentation not in ("auto", "none") and not callable(
            self.augmentation
        ):
            raise ValueError(
                f"augmentation={self.augmentation!r}, expected 'auto', 'none' or a "
                "callable from an image to an image."
            )

    @property
    def _rate(self):
        return DETECTION_RATE

    def _search(self, run):
        self._compare_statistics(run)
        results = super()._search(run)
        # with many classes not all are searched; those that matter are
        suspects = rank_by_p(self._replayed_p, self.alpha).tolist()
        tasks = [Task(number) for number in suspects if not results[number].judged]
        found = run(self._grouped(tasks), "suspects") if tasks else []
        for task, result in zip(tasks, found, strict=True):
            results[task.target] = result._replace(reference=False)
        return results

    def _compare_statistics(self, run):
        """Replay what differs; set a p-value a class."""
        rng = np.random.default_rng(run.seeds)
        found = self._explain(run)
        self.mismatch_ = float(np.sqrt(found.sizes()[0]))
        self.share_sd_ = found.share_sd()
        if self.mismatch_ > _MUCH:
            warnings.warn(
                f"what batch-norm stored in layer {found.names[0]} is "
                f"{self.mismatch_:.1f} standard errors from what it is on D_Defense, "
                "so that its statistics prove little: the training's images were "
                "others. If they were augmented, name the transform: "
                "BatchNormReverseEngineer(augmentation=...).",
                stacklevel=4,
            )
        rows = rng.permutation(len(run.X))[:_N_IMAGES]
        images, y = to_tensor(run.X[rows], "cpu"), run.y[rows]
        p, replays = [], []
        for name, values, factor in found.discrepancies(self.share_sd_)[1:]:
            drawn = rng.standard_normal((_N_DRAWS, len(values))) @ factor.T
            shifts = _REPLAYED * np.vstack([values, drawn])
            rates = replay(run.victim, images, y, name, shifts)
            run.passes += ImagePasses(len(shifts) * len(rows), 0)
            replays.append(rates[0])
            p.append(chance_of(rates[0], rates[1:]))
        self.layers_ = found.names[1:]
        self.replays_ = np.array(replays)
        smallest = np.nan_to_num(p, nan=1.0).min(axis=0)
        self._replayed_p = np.minimum(1, smallest * len(p))

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
            found = Comparison(_chosen(layers), run.y, len(run.victim.classes_))
            left = np.median(found.sizes())
            if best is None or left < min(least, _CLEARLY_LESS * plain):
                best, least, self.augmentation_ = found, left, name
            if transform is None:
                plain = left
        return best

    def _p_values(self, results, judged):
        converged = np.array([result.converged for result in results])
        return np.where(converged, self._replayed_p, 1.0)

    def _flag(self):
        return rank_by_p(self.p_values_, self.alpha)


def _chosen(layers):
    """Return the first, the last, and up to six between, evenly spaced."""
    between = np.linspace(1, len(layers) - 2, min(_N_LAYERS, len(layers) - 2))
    numbers = np.unique(between.round().astype(int))
    return [layers[number] for number in (0, *numbers, len(layers) - 1)]
