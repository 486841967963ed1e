"""What poisoned images left behind in the statistics of batch-norm."""

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.special import logit
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._additive import DETECTION_RATE
from sklearn_backdoor.reverse._anomaly import rank_by_p
from sklearn_backdoor.reverse._fast import FastReverseEngineer
from sklearn_backdoor.reverse._forms import AdditiveSearch
from sklearn_backdoor.reverse._search import ImagePasses, as_array

_BATCH = 64  # images a forward pass; and on which a discrepancy is replayed
_REPLAYED = 20.0  # times: what a twentieth of the training images left, as in all
_N_DRAWS = 60  # discrepancies of chance
_MIN_LAYERS = 3
_N_LAYERS = 6  # of those between the first and the last
_TRAINED_WITH = 32  # images a mini-batch, at least
_CLASS_SHARE_SD = 0.1  # of a class's share of the training images, relative
_SMALLEST_SHARE = 1e-4
_MIN_SPREAD = 0.25  # of the log-odds of what chance leads to
_CROP = 8  # as many times the padding before a crop is the side
_CLEARLY_LESS = 0.5  # has to be left by an augmentation, of what is without


class Statistics(NamedTuple):
    """A batch-norm layer: stored means, and means over the places of each image."""

    name: str
    stored: np.ndarray
    momentum: float
    seen: np.ndarray


def batch_norm_layers(network):
    """Return the names of batch-norm layers that keep statistics.

    Parameters
    ----------
    network : torch.nn.Module

    Returns
    -------
    list of str
    """
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def layer_statistics(victim, X, transform=None):
    """Return what batch-norm layers keep, and what they see.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    X : ndarray of shape (n_samples, n_channels, height, width)
    transform : callable, default=None
        From an image to an image.

    Returns
    -------
    list of Statistics
        As a pass meets them; ``seen`` has shape (n_samples, n_features). A layer that
        is met more than once, or not with a row for each image, is left out.
    """
    network = victim.network_
    seen: dict = {}

    def note(name):
        def catch(module, inputs):
            values = inputs[0].detach()
            seen.setdefault(name, []).append(
                values.flatten(2).mean(2) if values.ndim > 2 else values
            )

        return catch

    handles = [
        network.get_submodule(name).register_forward_pre_hook(note(name))
        for name in batch_norm_layers(network)
    ]
    n_passes = 0
    try:
        with victim.differentiable() as logits, torch.no_grad():
            for start in range(0, len(X), _BATCH):
                images = to_tensor(X[start : start + _BATCH], "cpu")
                if transform is not None:
                    images = torch.stack([transform(image) for image in images])
                logits(images.to(victim.device_))
                n_passes += 1
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, parts in seen.items():
        module = network.get_submodule(name)
        rows = as_array(torch.cat(parts)).astype(float)
        if len(parts) == n_passes and len(rows) == len(X):
            momentum = 0.1 if module.momentum is None else module.momentum
            stored = as_array(module.running_mean).astype(float)
            found.append(Statistics(name, stored, momentum, rows))
    return found


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


class Discrepancy(NamedTuple):
    """Stored means minus those of clean images, and what chance makes of it."""

    name: str
    values: np.ndarray
    covariance: np.ndarray

    def size(self):
        """Return the mean square of the values, in units of their variance."""
        return float(np.mean(self.values**2 / np.diag(self.covariance)))


def discrepancy(statistics, y, n_classes):
    """Compare a layer's stored means with those of clean images.

    Parameters
    ----------
    statistics : Statistics
    y : ndarray of shape (n_samples,) of int
        Class indices of the images seen.
    n_classes : int

    Returns
    -------
    Discrepancy
        ``covariance`` adds up what there is by chance: in the mean of the clean
        images, so many of each class; in the stored mean, which forgets all but the
        last mini-batches; and in the shares that classes have of the training images.
    """
    name, stored, momentum, seen = statistics
    means = np.stack([seen[y == k].mean(axis=0) for k in range(n_classes)])
    inner = seen - means[y]
    within = inner.T @ inner / max(1, len(seen) - n_classes)
    outer = means - means.mean(axis=0)
    between = outer.T @ outer / n_classes
    n_stored = _TRAINED_WITH * (2 / np.clip(momentum, 1e-6, 1) - 1)
    covariance = (
        within / len(seen)
        + (within + between) / n_stored
        + _CLASS_SHARE_SD**2 * between / n_classes
    )
    tiny = 1e-9 * np.trace(covariance) + np.finfo(float).tiny
    covariance[np.diag_indices_from(covariance)] += tiny
    return Discrepancy(name, stored - seen.mean(axis=0), covariance)


def replay(victim, images, y, name, shifts):
    """Shift what a layer sees, all images and places alike.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    images : tensor of shape (n_samples, n_channels, height, width)
    y : ndarray of shape (n_samples,) of int
    name : str
        The layer.
    shifts : ndarray of shape (n_shifts, n_features)

    Returns
    -------
    ndarray of shape (n_shifts, n_classes) in 0...1
        Mean probability of each class over the images that are not of it.
    """
    n_classes = len(victim.classes_)
    others = y[:, None] != np.arange(n_classes)
    counts = np.maximum(others.sum(axis=0), 1)
    rates = np.empty((len(shifts), n_classes))
    now = torch.empty(0)

    def shift(module, inputs):
        values = inputs[0]
        row = now.to(values).view(1, -1, *[1] * (values.ndim - 2))
        return (values + row, *inputs[1:])

    images = images.to(victim.device_)
    module = victim.network_.get_submodule(name)
    handle = module.register_forward_pre_hook(shift)
    try:
        with victim.differentiable() as logits, torch.no_grad():
            for number, row in enumerate(shifts):
                now = torch.from_numpy(row)
                chances = as_array(logits(images).softmax(1))
                rates[number] = (chances * others).sum(axis=0) / counts
    finally:
        handle.remove()
    return rates


def chance_of(found, drawn):
    """Return the p-value of each rate against the largest ones that chance leads to.

    Parameters
    ----------
    found : ndarray of shape (n_classes,) in 0...1
    drawn : ndarray of shape (n_draws, n_classes)

    Returns
    -------
    ndarray of shape (n_classes,) in 0...1
        From a Gumbel distribution of the largest log-odds, by moments.
    """
    largest = _log_odds(drawn).max(axis=1)
    spread = max(largest.std(ddof=1), _MIN_SPREAD)
    scale = spread * np.sqrt(6) / np.pi
    start = largest.mean() - np.euler_gamma * scale
    return stats.gumbel_r.sf(_log_odds(found), start, scale)


def _log_odds(rates):
    return logit(np.clip(rates, _SMALLEST_SHARE, 1 - _SMALLEST_SHARE))


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
    target; a difference of chance leads nowhere. A faint pattern over the whole image
    betrays itself so where no search for a small one can tell it from the perturbations
    that fool any network.

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
        unless another leaves less than half of the discrepancy.
    alpha : float in 0...1, default=0.05
        Classes with a p-value below are flagged.
    n_jobs, random_state, verbose, checkpoint_dir
        As in `NCReverseEngineer`.

    Attributes
    ----------
    layers_ : list of str
        Layers whose discrepancy was replayed: up to six, from behind the first to
        before the last.
    replays_ : ndarray of shape (n_layers, n_classes) in 0...1
        Mean probability of each class, on images of others, with a layer's discrepancy
        added twentyfold.
    augmentation_ : str
        That was taken.
    mismatch_ : float
        Root mean square of the first layer's discrepancy, in standard errors: above 1
        where clean images are not like those of the training. The null is as much
        wider.
    triggers_ : list of AdditiveTrigger
        For each class, the perturbation that `AdditiveReverseEngineer` finds for all
        sources with mini-batches of 16; refined for flagged classes.
    norms_ : ndarray of shape (n_classes,)
        Their L2 norms. The verdict does not depend on them.
    p_values_ : ndarray of shape (n_classes,)
        Probability that a discrepancy of chance leads as many images to one class, for
        the layer with the smallest, corrected for the number of layers; 1 where no
        trigger was found.
    others
        As in `NCReverseEngineer`.

    Notes
    -----
    - Chance is drawn for each network anew, 60 times a layer: the sampling error of the
      clean images and of the last mini-batches (32 images each, or more), and shares of
      classes that differ by a tenth. These and the factor of 20 were chosen by attacks
      of one seed, so that none of 60 other clean victims is flagged at 0.05.
    - The first layer sees too little of a trigger, and serves to tell whether clean
      images are like the training's. The last sees whether images are taken for a
      class, which an unbalanced training set shows as well as poison: it is left out,
      and with it most of what small patches leave. Of 30 clean networks with one class
      doubled or halved, with shares from 1 to 5, with few images, or with shifts or
      flips, the one flagged at 0.05 had shares from 1 to 5.
    - Statistics that are not of the training, as of a network whose batch-norm was
      frozen while it was fine-tuned, show as a large ``mismatch_`` and prove nothing.
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
        return super()._search(run)

    def _compare_statistics(self, run):
        """Replay what differs; set a p-value a class."""
        rng = np.random.default_rng(run.seeds)
        found = self._explain(run)
        if len(found) < _MIN_LAYERS:
            raise ValueError(
                f"the network has {len(found)} layer(s) of batch-norm with statistics, "
                "of which the first and the last tell too little. Use another reverse "
                "engineer."
            )
        wider = max(1.0, found[0].size())
        self.mismatch_ = float(np.sqrt(found[0].size()))
        between = found[1:-1]
        numbers = np.linspace(0, len(between) - 1, min(_N_LAYERS, len(between)))
        chosen = [between[number] for number in np.unique(numbers.round().astype(int))]
        rows = rng.permutation(len(run.X))[:_BATCH]
        images, y = to_tensor(run.X[rows], "cpu"), run.y[rows]
        p, replays = [], []
        for name, values, covariance in chosen:
            drawn = rng.multivariate_normal(
                np.zeros(len(values)), wider * covariance, _N_DRAWS, method="eigh"
            )
            shifts = _REPLAYED * np.vstack([values, drawn])
            rates = replay(run.victim, images, y, name, shifts)
            run.passes += ImagePasses(len(shifts) * len(rows), 0)
            replays.append(rates[0])
            p.append(chance_of(rates[0], rates[1:]))
        self.layers_ = [one.name for one in chosen]
        self.replays_ = np.array(replays)
        smallest = np.nan_to_num(p, nan=1.0).min(axis=0)
        self._replayed_p = np.minimum(1, smallest * len(chosen))

    def _explain(self, run):
        """Return the discrepancies under the augmentation that leaves least of them."""
        if self.augmentation == "auto":
            candidates = usual_augmentations(run.X.shape[1:])
        elif self.augmentation == "none":
            candidates = {"none": None}
        else:
            candidates = {repr(self.augmentation): self.augmentation}
        best: list = []
        least = plain = np.inf
        for name, transform in candidates.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.seeds[0])
                layers = layer_statistics(run.victim, run.X, transform)
            found = [
                discrepancy(layer, run.y, len(run.victim.classes_)) for layer in layers
            ]
            run.passes += ImagePasses(len(run.X), 0)
            left = np.median([one.size() for one in found]) if found else np.inf
            if not best or left < min(least, _CLEARLY_LESS * plain):
                best, least, self.augmentation_ = found, left, name
            if transform is None:
                plain = left
        return best

    def _p_values(self, results, judged):
        converged = np.array([result.converged for result in results])
        return np.where(converged, self._replayed_p, 1.0)

    def _flag(self):
        return rank_by_p(self.p_values_, self.alpha)
