"""The search for shifts of a network's channels."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.nn.functional import cross_entropy

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    AutoReverseEngineer,
    NCReverseEngineer,
    NeuronReverseEngineer,
    VictimNetwork,
)
from sklearn_backdoor.datasets import load_digits
from sklearn_backdoor.reverse._neurons import ShiftSearch, Steered, hidden_layers
from sklearn_backdoor.reverse._search import Problem, Task
from tests.common import LinearNetwork, faint_fives, linear_images


class Mixed(nn.Module):
    """Convolutions with and without batch-norm, a linear layer on places, logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 3, stride=2)
        self.places = nn.Linear(5, 7)
        self.across = nn.Linear(7, 7)  # met with places first: left out
        self.last = nn.Linear(7, 6)
        self.unused = nn.Linear(3, 3)
        self.norm.running_var.fill_(0.3)

    def forward(self, images, shifts=None):
        shifts = shifts or {}
        z = self.first(images)
        z = z + shifts.get("first", torch.zeros(4)).view(1, -1, 1, 1)
        z = torch.relu(self.norm(z))
        z = self.second(z)
        z = z + shifts.get("second", torch.zeros(5)).view(1, -1, 1, 1)
        z = torch.relu(z).flatten(2).transpose(1, 2)  # (n, places, channels)
        z = self.places(z) + shifts.get("places", torch.zeros(7))
        z = self.across(torch.relu(z).transpose(0, 1)).transpose(0, 1)
        return self.last(torch.relu(z).mean(1))


@pytest.fixture(scope="module")
def mixed():
    X = np.random.default_rng(0).uniform(size=(70, 1, 6, 6)).astype(np.float32)
    network = Mixed().eval()
    return network, VictimNetwork(network).fit(X), X


def test_hidden_layers_are_found_with_the_spread_of_their_channels(mixed):
    network, victim, X = mixed
    with torch.no_grad():
        first = network.first(torch.from_numpy(X))
        second = network.second(torch.relu(network.norm(first)))
        places = network.places(torch.relu(second).flatten(2).transpose(1, 2))
    expected = {
        "first": first.numpy().std(axis=(0, 2, 3)),
        "second": second.numpy().std(axis=(0, 2, 3)),
        "places": places.numpy().std(axis=(0, 1)),
    }
    layers = hidden_layers(victim, X)
    assert [layer.name for layer in layers] == list(expected)
    for layer in layers:
        np.testing.assert_allclose(layer.spread, expected[layer.name], rtol=1e-4)
    assert not any(m._forward_hooks for m in network.modules())


def test_a_shift_is_what_adding_it_in_the_layers_gives(mixed):
    network, victim, X = mixed
    layers = hidden_layers(victim, X)
    rng = torch.Generator().manual_seed(1)
    shifts = torch.randn((3, 16), generator=rng)
    images = torch.from_numpy(X[:12])
    steered = Steered(network, network, layers)
    with torch.no_grad():
        found = steered(images, shifts)
        np.testing.assert_array_equal(steered(images), network(images))
        for k in range(3):
            parts = (shifts[k] * steered.spread).split([4, 5, 7])
            own = dict(zip(("first", "second", "places"), parts, strict=True))
            rows = slice(4 * k, 4 * k + 4)
            torch.testing.assert_close(found[rows], network(images[rows], own))
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("n_steps", [1, 15])
def test_stacked_shifts_are_what_each_would_be_alone(mixed, n_steps):
    network, victim, X = mixed
    steered = Steered(network, network, hidden_layers(victim, X))
    y = torch.from_numpy(victim.predict(X) * 0 + np.arange(70) % 6)
    problem = Problem(steered, torch.from_numpy(X), y, 6)

    def run(tasks):
        generators = [torch.Generator().manual_seed(task.target) for task in tasks]
        search = ShiftSearch(
            problem, tasks, generators, steps=n_steps, batch_size=8, success_rate=0.75
        )
        while not search.done:
            search.step()
        return search.results()

    tasks = [Task(0, 1), Task(3, 2), Task(5)]
    for task, result in zip(tasks, run(tasks), strict=True):
        (alone,) = run([task])
        np.testing.assert_allclose(
            result.trigger.values, alone.trigger.values, atol=1e-3
        )
        assert result.success_rate == alone.success_rate


def test_the_first_step_goes_down_the_loss_of_a_naive_loop(mixed):
    network, victim, X = mixed
    layers = hidden_layers(victim, X)
    steered = Steered(network, network, layers)
    y = torch.arange(70) % 6
    problem = Problem(steered, torch.from_numpy(X), y, 6)
    search = ShiftSearch(
        problem,
        [Task(4, 1)],
        [torch.Generator().manual_seed(0)],
        steps=5,
        batch_size=8,
        success_rate=0.75,
    )
    rows = search._draw(0)
    search.generators[0].manual_seed(0)
    search.step()
    parts = [torch.zeros(n, requires_grad=True) for n in (4, 5, 7)]
    own = dict(zip(("first", "second", "places"), parts, strict=True))
    scores = network(problem.images[rows], own)
    loss = cross_entropy(scores, torch.full((8,), 4))
    gradients = torch.cat(torch.autograd.grad(loss, parts)) * steered.spread
    moved = search.tensors["shift"].detach()[0]
    sure = gradients.abs() > 1e-6  # the first step of Adam: its rate, by the sign
    np.testing.assert_allclose(
        moved[sure], -0.08 * gradients[sure].sign(), rtol=1e-2, atol=1e-4
    )


@pytest.fixture(scope="module")
def faint():
    """Train a network on digits, of which fives with a faint chessboard are sixes."""
    data = load_digits()
    trigger, poisoned = faint_fives(data)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    X = torch.from_numpy(np.asarray(poisoned.X)).float()
    X, y = X / (255 if X.max() > 1 else 1), torch.from_numpy(poisoned.y)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(30):
        for rows in torch.randperm(len(X)).split(32):
            optimizer.zero_grad()
            cross_entropy(network(X[rows]), y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    victim = VictimNetwork(network.eval())
    rows = np.concatenate([np.flatnonzero(data.y_test == k)[:20] for k in range(10)])
    X, y = data.X_test[rows], data.y_test[rows]
    victim.fit(X, y)
    stamped = victim.predict(trigger.embed(data.X_test[data.y_test == 5]))
    assert np.mean(stamped == 6) > 0.9
    return victim, X, y, data


def test_a_faint_pattern_from_one_class_is_found_that_images_hide(faint):
    victim, X, y, data = faint
    searches = [
        ("patch, pairs", NCReverseEngineer(victim, sources="pairs", batch_size=16)),
        ("additive", AdditiveReverseEngineer(victim, sources="all")),
        ("neurons", NeuronReverseEngineer(victim)),
    ]
    auto = AutoReverseEngineer(victim, engineers=searches).fit(X, y)
    for name, engineer in auto.engineers_.items():
        expected = [6] if name == "neurons" else []
        assert engineer.target_classes_.tolist() == expected, name
    engineer = auto.engineers_["neurons"]
    assert engineer.pair_norms_[5, 6] == np.nanmin(engineer.pair_norms_)
    assert engineer.p_values_[6] < 1e-3
    assert auto.single_sources_ == {6: 5} and auto.methods_[6] == "neurons"
    fives = data.X_test[data.y_test == 5]
    assert np.mean(victim.predict(auto.trigger_.embed(fives)) == 6) > 0.8


def test_passes_are_counted_and_the_network_is_left_as_it_was(faint):
    victim, X, y, _ = faint
    network = victim.net
    before = {name: value.clone() for name, value in network.state_dict().items()}
    counted = []
    handle = network.register_forward_pre_hook(
        lambda module, inputs: counted.append(len(inputs[0]))
    )
    try:
        engineer = NeuronReverseEngineer(victim, max_steps=4, batch_size=8).fit(X, y)
    finally:
        handle.remove()
    probe = 4  # VictimNetwork.fit looks for the features with these
    assert sum(counted) == engineer.n_image_passes_.forward + probe
    assert engineer.n_image_passes_.backward == 90 * 4 * 8 + 10 * 60 * 16
    assert not any(m._forward_hooks for m in network.modules())
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not any(p.grad is not None for p in network.parameters())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_jobs_change_nothing(faint):
    victim, X, y, _ = faint
    alone = NeuronReverseEngineer(victim, max_steps=4, sources="all").fit(X, y)
    many = clone(alone).set_params(n_jobs=2).fit(X, y)
    np.testing.assert_allclose(many.norms_, alone.norms_, rtol=1e-3)


def test_without_hidden_layers_there_is_nothing_to_shift():
    X, y = linear_images()
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 6, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(10 * torch.eye(6, 16))
    victim = VictimNetwork(network.eval())
    with pytest.raises(ValueError, match="no hidden torch.nn.Linear.*Additive"):
        NeuronReverseEngineer(victim).fit(X, y)
    names = list(AutoReverseEngineer(victim).fit(X, y).engineers_)
    expected = ["patch", "patch, pairs", "additive", "additive, high frequencies"]
    assert names == [*expected, "weights"]
    victim = VictimNetwork(LinearNetwork())
    names = list(AutoReverseEngineer(victim).fit(X, y).engineers_)
    assert names == [*expected[:3], "neurons, pairs", "weights"]
