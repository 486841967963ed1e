import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_backdoor import NCReverseEngineer, VictimNetwork
from sklearn_backdoor.detectors import NCPatcher
from tests.common import (
    CountingNetwork,
    LinearNetwork,
    corner_trigger,
    count_passes,
    linear_images,
)

NAMES = np.array(["fox", "ant", "eel", "dog", "cat", "bee"])  # not sorted
GOOD = {"lr": 0.05, "n_epochs": 40, "batch_size": 16}


def patcher(network, **settings):
    settings = {"target_class": 2, **settings}
    return NCPatcher(VictimNetwork(network), corner_trigger(), **settings)


def deep_network(seed=0):
    """Return a network with batch norm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(16, 12),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(12, 6),
        ).eval()


def softmax_minus_label(logits, label):
    powers = [math.exp(logit - max(logits)) for logit in logits]
    slope = [power / sum(powers) for power in powers]
    slope[label] -= 1
    return np.array(slope)


def two_steps_by_hand(X, y, lr, momentum=0.9):
    """Train `LinearNetwork` on all images at once, two steps; return its weights."""
    hidden, last = np.eye(16), np.zeros((6, 16))
    last[range(6), range(6)], last[2, 15] = 10, 30
    speed_hidden, speed_last = np.zeros_like(hidden), np.zeros_like(last)
    for _ in range(2):
        slope_hidden, slope_last = np.zeros_like(hidden), np.zeros_like(last)
        for image, label in zip(X.reshape(len(X), 16).astype(float), y, strict=True):
            before = hidden @ image
            features = np.maximum(before, 0)
            slope = softmax_minus_label(list(last @ features), label)
            slope_last += np.outer(slope, features) / len(X)
            slope_hidden += np.outer((slope @ last) * (before > 0), image) / len(X)
        speed_hidden = momentum * speed_hidden + slope_hidden
        speed_last = momentum * speed_last + slope_last
        hidden, last = hidden - lr * speed_hidden, last - lr * speed_last
    return hidden, last


@pytest.mark.parametrize("fraction", [0, 1])
def test_two_steps_are_those_of_momentum_on_true_labels(linear, images, fraction):
    X, y = images
    found = patcher(
        linear, lr=0.01, n_epochs=2, fraction=fraction, batch_size=len(X)
    ).fit(X, y)
    expected = two_steps_by_hand(corner_trigger().embed(X) if fraction else X, y, 0.01)
    network = found.patched_.network_
    for layer, weights, before in zip(
        (network.hidden, network.last), expected, (np.eye(16), None), strict=True
    ):
        np.testing.assert_allclose(layer.weight.detach().numpy(), weights, atol=2e-5)
        if before is not None and fraction:
            assert np.abs(weights - before).max() > 1e-2  # they did move


def test_patching_removes_the_backdoor(linear, images):
    X, y = images
    X_test, y_test = linear_images(seed=1)
    triggered = corner_trigger().embed(X_test[y_test != 2])
    sources = y_test[y_test != 2]
    assert (VictimNetwork(linear).fit(X).predict(triggered) == 2).all()
    found = patcher(linear, **GOOD).fit(X, y)
    assert np.mean(found.predict(triggered) == sources) > 0.95
    assert found.score(X_test, y_test) > 0.95
    assert found.is_trigger(triggered).mean() > 0.95
    assert not found.is_trigger(X_test).any()


def test_without_triggered_images_the_backdoor_stays(linear, images):
    X, y = images
    found = patcher(linear, **GOOD, fraction=0).fit(X, y)
    triggered = corner_trigger().embed(X)
    assert (found.predict(triggered) == 2).all()
    assert not found.is_trigger(triggered).any()


def test_is_trigger_asks_that_only_the_patched_network_leaves_the_target(images):
    X, y = images
    found = patcher(LinearNetwork(), n_epochs=1).fit(X, y)
    victim, patched = np.array([2, 2, 4, 4, 2]), np.array([2, 3, 2, 5, 0])
    found.victim_.predict, found.patched_.predict = lambda X: victim, lambda X: patched
    assert found.is_trigger(X[:5]).tolist() == [False, True, False, False, True]


seen: list = []


class Watched(LinearNetwork):
    """Notes the images that it is trained on."""

    def forward(self, images):
        if self.training:
            seen.append(images.detach().clone())
        return super().forward(images)


@pytest.mark.parametrize("fraction, n_expected", [(0.2, 10), (0.25, 12), (0.01, 1)])
def test_a_fraction_of_the_images_carries_the_trigger_the_same_each_epoch(
    images, fraction, n_expected
):
    X, y = images
    seen.clear()
    patcher(Watched().eval(), n_epochs=2, fraction=fraction, batch_size=20).fit(X, y)
    assert [len(batch) for batch in seen] == [16, 16, 16] * 2
    stamped = corner_trigger().embed(X)
    epochs = [torch.cat(seen[:3]).numpy(), torch.cat(seen[3:]).numpy()]
    assert not np.array_equal(*epochs)  # another order
    marked = []
    for epoch in epochs:
        rows = [
            next(
                (row, triggered)
                for row in range(len(X))
                for triggered in (False, True)
                if np.array_equal(image, (stamped if triggered else X)[row])
            )
            for image in epoch
        ]
        assert sorted(row for row, _ in rows) == list(range(len(X)))
        marked.append(sorted(row for row, triggered in rows if triggered))
    assert marked[0] == marked[1] and len(marked[0]) == n_expected


def test_the_victim_is_left_as_it_was(images):
    network = deep_network().train()  # whatever its mode
    network[5].eval()
    network[1].weight.requires_grad_(False)
    network[5].weight.grad = torch.ones(6, 12)
    state = copy.deepcopy(network.state_dict())
    found = patcher(network, n_epochs=2, batch_size=16).fit(*images)
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    modes = [module.training for module in network]
    assert modes == [True, True, True, True, True, False]
    trained = {name: p.requires_grad for name, p in network.named_parameters()}
    assert [name for name, value in trained.items() if not value] == ["1.weight"]
    assert torch.equal(network[5].weight.grad, torch.ones(6, 12))
    assert all(p.grad is None for p in list(network.parameters())[:-2])
    assert found.victim_.network_ is network


def test_the_whole_copy_is_trained_batch_norm_and_frozen_parameters_included(images):
    network = deep_network().requires_grad_(False)
    found = patcher(network, n_epochs=2, batch_size=16).fit(*images)
    patched = found.patched_.network_
    for (name, before), after in zip(
        network.named_parameters(), patched.parameters(), strict=True
    ):
        if name != "1.bias":  # batch norm takes a constant away
            assert not torch.equal(before, after), name
    assert not torch.equal(network[2].running_mean, patched[2].running_mean)
    assert int(patched[2].num_batches_tracked) == 2 * 3
    assert not any(module.training for module in patched.modules())
    assert all(p.grad is None for p in patched.parameters())


def test_a_random_state_decides_all_and_the_global_one_nothing(images):
    X, y = images

    def answers(random_state, global_seed):
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        found = patcher(
            deep_network(), n_epochs=2, batch_size=16, random_state=random_state
        ).fit(X, y)
        np.testing.assert_array_equal(np.random.get_state()[1], before[0])
        assert torch.equal(torch.get_rng_state(), before[1])
        return found.predict_proba(X)

    np.testing.assert_array_equal(answers(0, 1), answers(0, 2))
    assert np.abs(answers(0, 1) - answers(1, 1)).max() > 1e-3


def test_labels_may_be_names_in_any_order(linear, images):
    X, y = images
    numbered = patcher(linear, **GOOD).fit(X, y)
    named = NCPatcher(
        VictimNetwork(linear, classes=NAMES),
        corner_trigger(),
        target_class="eel",
        **GOOD,
    ).fit(X, NAMES[y])
    np.testing.assert_array_equal(named.predict_proba(X), numbered.predict_proba(X))
    np.testing.assert_array_equal(named.predict(X), NAMES[numbered.predict(X)])
    np.testing.assert_array_equal(named.classes_, NAMES)


class Probabilistic(LinearNetwork):
    """Returns probabilities, and no Linear layer's output that they could be from."""

    def forward(self, images):
        return (super().forward(images) / 5).softmax(1)


class Halved(LinearNetwork):
    def forward(self, images):
        return super().forward(images) / 5


def test_a_victim_that_returns_probabilities_is_trained_like_one_of_logits(images):
    X, y = images
    answers = [
        NCPatcher(
            VictimNetwork(network.eval(), feature_layer="hidden"),
            corner_trigger(),
            target_class=2,
            lr=0.05,
            n_epochs=5,
        )
        .fit(X, y)
        .predict_proba(X)
        for network in (Probabilistic(), Halved())
    ]
    np.testing.assert_allclose(*answers, atol=1e-4)
    untouched = VictimNetwork(Halved(), feature_layer="hidden").fit(X)
    assert np.abs(answers[0] - untouched.predict_proba(X)).max() > 1e-2


def test_image_passes_are_counted(images, tmp_path):
    X, y = images
    log = tmp_path / "log"
    network = CountingNetwork(log).eval()
    VictimNetwork(network).fit(X, y)
    n_opening = count_passes(log)
    found = patcher(network, n_epochs=3, batch_size=20).fit(X, y)
    assert count_passes(log) == found.n_image_passes_.forward + n_opening
    assert found.n_image_passes_ == (4 * len(X), 3 * len(X))


def test_a_rate_at_which_training_diverges_is_named(linear, images):
    found = patcher(linear, lr=1e30, n_epochs=2)
    with pytest.raises(ValueError, match=r"diverged at lr=1e\+30.*Lower lr.*1e\+29"):
        found.fit(*images)
    assert not [name for name in vars(found) if name.endswith("_")]
    # the step after which no other comes is looked at too
    last = patcher(linear, lr=1e30, n_epochs=1, batch_size=len(images[0]))
    with pytest.raises(ValueError, match="diverged"):
        last.fit(*images)


def test_a_reverse_engineer_gives_trigger_and_target(linear, images):
    victim = VictimNetwork(linear)
    engineer = NCReverseEngineer(victim, schedule="exhaustive", max_steps=60)
    found = NCPatcher(victim, engineer, **GOOD).fit(*images)
    assert found.target_class_ == 2
    assert found.trigger_ == found.engineer_.triggers_[2]
    assert not hasattr(engineer, "trigger_")  # a clone was fitted


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr": -1}, "lr=-1, expected"),
        ({"n_epochs": 0}, "n_epochs=0, expected"),
        ({"fraction": 1.1}, "fraction=1.1, expected"),
        ({"batch_size": 0}, "batch_size=0, expected"),
        ({"target_class": 9}, "target_class=9 is not among"),
        ({"target_class": None}, "target_class=None with a trigger"),
    ],
)
def test_bad_settings_are_named(linear, images, settings, message):
    with pytest.raises(ValueError, match=message):
        patcher(linear, **settings).fit(*images)


def test_bytes_are_trained_on_as_fractions(linear, images):
    X, y = images
    X = np.rint(255 * X).astype(np.uint8)
    from_bytes = patcher(linear, **GOOD).fit(X, y)
    from_fractions = patcher(linear, **GOOD).fit(X.astype(np.float32) / 255, y)
    np.testing.assert_allclose(
        from_bytes.predict_proba(X), from_fractions.predict_proba(X), atol=1e-5
    )
