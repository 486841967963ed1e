import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_backdoor._fingerprint import fingerprint
from sklearn_backdoor.networks import LeNet5
from tests.common import LinearNetwork


def scaled(z):
    return 2 * z


def shifted(z):
    return 2 + z


class ByGlobal(LinearNetwork):
    def forward(self, images):
        return scaled(super().forward(images))


class ByOtherGlobal(LinearNetwork):
    def forward(self, images):
        return shifted(super().forward(images))


ByOtherGlobal.__name__ = ByOtherGlobal.__qualname__ = "ByGlobal"


def test_equal_networks_have_equal_fingerprints():
    assert fingerprint(LinearNetwork()) == fingerprint(LinearNetwork())


def changed_weight(network):
    with torch.no_grad():
        network.last.weight[0, 0] += 1e-6


def changed_setting(network):
    network.last.out_features = 7


def changed_buffer(network):
    network.register_buffer("extra", torch.ones(1), persistent=False)


@pytest.mark.parametrize("change", [changed_weight, changed_setting, changed_buffer])
def test_weights_settings_and_buffers_count(change):
    network = LinearNetwork()
    before = fingerprint(network)
    change(network)
    assert fingerprint(network) != before


def test_mode_and_gradients_do_not_count():
    network = LinearNetwork().train()
    before = fingerprint(network)
    network.eval()
    network(torch.rand(1, 1, 4, 4)).sum().backward()
    assert fingerprint(network) == before


def test_the_code_of_forward_and_of_its_helpers_counts():
    assert fingerprint(ByGlobal()) != fingerprint(ByOtherGlobal())


def test_normalisation_in_a_buffer_that_is_not_saved_counts():
    assert fingerprint(seeded(mean=0.5)) != fingerprint(seeded(mean=0.4))


def seeded(**options):
    network = LeNet5(**options)
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    return network


def test_half_precision_integers_and_scalars_are_digested():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(2, 2)).to(torch.bfloat16)
    assert len(fingerprint(network)) == 64
    assert fingerprint(network) != fingerprint(network.float())


CODE = """
import torch
from torch import nn
from sklearn_backdoor._fingerprint import fingerprint

SCALE = 3

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        nn.init.ones_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, images):
        return helper(self.last(images.flatten(1)))

def helper(z):
    return (lambda v: SCALE * v)(z)

print(fingerprint(Network()))
"""


def test_every_process_agrees_and_globals_count():
    def run(code):
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout

    assert run(CODE) == run(CODE)
    assert run(CODE) != run(CODE.replace("SCALE = 3", "SCALE = 4"))


@pytest.mark.parametrize(
    "one, other",
    [(1.0, -1.0), ({"t": 1}, {"t": 2}), (np.float32(1), np.float32(2)), ([1], [2])],
)
def test_private_attributes_dicts_and_numpy_scalars_count(one, other):
    networks = LinearNetwork(), LinearNetwork()
    networks[0]._scale, networks[1]._scale = one, other
    assert fingerprint(networks[0]) != fingerprint(networks[1])


def test_arrays_as_attributes_count():
    one, other = LinearNetwork(), LinearNetwork()
    one.table, other.table = np.zeros(2), np.ones(2)
    assert fingerprint(one) != fingerprint(other)
