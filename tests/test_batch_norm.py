"""Traces of triggers in the statistics of batch-norm."""

import warnings
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from torch import nn
from torchvision.transforms import v2

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    AutoReverseEngineer,
    BatchNormReverseEngineer,
    NCReverseEngineer,
    PatchTrigger,
    VictimNetwork,
    poison,
    white_box,
)
from sklearn_backdoor.reverse._batch_norm import (
    _clear_and_small,
    can_be_compared,
    usual_augmentations,
)
from sklearn_backdoor.reverse._search import ImagePasses
from sklearn_backdoor.reverse._statistics import (
    Comparison,
    Statistics,
    layer_statistics,
    p_of_largest,
)
from tests import common
from tests.common import LinearNetwork, linear_images


class Normed(nn.Module):
    """Batch-norm on places and on features, one met twice, one without statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.BatchNorm2d(4)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)
        self.flat = nn.Linear(4, 8)
        self.features = nn.BatchNorm1d(8, momentum=None)
        self.last = nn.Linear(8, 6)
        self.first.running_mean.uniform_(-1, 1)
        self.features.running_var.fill_(0.3)

    def forward(self, images, shift=0.0):
        z = self.conv(images) + shift
        self.before_first = z
        z = self.twice(self.second(torch.relu(self.first(z))))
        z = torch.relu(self.bare(self.twice(z)))
        self.before_features = self.flat(z.mean((2, 3)))
        return self.last(torch.relu(self.features(self.before_features)))


@pytest.fixture(scope="module")
def normed():
    X = np.random.default_rng(0).uniform(size=(70, 1, 6, 6)).astype(np.float32)
    network = Normed().eval()
    return network, VictimNetwork(network).fit(X), X


def test_layers_see_what_a_forward_pass_gives_them(normed):
    network, victim, X = normed
    found = layer_statistics(victim, X)
    assert [layer.name for layer in found] == ["first", "features"]
    assert [layer.momentum for layer in found] == [0.1, 0.1]
    seen = []
    with torch.no_grad():
        for part in torch.from_numpy(X).split(64):  # "bare" norms by the mini-batch
            network(part)
            seen.append((network.before_first.mean((2, 3)), network.before_features))
    for layer, expected in zip(found, zip(*seen, strict=True), strict=True):
        np.testing.assert_allclose(layer.seen, torch.cat(expected), atol=1e-5)
        module = network.get_submodule(layer.name)
        np.testing.assert_allclose(layer.stored, module.running_mean, rtol=1e-6)
        spread = torch.sqrt(module.running_var + 1e-5)
        np.testing.assert_allclose(layer.spread, spread, rtol=1e-6)
    assert not any(m._forward_pre_hooks for m in network.modules())
    assert not can_be_compared(victim, X)


def test_a_layer_that_keeps_no_numbers_is_left_out(normed):
    network, _, X = normed
    victim = VictimNetwork(deepcopy(network)).fit(X)
    victim.network_.first.running_mean[1] = float("nan")
    assert "first" not in [layer.name for layer in layer_statistics(victim, X)]


def test_networks_that_round_inside_are_read_too(normed):
    network, _, X = normed

    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = deepcopy(network)

        def forward(self, images):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(images)

    victim = VictimNetwork(Rounding().eval()).fit(X)
    exact = layer_statistics(normed[1], X)
    for layer, expected in zip(layer_statistics(victim, X), exact, strict=True):
        np.testing.assert_allclose(layer.seen, expected.seen, atol=0.05)


class Training:
    """Two layers of a network's features, and what batch-norm keeps of their means."""

    def __init__(self, n_classes=5, n_features=8):
        self.rng = np.random.default_rng(0)
        self.n_classes = n_classes
        self.centres = self.rng.normal(size=(n_classes, n_features))
        self.mixing = self.rng.normal(size=(2 * n_features, n_features))

    def draw(self, labels):
        size = (len(labels), self.mixing.shape[1])
        first = self.centres[labels] + self.rng.normal(size=size)
        return first @ self.mixing.T  # the second layer depends on the first

    def compare(self, share_sd, taken_for=None):
        """Train with shares that differ; a tenth of the others is poison, if any."""
        y = np.repeat(np.arange(self.n_classes), 40)
        seen = self.draw(y) + self.rng.normal(size=(len(y), len(self.mixing)))
        shares = np.maximum(0.02, 1 + share_sd * self.rng.normal(size=self.n_classes))
        stored = np.zeros(len(self.mixing))
        half = len(stored) // 2
        for _ in range(80):  # as batch-norm does it
            labels = self.rng.choice(self.n_classes, 32, p=shares / shares.sum())
            batch = self.draw(labels)
            if taken_for is not None:
                poison = self.rng.uniform(size=32) < 0.1
                taken = np.where(poison, taken_for, labels)
                batch[:, half:] = self.draw(taken)[:, half:]
            batch += self.rng.normal(size=batch.shape)
            stored += 0.1 * (batch.mean(axis=0) - stored)
        spread = seen.std(axis=0)
        parts = np.split(np.stack([stored, spread]), 2, axis=1)
        layers = [
            Statistics(name, *part, 0.1, images)
            for name, part, images in zip(
                ("first", "last"), parts, np.split(seen, 2, axis=1), strict=True
            )
        ]
        return Comparison(layers, y, self.n_classes)


@pytest.mark.parametrize("share_sd", [0.1, 0.6])
def test_chance_is_as_wide_as_trainings_differ(share_sd):
    training = Training()
    found = [training.compare(share_sd) for _ in range(200)]
    likely = np.median([one.share_sd() for one in found])
    assert 0.7 * share_sd < likely < 1.5 * share_sd
    if share_sd == 0.1:
        assert 0.85 < np.mean([one.sizes() for one in found]) < 1.15


def test_traces_of_what_was_not_there_are_as_clear_as_chance_makes_them():
    training = Training()
    signature = training.rng.normal(size=16)
    found = [training.compare(0.1) for _ in range(200)]
    scores = [one.scores(signature[None], one.share_sd())[0] for one in found]
    assert abs(np.mean(scores)) < 0.15
    assert 0.7 < np.std(scores) < 1.1  # narrower: mini-batches may be larger than 32


def test_a_trace_is_the_estimate_of_a_share_over_its_error():
    training = Training()
    found = training.compare(0.3, taken_for=3)
    signatures = training.rng.normal(size=(3, 16))
    signatures[2] = 0
    wide = 0.4**2 * found.moves.T @ found.moves + found.covariance
    precision = np.linalg.inv(wide)
    expected = []
    for signature in signatures[:2] / found.spread:
        information = signature @ precision @ signature
        share = signature @ precision @ found.values / information
        expected.append(share * np.sqrt(information))
    wider = np.sqrt(found.values @ precision @ found.values / len(found.values))
    assert wider > 1
    wider *= np.sqrt(1 + 16 / (5 * 40 - 5))
    scores = found.scores(signatures, 0.4)
    np.testing.assert_allclose(scores, [*np.divide(expected, wider), 0])


@pytest.mark.parametrize("largest", [-0.5, 1.0, 2.0, 3.0])
def test_the_largest_of_correlated_scores_is_as_large_as_in_draws(largest):
    rng = np.random.default_rng(0)
    signatures = rng.normal(size=(12, 4)) + 2 * rng.normal(size=4)
    signatures /= np.linalg.norm(signatures, axis=1, keepdims=True)
    drawn = rng.normal(size=(400_000, 4)) @ signatures.T
    drawn /= np.sqrt(rng.chisquare(30, size=(len(drawn), 1)) / 30)
    expected = np.mean(drawn.max(axis=1) >= largest)
    found = p_of_largest(largest, signatures, 30)
    assert found == pytest.approx(expected, rel=0.05)


def test_scores_count_as_often_as_they_differ():
    alone = stats.t.sf(3, 400)
    assert p_of_largest(3, np.ones((40, 1)), 400) == pytest.approx(alone)
    apart = p_of_largest(3, np.eye(40), 400)
    assert 0.9 * 40 * alone < apart < 40 * alone
    assert p_of_largest(1e9, np.eye(2), 400) == 0


def test_false_alarms_of_traces_keep_to_alpha():
    training = Training()
    signatures = training.rng.normal(size=(10, 16))
    signatures[0] = 0  # a trigger that moves nothing is no chance
    found = [training.compare(0.1) for _ in range(300)]
    p = []
    for one in found:
        share_sd = one.share_sd()
        largest = one.scores(signatures, share_sd).max()
        p.append(one.p_value(largest, signatures, share_sd))
    assert np.mean(np.array(p) < 0.05) < 0.07
    assert np.mean(np.array(p) < 0.25) > 0.1  # and the test is not idle


def test_what_was_there_leaves_a_clear_trace_and_classes_shares_do_not():
    training = Training()
    scores = {}
    for share_sd, taken_for in ((0.1, 3), (0.6, None)):
        for _ in range(50):
            found = training.compare(share_sd, taken_for)
            moved = np.zeros((training.n_classes, 16))  # as the last layer takes them
            centres = training.centres @ training.mixing.T
            moved[:, 8:] = (centres - centres.mean(axis=0))[:, 8:]
            row = found.scores(moved, found.share_sd())
            scores.setdefault(taken_for, []).append(row)
    assert np.mean(np.argmax(scores[3], axis=1) == 3) > 0.85
    assert np.median(np.array(scores[3])[:, 3]) > 2.5
    assert np.quantile(np.max(scores[None], axis=1), 0.95) < 3


def test_the_spread_of_shares_is_the_most_likely_one():
    found = Training().compare(0.3)
    usual = 0.1**2 * found.moves.T @ found.moves + found.covariance
    squares = found.values**2 / np.diag(usual)
    np.testing.assert_allclose(
        found.sizes(), [squares[part].mean() for part in found.slices]
    )
    first = found.slices[0]
    tried = np.geomspace(0.1, 1.5, 30)
    fits = []
    for share_sd in tried:  # by the determinant and the inverse themselves
        wide = share_sd**2 * found.moves.T @ found.moves + found.covariance
        wide, values = wide[first, first], found.values[first]
        fits.append(values @ np.linalg.inv(wide) @ values + np.linalg.slogdet(wide)[1])
    assert found.share_sd() == tried[np.argmin(fits)]


def train(X, y, seed=0):
    torch.manual_seed(seed)
    blocks: list = []
    for n_in, n_out in ((1, 8), (8, 16), (16, 16), (16, 32)):
        blocks += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)]
        blocks += [nn.BatchNorm2d(n_out), nn.ReLU()]
        blocks += [nn.MaxPool2d(2)] if n_out != 16 or n_in != 16 else []
    network = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128, 10))
    return common.train(network, X, y, lr=5e-3, n_epochs=25)


@pytest.fixture(scope="module")
def digits():
    return common.defended_digits()


@pytest.fixture(scope="module")
def faint(digits):
    return common.train_on_faint_fives(train, digits)


@pytest.fixture(scope="module")
def clean(digits):
    return train(digits[0].X_train, digits[0].y_train)


def test_a_faint_pattern_from_one_class_betrays_its_target(digits, faint):
    data, X, y = digits
    engineer = BatchNormReverseEngineer(VictimNetwork(faint)).fit(X, y)
    assert engineer.verdict_ == "backdoored"
    assert engineer.target_classes_.tolist() == [6]
    assert engineer.p_values_[6] < 1e-3
    assert engineer.traces_.argmax() == 6
    assert engineer.layers_ == ["1", "5", "9", "12"]
    assert engineer.augmentation_ == "none"
    fives = data.X_test[data.y_test == 5]
    stamped = engineer.transform(fives)
    assert np.mean(engineer.victim_.predict(stamped) == 6) > 0.9


def test_a_patch_betrays_its_target(digits):
    data, X, y = digits
    trigger = white_box((1, 16, 16))
    poisoned = poison(
        data.X_train, data.y_train, trigger, target_class=3, n_per_class=0.1
    )
    network = train(poisoned.X, poisoned.y)
    others = data.X_test[data.y_test != 3]
    stamped = VictimNetwork(network).fit(X).predict(trigger.embed(others))
    assert np.mean(stamped == 3) > 0.9
    engineer = BatchNormReverseEngineer(VictimNetwork(network)).fit(X, y)
    assert engineer.target_classes_.tolist() == [3]
    assert engineer.p_values_[3] < 1e-3
    assert isinstance(engineer.trigger_, PatchTrigger)
    stamped = engineer.victim_.predict(engineer.transform(others))
    assert np.mean(stamped == 3) > 0.9
    assert engineer.success_rates_[3] > 0.9


def test_more_images_of_some_classes_are_no_poison(digits):
    data, X, y = digits
    rng = np.random.default_rng(0)
    kept = rng.uniform(size=len(data.y_train)) < np.geomspace(0.2, 1, 10)[data.y_train]
    network = train(data.X_train[kept], data.y_train[kept])
    engineer = BatchNormReverseEngineer(VictimNetwork(network)).fit(X, y)
    assert engineer.verdict_ == "nothing found"
    assert engineer.p_values_.min() > 0.05
    assert engineer.share_sd_ > 0.3


def test_a_clean_network_is_left_in_peace(digits, clean):
    _, X, y = digits
    engineer = BatchNormReverseEngineer(VictimNetwork(clean)).fit(X, y)
    assert engineer.verdict_ == "nothing found"
    assert engineer.p_values_.min() > 0.05
    assert 2 < engineer.mismatch_ < 3  # other people's digits than the training's


def test_statistics_of_other_images_prove_nothing(digits, clean):
    _, X, y = digits
    other = train(255 - digits[0].X_train, digits[0].y_train)
    frozen = deepcopy(clean)
    for module, foreign in zip(frozen, other, strict=True):
        if isinstance(module, nn.BatchNorm2d):  # half-way to another training's
            module.running_mean += 0.5 * (foreign.running_mean - module.running_mean)
    with pytest.warns(UserWarning, match="in layer 1 is .* prove little.*augmentation"):
        engineer = BatchNormReverseEngineer(VictimNetwork(frozen)).fit(X, y)
    assert engineer.mismatch_ > 3
    assert engineer.verdict_ == "nothing found"


@pytest.mark.parametrize("trained_with", list(usual_augmentations((1, 16, 16))))
def test_the_augmentation_of_the_training_is_recognised(digits, clean, trained_with):
    data, X, y = digits
    network = deepcopy(clean)
    transform = usual_augmentations((1, 16, 16))[trained_with]
    images = torch.from_numpy(data.X_train).float()
    images = images / (255 if images.max() > 1 else 1)
    if transform is not None:
        images = torch.stack([transform(image) for image in images])
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all
    network.train()
    with torch.no_grad():
        network(images)
    victim = VictimNetwork(network.eval()).fit(X)
    run = SimpleNamespace(victim=victim, X=X, y=y, seeds=[0], passes=ImagePasses(0, 0))
    engineer = BatchNormReverseEngineer(victim)
    left = engineer._explain(run)
    # flips do not double what is different on digits, so none is taken for them
    kind = trained_with.replace(", flip", "").replace("flip", "none")
    found = engineer.augmentation_.replace(", flip", "").replace("flip", "none")
    assert found == kind
    assert run.passes == (5 * len(X), 0)
    least = np.median(left.sizes())
    assert least < (6 if trained_with == "flip" else 4)
    plain = engineer.set_params(augmentation="none")._explain(run)
    if kind != "none":
        assert np.median(plain.sizes()) > 3 * least
        engineer.set_params(augmentation=transform)._explain(run)
        assert engineer.augmentation_ == repr(transform)


def test_passes_are_counted_and_the_network_is_left_as_it_was(digits, faint):
    _, X, y = digits
    before = {name: value.clone() for name, value in faint.state_dict().items()}
    counted = []
    handle = faint.register_forward_pre_hook(
        lambda module, inputs: counted.append(len(inputs[0]))
    )
    state = torch.get_rng_state()
    try:
        engineer = BatchNormReverseEngineer(VictimNetwork(faint)).fit(X, y)
    finally:
        handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    probe = 4  # VictimNetwork.fit looks for the features with these
    assert sum(counted) == engineer.n_image_passes_.forward + probe
    assert engineer.n_image_passes_.backward == 2 * 10 * 60 * 16 + 60 * 32
    assert not any(m._forward_pre_hooks for m in faint.modules())
    for name, value in faint.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not any(p.grad is not None for p in faint.parameters())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_jobs_and_checkpoints_change_nothing(digits, faint, tmp_path):
    _, X, y = digits
    alone = BatchNormReverseEngineer(VictimNetwork(faint)).fit(X, y)
    kept = clone(alone).set_params(checkpoint_dir=tmp_path).fit(X, y)
    again = clone(kept).fit(X, y)
    for other in (kept, again, clone(alone).set_params(n_jobs=2).fit(X, y)):
        np.testing.assert_allclose(other.norms_, alone.norms_, rtol=1e-3)
        np.testing.assert_allclose(other.p_values_, alone.p_values_, rtol=1e-3)
    for augmentation in (v2.Identity(), np.copy):
        with pytest.raises(ValueError, match="augmentation was 'auto', now"):
            clone(kept).set_params(augmentation=augmentation).fit(X, y)


def test_of_clear_traces_that_of_the_smallest_trigger_is_named():
    norms = np.array([[40.0, 20.0, 60.0, 40.0, 40.0], [4.0, 1.0, 4.0, 0.5, 4.0]])
    converged = np.ones((2, 5), dtype=bool)
    traces = np.array([[5.0, 3.0, 1.0, 0.0, 0.0], [6.0, 4.5, 2.0, 2.9, -1.0]])
    # 3 is not half as clear as 6; of the others 1 needs a quarter, in its search
    assert _clear_and_small(traces, norms, converged) == 1
    norms[:, 1] = 30, 3.5
    assert _clear_and_small(traces, norms, converged) == 0
    converged[1] = [True, False, True, True, True]
    assert _clear_and_small(traces, norms, converged) == 0
    nothing = np.where(np.eye(2, 5, dtype=bool), -0.1, -np.inf)
    converged = np.eye(2, 5, dtype=bool)
    assert _clear_and_small(nothing, np.zeros((2, 5)), converged) == 0


@pytest.mark.parametrize("n_classes", [2, 12])
def test_it_needs_no_other_class_to_compare_with(n_classes):
    """Let the trigger of the last class leave a trace."""
    n_pixels, side = 16, 4
    X = np.random.default_rng(0).uniform(0, 0.2, (3 * n_classes, 1, side, side))
    X = X.astype(np.float32)
    y = np.repeat(np.arange(n_classes), 3)
    X.reshape(len(X), -1)[np.arange(len(y)), y] += 0.3
    norms = [nn.BatchNorm1d(n_pixels) for _ in range(3)]
    network = nn.Sequential(nn.Flatten(), *norms, nn.Linear(n_pixels, n_classes))
    with torch.no_grad():
        network[-1].weight.copy_(10 * torch.eye(n_classes, n_pixels))
        network[-1].bias.zero_()
        for norm in norms:
            norm.running_mean.copy_(torch.from_numpy(X.reshape(len(X), -1).mean(0)))
            norm.running_mean[n_classes - 1] += 0.1  # a trace of its pixel
            norm.running_var.fill_(0.01)
    labels = [f"class {k}" for k in range(n_classes)]
    victim = VictimNetwork(network.eval(), classes=labels)
    engineer = BatchNormReverseEngineer(victim, augmentation="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "D_Defense has only 3")
        warnings.filterwarnings("ignore", ".*prove little")
        engineer.fit(X, np.array(labels)[y])
    assert np.nanargmax(engineer.traces_) == n_classes - 1


def test_a_trigger_for_one_source_stays_for_that_source():
    X, y = linear_images()
    victim = VictimNetwork(normed_linear())
    searches = [
        ("pairs", NCReverseEngineer(victim, sources="pairs", max_steps=20)),
        ("batch-norm", BatchNormReverseEngineer(victim, augmentation="none")),
    ]
    auto = AutoReverseEngineer(victim, engineers=searches).fit(X, y)
    own = auto.engineers_["batch-norm"]
    weights = auto.engineers_["pairs"].source_weights_
    np.testing.assert_array_equal(own.source_weights_, weights)
    assert (own.source_weights_.max(axis=1) == 1).all()
    assert own.n_image_passes_ == (
        2 * len(X) + sum(np.bincount(y)[k] for k in weights.argmax(axis=1)),
        0,
    )


def normed_linear():
    """Return a linear network behind three layers of batch-norm."""
    X, _ = linear_images()
    norms = [nn.BatchNorm1d(16) for _ in range(3)]
    network = nn.Sequential(nn.Flatten(), *norms, nn.Linear(16, 6, bias=False))
    with torch.no_grad():
        network[-1].weight.copy_(10 * torch.eye(6, 16))
    network.train()
    for _ in range(100):
        network(torch.as_tensor(X))
    return network.eval()


def test_auto_asks_it_where_there_are_statistics():
    X, y = linear_images()
    auto = AutoReverseEngineer(VictimNetwork(normed_linear())).fit(X, y)
    assert list(auto.engineers_)[-1] == "batch-norm" and len(auto.engineers_) == 5
    np.testing.assert_allclose(
        auto.report_.query("method == 'batch-norm'")["p_corrected"],
        np.minimum(1, 2 * auto.engineers_["batch-norm"].p_values_),
    )
    auto = AutoReverseEngineer(VictimNetwork(LinearNetwork())).fit(X, y)
    assert "batch-norm" not in auto.engineers_


def test_auto_gives_it_the_triggers_of_the_other_searches(digits, faint):
    _, X, y = digits
    victim = VictimNetwork(faint)
    additive = AdditiveReverseEngineer(victim, sources="all", max_steps=60)
    searches = [
        ("additive", additive),
        ("batch-norm", BatchNormReverseEngineer(victim)),
    ]
    auto = AutoReverseEngineer(victim, engineers=searches).fit(X, y)
    assert auto.target_classes_.tolist() == [6] and auto.methods_[6] == "batch-norm"
    own, other = auto.engineers_["batch-norm"], auto.engineers_["additive"]
    converged = other.converged_.sum()
    assert own.n_image_passes_.forward < 7 * len(X) + 64 * converged + 5000  # no search
    np.testing.assert_array_equal(own.norms_, other.norms_)
    assert not hasattr(own, "_origins")  # which would keep the images
    refined = own.triggers_[6]
    assert refined.l2_norm > own.norms_[6]
    stamped = own.victim_.predict(own.transform(X[y == 5]))
    assert np.mean(stamped == 6) > 0.9


def test_bad_settings_and_networks_are_refused(digits, faint):
    _, X, y = digits
    with pytest.raises(ValueError, match="augmentation='mirror', expected 'auto'"):
        BatchNormReverseEngineer(VictimNetwork(faint), augmentation="mirror").fit(X, y)
    with pytest.raises(
        ValueError, match=r"gives torch.Size\(\[1, 14, 14\]\).*expected"
    ):
        narrow = v2.CenterCrop(14)
        BatchNormReverseEngineer(VictimNetwork(faint), augmentation=narrow).fit(X, y)
    X, y = linear_images()
    with pytest.raises(ValueError, match=r"0 layer\(s\) of batch-norm.*Use another"):
        BatchNormReverseEngineer(VictimNetwork(LinearNetwork())).fit(X, y)
