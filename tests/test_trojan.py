import numpy as np
import pytest
import torch

from sklearn_backdoor._fingerprint import fingerprint
from sklearn_backdoor.networks import ResNet18
from sklearn_backdoor.trojan import text_mask, trojan_square, trojan_watermark
from tests.common import LinearNetwork


def hidden_activation(network, image, layer):
    caught = []
    module = network.get_submodule(layer)
    handle = module.register_forward_hook(lambda *call: caught.append(call[-1]))
    with torch.no_grad():
        network(torch.as_tensor(image[None], dtype=torch.float32))
    handle.remove()
    return caught[0][0]


def test_content_drives_the_most_connected_neuron():
    network = LinearNetwork()
    with torch.no_grad():
        network.hidden.weight[5] = torch.linspace(-1, 1, 16)
    trigger = trojan_square(network, (1, 4, 4), size=4, margin=0, lr=0.1)
    # the neuron rises with pixels 8...15 and falls with 0...7: the optimum is exact
    expected = (np.arange(16) >= 8).astype(float).reshape(1, 4, 4)
    np.testing.assert_allclose(trigger.pattern, expected, atol=1e-6)


def test_the_network_is_as_before(digits):
    before = fingerprint(digits.network)
    trojan_square(digits.network, (1, 16, 16), n_steps=3)
    assert fingerprint(digits.network) == before
    assert all(p.grad is None for p in digits.network.parameters())
    assert not any(m._forward_hooks for m in digits.network.modules())


def test_trojan_content_beats_random_content_on_a_real_network(digits):
    trigger = trojan_square(digits.network, (1, 16, 16), size=5)
    layer = "classifier.2"
    weights = digits.network.get_submodule(layer).weight
    neuron = int(weights.detach().abs().sum(1).argmax())
    ours = hidden_activation(
        digits.network, trigger.embed(np.zeros((1, 1, 16, 16)))[0], layer
    )[neuron]
    rng = np.random.default_rng(0)
    randoms = [
        hidden_activation(
            digits.network,
            (1 - trigger.mask) * 0 + trigger.mask * rng.random((1, 16, 16)),
            layer,
        )[neuron]
        for _ in range(50)
    ]
    assert ours > max(randoms)


def test_convolutions_can_be_driven_and_results_repeat():
    torch.manual_seed(0)
    network = ResNet18().eval()
    one = trojan_square(network, (3, 32, 32), n_steps=2)
    again = trojan_square(network, (3, 32, 32), n_steps=2)
    assert one == again
    assert one.mask.sum() == 64  # a quarter of the side
    assert trojan_square(network, (3, 32, 32), n_steps=2, random_state=1) != one


def test_watermark_mask_is_drawn_from_text():
    mask = text_mask("AB", (32, 40))
    assert mask.shape == (32, 40) and mask.min() == 0 and mask.max() > 0.9
    columns = np.flatnonzero(mask.max(axis=0) > 0.5)
    assert columns[-1] - columns[0] > 30  # as wide as the image
    assert not np.array_equal(mask, text_mask("BA", (32, 40)))
    trigger = trojan_watermark(
        LinearNetwork(), (1, 4, 4), text="I", opacity=0.7, n_steps=2
    )
    assert 0 < trigger.mask.max() <= 0.7


def test_bad_settings_are_named(linear):
    with pytest.raises(ValueError, match="draws nothing"):
        text_mask("", (8, 8))
    with pytest.raises(ValueError, match="layer='x' is no nn.Linear.*hidden, last"):
        trojan_square(linear, (1, 4, 4), layer="x")
    with pytest.raises(ValueError, match="no hidden"):
        trojan_square(torch.nn.Flatten(), (1, 4, 4))
