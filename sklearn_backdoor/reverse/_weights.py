"""Triggers that left a trace in the weights."""

import warnings
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from torch import nn

from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._additive import AdditiveReverseEngineer
from sklearn_backdoor.reverse._anomaly import PRIOR_DF, is_informative, p_values
from sklearn_backdoor.reverse._search import ImagePasses
from sklearn_backdoor.reverse._traces import (
    TraceReverseEngineer,
    chosen_layers,
    images_meant,
)
from sklearn_backdoor.reverse._unused import responses, weight_layers, weights_of

_SMALL = 1e-6  # response that is as good as none
# Usual standard deviation of log-responses to the triggers of a clean victim's classes:
# in the first convolution, later ones, hidden linear layers, and the last layer.
_FIRST_SD, _CONVOLUTION_SD, _LINEAR_SD, _LAST_SD = 0.05, 0.08, 0.22, 0.35
# Usual mean and standard deviation, from victim to victim, of the classes' median.
_FIRST_LEVEL, _CONVOLUTION_LEVEL = (0.0, 0.1), (0.15, 0.2)


class WeightReverseEngineer(TraceReverseEngineer):
    """Find the trigger that left a trace in the weights.

    Training alters weights where its images have energy. In other directions it leaves
    them as chance initialised them, except where a trigger was: to that the network was
    taught to respond. So patches and additive perturbations are searched for each
    class, as small as may be, and what they do to a layer's inputs is cut down to the
    directions that clean images leave unused: does the layer respond to it as to any,
    or much more strongly?

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered. With a convolution or a linear
        layer at least.
    alpha : float in 0...1, default=0.05
        A class with a p-value below is flagged.
    n_jobs, random_state, verbose, checkpoint_dir
        As in `NCReverseEngineer`.

    Attributes
    ----------
    layers_ : list of str
        Layers that were looked at: the first, the last, and up to six between.
    responses_ : ndarray of shape (n_classes, n_layers)
        How strongly a layer responds to a class's triggers by way of unused directions,
        1 where these weights had nothing to do with them: mean square of the outputs
        per mean square of the inputs and of the weights, geometric mean over searches.
    traces_ : ndarray of shape (n_classes,)
        By how much the logarithms of a class's responses exceed the classes' medians,
        in standard deviations, summed over layers.
    triggers_ : list of PatchTrigger or AdditiveTrigger
        For each class, the one whose responses exceed the median most; refined for the
        class flagged.
    norms_ : ndarray of shape (n_classes,)
        Their norms, L1 of masks and L2 of perturbations.
    p_values_ : ndarray of shape (n_classes,)
        Probability that chance makes the largest deviation as large, allowing for the
        number of them. It is given to one class, 1 to the others: to the one with the
        largest trace, or, where a layer responds strongly to all classes' triggers and
        none stands out, to the one with the smallest perturbation.
    source_weights_, single_sources_
        As in `NCReverseEngineer`, of the searches that found the triggers.
    others
        As in `NCReverseEngineer`, without those of pairs; anomaly indices are NaN.

    Notes
    -----
    - Two kinds of deviation are tested, as a trigger that is faint and alike everywhere
      helps other classes' triggers too: a class's log-response in a layer against those
      of the other classes, by the t-test of norms, see `NCReverseEngineer`; and a
      convolution's median over the classes against what is usual in clean networks, of
      images with one channel only, as no other was measured. The smallest p-value
      counts, times the number of tests.
    - What is usual was measured on clean networks: LeNet-5 and two small ones with
      batch-norm. Within a network the deviations' own spread counts as well.
    - In `AutoReverseEngineer` it takes the triggers that the other searches found, with
      up to 16 classes, where there are no statistics of batch-norm to ask, which tell
      more.
    - It finds what the searches find: a patch that works for one source class alone may
      not be among triggers for all of them.
    - That clean training leaves such directions alone is known from pruning dormant
      neurons; to ask the weights for found triggers, and the tests, are ours.

    References
    ----------
    Liu, Dolan-Gavitt, Garg: Fine-pruning: Defending against backdooring attacks on deep
    neural networks. RAID 2018 (dormant neurons).
    """

    def __init__(
        self,
        victim,
        *,
        alpha=0.05,
        n_jobs=None,
        random_state=0,
        verbose=False,
        checkpoint_dir=None,
    ):
        self.victim = victim
        self.alpha = alpha
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir

    def _check_params(self):
        check_number(self.alpha, "alpha", 0, 1)

    def _ask(self, run, found):
        names = weight_layers(run.victim, run.X)
        run.passes += ImagePasses(2, 0)
        if not names:
            raise ValueError(
                "the network has no linear layer and no plain convolution, whose "
                "weights could be looked at. Use another reverse engineer."
            )
        self.layers_ = names = chosen_layers(names)
        usual = _usual(run.victim.network_, names, n_channels=run.X.shape[1])
        converged = np.array([[r.converged for r in results] for *_, results in found])
        logs = np.log(np.maximum(self._responses(run, found, converged), _SMALL))
        levels = _median(logs, axis=1)  # a search's, that does not depend on classes
        above = logs - levels
        means = _mean(above) + _mean(levels)
        self.responses_ = np.exp(means)
        self.traces_ = np.nansum(_deviations(means, usual), axis=1)
        self.traces_[~converged.any(axis=0)] = np.nan
        scores = np.nansum(above / [layer.spread for layer in usual], axis=2)
        chosen = np.where(converged, scores, -np.inf).argmax(axis=0)
        named = int(np.nan_to_num(self.traces_, nan=-np.inf).argmax())
        of_class, of_level = _smallest_p(means, usual)
        if of_level < self.alpha and not of_class < self.alpha:
            chosen, named = _smallest_perturbation(found, converged, chosen, named)
        return self._answer(found, chosen, named, np.fmin(of_class, of_level))

    def _is_conclusive(self):
        return is_informative(self.norms_, self.converged_)

    def _responses(self, run, found, converged):
        """Return the layers' responses: (n_searches, n_classes, n_layers)."""
        layers = weights_of(run.victim, run.X, self.layers_)
        run.passes += ImagePasses(len(run.X), 0)
        values = np.full((*converged.shape, len(layers)), np.nan)
        for number, target in np.argwhere(converged):
            result = found[number][2][target]
            clean = run.X[images_meant(run, result, target)]
            stamped = result.trigger.embed(clean)
            values[number, target] = responses(run.victim, layers, clean, stamped)
            run.passes += ImagePasses(2 * len(clean), 0)
        return values


class _Usual(NamedTuple):
    """Of log-responses in clean victims: spread over classes, and the median's."""

    spread: float
    level: tuple[float, float] | None


def _usual(network, names, n_channels):
    """Return what is usual for each layer, by its place and kind.

    Levels are known for images of one channel: in a clean ResNet-18 for colour images
    the first convolution's median response is 1.9.
    """
    found = []
    for number, name in enumerate(names):
        linear = isinstance(network.get_submodule(name), nn.Linear)
        level: Any = _FIRST_LEVEL if number == 0 else _CONVOLUTION_LEVEL
        if 0 < number == len(names) - 1:
            found.append(_Usual(_LAST_SD, None))
        elif linear:
            found.append(_Usual(_LINEAR_SD, None))
        else:
            spread = _FIRST_SD if number == 0 else _CONVOLUTION_SD
            found.append(_Usual(spread, level if n_channels == 1 else None))
    return found


def _deviations(logs, usual):
    """Return by how many standard deviations each exceeds the classes' median."""
    spread = np.array([layer.spread for layer in usual])
    above = logs - _median(logs, axis=0)
    df = np.maximum(np.isfinite(above).sum(axis=0) - 1, 0)
    variance = np.nansum((above - _mean(above)) ** 2, axis=0)
    return above / np.sqrt((PRIOR_DF * spread**2 + variance) / (PRIOR_DF + df))


def _smallest_p(logs, usual):
    """Return the smallest p-value of each kind of test, times the number of all.

    Parameters
    ----------
    logs : ndarray of shape (n_classes, n_layers)
        NaN where no trigger converged.
    usual : list of _Usual

    Returns
    -------
    of_class, of_level : float
        Of a class against the others, and of the classes' median; NaN without a test.
    """
    of_class, of_level = [], []
    for values, layer in zip(logs.T, usual, strict=True):
        seen = np.isfinite(values)
        p = p_values(np.exp(-values), seen, prior_sd=layer.spread).min()
        if not np.isnan(p):
            of_class.append(p)
        if layer.level is not None and seen.any():
            of_level.append(stats.norm.sf(np.median(values[seen]), *layer.level))
    n_tests = len(of_class) + len(of_level)
    return tuple(n_tests * min(found, default=np.nan) for found in (of_class, of_level))


def _smallest_perturbation(found, converged, chosen, named):
    """Return what searches' triggers are kept, and the class, by perturbations' size.

    Without perturbations these are those given.
    """
    sizes = np.full(converged.shape, np.inf)
    for number, (engineer, *_) in enumerate(found):
        usable = converged[number]
        if isinstance(engineer, AdditiveReverseEngineer) and usable.any():
            norms = engineer.norms_[usable]
            sizes[number, usable] = norms / np.median(norms)
    if np.isfinite(sizes).any():
        number, named = divmod(int(sizes.argmin()), sizes.shape[1])
        chosen[named] = number
    return chosen, named


def _median(values, axis):
    """Return the median of what is a number, NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return np.nanmedian(values, axis=axis, keepdims=True)


def _mean(values):
    """Return the mean over the first axis of what is a number, NaN where nothing is."""
    seen = np.isfinite(values)
    total = np.where(seen, values, 0).sum(axis=0)
    return np.divide(
        total, seen.sum(axis=0), np.full(total.shape, np.nan), where=seen.any(axis=0)
    )
