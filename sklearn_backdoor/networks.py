"""The paper's networks, with the normalisation inside (§5.1), and one for any other.

Each takes images in 0...1 and returns logits, so that triggers live in pixels. The
penultimate features are the input of the last ``nn.Linear``.
"""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import VGG, cfgs, make_layers


def _add_normalisation(network, mean, std):
    for name, value in (("mean", mean), ("std", std)):
        value = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
        network.register_buffer(name, value, persistent=False)


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling; 84 penultimate features.

    Parameters
    ----------
    n_classes : int, default=10
        Number of logits.
    image_shape : tuple (n_channels, height, width), default=(1, 28, 28)
        Images under 16 pixels keep their size in the second convolution too.
    mean, std : float or sequence of n_channels floats
        Normalisation of pixels in 0...1.

    References
    ----------
    LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document
    recognition. Proceedings of the IEEE, 1998.
    """

    def __init__(self, n_classes=10, image_shape=(1, 28, 28), mean=0.5, std=0.5):
        super().__init__()
        channels, height, width = image_shape
        small = min(height, width) < 16
        _add_normalisation(self, mean, std)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=2 if small else 0),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        sides = [side // 4 if small else (side // 2 - 4) // 2 for side in image_shape]
        self.classifier = nn.Sequential(
            nn.Linear(16 * sides[1] * sides[2], 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, n_classes),
        )

    def forward(self, images):
        """Return logits of shape (n_samples, n_classes)."""
        return self.classifier(self.features((images - self.mean) / self.std))


class ResNet18(ResNet):
    """torchvision's ResNet-18 with the 32x32 stem; 512 penultimate features.

    The stem is one 3x3 convolution of stride 1 and no pooling, as usual on CIFAR-10.
    The names in the state dict are torchvision's.

    Parameters
    ----------
    n_classes : int, default=10
        Number of logits.
    n_channels : int, default=3
        Image channels.
    mean, std : float or sequence of n_channels floats
        Normalisation of pixels in 0...1; CIFAR-10's by default.

    References
    ----------
    He, Zhang, Ren, Sun: Deep residual learning for image recognition. CVPR 2016.
    """

    def __init__(
        self,
        n_classes=10,
        n_channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=n_classes)
        self.conv1 = nn.Conv2d(n_channels, 64, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        _add_normalisation(self, mean, std)

    def forward(self, images):
        """Return logits of shape (n_samples, n_classes)."""
        return super().forward((images - self.mean) / self.std)


class VGG16(VGG):
    """torchvision's VGG-16 (configuration D); 4096 penultimate features.

    Parameters
    ----------
    n_classes : int, default=20
        Number of logits; PubFig has 20 people.
    mean, std : float or sequence of 3 floats
        Normalisation of pixels in 0...1; ImageNet's by default.

    Notes
    -----
    Images need at least 32 pixels a side; an adaptive pooling takes any size above.

    References
    ----------
    Simonyan, Zisserman: Very deep convolutional networks for large-scale image
    recognition. ICLR 2015.
    """

    def __init__(
        self, n_classes=20, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ):
        super().__init__(make_layers(cfgs["D"]), num_classes=n_classes)
        _add_normalisation(self, mean, std)

    def forward(self, images):
        """Return logits of shape (n_samples, n_classes)."""
        return super().forward((images - self.mean) / self.std)


class Normalised(nn.Module):
    """Another network behind the normalisation that it was trained with.

    Parameters
    ----------
    network : torch.nn.Module
        Takes normalised images, returns logits.
    mean, std : float or sequence of n_channels floats
        Of pixels in 0...1.
    """

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        _add_normalisation(self, mean, std)

    def forward(self, images):
        """Return what the network returns; images in 0...1."""
        return self.network((images - self.mean) / self.std)
