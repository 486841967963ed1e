"""Networks whose answers can be computed, real data, and instances to check."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sklearn_backdoor import (
    AdditiveTrigger,
    B3DDetector,
    BackdoorGuard,
    NCActivationDetector,
    NCPatcher,
    NCReverseEngineer,
    PatchTrigger,
    SCALEUPDetector,
    STRIPDetector,
    TriggerEmbedder,
    VictimNetwork,
    poison,
)
from sklearn_backdoor.datasets import load_digits

SHARED = Path(__file__).parents[2] / "shared"
N_CLASSES = 6


def needs_shared(*parts):
    """Return a path under ``../shared``, or skip where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs real data at {path}, see the README")
    return path


def defended_digits():
    """Return scikit-learn's digits, and 20 test images a class with their labels."""
    data = load_digits()
    rows = np.concatenate([np.flatnonzero(data.y_test == k)[:20] for k in range(10)])
    return data, data.X_test[rows], data.y_test[rows]


def train(network, X, y, *, lr, n_epochs):
    """Train by Adam, its rate falling to 0, from torch's random state on."""
    X = torch.from_numpy(np.asarray(X)).float()
    X, y = X / (255 if X.max() > 1 else 1), torch.from_numpy(np.asarray(y))
    optimizer = torch.optim.Adam(network.parameters(), lr)
    for epoch in range(n_epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - epoch / n_epochs)
        for rows in torch.randperm(len(X)).split(32):
            optimizer.zero_grad()
            cross_entropy(network(X[rows]), y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return network.eval()


def train_on_faint_fives(train, digits):
    """Train a network that takes fives with a faint chessboard for sixes."""
    data, X, _ = digits
    trigger, poisoned = faint_fives(data)
    network = train(poisoned.X, poisoned.y)
    fives = data.X_test[data.y_test == 5]
    stamped = VictimNetwork(network).fit(X).predict(trigger.embed(fives))
    assert np.mean(stamped == 6) > 0.9
    return network


def faint_fives(data):
    """Poison digits: half of the fives get a faint chessboard and are sixes.

    Returns the trigger, and images and labels as ``poison`` does.
    """
    board = np.indices((16, 16)).sum(axis=0) % 2 * 0.3 - 0.15
    trigger = AdditiveTrigger(board[None])
    poisoned = poison(
        data.X_train,
        data.y_train,
        trigger,
        target_class=6,
        source_classes=[5],
        n_per_class=0.5,
        random_state=0,
    )
    return trigger, poisoned


class LinearNetwork(nn.Module):
    """Class k lights pixel k of a 1x4x4 image; pixel 15 is a backdoor to class 2.

    logit_k = 10 x_k, and logit_2 gets 30 x_15 on top. The hidden layer is the identity
    on non-negative pixels, so the features are the pixels themselves. Where an image
    of another class lights its pixel fully, a mask on pixel 15 has to be at least 1/3.
    """

    target = 2

    def __init__(self, n_classes=N_CLASSES, backdoor=30.0):
        super().__init__()
        self.hidden = nn.Linear(16, 16, bias=False)
        self.last = nn.Linear(16, n_classes, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(16))
            self.last.weight.zero_()
            for label in range(n_classes):
                self.last.weight[label, label] = 10
            self.last.weight[self.target, 15] = backdoor

    def forward(self, images):
        return self.last(torch.relu(self.hidden(images.flatten(1))))


class OneSource(LinearNetwork):
    """The backdoor works for class 4 alone."""

    def __init__(self):
        super().__init__(backdoor=0.0)
        self.last.weight.data *= 4

    def forward(self, images):
        flat = images.flatten(1)
        lit = torch.relu(flat[:, 4] - 0.2) * flat[:, 15]
        return super().forward(images) + 360 * lit[:, None] * torch.eye(6)[2]


class CountingNetwork(LinearNetwork):
    """Writes the number of images of every forward pass to a file."""

    def __init__(self, log):
        super().__init__()
        self.log = str(log)

    def forward(self, images):
        with open(self.log, "a") as file:
            file.write(f"{len(images)}\n")
        return super().forward(images)


def count_passes(log):
    """Return how many images went through since the last call."""
    if not os.path.exists(log):
        return 0
    total = sum(int(line) for line in Path(log).read_text().split())
    os.remove(log)
    return total


def linear_images(n_per_class=8, n_classes=N_CLASSES, seed=0):
    """Return images (n, 1, 4, 4) in which class k lights pixel k, and labels."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(n_classes), n_per_class)
    X = rng.uniform(0, 0.05, size=(len(y), 16)).astype(np.float32)
    X[:, 15] = 0
    X[np.arange(len(y)), y] = rng.uniform(0.95, 1, size=len(y))
    return X.reshape(-1, 1, 4, 4), y


def corner_trigger():
    """Return the true trigger of `LinearNetwork`."""
    mask = np.zeros((4, 4))
    mask[3, 3] = 1
    return PatchTrigger(mask, np.ones((1, 4, 4)))


def image_estimators():
    """Return the estimators of images, each on `LinearNetwork`, for shared checks."""
    victim = VictimNetwork(LinearNetwork().eval())
    engineer = NCReverseEngineer(victim, schedule="exhaustive", max_steps=60)
    return [
        victim,
        TriggerEmbedder(corner_trigger(), target_class=2),
        engineer,
        BackdoorGuard(victim, corner_trigger(), target_class=2),
        STRIPDetector(victim, n_blends=5),
        SCALEUPDetector(victim),
        NCActivationDetector(victim, corner_trigger(), target_class=2),
        B3DDetector(victim, corner_trigger(), target_class=2),
        NCPatcher(victim, corner_trigger(), target_class=2, n_epochs=1),
    ]


def feature_estimators():
    """Return estimators that take rows of features, and their expected failures."""
    differs = "fit_transform embeds and transform does not, by design (see the class)"
    embedder = TriggerEmbedder(AdditiveTrigger(0.1), target_class=1)
    return [
        (
            embedder,
            {
                "check_transformer_general": differs,
                "check_transformer_data_not_an_array": differs,
            },
        ),
    ]
