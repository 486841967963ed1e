"""The smallest shift of a network's channels that sends images to one class."""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from sklearn_backdoor._forward import device_of
from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._additive import DETECTION_RATE
from sklearn_backdoor.reverse._anomaly import (
    NEURON_COLUMN_SD,
    NEURON_PAIR_SD,
    NEURON_POWER,
    NEURON_SD,
    rank_by_p,
)
from sklearn_backdoor.reverse._fast import REFINE_BATCH, FastReverseEngineer
from sklearn_backdoor.reverse._forms import AdditiveSearch
from sklearn_backdoor.reverse._hooks import hooked
from sklearn_backdoor.reverse._search import (
    ImagePasses,
    Task,
    apply_gradients,
    as_array,
)
from sklearn_backdoor.reverse._stacked import StackedSearch

_SOURCES = ("all", "pairs")
_BATCH = 64  # images, where the usual spread of channels is taken
_TRIGGER_STEPS, _TRIGGER_BATCH = 60, 16


class Layer(NamedTuple):
    """A hidden layer: its name, whether channels come last, and their spread."""

    name: str
    is_linear: bool
    spread: np.ndarray


class Shift(NamedTuple):
    """What the search keeps in place of a trigger."""

    values: np.ndarray


def hidden_layers(victim, X):
    """Find the convolutions and linear layers, all but the last, which gives logits.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    X : ndarray of shape (n_samples, n_channels, height, width)

    Returns
    -------
    list of Layer
        As a pass meets them; ``spread`` is the standard deviation of each channel over
        images and places. Layers whose output has no place for each image are left out.
    """
    network = victim.network_
    moments: dict = {}

    def note(name, is_linear):
        def catch(module, inputs, output):
            if len(output) != len(batch):
                return
            values = output.detach() if is_linear else output.detach().movedim(1, -1)
            values = values.flatten(0, -2)
            seen = torch.stack([values.mean(0), values.square().mean(0)]).double()
            moments[name] = moments.get(name, 0) + len(batch) / len(X) * seen

        return catch

    kinds = {
        name: isinstance(module, nn.Linear)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | _ConvNd)
    }
    hooks = [
        (network.get_submodule(name).register_forward_hook, note(name, is_linear))
        for name, is_linear in kinds.items()
    ]
    with hooked(victim, hooks) as logits:
        for start in range(0, len(X), _BATCH):
            batch = to_tensor(X[start : start + _BATCH], victim.device_)
            logits(batch)
    return [
        Layer(name, kinds[name], as_array((square - mean**2).clamp_min(0).sqrt()))
        for name, (mean, square) in list(moments.items())[:-1]
    ]


class Steered:
    """A network as a function of images and, where given, shifts of its channels.

    Parameters
    ----------
    logits : callable
        From a tensor of images to logits.
    network : torch.nn.Module
        Behind it; hooks are set and removed within each pass.
    layers : list of Layer
    """

    def __init__(self, logits, network, layers):
        self.logits = logits
        self.network = network
        self.layers = layers
        self.spread = torch.tensor(
            np.concatenate([layer.spread for layer in layers]),
            dtype=torch.float32,
            device=device_of(network),
        )

    def __call__(self, images, shifts=None):
        """Return logits; row k of ``shifts`` is for the k-th part of the images."""
        if shifts is None:
            return self.logits(images)
        sizes = [len(layer.spread) for layer in self.layers]
        parts = (shifts * self.spread).split(sizes, dim=1)
        handles = [
            self.network.get_submodule(layer.name).register_forward_hook(
                _shifting(part, layer.is_linear)
            )
            for layer, part in zip(self.layers, parts, strict=True)
        ]
        try:
            return self.logits(images)
        finally:
            for handle in handles:
                handle.remove()


def _shifting(shifts, is_linear):
    """Return a hook that adds a row of shifts to the channels of each part."""

    def shift(module, inputs, output):
        rows = shifts.repeat_interleave(len(output) // len(shifts), dim=0)
        places = [1] * (output.ndim - 2)
        shape = (len(rows), *places, -1) if is_linear else (len(rows), -1, *places)
        return output + rows.view(shape).to(output.dtype)

    return shift


class ShiftSearch(StackedSearch):
    """Shifts of channels, in units of their spread, moved by Adam from 0.

    The norm is L2 over all layers. Its cost rises with the success rate's surplus and
    falls with its deficit.
    """

    optimizer: torch.optim.Adam
    _shape = ("shift",)
    _lr, _betas, _last_lr = 0.08, (0.8, 0.95), 0.2
    _first_cost = 0.05

    def __init__(self, problem, tasks, generators, **options):
        super().__init__(problem, tasks, generators, **options)
        self.tensors["shift"].requires_grad_()
        self.optimizer = torch.optim.Adam(
            [self.tensors["shift"]], lr=self._lr, betas=self._betas
        )
        self.tensors["cost"] = torch.full_like(self.tensors["rate"], self._first_cost)

    def _begin(self, image_shape, generators):
        n_channels = len(self.problem.logits.spread)
        return {"shift": torch.zeros((len(generators), n_channels))}

    def _take_up(self, triggers):
        return {"shift": torch.stack([torch.tensor(t.values) for t in triggers])}

    def _embed(self, images, shape):
        return images  # the shift is inside the network

    def _scores(self, images, shape):
        logits = self.problem.logits(images.flatten(0, 1), shape["shift"])
        return logits.view(*images.shape[:2], -1)

    def _norms(self, shape):
        return shape["shift"].norm(dim=1)

    def _scaled(self, shape, factors):
        return {"shift": shape["shift"] * factors[:, None]}

    def _trigger(self, shape, number):
        return Shift(as_array(shape["shift"][number]))

    def _move(self, losses, hits):
        part = self.numbers["step"] / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * (1 - (1 - self._last_lr) * part)
        penalty = self.tensors["cost"] * self._norms(self._now)
        apply_gradients(
            self.optimizer, [self.tensors["shift"]], (losses.sum(1) + penalty).sum()
        )
        with torch.no_grad():
            surplus = self.tensors["rate"] - self._level
            self.tensors["cost"] *= surplus.exp().clamp(0.5, 1.5)


class NeuronReverseEngineer(FastReverseEngineer):
    """Find the target class by how little inside the network leads to it.

    For each class, or pair of classes, shift the channels of the hidden layers, each by
    a value of its own, the same for all images and places, until most images are
    classified to it. What a backdoor has taught a network is a short way to its target:
    where the shift has an abnormally small L2 norm, in standard deviations of the
    channels on clean images, the class is a target. A faint pattern over the whole
    image, from one source class too, shows here where it hides among the perturbations
    that fool any network.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    sources : {"all", "pairs"}, default="pairs"
        Source classes that a shift is meant for: each pair of classes by itself, which
        costs as many searches as there are pairs, or all together, for which the null
        is as wide as that of patches, and not measured.
    success_rate : float in 0...1, default=None
        Fraction of images that must be classified to the candidate; None for 0.75.
    max_steps : int, default=60
        Mini-batches a class or pair.
    batch_size : int, default=8
        Images a mini-batch.
    alpha : float in 0...1, default=0.05
        Classes with a p-value below are flagged.
    n_jobs, random_state, verbose, checkpoint_dir
        As in `NCReverseEngineer`.

    Attributes
    ----------
    triggers_ : list of AdditiveTrigger
        For each class, the perturbation that `AdditiveReverseEngineer` finds for all
        sources; refined for flagged classes.
    norms_ : ndarray of shape (n_classes,)
        L2 norm of each shift.
    success_rates_ : ndarray of shape (n_classes,)
        Of the triggers, not of the shifts.
    p_values_ : ndarray of shape (n_classes,)
        Probability of a norm as small if no class is a target; of pairs as in
        `NCReverseEngineer`.
    others
        As in `NCReverseEngineer`; ``converged_`` is that of the shifts.

    Notes
    -----
    - Shifted are the outputs of every convolution and linear layer but the last, before
      the non-linearity; batch-norm in between makes no difference to the unit.
    - The form of the search is ours. That neurons betray a backdoor is ABS's idea; that
      small changes of them bring it out, ANP's and BAN's: these shift or scale weights,
      for all classes at once and against the true labels.

    References
    ----------
    Liu et al.: ABS: Scanning neural networks for back-doors by artificial brain
    stimulation. CCS 2019.
    Wu, Wang: Adversarial neuron pruning purifies backdoored deep models. NeurIPS 2021.
    Xu et al.: BAN: Detecting backdoors activated by adversarial neuron noise. NeurIPS
    2024.
    """

    _kind = ShiftSearch
    _pair_null = {
        "pair_sd": NEURON_PAIR_SD,
        "column_sd": NEURON_COLUMN_SD,
        "power": NEURON_POWER,
    }

    def __init__(
        self,
        victim,
        *,
        sources="pairs",
        success_rate=None,
        max_steps=60,
        batch_size=8,
        alpha=0.05,
        n_jobs=None,
        random_state=0,
        verbose=False,
        checkpoint_dir=None,
    ):
        self.victim = victim
        self.sources = sources
        self.success_rate = success_rate
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.alpha = alpha
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir

    def _check_params(self):
        if self.sources not in _SOURCES:
            raise ValueError(
                f"sources={self.sources!r}, expected one of {', '.join(_SOURCES)}."
            )
        super()._check_params()
        check_number(self.alpha, "alpha", 0, 1)

    @property
    def _prior_sd(self):
        return NEURON_SD

    def _search(self, run):
        self._layers = hidden_layers(run.victim, run.X)
        run.passes += ImagePasses(len(run.X), 0)
        if not self._layers:
            raise ValueError(
                "the network has no hidden torch.nn.Linear or convolution whose "
                "channels could be shifted. Use AdditiveReverseEngineer."
            )
        shifts = super()._search(run)
        tasks = [Task(target) for target in range(len(shifts))]
        return [
            shift._replace(trigger=image.trigger, success_rate=image.success_rate)
            for shift, image in zip(
                shifts, run(self._grouped(tasks), "trigger"), strict=True
            )
        ]

    def _open_search(self, problem, tasks, generators, stage, **options):
        if stage not in ("trigger", "refine"):
            return super()._open_search(problem, tasks, generators, stage, **options)
        return AdditiveSearch(
            problem,
            tasks,
            generators,
            steps=_TRIGGER_STEPS,
            batch_size=REFINE_BATCH if stage == "refine" else _TRIGGER_BATCH,
            success_rate=DETECTION_RATE,
            **options,
        )

    @contextmanager
    def _oracle(self, victim, bfloat16):
        with super()._oracle(victim, bfloat16) as logits:
            yield Steered(logits, victim.network_, self._layers)

    def _trigger_norms(self, numbers):
        return np.array([self.triggers_[number].l2_norm for number in numbers])

    def _flag(self):
        return rank_by_p(self.p_values_, self.alpha)
