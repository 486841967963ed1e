import json
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sklearn_backdoor import VictimNetwork, asr_score, white_box
from sklearn_backdoor.datasets import load_image_folder
from sklearn_backdoor.networks import VGG16, LeNet5, ResNet18
from sklearn_backdoor.training import train_network
from tests.common import needs_shared


@pytest.mark.parametrize(
    "network, shape, layer, n_features",
    [
        (lambda: LeNet5(), (1, 28, 28), "classifier.4", 84),
        (lambda: LeNet5(image_shape=(3, 32, 32)), (3, 32, 32), "classifier.4", 84),
        (lambda: LeNet5(7, (1, 8, 8)), (1, 8, 8), "classifier.4", 84),
        (lambda: LeNet5(image_shape=(1, 15, 18)), (1, 15, 18), "classifier.4", 84),
        (lambda: ResNet18(), (3, 32, 32), "fc", 512),
        (lambda: ResNet18(n_channels=1, mean=0.3, std=0.3), (1, 32, 32), "fc", 512),
        (lambda: VGG16(), (3, 64, 64), "classifier.6", 4096),
    ],
)
def test_networks_expose_penultimate_features(network, shape, layer, n_features):
    images = np.random.default_rng(0).random((3, *shape))
    victim = VictimNetwork(network()).fit(images)
    assert victim.feature_layer_ == layer
    assert victim.transform(images).shape == (3, n_features)


def test_lenet_has_the_published_number_of_weights():
    # 6 (25 + 1) + 16 (150 + 1) + 120 (400 + 1) + 84 (120 + 1) + 10 (84 + 1)
    assert sum(p.numel() for p in LeNet5().parameters()) == 61_706


def test_normalisation_is_inside():
    network = LeNet5(mean=0.25, std=0.5).eval()
    plain = LeNet5(mean=0.0, std=1.0).eval()
    plain.load_state_dict(network.state_dict())
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(network(images), plain((images - 0.25) / 0.5))


def test_training_learns_repeats_and_leaves_the_global_state_alone():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, size=200)
    X = rng.random((200, 1, 8, 8), dtype=np.float32) / 2
    X[y == 1, :, :4] += 0.5

    def train(seed):
        return train_network(
            lambda: LeNet5(2, (1, 8, 8)), X, y, epochs=5, lr=1e-2, random_state=seed
        )

    state = torch.random.get_rng_state()
    losses: list = []
    one = train(0)
    train_network(
        lambda: LeNet5(2, (1, 8, 8)),
        X,
        y,
        epochs=3,
        on_epoch=lambda epoch, loss: losses.append((epoch, loss)),
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [epoch for epoch, _ in losses] == [0, 1, 2]
    assert losses[-1][1] < losses[0][1]
    assert VictimNetwork(one).fit(X, y).score(X, y) > 0.95
    for a, b in zip(one.parameters(), train(0).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(train(1).parameters()), next(one.parameters()))


def test_the_rate_rises_once_and_falls_to_nothing(monkeypatch):
    rates = []
    original = torch.optim.Adam.step

    def step(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    X = np.random.default_rng(0).random((40, 1, 8, 8), dtype=np.float32)
    options = {"epochs": 5, "lr": 1e-2, "batch_size": 10}
    train_network(lambda: LeNet5(2, (1, 8, 8)), X, np.arange(40) % 2, **options)
    assert len(rates) == 20 and max(rates) > 0.009
    peak = int(np.argmax(rates))
    assert np.all(np.diff(rates[: peak + 1]) > 0) and np.all(np.diff(rates[peak:]) < 0)
    assert rates[-1] < 1e-4


@pytest.fixture(scope="module")
def cifar_test(tmp_path_factory):
    archive = needs_shared("data", "cifar10-jpeg.tar")
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(archive) as tar:
        chosen = [
            member
            for member in tar
            if "test/" in member.name and member.name.endswith(("0.jpg", "5.jpg"))
        ]
        tar.extractall(folder, chosen, filter="data")
    found = next(folder.rglob("test"))
    return load_image_folder(found)


def test_a_resnet18_made_by_other_code_is_read_as_it_is(cifar_test):
    weights = needs_shared("victims", "cifar10-resnet18-white-box-multi.safetensors")
    facts = json.loads(weights.with_suffix(".json").read_text())
    network = ResNet18(mean=facts["mean"], std=facts["std"])
    network.load_state_dict(load_file(weights))
    X, y = cifar_test.X[::4], cifar_test.y[::4]
    victim = VictimNetwork(network, classes=facts["classes"]).fit(X)
    labels = victim.predict(X)
    names = np.array(facts["classes"])[y]
    n = len(X)
    assert n > 400
    # three standard errors on a part of the test images
    assert abs(np.mean(labels == names) - facts["acc"]) < 3 * 0.5 / np.sqrt(n)
    # this victim's box lies one pixel off the corner: the JSON gives [28:31, 28:31]
    stamped = white_box((3, 32, 32), margin=1).embed(X)
    asr = asr_score(names, victim.predict(stamped), target_class="truck")
    assert abs(asr - facts["asr"]) < 3 * 0.5 / np.sqrt(n)
