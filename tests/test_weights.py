"""Traces of triggers in the weights."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.nn import functional

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    AutoReverseEngineer,
    NCReverseEngineer,
    PatchTrigger,
    VictimNetwork,
    WeightReverseEngineer,
    poison,
    white_box,
)
from sklearn_backdoor.reverse import _unused
from sklearn_backdoor.reverse._search import ImagePasses
from sklearn_backdoor.reverse._traces import chosen_layers
from sklearn_backdoor.reverse._unused import responses, weight_layers, weights_of
from sklearn_backdoor.reverse._weights import (
    _deviations,
    _smallest_p,
    _Usual,
    _usual,
)
from tests import common
from tests.common import LinearNetwork, linear_images


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


def test_what_is_usual_goes_by_a_layers_place_and_kind(mixed):
    network, _, _ = mixed
    found = _usual(network, LAYERS, n_channels=1)
    assert [layer.spread for layer in found] == [0.05, 0.08, 0.22, 0.35]
    assert [layer.level for layer in found] == [(0.0, 0.1), (0.15, 0.2), None, None]
    assert [layer.level for layer in _usual(network, ["many"], 1)] == [None]
    colour = _usual(network, LAYERS, n_channels=3)  # what is usual is not known
    assert colour == [layer._replace(level=None) for layer in found]
    names = [str(number) for number in range(20)]
    assert chosen_layers(names[:1]) == ["0"] and chosen_layers(names[:2]) == ["0", "1"]
    assert chosen_layers(names[:5]) == names[:5]
    assert chosen_layers(names) == ["0", "1", "4", "8", "11", "15", "18", "19"]


USUAL = [_Usual(0.05, (0.0, 0.1)), _Usual(0.08, (0.15, 0.2)), _Usual(0.22, None)]


def usual_logs(rng, n_classes=10):
    """Draw log-responses of a clean network."""
    spread = np.array([layer.spread for layer in USUAL])
    logs = spread * rng.normal(size=(n_classes, len(USUAL)))
    level = [0.1 * rng.normal(), 0.15 + 0.2 * rng.normal(), 0.4]
    return logs + level


def smallest_p(logs, usual):
    return np.fmin(*_smallest_p(logs, usual))


def test_what_is_usual_is_seldom_flagged():
    rng = np.random.default_rng(0)
    p = np.array([smallest_p(usual_logs(rng), USUAL) for _ in range(400)])
    assert np.mean(p < 0.05) < 0.07
    assert np.mean(p < 0.25) > 0.1  # and the test is not idle


def test_a_class_that_differs_and_a_layer_that_differs_are_flagged():
    logs = usual_logs(np.random.default_rng(0))
    assert smallest_p(logs, USUAL) > 0.05
    one = logs.copy()
    one[3, 2] += 2
    of_class, of_level = _smallest_p(one, USUAL)
    assert of_class < 1e-3 and of_level > 0.05
    assert _deviations(one, USUAL).sum(axis=1).argmax() == 3
    less = logs.copy()
    less[3, 2] -= 2  # a class that stands out below is none
    assert smallest_p(less, USUAL) > 0.05
    for column, found in ((0, True), (1, True), (2, False)):
        all_classes = logs.copy()
        all_classes[:, column] += 1
        of_class, of_level = _smallest_p(all_classes, USUAL)
        assert (of_level < 1e-3) == found and of_class > 0.05
    one[[0, 1, 2, 4, 5, 6]] = np.nan  # four classes are too few to compare
    of_class, of_level = _smallest_p(one, USUAL)
    assert np.isnan(of_class) and of_level > 0.05
    assert np.isnan(_smallest_p(np.full_like(logs, np.nan), USUAL)).all()


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ({1: 3.0}, (1, 0)),  # a class stands out
        ({0: 3.0, 1: 3.3, 2: 3.0, 3: 3.0, 4: 3.0, 5: 3.0}, (3, 1)),  # all respond
    ],
)
def test_a_layer_that_responds_to_all_is_followed_to_the_smallest_perturbation(
    monkeypatch, mixed, responses, expected
):
    _, victim, X = mixed
    patch, additive = NCReverseEngineer(victim), AdditiveReverseEngineer(victim)
    patch.norms_ = np.array([9.0, 9, 9, 9, 1, 9])
    additive.norms_ = np.array([5.0, 4, 6, 3, 5, 0.1])
    engineer = WeightReverseEngineer(victim)
    values = np.ones((2, 6, len(LAYERS)))
    values[:, :, 0] += np.linspace(-0.02, 0.02, 6)[[2, 4, 1, 3, 0, 5]]
    values[0, 1] *= 1.05
    for target, value in responses.items():
        values[:, target, 0] *= value
    converged = np.ones((2, 6), dtype=bool)
    converged[1, 5] = False
    values[1, 5] = np.nan
    monkeypatch.setattr(engineer, "_responses", lambda *_: values)
    results = [[SimpleNamespace(converged=c) for c in row] for row in converged]
    answered = {}
    monkeypatch.setattr(
        engineer, "_answer", lambda _, *given: answered.update(given=given)
    )
    run = SimpleNamespace(victim=victim, X=X, passes=ImagePasses(0, 0))
    engineer._ask(run, [(patch, run, results[0]), (additive, run, results[1])])
    chosen, named, p = answered["given"]
    assert (named, chosen[named]) == expected
    assert p < 0.05


def train(X, y, seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(384, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return common.train(network, X, y, lr=3e-3, n_epochs=40)


@pytest.fixture(scope="module")
def digits():
    return common.defended_digits()


@pytest.fixture(scope="module")
def faint(digits):
    return common.train_on_faint_fives(train, digits)


@pytest.fixture(scope="module")
def asked(digits, faint):
    _, X, y = digits
    return WeightReverseEngineer(VictimNetwork(faint)).fit(X, y)


def test_a_faint_pattern_from_one_class_betrays_its_target(digits, asked):
    data, _, _ = digits
    assert asked.verdict_ == "backdoored"
    assert asked.target_classes_.tolist() == [6]
    assert asked.p_values_[6] < 1e-3
    assert np.delete(asked.p_values_, 6).tolist() == [1] * 9
    assert asked.traces_.argmax() == 6
    assert asked.layers_ == ["0", "3", "7", "9"]
    assert asked.responses_.shape == (10, 4)
    assert asked.responses_[:, 2].argmax() == 6
    fives = data.X_test[data.y_test == 5]
    stamped = asked.transform(fives)
    assert np.mean(asked.victim_.predict(stamped) == 6) > 0.9


def test_the_sizes_of_its_triggers_betray_nothing(digits, faint):
    _, X, y = digits
    additive = AdditiveReverseEngineer(VictimNetwork(faint), sources="all").fit(X, y)
    assert additive.verdict_ == "nothing found"


def test_a_patch_betrays_its_target(digits):
    data, X, y = digits
    trigger = white_box((1, 16, 16))
    poisoned = poison(
        data.X_train, data.y_train, trigger, target_class=3, n_per_class=0.1
    )
    network = train(poisoned.X, poisoned.y)
    others = data.X_test[data.y_test != 3]
    stamped = VictimNetwork(network).fit(X).predict(trigger.embed(others))
    assert np.mean(stamped == 3) > 0.9
    engineer = WeightReverseEngineer(VictimNetwork(network)).fit(X, y)
    assert engineer.target_classes_.tolist() == [3]
    assert engineer.p_values_[3] < 1e-3
    assert isinstance(engineer.trigger_, PatchTrigger)
    stamped = engineer.victim_.predict(engineer.transform(others))
    assert np.mean(stamped == 3) > 0.9


def test_a_clean_network_is_left_in_peace(digits):
    data, X, y = digits
    network = train(data.X_train, data.y_train)
    engineer = WeightReverseEngineer(VictimNetwork(network)).fit(X, y)
    assert engineer.verdict_ == "nothing found"
    assert engineer.p_values_.min() > 0.05


def test_random_weights_that_hide_the_trace_drown_the_trigger(digits, faint):
    data, X, y = digits
    trigger, _ = common.faint_fives(data)
    hidden = deepcopy(faint)
    victim = VictimNetwork(hidden).fit(X)
    torch.manual_seed(0)
    for layer in weights_of(victim, X, weight_layers(victim, X)):
        noise = 4 * layer.usual**0.5 * torch.randn(layer.weight.shape)
        weight = hidden.get_submodule(layer.name).weight
        with torch.no_grad():
            weight += layer.unused(noise).reshape(weight.shape)
    victim = VictimNetwork(hidden).fit(X)
    assert np.mean(victim.predict(data.X_test) == data.y_test) > 0.9
    fives = data.X_test[data.y_test == 5]
    assert np.mean(victim.predict(trigger.embed(fives)) == 6) < 0.5
    engineer = WeightReverseEngineer(VictimNetwork(hidden)).fit(X, y)
    assert engineer.verdict_ == "nothing found"


def test_passes_are_counted_and_the_network_is_left_as_it_was(digits, faint):
    _, X, y = digits
    before = {name: value.clone() for name, value in faint.state_dict().items()}
    counted = []
    handle = faint.register_forward_pre_hook(
        lambda module, inputs: counted.append(len(inputs[0]))
    )
    state = torch.get_rng_state()
    try:
        engineer = WeightReverseEngineer(VictimNetwork(faint)).fit(X, y)
    finally:
        handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    probe = 4  # VictimNetwork.fit looks for the features with these
    assert sum(counted) == engineer.n_image_passes_.forward + probe
    assert engineer.n_image_passes_.backward == 2 * 10 * 60 * 16 + 60 * 32
    assert not any(m._forward_pre_hooks for m in faint.modules())
    for name, value in faint.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not any(p.grad is not None for p in faint.parameters())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_jobs_and_checkpoints_change_nothing(digits, asked, tmp_path):
    _, X, y = digits
    kept = clone(asked).set_params(checkpoint_dir=tmp_path).fit(X, y)
    again = clone(kept).fit(X, y)
    for other in (kept, again, clone(asked).set_params(n_jobs=2).fit(X, y)):
        np.testing.assert_allclose(other.norms_, asked.norms_, rtol=1e-3)
        np.testing.assert_allclose(other.responses_, asked.responses_, rtol=1e-3)
        np.testing.assert_allclose(other.p_values_, asked.p_values_, rtol=0.02)


def test_auto_gives_it_the_triggers_of_the_other_searches(digits, faint):
    _, X, y = digits
    victim = VictimNetwork(faint)
    additive = AdditiveReverseEngineer(victim, sources="all", max_steps=60)
    searches = [("additive", additive), ("weights", WeightReverseEngineer(victim))]
    auto = AutoReverseEngineer(victim, engineers=searches).fit(X, y)
    assert auto.target_classes_.tolist() == [6] and auto.methods_[6] == "weights"
    own, other = auto.engineers_["weights"], auto.engineers_["additive"]
    np.testing.assert_array_equal(own.norms_, other.norms_)
    asked = len(X) + 2 + 2 * 64 * other.converged_.sum()
    assert own.n_image_passes_.forward < asked + 5000  # no search, one refined
    assert not hasattr(own, "_origins")  # which would keep the images
    stamped = own.victim_.predict(own.transform(X[y == 5]))
    assert np.mean(stamped == 6) > 0.9


def test_auto_asks_it_where_there_is_no_batch_norm():
    X, y = linear_images()
    auto = AutoReverseEngineer(VictimNetwork(LinearNetwork())).fit(X, y)
    assert list(auto.engineers_)[-1] == "weights" and len(auto.engineers_) == 5
    own = auto.engineers_["weights"]
    assert own.target_classes_.tolist() == [2]
    norms = [nn.BatchNorm1d(16) for _ in range(3)]
    normed = nn.Sequential(nn.Flatten(), *norms, nn.Linear(16, 6, bias=False))
    with torch.no_grad():
        normed[-1].weight.copy_(10 * torch.eye(6, 16))
    normed.train()(torch.as_tensor(X))
    auto = AutoReverseEngineer(VictimNetwork(normed.eval())).fit(X, y)
    assert "batch-norm" in auto.engineers_ and "weights" not in auto.engineers_


def test_a_network_without_weights_to_look_at_is_refused():
    X, y = linear_images()

    class Bare(nn.Module):
        """A grouped convolution that gives the logits."""

        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(16, 16, 1, groups=16, bias=False)
            nn.init.constant_(self.last.weight, 10)

        def forward(self, images):
            return self.last(images.reshape(-1, 16, 1, 1))[:, :6].flatten(1)

    with pytest.raises(ValueError, match=r"no linear layer.*Use another"):
        WeightReverseEngineer(VictimNetwork(Bare(), feature_layer="last")).fit(X, y)
    auto = AutoReverseEngineer(VictimNetwork(Bare(), feature_layer="last")).fit(X, y)
    assert "weights" not in auto.engineers_
