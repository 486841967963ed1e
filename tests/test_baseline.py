"""Norms beside those that a copy of the network takes, which forgot its backdoor."""

import numpy as np
import pytest
import torch
from sklearn.base import clone

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    AutoReverseEngineer,
    NCReverseEngineer,
    TABORReverseEngineer,
    VictimNetwork,
)
from sklearn_backdoor._fingerprint import fingerprint
from sklearn_backdoor.reverse import _fast, default_engineers
from sklearn_backdoor.reverse._anomaly import (
    ADDITIVE_FINE_RELATIVE,
    ADDITIVE_RELATIVE,
    PATCH_RELATIVE,
    p_values,
    relative_norms,
)
from sklearn_backdoor.reverse._baseline import Distillation
from sklearn_backdoor.reverse._search import ImagePasses
from tests.common import CountingNetwork, LinearNetwork, count_passes


def distilled(victim, X, seed=0, bfloat16=False):
    distillation = Distillation(victim, X, bfloat16)
    distillation.run(np.random.SeedSequence(seed))
    return distillation


@pytest.fixture
def judged_late(monkeypatch):
    """No norm is so small that the baseline is not asked."""
    monkeypatch.setattr(_fast, "_OVERWHELMING", 0.0)


def test_the_copy_forgets_the_backdoor_and_knows_the_digits(digits):
    victim = VictimNetwork(digits.network).fit(digits.X_defense)
    before = fingerprint(digits.network)
    baseline = distilled(victim, digits.X_defense).result()
    X, y = digits.evaluation_set()
    attacked = y != digits.target
    success = [np.mean(v.predict(X)[attacked] == 9) for v in (victim, baseline)]
    assert success[0] > 0.95 and success[1] < 0.2
    accuracy = [
        np.mean(v.predict(digits.X_test) == digits.y_test) for v in (victim, baseline)
    ]
    assert accuracy[1] > accuracy[0] - 0.05
    assert fingerprint(digits.network) == before
    assert not digits.network.training
    assert all(p.grad is None for p in digits.network.parameters())
    assert all(p.requires_grad for p in digits.network.parameters())


def test_a_distillation_is_the_same_each_time_and_draws_from_no_global_state(images):
    X, _ = images
    victim = VictimNetwork(LinearNetwork()).fit(X)
    state = torch.random.get_rng_state()
    one, other = (distilled(victim, X).pack()[0] for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = distilled(victim, X, seed=1).pack()[0]
    assert not torch.equal(changed["last.weight"], one["last.weight"])


def test_it_computes_in_bfloat16_if_told_to(images):
    X, _ = images
    victim = VictimNetwork(LinearNetwork()).fit(X)
    exact, rounded = (distilled(victim, X, bfloat16=b).pack()[0] for b in (False, True))
    assert rounded["last.weight"].dtype == torch.float32
    assert not torch.equal(rounded["last.weight"], exact["last.weight"])
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.2)


def test_the_target_alone_takes_far_more_from_the_copy(images, judged_late):
    X, y = images
    engineer = NCReverseEngineer(VictimNetwork(LinearNetwork()), baseline="distilled")
    engineer.fit(X, y)
    ratios = relative_norms(engineer.norms_, engineer.baseline_norms_)
    assert ratios[2] < 0.6 * np.delete(ratios, 2).min()
    assert engineer.target_classes_.tolist() == [2]


@pytest.mark.parametrize(
    ("kind", "options", "null"),
    [
        (NCReverseEngineer, {}, PATCH_RELATIVE),
        (AdditiveReverseEngineer, {"sources": "all"}, ADDITIVE_RELATIVE),
        (
            AdditiveReverseEngineer,
            {"sources": "all", "min_frequency": 0.3},
            ADDITIVE_FINE_RELATIVE,
        ),
    ],
)
def test_p_values_are_of_the_norms_beside_the_baseline(
    images, judged_late, kind, options, null
):
    X, y = images
    victim = VictimNetwork(LinearNetwork())
    engineer = kind(victim, baseline="distilled", **options).fit(X, y)
    ratios = relative_norms(engineer.norms_, engineer.baseline_norms_)
    expected = p_values(ratios, engineer.converged_, **null)
    np.testing.assert_allclose(engineer.p_values_, expected)
    plain = kind(victim, **options).fit(X, y)
    assert plain.baseline_norms_ is None
    np.testing.assert_array_equal(plain.norms_, engineer.norms_)
    assert not np.allclose(plain.p_values_, engineer.p_values_)


def test_where_a_norm_stands_out_at_once_no_baseline_is_made(images, monkeypatch):
    X, y = images
    engineer = NCReverseEngineer(VictimNetwork(LinearNetwork()), baseline="distilled")
    monkeypatch.setattr(_fast, "_OVERWHELMING", 1.1)
    monkeypatch.setattr(Distillation, "run", None)
    assert engineer.fit(X, y).baseline_norms_ is None


def test_a_class_that_the_baseline_withstands_is_no_smaller_for_that():
    ratios = relative_norms([1, 2, 3, 4], [2, 8, np.inf, np.nan])
    np.testing.assert_array_equal(ratios, [1 / 2, 2 / 8, 3 / 8, 4 / 8])


def test_a_baseline_that_mostly_withstands_is_not_compared_with(images, judged_late):
    X, y = images
    engineer = NCReverseEngineer(VictimNetwork(LinearNetwork()), baseline="distilled")
    search = NCReverseEngineer._open_search

    def never_there(self, problem, tasks, generators, stage, **options):
        found = search(self, problem, tasks, generators, stage, **options)
        if stage.startswith("baseline"):
            results = found.results
            found.results = lambda: [r._replace(converged=False) for r in results()]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NCReverseEngineer, "_open_search", never_there)
        engineer.fit(X, y)
    assert np.isinf(engineer.baseline_norms_).all()
    plain = clone(engineer).set_params(baseline=None).fit(X, y)
    np.testing.assert_array_equal(engineer.p_values_, plain.p_values_)


def test_image_passes_are_counted_exactly(tmp_path, images, judged_late, monkeypatch):
    X, y = images
    monkeypatch.setattr(_fast, "_STEPS", 12)
    log = tmp_path / "passes"
    victim = VictimNetwork(CountingNetwork(log))
    engineer = NCReverseEngineer(victim, baseline="distilled", threshold=1e9)
    passes = engineer.fit(X, y).n_image_passes_
    opening = 2 * 4  # two images twice, to find logits and features, of each network
    assert count_passes(log) == passes.forward + opening
    n_distilled = 20 * 2 * 32  # 48 images: two mini-batches, twenty times
    assert passes.backward == 2 * 2 * 6 * 12 * 32 + n_distilled


class Frozen(torch.nn.Module):
    """Nothing in it can be trained."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Identity()

    def forward(self, images):
        return 10 * self.hidden(images).flatten(1)[:, :6]


class Forgetful(LinearNetwork):
    """In training its logits are those of another class."""

    def forward(self, images):
        logits = super().forward(images)
        return logits.roll(1, dims=1) if self.training else logits


class Explosive(LinearNetwork):
    def forward(self, images):
        logits = super().forward(images)
        return logits * torch.inf if self.training else logits


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Frozen(), "empty parameter list"),
        (Forgetful(), "right on .* of D_Defense then"),
        (Explosive(), "NaN"),
    ],
)
def test_a_network_that_cannot_be_fine_tuned_is_judged_without(
    images, judged_late, network, message
):
    X, y = images
    victim = VictimNetwork(network.eval(), feature_layer="hidden")
    engineer = NCReverseEngineer(victim, baseline="distilled")
    with pytest.warns(UserWarning, match=f"no baseline .*{message}"):
        engineer.fit(X, y)
    assert engineer.baseline_norms_ is None
    plain = clone(engineer).set_params(baseline=None).fit(X, y)
    np.testing.assert_array_equal(engineer.p_values_, plain.p_values_)


def test_many_classes_are_compared_with_the_baseline_as_chosen(judged_late):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(40), 3)
    X = rng.uniform(0, 0.05, size=(len(y), 49)).astype(np.float32)
    X[np.arange(len(y)), y] = 0.9
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(49, 40))
    with torch.no_grad():
        network[1].bias.zero_()
        network[1].weight.copy_(10 * torch.eye(40, 49))
    engineer = NCReverseEngineer(VictimNetwork(network), baseline="distilled")
    with pytest.warns(UserWarning, match="image"):
        engineer.fit(X.reshape(-1, 1, 7, 7), y)
    judged = ~np.isnan(engineer.p_values_)
    assert 16 <= judged.sum() <= 32
    np.testing.assert_array_equal(judged, ~np.isnan(engineer.baseline_norms_))


def test_the_automatic_search_makes_one_baseline_for_all(images, monkeypatch):
    X, y = images
    monkeypatch.setattr(_fast, "_OVERWHELMING", 0.0)
    made = []
    run = Distillation.run
    monkeypatch.setattr(
        Distillation, "run", lambda self, *a, **k: made.append(run(self, *a, **k))
    )
    victim = VictimNetwork(LinearNetwork())
    engineers = [
        (name, one.set_params(baseline="distilled" if one.sources == "all" else None))
        for name, one in default_engineers(victim)
    ]
    auto = AutoReverseEngineer(victim, engineers=engineers).fit(X, y)
    assert len(made) == 1
    beside = [one.baseline_norms_ is not None for one in auto.engineers_.values()]
    assert beside == [True, False, False, True, True]  # for all source classes
    has_norm = auto.report_.groupby("method", sort=False)["baseline_norm"].count() > 0
    assert has_norm.tolist() == beside
    total = sum(
        (one.n_image_passes_ for one in auto.engineers_.values()), ImagePasses(0, 0)
    )
    assert auto.n_image_passes_ == total


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (NCReverseEngineer, {"baseline": "clean"}, "expected one of"),
        (NCReverseEngineer, {"sources": "pairs"}, "all sources only"),
        (AdditiveReverseEngineer, {}, "all sources only"),  # the default is learnt
        (NCReverseEngineer, {"schedule": "exhaustive"}, "Choose schedule='fast'"),
        (AdditiveReverseEngineer, {"sources": "all", "null": "gamma"}, "published"),
    ],
)
def test_settings_that_do_not_fit_are_named(images, kind, options, message):
    engineer = kind(
        VictimNetwork(LinearNetwork()), **{"baseline": "distilled", **options}
    )
    with pytest.raises(ValueError, match=message):
        engineer.fit(*images)


def test_tabor_has_no_baseline(images):
    engineer = TABORReverseEngineer(VictimNetwork(LinearNetwork()), max_steps=6)
    assert engineer.fit(*images).baseline_norms_ is None
    assert "baseline" not in engineer.get_params()
