"""Traces of triggers in the weights."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    AutoReverseEngineer,
    NCReverseEngineer,
    VictimNetwork,
    WeightReverseEngineer,
)
from sklearn_backdoor.datasets import load_digits
from sklearn_backdoor.reverse import _unused
from sklearn_backdoor.reverse._unused import responses, weight_layers, weights_of
from sklearn_backdoor.reverse._weights import _chosen, _smallest_p, _usual, _Usual
from tests.common import LinearNetwork, faint_fives, linear_images


class Mixed(nn.Module):
    """Convolutions of all kinds, linear layers on places and on many inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, (3, 2), padding="same", dilation=2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.second = nn.Conv2d(4, 5, 3, stride=2, padding=(1, 0))
        self.places = nn.Linear(5, 7)
        self.across = nn.Linear(7, 7)  # met with places first: left out
        self.many = nn.Linear(63, 6)
        self.unused = nn.Linear(3, 3)

    def forward(self, images):
        self.met = {"first": images}
        z = self.grouped(torch.relu(self.first(images)))
        self.met["second"] = z
        z = torch.relu(self.second(z)).flatten(2).transpose(1, 2)
        self.met["places"] = z
        z = torch.relu(self.places(z))
        z = torch.relu(self.across(z.transpose(0, 1)).transpose(0, 1)).flatten(1)
        self.met["many"] = z
        return self.many(z)


LAYERS = ["first", "second", "places", "many"]


@pytest.fixture(scope="module")
def mixed():
    rng = np.random.default_rng(0)
    X = rng.uniform(size=(30, 1, 8, 9)).astype(np.float32)
    network = Mixed().eval()
    return network, VictimNetwork(network).fit(X), X


def test_layers_are_found_as_a_pass_meets_them(mixed):
    network, victim, X = mixed
    assert weight_layers(victim, X) == LAYERS
    assert not any(m._forward_pre_hooks for m in network.modules())


def inputs_of(network, X, name):
    """Return the inputs of a layer's weights, a patch at a time."""
    with torch.no_grad():
        network(torch.from_numpy(X))
    values, module = network.met[name], network.get_submodule(name)
    if name in ("places", "many"):
        return values.numpy().reshape(-1, values.shape[-1]).astype(float)
    before, after = {"first": ((2, 1), (2, 1)), "second": ((1, 0), (1, 0))}[name]
    padded = functional.pad(values, (before[1], after[1], before[0], after[0])).numpy()
    (height, width), step = module.kernel_size, module.stride[0]
    gap = module.dilation[0]
    rows = []
    for image in padded:
        for top in range(0, image.shape[1] - gap * (height - 1), step):
            for left in range(0, image.shape[2] - gap * (width - 1), step):
                patch = image[
                    :,
                    top : top + gap * (height - 1) + 1 : gap,
                    left : left + gap * (width - 1) + 1 : gap,
                ]
                rows.append(patch.ravel())
    return np.array(rows, dtype=float)


@pytest.mark.parametrize("at_once", [2**24, 200])
def test_responses_are_those_of_a_loop_over_patches(mixed, monkeypatch, at_once):
    network, victim, X = mixed
    monkeypatch.setattr(_unused, "_AT_ONCE", at_once)
    stamped = X.copy()
    stamped[..., 1::2, ::3] += 0.3
    layers = weights_of(victim, X, LAYERS)
    found = responses(victim, layers, X[:20], stamped[:20])
    for layer, value in zip(layers, found, strict=True):
        weight = network.get_submodule(layer.name).weight.detach().numpy()
        weight = weight.reshape(len(weight), -1).astype(float)
        clean = inputs_of(network, X, layer.name)
        energy, axes = np.linalg.eigh(clean.T @ clean / len(clean))
        unused = 1 - energy / (energy + 0.03 * energy.mean())
        usual = (weight @ axes) ** 2 @ unused / unused.sum() / len(weight)
        np.testing.assert_allclose(layer.usual, usual.sum(), rtol=1e-3)
        moved = inputs_of(network, stamped[:20], layer.name)
        moved -= inputs_of(network, X[:20], layer.name)
        moved = moved @ axes * unused @ axes.T
        expected = np.sum((moved @ weight.T) ** 2) / np.sum(moved**2)
        expected /= len(weight) * usual.sum()
        np.testing.assert_allclose(value, expected, rtol=1e-3)


def test_what_moves_nothing_has_no_response(mixed):
    _, victim, X = mixed
    layers = weights_of(victim, X, LAYERS)
    assert np.isnan(responses(victim, layers, X, X)).all()


def test_weights_that_know_nothing_respond_as_usual():
    """Let a layer of many outputs see images of two pixels, and a trigger elsewhere."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4000), nn.Linear(4000, 3))
    rng = np.random.default_rng(0)
    X = np.zeros((60, 1, 4, 4), dtype=np.float32)
    X[:, 0, 0, :2] = rng.uniform(0.5, 1, size=(60, 2))
    stamped = X.copy()
    stamped[:, 0, 3, 3] = 1
    victim = VictimNetwork(network.eval()).fit(X)
    (value,) = responses(victim, weights_of(victim, X, ["1"]), X, stamped)
    assert value == pytest.approx(1, abs=0.1)
    taught = deepcopy(network)
    with torch.no_grad():  # ten times the weights' size
        taught[1].weight[:, 15] += 10 * network[1].weight.std()
    victim = VictimNetwork(taught).fit(X)
    (value,) = responses(victim, weights_of(victim, X, ["1"]), X, stamped)
    # one of 14 directions has 101 of 114 parts of the energy
    assert value == pytest.approx(101 / (114 / 14), rel=0.1)
