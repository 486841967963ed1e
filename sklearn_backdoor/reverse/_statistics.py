"""Statistics of batch-norm against clean images, and what their difference does."""

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.special import logit
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor.reverse._hooks import hooked
from sklearn_backdoor.reverse._search import as_array

_BATCH = 64  # images a forward pass
_TRAINED_WITH = 32  # images a mini-batch, at least
_CLASS_SHARE_SD = 0.1  # of a class's share of the training images, relative
_SMALLEST_SHARE = 1e-4
_MIN_SPREAD = 0.25  # of the log-odds of what chance leads to


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
        From an image to one of the same shape.

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
            values = inputs[0].detach().float()
            seen.setdefault(name, []).append(
                values.flatten(2).mean(2) if values.ndim > 2 else values
            )

        return catch

    n_passes = 0
    hooks = [
        (network.get_submodule(name).register_forward_pre_hook, note(name))
        for name in batch_norm_layers(network)
    ]
    with hooked(victim, hooks) as logits:
        for start in range(0, len(X), _BATCH):
            images = to_tensor(X[start : start + _BATCH], "cpu")
            if transform is not None:
                images = _augmented(images, transform)
            logits(images.to(victim.device_))
            n_passes += 1
    found = []
    for name, parts in seen.items():
        module = network.get_submodule(name)
        rows = as_array(torch.cat(parts)).astype(float)
        if len(parts) == n_passes and len(rows) == len(X):
            momentum = 0.1 if module.momentum is None else module.momentum
            stored = as_array(module.running_mean.float()).astype(float)
            found.append(Statistics(name, stored, momentum, rows))
    return found


def _augmented(images, transform):
    given = [transform(image) for image in images]
    for image in given:
        if getattr(image, "shape", None) != images.shape[1:]:
            raise ValueError(
                f"augmentation gives {getattr(image, 'shape', type(image).__name__)} "
                f"of an image of shape {tuple(images.shape[1:])}, expected a tensor of "
                "the same."
            )
    return torch.stack(given)


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
    with hooked(victim, [(module.register_forward_pre_hook, shift)]) as logits:
        for number, row in enumerate(shifts):
            now = torch.from_numpy(row)
            chances = as_array(logits(images).float().softmax(1))
            rates[number] = (chances * others).sum(axis=0) / counts
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
