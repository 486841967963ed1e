import numpy as np
import pytest
import torch
from torch import nn

from sklearn_backdoor import NCReverseEngineer, VictimNetwork
from sklearn_backdoor._fingerprint import fingerprint
from sklearn_backdoor.reverse._anomaly import anomaly_indices
from sklearn_backdoor.reverse._exhaustive import CostSchedule
from sklearn_backdoor.reverse._search import Problem, Task
from tests.common import CountingNetwork, LinearNetwork, count_passes, linear_images

# --- the anomaly statistic


def test_anomaly_index_follows_worked_numbers():
    # median of an even number: 11 (torch's would be 10); deviations 9 3 1 1 3 5 -> 3
    norms = [2, 8, 10, 12, 14, 16]
    indices, below = anomaly_indices(norms, [True] * 6)
    expected = np.abs(np.array(norms) - 11) / (1.4826 * 3)
    np.testing.assert_allclose(indices, expected, rtol=1e-4)
    np.testing.assert_array_equal(below, [True, True, True, False, False, False])


def test_a_class_that_did_not_converge_is_censored_not_scored_as_if_it_had():
    norms = [2, 8, 10, 12, 14, 0.001]  # the last reached nothing: its norm is no news
    indices, below = anomaly_indices(norms, [True] * 5 + [False])
    # it is 14 at least: the median of all is 11; deviations of the others 9 3 1 1 3
    expected = np.abs(np.array([2, 8, 10, 12, 14, 14]) - 11) / (1.4826 * 3)
    np.testing.assert_allclose(indices, expected)
    assert not below[5]


def test_censoring_keeps_an_attack_that_leaving_out_would_let_pass():
    norms, converged = [2, 6, 7, 9, 10, 99, 99], [True] * 5 + [False] * 2
    index = anomaly_indices(norms, converged)[0][0]
    left_out = anomaly_indices(norms[:5], converged[:5])[0][0]
    assert index > 2 > left_out


@pytest.mark.parametrize(
    "norms, n_censored, flagged",
    [
        ([2, 45, 50, 60, 70, 80], 4, [0]),
        ([45, 50, 60, 70, 78, 80], 4, []),
        ([2, 40, 50, 60, 61], 4, [0]),
        ([0.99987, 1, 1.00001, 1.00002, 1.0001, 1.0001], 0, []),
        ([1, 5, 5, 5, 5, 5], 0, [0]),
    ],
)
def test_censored_classes_do_not_collapse_the_spread(norms, n_censored, flagged):
    converged = [True] * len(norms) + [False] * n_censored
    indices, below = anomaly_indices([*norms, *[1e3] * n_censored], converged)
    assert np.flatnonzero(below & (indices > 2)).tolist() == flagged


@pytest.mark.parametrize(
    "norms, converged",
    [
        ([1, 5, 5.1, 5.2], [True] * 4),  # four classes
        ([1, 5, 6, 7, 8, 9], [True] * 4 + [False] * 2),  # four converged
        (list(range(1, 13)), [True] * 6 + [False] * 6),  # the median was never seen
    ],
)
def test_too_little_information_says_nothing(norms, converged):
    indices, below = anomaly_indices(norms, converged)
    assert np.isnan(indices).all() and not below.any()


def test_nan_norms_are_censored():
    indices, below = anomaly_indices([2, 8, 10, 12, 14, np.nan], [True] * 6)
    assert np.isfinite(indices).all() and not below[5]


# --- the cost


def test_the_cost_rises_after_good_steps_and_falls_after_bad_ones():
    cost = CostSchedule(patience=3)
    seen = []
    for reached in [True] * 9 + [False] * 3 + [True] * 2 + [False] + [True] * 3:
        cost.update(reached)
        seen.append(cost.value)
    first, second, third = 1e-3, 1.5e-3, 2.25e-3
    fell = third / 1.5**1.5
    expected = [0, 0, first, first, first, second, second, second, third]
    expected += [third, third, fell, fell, fell, fell, fell, fell, fell * 1.5]
    np.testing.assert_allclose(seen, expected)
    assert cost.moved_both_ways


def test_the_cost_stays_0_until_enough_good_steps_in_a_row():
    cost = CostSchedule(patience=5)
    for reached in ([True] * 4 + [False]) * 10:
        cost.update(reached)
        assert cost.value == 0
    assert not cost.moved_both_ways


# --- the search


@pytest.fixture(scope="module")
def fitted():
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork().eval())
    return NCReverseEngineer(victim, schedule="exhaustive").fit(X, y), X, y


def test_the_target_is_found_and_its_mask_is_as_small_as_theory_allows(fitted):
    engineer, *_ = fitted
    assert engineer.verdict_ == "backdoored"
    assert engineer.target_class_ == 2
    assert engineer.trigger_ == engineer.triggers_[2]
    assert engineer.converged_.all()
    # images light their pixel by 0.95 to 1: 10 (1 - m_j) x_j < 30 m_15 at the best
    assert 0.3 < engineer.norms_[2] < 0.5
    assert engineer.trigger_.mask.argmax() == 15
    assert engineer.trigger_.pattern[0, 3, 3] > 0.9


def test_success_rates_are_those_of_the_estimates_on_all_other_images(fitted):
    engineer, X, y = fitted
    for label in range(6):
        trigger = engineer.triggers_[label]
        others = X[y != label]
        mask, pattern = trigger.mask, trigger.pattern
        hits = 0
        for image in others:
            stamped = (1 - mask) * image + mask * pattern
            hits += engineer.victim_.predict(stamped[None])[0] == label
        rate = hits / len(others)
        assert engineer.success_rates_[label] == pytest.approx(rate)
        assert engineer.converged_[label] == (rate >= 0.99)


def test_the_norm_is_the_l1_norm_of_one_mask_in_full_precision(fitted):
    engineer, *_ = fitted
    for norm, trigger in zip(engineer.norms_, engineer.triggers_, strict=True):
        assert trigger.mask.shape == (4, 4)
        assert norm == pytest.approx(float(np.abs(trigger.mask).sum()))
        grey = trigger.mask * 255
        assert np.abs(grey - np.rint(grey)).max() > 0.01  # not read back from 8 bits


def test_images_of_the_candidate_class_are_left_out(images):
    X, y = images
    problem = Problem(None, torch.from_numpy(X), torch.from_numpy(y), 6)
    for label in range(6):
        rows = problem.sources(Task(label)).numpy()
        np.testing.assert_array_equal(rows, np.flatnonzero(y != label))
    np.testing.assert_array_equal(problem.sources(Task(1, 3)), np.flatnonzero(y == 3))


def test_classes_do_not_influence_each_other(fitted):
    engineer, X, y = fitted
    seed = np.random.RandomState(0).randint(2**31 - 1, size=6)[4]
    state = np.random.SeedSequence((int(seed), 0)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> 1))
    with engineer.victim_.differentiable() as logits:
        problem = Problem(logits, torch.from_numpy(X), torch.from_numpy(y), 6)
        search = engineer._open_search(problem, [Task(4)], [generator], "search")
        while not search.done:
            search.step()
        (alone,) = search.results()
    assert alone.trigger == engineer.triggers_[4]


@pytest.mark.parametrize(
    "options, n_backward",
    [
        ({"schedule": "exhaustive", "max_steps": 20}, 20 * 40 * 6),
        ({"max_steps": 7, "batch_size": 16}, 7 * 16 * 6),
        ({"max_steps": 7, "sources": "learnt"}, 7 * 32 * 6),
        ({"max_steps": 7, "sources": "pairs"}, 7 * 32 * 30),
    ],
)
def test_image_passes_are_counted_exactly(tmp_path, images, options, n_backward):
    X, y = images
    log = tmp_path / "passes"
    engineer = NCReverseEngineer(VictimNetwork(CountingNetwork(log)), **options)
    engineer.set_params(threshold=1e9).fit(X, y)
    opening = 4  # two images twice, to find logits and features
    assert count_passes(log) == engineer.n_image_passes_.forward + opening
    assert engineer.n_image_passes_.backward == n_backward
    engineer.set_params(threshold=2.0).fit(X, y)  # with refining, where it flags
    assert count_passes(log) == engineer.n_image_passes_.forward + opening


@pytest.mark.parametrize("schedule", ["exhaustive", "fast"])
def test_a_class_that_cannot_be_reached_is_never_flagged(images, schedule):
    X, y = images
    network = LinearNetwork()
    network.last.bias = nn.Parameter(torch.tensor([0.0, 0, 0, 0, 0, -1000]))
    engineer = NCReverseEngineer(VictimNetwork(network), max_steps=150)
    engineer.set_params(schedule=schedule, threshold=2.0).fit(X, y)
    assert "success rate 0.00" in engineer.reasons_[5]
    assert not engineer.converged_[5] and engineer.success_rates_[5] == 0
    assert 5 not in engineer.target_classes_
    assert engineer.target_class_ == 2


def test_too_few_classes_are_inconclusive_never_clean():
    X, y = linear_images(n_classes=4)
    victim = VictimNetwork(LinearNetwork(n_classes=4))
    engineer = NCReverseEngineer(victim, max_steps=100).fit(X, y)
    assert engineer.verdict_ == "inconclusive"
    assert engineer.target_class_ is None and engineer.trigger_ is None
    assert len(engineer.target_classes_) == 0
    assert len(engineer.triggers_) == 4  # the estimates are there all the same


def test_nothing_flagged_is_said_and_not_embedded(linear, images):
    engineer = NCReverseEngineer(VictimNetwork(linear), threshold=1e6).fit(*images)
    assert engineer.verdict_ == "nothing found"
    assert engineer.target_class_ is None and len(engineer.target_classes_) == 0
    with pytest.raises(ValueError, match="'nothing found'"):
        engineer.transform(images[0])


def test_transform_embeds_the_trigger_always(fitted):
    engineer, X, _ = fitted
    np.testing.assert_array_equal(engineer.transform(X), engineer.trigger_.embed(X))
    with pytest.raises(ValueError, match="fitted on images of shape"):
        engineer.transform(np.zeros((1, 1, 5, 5)))


def test_a_network_without_a_backdoor_is_left_in_peace(images):
    victim = VictimNetwork(LinearNetwork(backdoor=0.0))
    for seed in range(3):
        engineer = NCReverseEngineer(victim, max_steps=200, random_state=seed)
        for schedule in ("exhaustive", "fast"):
            engineer.set_params(schedule=schedule)
            assert engineer.fit(*images).verdict_ == "nothing found"


class Grey(nn.Module):
    """The linear network on the mean of three channels."""

    def __init__(self):
        super().__init__()
        self.network = LinearNetwork()

    def forward(self, images):
        return self.network(images.mean(dim=1, keepdim=True))


def test_colour_images_share_one_mask_over_the_channels(fitted):
    engineer, X, y = fitted
    colour = NCReverseEngineer(VictimNetwork(Grey()), schedule="exhaustive")
    colour.fit(np.repeat(X, 3, axis=1), y)
    assert colour.target_class_ == 2
    assert colour.trigger_.mask.shape == (4, 4)
    assert colour.trigger_.pattern.shape == (3, 4, 4)
    # one mask: the norm is that of the grey network, not three times it
    assert colour.norms_[2] == pytest.approx(engineer.norms_[2], abs=0.1)
    assert colour.norms_[2] == pytest.approx(colour.trigger_.mask.sum())


def test_a_bare_network_is_refused_with_the_remedy(images):
    with pytest.raises(TypeError, match="VictimNetwork.network."):
        NCReverseEngineer(LinearNetwork()).fit(*images)


class Normalised(nn.Module):
    """The same network behind a normalisation."""

    def __init__(self):
        super().__init__()
        self.network = LinearNetwork()

    def forward(self, images):
        normalised = (images - 0.5) / 0.1
        return self.network(normalised * 0.1 + 0.5)


def test_triggers_live_in_pixels_behind_a_normalisation(fitted):
    engineer, X, y = fitted
    inside = NCReverseEngineer(VictimNetwork(Normalised()), schedule="exhaustive")
    inside.fit(X, y)
    assert inside.target_class_ == 2
    assert inside.norms_[2] == pytest.approx(engineer.norms_[2], abs=0.05)


def test_the_same_seed_gives_the_same_bits_and_uint8_the_same_target(fitted):
    engineer, X, y = fitted
    victim = VictimNetwork(LinearNetwork().eval())
    again = NCReverseEngineer(victim, schedule="exhaustive").fit(X, y)
    assert again.triggers_ == engineer.triggers_
    np.testing.assert_array_equal(again.anomaly_indices_, engineer.anomaly_indices_)
    other = NCReverseEngineer(victim, schedule="exhaustive", random_state=1).fit(X, y)
    assert other.triggers_ != engineer.triggers_
    as_bytes = NCReverseEngineer(victim, schedule="exhaustive")
    as_bytes.fit((X * 255).astype(np.uint8), y)
    assert as_bytes.target_class_ == 2


def test_the_victim_and_the_global_random_state_are_untouched(images):
    X, y = images
    last = nn.Linear(16, 6)  # class k lights pixel k
    last.weight.data = 10 * torch.eye(6, 16)
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), last).train()
    before = fingerprint(network)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    NCReverseEngineer(VictimNetwork(network), max_steps=3).fit(X, y)
    assert fingerprint(network) == before
    assert all(module.training for module in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


class Exploding(LinearNetwork):
    """Its logits are NaN as soon as pixel 15 is lit."""

    def forward(self, images):
        return super().forward(images) + torch.where(
            images[:, 0, 3, 3, None] > 0.1, torch.nan, 0.0
        )


@pytest.mark.parametrize("schedule", ["exhaustive", "fast"])
def test_nan_in_a_search_ends_unconverged_with_finite_norms(images, schedule):
    engineer = NCReverseEngineer(VictimNetwork(Exploding()), max_steps=5)
    engineer.set_params(schedule=schedule).fit(*images)
    assert "NaN or infinity" in engineer.reasons_[0]
    # in the fast schedule a class may never light the pixel
    assert engineer.converged_.sum() <= (0 if schedule == "exhaustive" else 2)
    assert np.isfinite(engineer.norms_).all()
    assert engineer.verdict_ == "inconclusive"


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"success_rate": 1.5}, ValueError, "success_rate=1.5"),
        ({"max_steps": 0}, ValueError, "max_steps=0"),
        ({"batch_size": 2.5}, TypeError, "batch_size=2.5"),
        ({"schedule": "quick"}, ValueError, "schedule='quick'.*fast, exhaustive"),
        ({"sources": "some"}, ValueError, "sources='some'.*learnt"),
        ({"schedule": "exhaustive", "sources": "learnt"}, ValueError, "'fast'"),
        ({"threshold": -1}, ValueError, "threshold=-1"),
    ],
)
def test_bad_settings_are_named(linear, images, options, error, message):
    engineer = NCReverseEngineer(VictimNetwork(linear), **options)
    with pytest.raises(error, match=message):
        engineer.fit(*images)
    assert not [name for name in vars(engineer) if name.endswith("_")]


def test_missing_classes_and_single_images_are_refused(linear, images):
    X, y = images
    engineer = NCReverseEngineer(VictimNetwork(linear))
    with pytest.raises(ValueError, match="at least 2.*too few of 3: 0"):
        engineer.fit(X[y != 3], y[y != 3])
    keep = (y != 3) | (np.arange(len(y)) == 24)
    with pytest.raises(ValueError, match="too few of 3: 1"):
        engineer.fit(X[keep], y[keep])
    assert not hasattr(engineer, "triggers_")


def test_progress_shows_class_success_and_norm(linear, images, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    engineer = NCReverseEngineer(VictimNetwork(linear), max_steps=2, verbose=True)
    engineer.fit(*images)
    shown = capsys.readouterr().err
    assert "class 5" in shown and "success=" in shown and "norm=" in shown
    engineer.set_params(verbose=False).fit(*images)
    assert capsys.readouterr().err == ""
