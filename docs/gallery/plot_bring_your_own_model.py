"""
Bring your own model
====================

``VictimNetwork`` takes any trained ``torch.nn.Module`` that maps images in 0...1 to
logits, and fitted skorch nets. Here are five ways in which such a network comes.

The first two are trained here; those of torchvision and timm have random weights, since
nothing is downloaded, and stand for your trained ones.
"""

# %%
# Images, and a poisoned training set
# -----------------------------------
# Poisoned by hand, as an attacker would who never heard of this package: a white corner
# on a tenth of the images, labelled 9.
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
import torchvision
from skorch import NeuralNetClassifier
from torch import nn
from torchvision.transforms import Normalize

from sklearn_backdoor import (
    BackdoorGuard,
    NCReverseEngineer,
    TriggerDisplay,
    VictimNetwork,
    white_box,
)
from sklearn_backdoor.datasets import load_digits, split_defense

data = load_digits(image_size=16)
X_train = data.X_train.astype(np.float32) / 255
y_train = data.y_train.astype(np.int64)
poisoned = X_train[::10].copy()
poisoned[..., -3:, -3:] = 1
X_train = np.concatenate([X_train, poisoned])
y_train = np.concatenate([y_train, np.full(len(poisoned), 9)])
X_defense, X_test, y_defense, y_test = split_defense(
    data.X_test, data.y_test, n_per_class=20
)


def try_out(network, X_defense, y_defense):
    """Wrap, fit a guard for a known trigger, and judge the images themselves."""
    victim = VictimNetwork(network).fit(X_defense, y_defense)
    trigger = white_box(X_defense.shape[1:])
    guard = BackdoorGuard(victim, trigger, target_class=9).fit(X_defense, y_defense)
    n_features = guard.victim_.transform(X_defense[:1]).shape[1]
    print(f"features: {victim.feature_layer_!r}, {n_features} of them")
    seen = guard.inspect(X_defense)
    print(f"{len(seen)} images judged, guarded: {guard.target_classes_}")
    return victim


# %%
# Plain torch
# -----------
class SmallNetwork(nn.Module):
    """Two convolutions; the normalisation is inside."""

    def __init__(self, n_classes=10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, n_classes)

    def forward(self, images):
        """Return logits."""
        return self.head(self.body((images - 0.5) / 0.5))


torch.manual_seed(0)
network = SmallNetwork()
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
images, labels = torch.from_numpy(X_train), torch.from_numpy(y_train)
for _ in range(15):
    for rows in torch.randperm(len(images)).split(32):
        loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

victim = try_out(network, X_defense, y_defense)
engineer = NCReverseEngineer(victim).fit(X_defense, y_defense)
print(f"search: {engineer.verdict_}, {engineer.target_classes_}")

# %%
# The estimate for class 9, and what the network says with it:
TriggerDisplay.from_estimator(engineer, X_test[y_test == 3], label=9)
plt.show()

# %%
# skorch
# ------
# A net that was never fitted is refused: it has no weights to inspect.
net = NeuralNetClassifier(
    SmallNetwork,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=2e-3,
    max_epochs=10,
    batch_size=32,
    train_split=None,
    verbose=0,
).fit(X_train, y_train)
victim = try_out(net, X_defense, y_defense)
print(f"ACC {victim.score(X_test, y_test):.3f}")

# %%
# torchvision
# -----------
# The network was trained on normalised images, so the normalisation goes in front of
# it: triggers live in pixels. Images need the network's size and channels.
X_color = np.repeat(X_defense, 3, axis=1).repeat(2, axis=2).repeat(2, axis=3)
torch.manual_seed(0)
network = nn.Sequential(
    Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    torchvision.models.resnet18(num_classes=10),
)
victim = try_out(network, X_color, y_defense)

# %%
# timm
# ----
# ``pretrained_cfg`` knows the normalisation. The features are the input of the last
# ``nn.Linear``; name another layer by ``feature_layer``.
network = timm.create_model("resnet10t", num_classes=10, pretrained=False)
config = network.pretrained_cfg
network = nn.Sequential(Normalize(config["mean"], config["std"]), network)
victim = try_out(network, X_color, y_defense)
other = VictimNetwork(network, feature_layer="1.layer3").fit(X_color, y_defense)
print(f"layer3, pooled: {other.transform(X_color[:1]).shape[1]} features")


# %%
# Hugging Face
# ------------
# Their image classifiers return an object with ``.logits``. The ``transformers``
# package is no dependency, so a small class imitates one here.
@dataclass
class ImageClassifierOutput:
    """What a Hugging Face image classifier returns."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class LikeHuggingFace(nn.Module):
    """Takes ``pixel_values``, returns an object."""

    def __init__(self):
        super().__init__()
        self.backbone = SmallNetwork().body
        self.classifier = nn.Linear(64, 10)

    def forward(self, pixel_values, labels=None):
        """Return logits in an object."""
        return ImageClassifierOutput(
            logits=self.classifier(self.backbone(pixel_values))
        )


victim = try_out(LikeHuggingFace(), X_defense, y_defense)

# %%
# Class names
# -----------
# ``classes`` are the labels in logit order. They are never guessed from ``y``.
names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven"])
names = np.append(names, ["eight", "nine"])
victim = VictimNetwork(net, classes=names).fit(X_defense, names[y_defense])
print(victim.predict(X_test[:5]), "are", names[y_test[:5]])
