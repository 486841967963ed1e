"""The directions of a network's weights that clean images leave unused."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor.reverse._hooks import hooked

_BATCH = 16  # images a forward pass
_ROUNDING = 1e-5  # of the largest value
_AT_ONCE = 2**24  # numbers of unfolded images
_SHARE = 0.03  # of the mean energy: where a direction counts as half unused


class Weights(NamedTuple):
    """A layer's weights, and what clean images use of them.

    Attributes
    ----------
    name : str
    weight : Tensor of shape (n_outputs, n_inputs)
    axes : Tensor of shape (n_inputs, n_axes)
        Eigenvectors of the second moment of the clean inputs.
    used : Tensor of shape (n_axes,)
        In 0...1; directions other than the axes are not used at all.
    usual : float
        Mean square of an output's weight in an unused direction.
    """

    name: str
    weight: Any
    axes: Any
    used: Any
    usual: float

    def unused(self, rows):
        """Return what rows, of shape (n_rows, n_inputs), hold in unused directions."""
        return rows - (rows @ self.axes * self.used) @ self.axes.T


def weight_layers(victim, X):
    """Find the layers whose weights can be looked at.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    X : ndarray of shape (n_samples, n_channels, height, width)
        Of which two images are passed.

    Returns
    -------
    list of str
        Linear layers, and convolutions of images that are not grouped, as a pass meets
        them. A layer whose input has no place for each image is left out.
    """
    met: list = []

    def note(name):
        def catch(module, inputs):
            if len(inputs[0]) == len(images) and name not in met:
                met.append(name)

        return catch

    hooks = [
        (module.register_forward_pre_hook, note(name))
        for name, module in victim.network_.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    images = to_tensor(X[:2], victim.device_)
    with hooked(victim, hooks) as logits:
        logits(images)
    return met


def weights_of(victim, X, names):
    """Take apart which directions of layers' weights clean images use.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    X : ndarray of shape (n_samples, n_channels, height, width)
        D_Defense; each image is passed once.
    names : list of str
        Of layers.

    Returns
    -------
    list of Weights
    """
    moments: dict = {}
    few: dict = {}  # rows, of layers that have more inputs than rows
    counts = dict.fromkeys(names, 0)

    def note(name, module, values):
        for rows in _rows(module, values):
            counts[name] += len(rows)
            n_rows = len(rows) / len(values) * len(X)
            if isinstance(module, nn.Linear) and n_rows < rows.shape[1]:
                few.setdefault(name, []).append(rows)
            else:
                moments[name] = moments.get(name, 0) + (rows.T @ rows).double()

    _pass(victim, names, note, X)
    found = []
    for name in names:
        weight = victim.network_.get_submodule(name).weight.detach().float().flatten(1)
        if name in few:
            rows = torch.cat(few[name])
            _, sizes, axes = torch.linalg.svd(rows, full_matrices=False)
            energy, axes = sizes.double().square() / counts[name], axes.T
        else:
            energy, axes = torch.linalg.eigh(moments[name] / counts[name])
        used = energy.clamp_min(0)
        used = used / (used + _SHARE * energy.sum().clamp_min(1e-30) / len(axes))
        n_unused = len(axes) - used.sum()
        along = (weight.double() @ axes.double()).square().sum(0)
        square = weight.double().square().sum() - (along * used).sum()
        usual = float(square / n_unused / len(weight))
        found.append(Weights(name, weight, axes.float(), used.float(), usual))
    return found


def responses(victim, layers, clean, stamped):
    """Return how strongly layers respond to a trigger in directions left unused.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    layers : list of Weights
    clean, stamped : ndarray of shape (n_samples, n_channels, height, width)
        Without and with the trigger; each image is passed once.

    Returns
    -------
    list of float
        For each layer, the mean square of what the trigger does to the layer's outputs
        by way of unused directions, over what it would be if these weights had nothing
        to do with the trigger. NaN where it does nothing there but for rounding.
    """
    by_name = {layer.name: layer for layer in layers}
    answers = dict.fromkeys(by_name, 0.0)
    inputs = dict.fromkeys(by_name, 0.0)
    moved = dict.fromkeys(by_name, False)

    def note(name, module, values):
        layer = by_name[name]
        half = len(values) // 2
        change = (values[half:] - values[:half]).abs().max()
        moved[name] |= bool(change > _ROUNDING * values.abs().max())
        for rows in _rows(module, values[half:] - values[:half]):
            rows = layer.unused(rows)
            inputs[name] += float(rows.square().sum())
            answers[name] += float((rows @ layer.weight.T).square().sum())

    _pass(victim, list(by_name), note, clean, stamped)
    return [
        answers[layer.name] / inputs[layer.name] / len(layer.weight) / layer.usual
        if moved[layer.name] and inputs[layer.name] * layer.usual > 0
        else float("nan")
        for layer in layers
    ]


def _pass(victim, names, note, *stacks):
    """Pass batches, side by side of each stack of images, and note layers' inputs."""

    def catching(name):
        return lambda module, inputs: note(name, module, inputs[0].detach().float())

    hooks = [
        (victim.network_.get_submodule(name).register_forward_pre_hook, catching(name))
        for name in names
    ]
    with hooked(victim, hooks) as logits:
        for start in range(0, len(stacks[0]), _BATCH):
            parts = [to_tensor(X[start : start + _BATCH], "cpu") for X in stacks]
            logits(torch.cat(parts).to(victim.device_))


def _rows(module, values):
    """Yield what is multiplied by a layer's weights, (n_rows, n_inputs) at a time."""
    if isinstance(module, nn.Linear):
        yield values.flatten(0, -2)
        return
    padding = module.padding
    if isinstance(padding, str):
        total = [
            dilation * (side - 1) if padding == "same" else 0
            for dilation, side in zip(module.dilation, module.kernel_size, strict=True)
        ]
        (top, left), (height, width) = [n // 2 for n in total], total
        values = functional.pad(values, (left, width - left, top, height - top))
        padding = 0
    size = prod(module.kernel_size) * values[0].numel()
    for part in values.split(max(1, _AT_ONCE // size)):
        patches = functional.unfold(
            part, module.kernel_size, module.dilation, padding, module.stride
        )
        yield patches.movedim(1, 2).flatten(0, 1)
