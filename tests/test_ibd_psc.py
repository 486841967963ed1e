import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sklearn_backdoor import VictimNetwork
from sklearn_backdoor.detectors import IBDPSCDetector
from tests.common import linear_images


class Block(nn.Module):
    """A chain of batch-norm layers over 16 pixels, then a bias-free Linear of 6 logits.

    gamma_i and beta_i are given; running mean 0 and variance 1 leave x as it is. The
    layers are registered in the opposite order to that in which they are executed.
    """

    def __init__(self, gammas=(1, 1, 1), betas=(0, 0, 0), weight=10.0):
        super().__init__()
        self.last = nn.Linear(16, 6, bias=False)
        self.depth = len(gammas)
        for number in reversed(range(self.depth)):
            norm = nn.BatchNorm1d(16, eps=0)
            with torch.no_grad():
                norm.weight.fill_(gammas[number])
                norm.bias.fill_(betas[number])
            self.add_module(f"norm{number}", norm)
        with torch.no_grad():
            self.last.weight.copy_(torch.eye(6, 16) * weight)

    def forward(self, images):
        values = images.flatten(1)
        for number in range(self.depth):
            values = torch.relu(getattr(self, f"norm{number}")(values))
        return self.last(values)


class Saturating(Block):
    """Logits 0...4 are 10 min(v, 1); logit 5 is 3.5 v and alone grows with gamma."""

    def forward(self, images):
        values = images.flatten(1)
        for number in range(self.depth):
            values = torch.relu(getattr(self, f"norm{number}")(values))
        kept = torch.cat([values[:, :5].clamp_max(1), 0.35 * values[:, 5:]], dim=1)
        return self.last(kept)


def falling():
    """Return a network whose labels all become 5 once three layers are amplified."""
    return Saturating((1, 1, 1, 1), (0, 0, 0, 0))


def saturating_images():
    """Return images of classes 0...4, whose pixel 5 is always white, and labels."""
    X, y = linear_images(n_per_class=4, n_classes=5)
    X.reshape(len(X), 16)[:, 5] = 1
    return X, y


def naive_logits(network, image, n_amplified, scale):
    """Return the logits of `Saturating` by hand, the last layers amplified."""
    values = [float(v) for v in image.reshape(-1)]
    for number in range(network.depth):
        norm = getattr(network, f"norm{number}")
        factor = scale if number >= network.depth - n_amplified else 1.0
        gammas, betas = norm.weight.tolist(), norm.bias.tolist()
        values = [
            max(factor * g * v + factor * b, 0.0)
            for g, v, b in zip(gammas, values, betas, strict=True)
        ]
    return [10 * min(v, 1) for v in values[:5]] + [3.5 * values[5]]


def naive_score(network, image, versions, scale):
    logits = naive_logits(network, image, 0, scale)
    label = logits.index(max(logits))
    total = 0.0
    for n_amplified in versions:
        powers = [math.exp(v) for v in naive_logits(network, image, n_amplified, scale)]
        total += powers[label] / sum(powers)
    return total / len(versions)


def fit_unmoved(network, X, y, **options):
    """Fit a detector where no number of layers qualifies."""
    with pytest.warns(UserWarning, match="never gives an error rate above"):
        return IBDPSCDetector(VictimNetwork(network), **options).fit(X, y)


# --- the score


def test_score_is_that_of_a_naive_loop():
    network = Saturating((1, 0.9, 1.1, 0.8, 1.2), (0, 0.01, 0, 0.02, 0.01))
    X, y = saturating_images()
    detector = IBDPSCDetector(VictimNetwork(network), n_models=2).fit(X, y)
    np.testing.assert_array_equal(detector.clean_scores_, detector.trigger_score(X))
    X.reshape(len(X), 16)[:, 5] = np.linspace(0.2, 1, len(X))
    expected = [naive_score(network, x, detector.n_amplified_, 1.5) for x in X]
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(detector.trigger_score(X), expected, rtol=1e-4)


def test_scale_one_gives_the_victims_own_confidence(images):
    network = Block(betas=(0.1, 0, 0.2), weight=2.0)
    detector = fit_unmoved(network, *images, scale=1)
    expected = detector.victim_.predict_proba(images[0]).max(axis=1)
    np.testing.assert_allclose(detector.trigger_score(images[0]), expected, rtol=1e-6)


def test_logits_scale_with_gamma_and_beta_before_a_bias_free_linear_layer(images):
    X, y = images
    network = Block((1,), (0.3,), weight=1.0)
    detector = fit_unmoved(network, X, y)
    logits = detector.victim_.decision_function(X)
    powers = np.exp(1.5 * logits)
    label = logits.argmax(axis=1)
    expected = powers[np.arange(len(X)), label] / powers.sum(axis=1)
    np.testing.assert_allclose(detector.trigger_score(X), expected, rtol=1e-5)
    confidence = detector.victim_.predict_proba(X).max(axis=1)
    assert (detector.trigger_score(X) > confidence).all()


def test_probability_is_that_of_the_label_without_amplification():
    X, y = saturating_images()
    detector = IBDPSCDetector(VictimNetwork(falling()), n_models=1).fit(X, y)
    # amplified, class 5 is sure to win, and the score is small
    assert detector.trigger_score(X).max() < 0.1


def test_score_depends_neither_on_the_batch_nor_on_the_order():
    X, y = saturating_images()
    victim = VictimNetwork(falling(), batch_size=7)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    detector = IBDPSCDetector(victim, n_models=2).fit(X, y)
    scores = detector.trigger_score(X)
    np.testing.assert_allclose(detector.trigger_score(X[::-1])[::-1], scores, 1e-5)
    assert detector.trigger_score(X[3:4]) == pytest.approx(scores[3:4], rel=1e-5)
    packed = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(packed.trigger_score(X), scores)
    as_bytes = np.round(X * 255).astype(np.uint8)
    np.testing.assert_allclose(
        detector.trigger_score(as_bytes), detector.trigger_score(as_bytes / 255), 1e-5
    )
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


# --- which layers


def test_layers_count_as_executed_and_not_as_registered(images):
    network = Block()
    registered = [
        n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm1d)
    ]
    assert registered == ["norm2", "norm1", "norm0"]
    detector = fit_unmoved(network, *images)
    assert detector.layers_ == ["norm2", "norm1", "norm0"]  # the last one first
    # amplifying the last one executed changes what a beta before it does
    network = Saturating((1, 1), (0.2, 0))
    X, y = saturating_images()
    detector = fit_unmoved(network, X, y, n_models=2, max_error=1)
    expected = [naive_score(network, x, [1, 2], 1.5) for x in X]
    np.testing.assert_allclose(detector.trigger_score(X), expected, rtol=1e-4)


def test_first_version_has_a_layer_more_than_it_takes_for_the_error():
    network, (X, y) = falling(), saturating_images()
    errors = {}
    for k in (1, 2, 3):
        logits = [naive_logits(network, x, k, 1.5) for x in X]
        labels = [row.index(max(row)) for row in logits]
        errors[k] = np.mean(np.array(labels) != y)
    assert [k for k in errors if errors[k] > 0.6] == [3]
    victim = VictimNetwork(network)
    assert IBDPSCDetector(victim, n_models=1).fit(X, y).n_amplified_ == [4]
    assert IBDPSCDetector(victim, n_models=1, start=0).fit(X, y).n_amplified_ == [3]
    assert errors[3] == 1  # which is not above 1
    fit_unmoved(network, X, y, max_error=1.0)


@pytest.mark.parametrize(
    "n_layers, expected", [(5, [4, 5]), (6, [4, 5, 6]), (9, [4, 5, 6])]
)
def test_there_are_fewer_versions_instead_of_two_alike(n_layers, expected):
    network = Saturating((1,) * n_layers, (0,) * n_layers)
    victim = VictimNetwork(network)
    detector = IBDPSCDetector(victim, n_models=3).fit(*saturating_images())
    assert detector.n_amplified_ == expected
    assert detector.n_passes_per_image_ == 1 + len(expected)


@pytest.mark.parametrize(
    "n_layers, n_models, expected", [(4, 2, [3, 4]), (3, 5, [1, 2, 3]), (1, 5, [1])]
)
def test_last_versions_are_taken_with_a_warning_where_no_error_is_high_enough(
    images, n_layers, n_models, expected
):
    network = Block((1,) * n_layers, (0,) * n_layers)
    detector = fit_unmoved(network, *images, n_models=n_models)
    assert detector.n_amplified_ == expected
    assert np.isfinite(detector.trigger_score(images[0])).all()


class TwoKinds(nn.Module):
    """BatchNorm2d on the image, BatchNorm1d on features, and three that do not count.

    These are one that is never executed, one without gamma and beta, and an instance
    norm.
    """

    def __init__(self):
        super().__init__()
        self.features = nn.BatchNorm1d(16)
        self.idle = nn.BatchNorm1d(16)
        self.fixed = nn.BatchNorm1d(16, affine=False)
        self.instance = nn.InstanceNorm2d(1, affine=True)
        self.image = nn.BatchNorm2d(1)
        self.last = nn.Linear(16, 6, bias=False)

    def forward(self, images):
        images = self.image(self.instance(images))
        return self.last(self.fixed(self.features(images.flatten(1))))


def test_batch_norm_of_any_dimension_counts_where_executed_with_gamma(images):
    victim = VictimNetwork(TwoKinds())
    detector = IBDPSCDetector(victim, max_error=0.0).fit(*images)
    assert detector.layers_ == ["features", "image"]
    assert detector.n_amplified_ == [2]


class Tied(Block):
    """norm0 is executed again at the end, by another name; norm1 shares its gamma."""

    def __init__(self):
        super().__init__((1, 1), (0.1, 0), weight=1.0)
        self.again = self.norm0
        self.norm1.weight = self.norm0.weight

    def forward(self, images):
        values = self.norm1(self.norm0(images.flatten(1)))
        return self.last(self.again(values))


def test_a_layer_executed_twice_counts_once_and_a_shared_gamma_is_not_scaled_twice(
    images,
):
    X, y = images
    detector = fit_unmoved(Tied(), X, y, scale=2)
    assert len(detector.layers_) == 2 and detector.n_amplified_ == [1, 2]
    pixels = X.reshape(len(X), 16)[:, :6].astype(float)
    label = (pixels + 0.2).argmax(axis=1)
    once = 2 * (2 * pixels + 0.2) + 0.2  # norm1 has its own copy of gamma
    twice = 2 * (2 * (2 * pixels + 0.2)) + 0.2
    expected = 0
    for logits in (once, twice):
        powers = np.exp(logits)
        expected += powers[np.arange(len(X)), label] / powers.sum(axis=1) / 2
    np.testing.assert_allclose(detector.trigger_score(X), expected, rtol=1e-5)


# --- the victim is evidence


@pytest.mark.parametrize("training", [True, False])
def test_weights_mode_hooks_and_gradients_stay_as_they_were(training):
    network = falling().train(training)
    parameters = dict(network.named_parameters())
    state = {name: value.clone() for name, value in network.state_dict().items()}
    X, y = saturating_images()
    detector = IBDPSCDetector(VictimNetwork(network), n_models=2).fit(X, y)
    detector.trigger_score(X)
    assert dict(network.named_parameters()).keys() == parameters.keys()
    for name, value in network.named_parameters():
        assert value is parameters[name] and value.grad is None, name
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    for module in network.modules():
        assert module.training is training
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_weights_come_back_when_a_pass_fails():
    network, (X, y) = falling(), saturating_images()
    detector = IBDPSCDetector(VictimNetwork(network), n_models=1).fit(X, y)
    gamma = network.norm3.weight

    def fail(module, inputs):
        if module.weight is not gamma:  # amplified
            raise RuntimeError("no memory left")

    handle = network.norm3.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        detector.trigger_score(X)
    handle.remove()
    assert network.norm3.weight is gamma and gamma.tolist() == [1] * 16


def test_a_softmax_network_scores_as_its_logits_do():
    X, y = saturating_images()
    bare = IBDPSCDetector(VictimNetwork(falling())).fit(X, y)
    network = nn.Sequential(falling(), nn.Softmax(dim=1))
    wrapped = IBDPSCDetector(VictimNetwork(network)).fit(X, y)
    np.testing.assert_allclose(wrapped.trigger_score(X), bare.trigger_score(X), 1e-5)


# --- the threshold


def test_threshold_keeps_the_rate_on_clean_images_with_ties():
    X, y = saturating_images()
    X, y = np.repeat(X, 3, axis=0), np.repeat(y, 3)
    detector = IBDPSCDetector(VictimNetwork(falling()), fpr=0.1).fit(X, y)
    flagged = detector.clean_scores_ >= detector.threshold_
    assert 0 < flagged.mean() <= 0.1


def test_threshold_is_set_on_target_images_and_a_given_one_is_taken_as_it_is():
    X, y = saturating_images()
    victim = VictimNetwork(falling())
    detector = IBDPSCDetector(victim).fit(X, y)
    aimed = clone(detector).set_params(target_class=3).fit(X, y)
    np.testing.assert_array_equal(aimed.clean_scores_, detector.clean_scores_[y == 3])
    given = clone(detector).set_params(threshold=0.9).fit(X, y)
    assert given.threshold_ == 0.9


# --- errors


def test_a_network_without_batch_norm_is_refused_with_a_remedy(linear, images):
    with pytest.raises(ValueError, match="Use STRIPDetector or SCALEUPDetector"):
        IBDPSCDetector(VictimNetwork(linear)).fit(*images)


def test_an_overflow_is_reported(images):
    detector = IBDPSCDetector(VictimNetwork(Block()), scale=1e30)
    with pytest.raises(ValueError, match="overflows with batch norm amplified"):
        detector.fit(*images)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"n_models": 0}, ValueError, "n_models=0"),
        ({"n_models": 1.5}, TypeError, "n_models=1.5"),
        ({"scale": 0.5}, ValueError, "scale=0.5"),
        ({"max_error": 1.1}, ValueError, "max_error=1.1"),
        ({"fpr": 1.1}, ValueError, "fpr=1.1"),
        ({"threshold": "0.9"}, TypeError, "threshold='0.9'"),
        ({"target_class": 7}, ValueError, "target_class=7 is not among"),
    ],
)
def test_bad_settings_are_named(options, error, message):
    with pytest.raises(error, match=message):
        IBDPSCDetector(VictimNetwork(falling()), **options).fit(*saturating_images())
