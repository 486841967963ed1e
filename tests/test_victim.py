import pickle
import threading
from collections import OrderedDict, namedtuple

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from skorch import NeuralNetClassifier
from torch import nn

from sklearn_backdoor import VictimNetwork
from sklearn_backdoor._fingerprint import fingerprint
from tests.common import CountingNetwork, LinearNetwork, count_passes, linear_images


class Wrapped(nn.Module):
    """Returns a function of a linear network's logits."""

    def __init__(self, function):
        super().__init__()
        self.network = LinearNetwork()
        self.function = function

    def forward(self, images):
        return self.function(self.network(images))


def test_logits_features_and_labels_are_the_networks(linear, images):
    X, y = images
    victim = VictimNetwork(linear).fit(X, y)
    flat = X.reshape(len(X), -1).astype(np.float64)
    weights = linear.last.weight.detach().numpy().astype(np.float64)
    logits = np.array([[row @ weight for weight in weights] for row in flat])
    np.testing.assert_allclose(victim.decision_function(X), logits, atol=1e-5)
    np.testing.assert_allclose(victim.transform(X), flat, atol=1e-6)
    np.testing.assert_array_equal(victim.predict(X), y)
    exponentials = np.exp(logits)
    np.testing.assert_allclose(
        victim.predict_proba(X),
        exponentials / exponentials.sum(axis=1, keepdims=True),
        atol=1e-6,
    )
    assert victim.score(X, y) == 1
    assert victim.feature_layer_ == "last"


def test_labels_and_features_come_from_one_pass(tmp_path, images):
    X, _ = images
    log = tmp_path / "passes"
    victim = VictimNetwork(CountingNetwork(log)).fit(X)
    count_passes(log)
    labels, Z = victim.predict_and_transform(X)
    assert count_passes(log) == len(X)
    np.testing.assert_array_equal(labels, victim.predict(X))
    np.testing.assert_array_equal(Z, victim.transform(X))


@pytest.mark.parametrize("batch_size", [1, 7, 48, 1000])
def test_batch_size_changes_nothing(linear, images, batch_size):
    X, _ = images
    reference = VictimNetwork(linear).fit(X).decision_function(X)
    victim = VictimNetwork(linear, batch_size=batch_size).fit(X)
    np.testing.assert_allclose(victim.decision_function(X), reference, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_all_image_dtypes_and_layouts_give_the_same(linear, images, dtype, tmp_path):
    X = (images[0] * 255).astype(np.uint8)
    victim = VictimNetwork(linear).fit(X)
    reference = victim.decision_function(X)
    if dtype != np.uint8:
        X = (X / 255).astype(dtype)
    tolerance = 0.02 if dtype == np.float16 else 1e-5
    mapped = np.memmap(tmp_path / "X", dtype, "w+", shape=X.shape)
    mapped[:] = X
    mapped.flags.writeable = False
    strided = np.repeat(X, 2, axis=0)[::2]
    reordered = np.asfortranarray(X)
    for same in (
        X,
        mapped,
        strided,
        reordered,
        X.tolist() if dtype is np.float64 else X,
    ):
        np.testing.assert_allclose(
            victim.decision_function(same), reference, atol=tolerance
        )


def test_empty_batches_give_empty_arrays(linear, images):
    X, _ = images
    victim = VictimNetwork(linear, classes=list("abcdef")).fit(X)
    assert victim.predict(X[:0]).shape == (0,)
    assert victim.predict_proba(X[:0]).shape == (0, 6)
    assert victim.transform(X[:0]).shape == (0, 16)


def test_classes_may_be_strings_in_any_order(linear, images):
    X, y = images
    names = np.array(["zebra", "ant", "fox", "bee", "cow", "dog"])
    victim = VictimNetwork(linear, classes=names).fit(X, names[y])
    np.testing.assert_array_equal(victim.predict(X), names[y])


def test_a_named_layer_is_pooled_or_flattened(images):
    X, _ = images
    network = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 3, 3), flat=nn.Flatten(), last=nn.Linear(12, 6))
    ).eval()
    pooled = VictimNetwork(network, feature_layer="conv").fit(X).transform(X)
    with torch.no_grad():
        maps = network.conv(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(pooled, maps.mean(axis=(2, 3)), atol=1e-6)
    flat = VictimNetwork(network, feature_layer="flat").fit(X).transform(X)
    np.testing.assert_allclose(flat, maps.reshape(len(X), -1), atol=1e-6)


Output = namedtuple("Output", ["logits", "hidden"])


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.softmax(1),
        lambda z: z.log_softmax(1),
        lambda z: (z, z),
        lambda z: {"logits": z},
        lambda z: Output(z, None),
        lambda z: z.double(),
    ],
    ids=["softmax", "log_softmax", "tuple", "dict", "object", "double"],
)
def test_other_outputs_are_understood(images, linear, function):
    X, y = images
    victim = VictimNetwork(Wrapped(function)).fit(X)
    plain = VictimNetwork(linear).fit(X)
    np.testing.assert_allclose(
        victim.predict_proba(X), plain.predict_proba(X), atol=1e-5
    )
    np.testing.assert_allclose(victim.transform(X), plain.transform(X), atol=1e-6)


def test_softmax_that_underflows_keeps_finite_logits(images):
    X, _ = images
    victim = VictimNetwork(
        Wrapped(lambda z: (100 * z).softmax(1)), feature_layer="network"
    )
    assert np.isfinite(victim.fit(X).decision_function(X)).all()


def snapshot(network):
    return (
        {name: value.clone() for name, value in network.state_dict().items()},
        [module.training for module in network.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()],
        [p.requires_grad for p in network.parameters()],
        [p.grad is None for p in network.parameters()],
    )


def test_the_network_is_as_before_after_every_call(images):
    X, y = images
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(16, 6),
    )
    network[1].eval()
    network[4].bias.requires_grad_(False)
    before = snapshot(network)
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    victim = VictimNetwork(network).fit(X, y)
    one, two = victim.predict_and_transform(X), victim.predict_and_transform(X)
    with victim.differentiable() as logits:
        part = torch.from_numpy(X[:2]).requires_grad_()
        torch.autograd.grad(logits(part).sum(), part)
    np.testing.assert_array_equal(one[1], two[1])  # dropout is off
    after = snapshot(network)
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name])
    assert before[1:] == after[1:]
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_the_mode_is_restored_after_an_error(images):
    network = Wrapped(lambda z: z).train()
    victim = VictimNetwork(network).fit(images[0])
    network.function = lambda z: 1 / 0
    with pytest.raises(ZeroDivisionError):
        victim.predict(images[0])
    assert network.training and network.network.last.training
    assert not network.network.last._forward_hooks


def test_clone_shares_the_weights_and_copies_the_settings(linear, images):
    victim = VictimNetwork(linear, feature_layer="hidden", classes=list("abcdef"))
    twin = clone(victim.fit(images[0]))
    assert twin.net is linear and twin is not victim
    assert twin.get_params() == victim.get_params()
    with pytest.raises(NotFittedError):
        twin.predict(images[0])
    frozen = clone(FrozenEstimator(victim))
    np.testing.assert_array_equal(frozen.predict(images[0]), victim.predict(images[0]))


def test_a_fitted_skorch_net_keeps_its_weights(images):
    X, y = images
    net = NeuralNetClassifier(
        LinearNetwork, criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0
    ).fit(X, y)
    before = fingerprint(net.module_)
    victim = VictimNetwork(net).fit(X, y)
    np.testing.assert_array_equal(victim.predict(X), net.predict(X))
    twin = clone(victim).fit(X, y)
    np.testing.assert_array_equal(twin.predict(X), net.predict(X))
    assert "net__module" not in victim.get_params(deep=True)
    with pytest.raises(ValueError, match="net__module__backdoor cannot be set"):
        victim.set_params(net__module__backdoor=1.0)
    again = pickle.loads(pickle.dumps(victim))
    np.testing.assert_array_equal(again.predict(X), net.predict(X))
    assert fingerprint(net.module_) == before


def test_pickles_work_and_the_inspection_net_never_trains(linear, images):
    X, y = images
    victim = VictimNetwork(linear).fit(X, y)
    again = pickle.loads(pickle.dumps(victim))
    np.testing.assert_array_equal(again.transform(X), victim.transform(X))
    for call in (victim.net_.fit, victim.net_.partial_fit):
        with pytest.raises(TypeError, match="never trained"):
            call(X, y)


def test_threads_on_one_network_equal_the_serial_result(digits):
    victims = [
        VictimNetwork(digits.network, feature_layer=layer).fit(digits.X_defense)
        for layer in (None, "features.2", "classifier.1", None)
    ]
    digits.network.train()
    serial = [victim.transform(digits.X_test) for victim in victims]
    results: list = [None] * len(victims)

    def work(i):
        results[i] = [victims[i].transform(digits.X_test) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(victims))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digits.network.training
    digits.network.eval()
    for expected, found in zip(serial, results, strict=True):
        for part in found:
            np.testing.assert_allclose(part, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["str", "path", "Memory"])
def test_memory_spares_passes_and_changes_no_answer(tmp_path, images, kind):
    X, _ = images
    log, folder = tmp_path / "passes", tmp_path / "memory"
    memory = {"str": str(folder), "path": folder}.get(
        kind, joblib.Memory(folder, verbose=0)
    )
    network = CountingNetwork(log)
    plain = VictimNetwork(network).fit(X).transform(X)
    count_passes(log)
    victim = VictimNetwork(network, memory=memory).fit(X)
    np.testing.assert_array_equal(victim.transform(X), plain)
    assert count_passes(log) == len(X) + 4  # two images twice to open the network
    twin = clone(victim).fit(X)
    twin.predict(X), twin.predict_proba(X), victim.transform(np.asfortranarray(X))
    np.testing.assert_array_equal(twin.transform(X), plain)
    assert count_passes(log) == 0
    with torch.no_grad():
        network.last.weight.mul_(2)
    np.testing.assert_allclose(
        victim.decision_function(X), VictimNetwork(network).fit(X).decision_function(X)
    )
    assert count_passes(log) == len(X) * 2 + 4


def test_memory_tells_layers_and_images_apart(tmp_path, images):
    X, _ = images
    log = tmp_path / "passes"
    network = CountingNetwork(log)
    for layer in (None, "hidden", "last"):
        victim = VictimNetwork(network, feature_layer=layer, memory=tmp_path / "m")
        expected = VictimNetwork(network, feature_layer=layer).fit(X).transform(X)
        np.testing.assert_array_equal(victim.fit(X).transform(X), expected)
        part = victim.transform(X[:5])
        np.testing.assert_allclose(part, expected[:5], atol=1e-6)


class Unpooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 6, 4)

    def forward(self, images):
        return self.body(images).flatten(1)


def nan_network():
    network = LinearNetwork()
    with torch.no_grad():
        network.last.weight[:] = np.nan
    return network


class Lazy(LinearNetwork):
    """Keeps a tensor from its first pass."""

    kept = None

    def forward(self, images):
        if self.kept is None:
            self.kept = torch.eye(6) * 1.0
        return super().forward(images @ torch.eye(4)) @ self.kept


def test_tensors_kept_from_a_pass_can_be_differentiated_through(images):
    X, _ = images
    victim = VictimNetwork(Lazy(), feature_layer="hidden").fit(X)
    victim.predict(X)
    with victim.differentiable() as logits:
        part = torch.from_numpy(X[:2]).requires_grad_()
        (gradient,) = torch.autograd.grad(logits(part).sum(), part)
    assert gradient.abs().sum() > 0


def test_a_softmax_that_underflows_keeps_its_gradients(images):
    X, _ = images
    victim = VictimNetwork(Wrapped(lambda z: z.softmax(1))).fit(X)
    assert victim._opened.logits_layer == "network.last"
    with victim.differentiable() as logits:
        part = (100 * torch.from_numpy(X[:1])).requires_grad_()
        (gradient,) = torch.autograd.grad(logits(part)[0, 5], part)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: VictimNetwork(nan_network()), ValueError, "NaN for the first images"),
        (
            lambda: VictimNetwork(LinearNetwork().half()),
            ValueError,
            "weights are torch.float16: call .float",
        ),
        (
            lambda: VictimNetwork(nn.Sequential(nn.Flatten(), nn.Linear(16, 1))),
            ValueError,
            r"returns 1 logit\(s\).*two at least",
        ),
        (lambda: VictimNetwork("net.pt"), TypeError, "type str, expected a trained"),
        (lambda: VictimNetwork(LinearNetwork), TypeError, "expected a trained"),
        (
            lambda: VictimNetwork(NeuralNetClassifier(LinearNetwork)),
            ValueError,
            "was never fitted",
        ),
        (
            lambda: VictimNetwork(LinearNetwork(), feature_layer="conv9"),
            ValueError,
            "'conv9' does not exist. Choose one of: hidden, last",
        ),
        (lambda: VictimNetwork(Unpooled()), ValueError, "feature_layer=.*body"),
        (
            lambda: VictimNetwork(Wrapped(torch.sigmoid)),
            ValueError,
            "sigmoids.*Remove the sigmoid",
        ),
        (
            lambda: VictimNetwork(Wrapped(lambda z: z**3)),
            ValueError,
            "values that are not the output of an nn.Linear",
        ),
        (
            lambda: VictimNetwork(Wrapped(lambda z: "label")),
            TypeError,
            "returned str, expected logits",
        ),
        (
            lambda: VictimNetwork(Wrapped(lambda z: z.argmax(1))),
            TypeError,
            r"a tensor of shape \(2,\), expected logits",
        ),
        (
            lambda: VictimNetwork(LinearNetwork(), classes=[0, 1]),
            ValueError,
            "returns 6 logits",
        ),
        (
            lambda: VictimNetwork(LinearNetwork(), classes=[0, 1, 2, 3, 4, 4]),
            ValueError,
            "6 different labels",
        ),
        (
            lambda: VictimNetwork(LinearNetwork(), batch_size=0),
            ValueError,
            "batch_size=0",
        ),
        (
            lambda: VictimNetwork(nn.Sequential(nn.Flatten(), nn.Linear(9, 6))),
            ValueError,
            "cannot process float32 images of shape",
        ),
    ],
)
def test_bad_networks_are_named_and_nothing_is_half_fitted(
    images, make, error, message
):
    victim = make()
    with pytest.raises(error, match=message):
        victim.fit(*images)
    assert not [name for name in vars(victim) if name.endswith("_")]


def test_labels_that_the_victim_does_not_know_are_refused(linear, images):
    X, y = images
    with pytest.raises(ValueError, match=r"labels \[100\].*classes="):
        VictimNetwork(linear).fit(X, np.where(y == 0, 100, y))


def test_another_shape_than_fitted_is_refused(linear, images):
    victim = VictimNetwork(linear).fit(images[0])
    with pytest.raises(ValueError, match=r"shape \(1, 5, 4\).*fitted on.*\(1, 4, 4\)"):
        victim.predict(np.zeros((2, 1, 5, 4)))
    with pytest.raises(ValueError, match="expected \\(n_samples"):
        victim.predict(np.zeros((2, 16)))


def test_nan_logits_never_become_a_label(images):
    X, _ = images
    network = LinearNetwork()
    victim = VictimNetwork(network).fit(X)
    with torch.no_grad():
        network.last.weight[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity for 48 of 48 images"):
        victim.predict(X)


def test_features_have_names_for_data_frames(linear, images):
    victim = VictimNetwork(linear).set_output(transform="pandas").fit(images[0])
    assert victim.transform(images[0]).columns[3] == "victimnetwork3"


def test_images_of_the_hidden_layer_are_features(images):
    X, _ = linear_images(3)
    victim = VictimNetwork(LinearNetwork(), feature_layer="hidden").fit(X)
    np.testing.assert_allclose(victim.transform(X), X.reshape(len(X), -1), atol=1e-6)
