"""Networks as they come: what the user guide says can be wrapped, can be."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchvision
from skorch import NeuralNetClassifier
from torch import nn
from torchvision.transforms import Normalize

from sklearn_backdoor import BackdoorGuard, VictimNetwork, white_box

SHAPE = (3, 32, 32)
N_CLASSES = 4


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(N_CLASSES), 6)
    X = rng.uniform(0, 0.3, size=(len(y), *SHAPE)).astype(np.float32)
    X += (y / 10).astype(np.float32)[:, None, None, None]
    return X, y


class SmallNetwork(nn.Module):
    """Plain torch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4)
        )
        self.head = nn.Linear(128, N_CLASSES)

    def forward(self, images):
        return self.head(self.body(images).flatten(1))


@dataclass
class ImageClassifierOutput:
    """What a Hugging Face image classifier returns; it is not installed here."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class LikeHuggingFace(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = SmallNetwork().body
        self.classifier = nn.Linear(128, N_CLASSES)

    def forward(self, pixel_values, labels=None):
        features = self.backbone(pixel_values).flatten(1)
        return ImageClassifierOutput(logits=self.classifier(features))


def plain_torch():
    return SmallNetwork(), 128


def torchvision_network():
    network = torchvision.models.resnet18(num_classes=N_CLASSES)
    return nn.Sequential(Normalize([0.5] * 3, [0.25] * 3), network), 512


def timm_network():
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=N_CLASSES, pretrained=False)
    config = network.pretrained_cfg
    return nn.Sequential(Normalize(config["mean"], config["std"]), network), 512


def hugging_face():
    return LikeHuggingFace(), 128


def skorch_net():
    net = NeuralNetClassifier(
        SmallNetwork,
        criterion=nn.CrossEntropyLoss,
        max_epochs=1,
        train_split=None,
        verbose=0,
    )
    images = np.zeros((4, *SHAPE), dtype=np.float32)
    return net.fit(images, np.arange(N_CLASSES)), 128


MAKERS = [plain_torch, torchvision_network, timm_network, hugging_face, skorch_net]


def logits_of(network, X):
    module = network.module_ if hasattr(network, "module_") else network
    with torch.no_grad():
        output = module.eval()(torch.from_numpy(X))
    return getattr(output, "logits", output).numpy()


@pytest.mark.parametrize("make", MAKERS)
def test_victim_answers_as_the_network_does(make, data):
    torch.manual_seed(0)
    network, n_features = make()
    X, y = data
    victim = VictimNetwork(network).fit(X, y)
    logits = logits_of(network, X)
    np.testing.assert_allclose(victim.decision_function(X), logits, atol=1e-5)
    assert victim.transform(X).shape == (len(X), n_features)


@pytest.mark.parametrize("make", MAKERS)
def test_guard_works_and_leaves_the_weights_alone(make, data):
    torch.manual_seed(0)
    network, _ = make()
    X, y = data
    module = network.module_ if hasattr(network, "module_") else network
    before = {name: value.clone() for name, value in module.state_dict().items()}
    guard = BackdoorGuard(VictimNetwork(network), white_box(SHAPE), target_class=3)
    seen = guard.fit(X, y).inspect(X)
    passed = seen["victim_label"] != 3
    assert (seen["label"] == seen["victim_label"])[passed].all()
    assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())


def test_normalisation_in_front_is_part_of_the_network(data):
    X, _ = data
    network = SmallNetwork()
    normalised = nn.Sequential(Normalize([0.5] * 3, [0.25] * 3), network)
    victim = VictimNetwork(normalised).fit(X)
    bare = VictimNetwork(network).fit(X)
    by_hand = logits_of(network, (X - np.float32(0.5)) / np.float32(0.25))
    np.testing.assert_allclose(victim.decision_function(X), by_hand, atol=1e-5)
    assert not np.allclose(bare.decision_function(X), by_hand)


def test_another_layer_is_pooled_over_height_and_width(data):
    X, _ = data
    network, _ = torchvision_network()
    victim = VictimNetwork(network, feature_layer="1.layer3").fit(X)
    assert victim.transform(X).shape == (len(X), 256)


def test_a_skorch_net_that_was_never_fitted_is_refused(data):
    net = NeuralNetClassifier(SmallNetwork)
    with pytest.raises(ValueError, match="never fitted"):
        VictimNetwork(net).fit(data[0])
