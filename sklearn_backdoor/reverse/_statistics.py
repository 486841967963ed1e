"""Statistics of batch-norm against clean images, and what triggers leave in them."""

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.linalg import cholesky, solve_triangular
from sklearn.covariance import LedoitWolf
from torch.nn.modules.batchnorm import _BatchNorm

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor.reverse._hooks import hooked
from sklearn_backdoor.reverse._search import as_array

_BATCH = 64  # images a forward pass
_TRAINED_WITH = 32  # images a mini-batch, at least
_N_DRAWS = 2000  # for a p-value; its relative error is then some 1 %
_SHARE_SD, _LARGEST_SHARE_SD = 0.1, 1.5  # of a class's share of the images, relative


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


class Comparison:
    """Stored means of several layers against the means of clean images.

    Chance is taken for normal. Its covariance, over the features of all layers, adds up
    what there is in the means of the clean images, so many of each class; in the stored
    means, which forget all but the last mini-batches; and in the shares that classes
    have of the training images. What the classes' shares, or the choice of the clean
    images, do to one layer they do to the next.

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
        self.n_free = n_free = max(1, len(seen) - n_classes)
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

    def scores(self, effects, share_sd):
        """Return how clearly the difference holds what triggers do to the features.

        Parameters
        ----------
        effects : ndarray of shape (n_triggers, n_features)
            By how much each trigger moves the means of all layers.
        share_sd : float
            Spread of the classes' shares that is allowed for.

        Returns
        -------
        ndarray of shape (n_triggers,)
            The best linear estimate of a trigger's share of the training images, in
            standard errors: chance makes it about standard normal. Where the difference
            as a whole is larger than by chance, so much larger is the error. 0 for a
            trigger that moves nothing.

        Notes
        -----
        The matched filter: signature and data are whitened by the noise's covariance.
        That of many features looks narrower than it is on few images: standard errors
        are taken to be larger by sqrt(1 + n_features / n_free).
        """
        values, signatures = self._whitened(effects, share_sd)
        wider = max(1.0, np.sqrt(np.mean(values**2)))
        wider *= np.sqrt(1 + len(values) / self.n_free)
        return signatures @ values / wider

    def p_value(self, largest, effects, share_sd):
        """Return how probably chance makes the largest of the scores as large.

        Parameters
        ----------
        largest : float
        effects, share_sd
            As of `scores`.

        Returns
        -------
        float
            By Student's t, from draws of scores as correlated as the signatures are:
            the triggers of a network share much of what they do, and are not as many
            chances as they are.
        """
        _, signatures = self._whitened(effects, share_sd)
        moving = signatures[signatures.any(axis=1)]
        return p_of_largest(largest, moving, self.n_free)

    def _whitened(self, effects, share_sd):
        """Return the difference, and signatures of length 1 (or 0), both whitened."""
        covariance = self.covariance + share_sd**2 * self.moves.T @ self.moves
        factor = cholesky(covariance, lower=True)
        columns = np.column_stack([self.values, (effects / self.spread).T])
        white = solve_triangular(factor, columns, lower=True)
        norms = np.linalg.norm(white[:, 1:], axis=0)
        return white[:, 0], (white[:, 1:] / np.where(norms > 0, norms, 1)).T


def p_of_largest(largest, directions, df):
    """Return the probability that the largest of correlated t-scores is as large.

    Parameters
    ----------
    largest : float
    directions : ndarray of shape (n_scores, n_features)
        Of length 1: scores are correlated as these are.
    df : int
        Degrees of freedom that the scores share.

    Returns
    -------
    float in 0...1
        At most the number of scores times the probability of one.

    Notes
    -----
    A score is drawn from those as large, then the others given it: the sum of the
    scores' own probabilities is divided by how many are as large at once, which takes
    no more draws where p is small [1]_.

    References
    ----------
    .. [1] Adler, Blanchet, Liu: Efficient Monte Carlo for high excursions of Gaussian
       random fields. Annals of Applied Probability 22 (2012).
    """
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(_N_DRAWS, directions.shape[1])) @ directions.T
    alone = stats.t.sf(largest, df)
    if alone < np.finfo(float).tiny:
        return 0.0
    first = stats.t.isf(rng.uniform(0, alone, size=(_N_DRAWS, 1)), df)
    wider = np.sqrt((df + first**2) / rng.chisquare(df + 1, size=(_N_DRAWS, 1)))
    total = 0.0
    for number, along in enumerate(directions @ directions.T):
        others = first * along + wider * (drawn - drawn[:, [number]] * along)
        others[:, number] = first[:, 0]
        total += alone * np.mean(1 / (others >= largest).sum(axis=1))
    return min(1.0, total)


def features_of(layers):
    """Return what layers see, side by side: (n_samples, n_features)."""
    return np.concatenate([layer.seen for layer in layers], axis=1)
