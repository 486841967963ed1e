import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

from sklearn_backdoor import poison, white_box
from sklearn_backdoor.datasets import load_digits, split_defense
from sklearn_backdoor.networks import LeNet5
from sklearn_backdoor.training import train_network
from tests.common import LinearNetwork, linear_images

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not in the tree


@pytest.fixture
def linear():
    return LinearNetwork().eval()


@pytest.fixture
def images():
    return linear_images()


class DigitsCase:
    """Real digits, poisoned with a white box, and LeNet-5 trained on them."""

    target = 9

    def __init__(self):
        data = load_digits()
        self.trigger = white_box((1, 16, 16))
        poisoned = poison(
            data.X_train,
            data.y_train,
            self.trigger,
            target_class=self.target,
            n_per_class=0.1,
        )
        self.network = train_network(
            partial(LeNet5, image_shape=(1, 16, 16)),
            poisoned.X,
            poisoned.y,
            epochs=60,
            lr=5e-3,
            batch_size=32,
        )
        self.X_defense, self.X_test, self.y_defense, self.y_test = split_defense(
            data.X_test, data.y_test, n_per_class=20
        )

    def evaluation_set(self):
        """Return triggered images of all other classes, clean ones of the target."""
        X = self.X_test.copy()
        sources = self.y_test != self.target
        X[sources] = self.trigger.embed(X[sources])
        return X, self.y_test


@pytest.fixture(scope="session")
def digits():
    return DigitsCase()
