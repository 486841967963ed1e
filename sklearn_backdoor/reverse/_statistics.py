"""Statistics of batch-norm against clean images, and what their difference does."""

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.linalg import cholesky, solve_triangular
from scipy.special import logit
from sklearn.covariance import LedoitWolf
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor.reverse._hooks import hooked
from sklearn_backdoor.reverse._search import as_array

_BATCH = 64  # images a forward pass
_TRAINED_WITH = 32  # images a mini-batch, at least
_SHARE_SD, _LARGEST_SHARE_SD = 0.1, 1.5  # of a class's share of the images, relative
_SMALLEST_SHARE = 1e-4
_MIN_SPREAD = 0.25  # of the log-odds of what chance leads to


class Statistics(NamedTuple):
    """A batch-norm layer: stored means and spread, and the means of each image."""

    name: str
    stored: np.ndarray
    spread: np.ndarray
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
        is met more than once, or not with a row for each image, or that keeps what is
        no number, is left out.
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
            spread = as_array((module.running_var.float() + module.eps).sqrt())
            layer = Statistics(name, stored, spread.astype(float), momentum, rows)
            if all(np.isfinite(part).all() for part in layer[1:]):
                found.append(layer)
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
    """Stored means minus those of clean images, less what earlier layers explain.

    ``factor`` times standard normal numbers is what chance makes of ``values``.
    """

    name: str
    values: np.ndarray
    factor: np.ndarray

    def squares(self):
        """Return the squares of the values in units of their variance by chance."""
        return self.values**2 / np.square(self.factor).sum(axis=1)


class Comparison:
    """Stored means of several layers against the means of clean images.

    Chance is taken for normal. Its covariance, over the features of all layers, adds up
    what there is in the means of the clean images, so many of each class; in the stored
    means, which forget all but the last mini-batches; and in the shares that classes
    have of the training images. What the classes' shares, or the choice of the clean
    images, do to one layer they do to the next: so each layer is judged by what the
    layers before it leave unexplained.

    Parameters
    ----------
    layers : list of Statistics
        As a pass meets them.
    y : ndarray of shape (n_samples,) of int
        Class indices of the images seen.
    n_classes : int
    """

    def __init__(self, layers, y, n_classes):
        self.names = [layer.name for layer in layers]
        self.spread = np.concatenate([layer.spread for layer in layers])
        sizes = [len(layer.spread) for layer in layers]
        ends = np.cumsum(sizes)
        self.slices = [slice(b - n, b) for b, n in zip(ends, sizes, strict=True)]
        seen = np.concatenate([layer.seen for layer in layers], axis=1) / self.spread
        stored = np.concatenate([layer.stored for layer in layers]) / self.spread
        means = np.stack([seen[y == k].mean(axis=0) for k in range(n_classes)])
        self.values = stored - seen.mean(axis=0)
        n_free = max(1, len(seen) - n_classes)
        within = LedoitWolf(assume_centered=True).fit(seen - means[y]).covariance_
        within *= len(seen) / n_free
        # what each class adds to the means where its share is twice as large
        self.moves = (means - means.mean(axis=0)) / n_classes
        between = n_classes * self.moves.T @ self.moves
        momentum = np.clip(max(layer.momentum for layer in layers), 1e-6, 1)
        n_stored = _TRAINED_WITH * (2 / momentum - 1)
        self.covariance = within / len(seen) + (within + between) / n_stored
        tiny = 1e-6 * max(self.covariance.diagonal().mean(), 1e-6)
        self.covariance[np.diag_indices_from(self.covariance)] += tiny

    def share_sd(self):
        """Return the most likely spread of the classes' shares of the training images.

        Returns
        -------
        float
            Relative; from all layers but the last, where poison shows as a share too.
        """
        before = slice(self.slices[-1].start)
        values, moves = self.values[before], self.moves[:, before]
        factor = cholesky(self.covariance[before, before], lower=True)
        white = solve_triangular(factor, np.column_stack([values, moves.T]), lower=True)
        values, moves = white[:, 0], white[:, 1:]
        sizes, axes = np.linalg.eigh(moves.T @ moves)
        along = (axes.T @ (moves.T @ values)) ** 2
        tried = np.geomspace(_SHARE_SD, _LARGEST_SHARE_SD, 30)
        square = np.square(tried)[:, None]
        scale = 1 + square * sizes
        fit = (square * along / scale - np.log(scale)).sum(axis=1)
        return float(tried[fit.argmax()])

    def sizes(self):
        """Return each layer's mean square difference, in units of its variance."""
        variance = self.covariance.diagonal() + np.square(_SHARE_SD * self.moves).sum(0)
        squares = self.values**2 / variance
        return np.array([squares[part].mean() for part in self.slices])

    def discrepancies(self, share_sd):
        """Compare layer by layer.

        Parameters
        ----------
        share_sd : float
            Spread of the classes' shares that the last layer allows for; the others, in
            which it hardly shows, allow for 0.1.

        Returns
        -------
        list of Discrepancy
            In the layers' own units. Where earlier layers differ by more than chance,
            so much wider is chance.
        """
        found = self._unexplained(_SHARE_SD)
        found[-1] = self._unexplained(share_sd)[-1]
        squares = [one.squares() for one in found]
        for number in range(1, len(found)):
            name, values, factor = found[number]
            wider = max(1.0, np.concatenate(squares[:number]).mean())
            found[number] = Discrepancy(name, values, np.sqrt(wider) * factor)
        return found

    def _unexplained(self, share_sd):
        covariance = self.covariance + share_sd**2 * self.moves.T @ self.moves
        factor = cholesky(covariance, lower=True)
        white = solve_triangular(factor, self.values, lower=True)
        return [
            Discrepancy(
                name,
                self.spread[part] * (factor[part, part] @ white[part]),
                self.spread[part, None] * factor[part, part],
            )
            for name, part in zip(self.names, self.slices, strict=True)
        ]


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
        From a Gumbel distribution of the largest log-odds, by moments; at least the
        share of draws that lead as many images to a class.
    """
    odds, largest = _log_odds(found), _log_odds(drawn).max(axis=1)
    spread = max(largest.std(ddof=1), _MIN_SPREAD)
    scale = spread * np.sqrt(6) / np.pi
    start = largest.mean() - np.euler_gamma * scale
    share = (largest[:, None] >= odds).mean(axis=0)
    return np.maximum(share, stats.gumbel_r.sf(odds, start, scale))


def _log_odds(rates):
    return logit(np.clip(rates, _SMALLEST_SHARE, 1 - _SMALLEST_SHARE))
