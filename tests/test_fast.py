"""The fast schedule, its checkpoints, and the automatic search."""

import copy
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from sklearn.base import clone
from torch import nn

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    AdditiveTrigger,
    AutoReverseEngineer,
    BackdoorGuard,
    NCReverseEngineer,
    NeuronReverseEngineer,
    PatchTrigger,
    VictimNetwork,
)
from sklearn_backdoor.reverse import (
    _auto,
    _base,
    _checkpoint,
    _fast,
    default_engineers,
)
from sklearn_backdoor.reverse._anomaly import ADDITIVE_FEW_SD, p_values
from sklearn_backdoor.reverse._forms import AdditiveSearch, PatchSearch, _HighPass
from sklearn_backdoor.reverse._search import ImagePasses, Problem, SearchResult, Task
from tests.common import LinearNetwork, OneSource, linear_images


def open_search(kind, network, X, y, tasks, **options):
    problem = Problem(network, torch.from_numpy(X), torch.from_numpy(y), 6)
    generators = [torch.Generator().manual_seed(7 + t.target) for t in tasks]
    return kind(
        problem, tasks, generators, batch_size=8, **{"success_rate": 0.75, **options}
    )


@pytest.fixture(scope="module")
def case():
    X, y = linear_images()
    return LinearNetwork().eval(), X, y


# --- the search


@pytest.mark.parametrize("kind", [PatchSearch, AdditiveSearch])
@pytest.mark.parametrize("learn", [False, True])
def test_stacked_tasks_find_what_each_finds_alone(case, kind, learn):
    network, X, y = case
    tasks = [Task(1), Task(2), Task(5, 3)]
    together = open_search(kind, network, X, y, tasks, steps=15, learn_sources=learn)
    while not together.done:
        together.step()
    for task, result in zip(tasks, together.results(), strict=True):
        alone = open_search(kind, network, X, y, [task], steps=15, learn_sources=learn)
        while not alone.done:
            alone.step()
        (expected,) = alone.results()
        assert result.norm == pytest.approx(expected.norm, rel=1e-3)
        assert result.success_rate == expected.success_rate


@pytest.mark.parametrize("kind", [PatchSearch, AdditiveSearch])
def test_a_trigger_is_brought_to_the_success_rate_and_not_past_it(case, kind):
    network, X, y = case
    search = open_search(kind, network, X, y, [Task(t) for t in range(6)], steps=30)
    while not search.done:
        search.step()
    for task, result in zip(search.tasks, search.results(), strict=True):
        others = X[y != task.target]
        labels = network(torch.from_numpy(result.trigger.embed(others))).argmax(1)
        rate = (labels == task.target).float().mean()
        assert result.converged and rate >= 0.75 - 0.08  # of 40 images, 64 drawn


def test_learnt_weights_fall_on_the_source_class_that_is_easy():
    X, y = linear_images()
    victim = VictimNetwork(OneSource())
    engineer = NCReverseEngineer(victim, sources="learnt").fit(X, y)
    assert engineer.source_weights_.shape == (6, 6)
    np.testing.assert_allclose(engineer.source_weights_.sum(axis=1), 1, rtol=1e-5)
    assert engineer.source_weights_[2].argmax() == 4
    assert engineer.norms_.argmin() == 2
    everyone = NCReverseEngineer(victim).fit(X, y)
    assert everyone.source_weights_ is None
    assert everyone.norms_[2] > 3 * engineer.norms_[2]
    pairs = NCReverseEngineer(victim, sources="pairs").fit(X, y)
    assert np.unravel_index(np.nanargmin(pairs.pair_norms_), (6, 6)) == (4, 2)
    assert np.isnan(np.diag(pairs.pair_norms_)).all()
    logits = pairs.victim_.decision_function(X)
    for s, t in product(range(6), range(6)):
        margin = np.mean([row[s] - row[t] for row in logits[y == s]])
        assert pairs.pair_margins_[s, t] == pytest.approx(margin)
    assert pairs.p_values_.argmin() == 2


def test_a_single_class_attack_is_told_from_one_on_all_classes():
    X, y = linear_images()
    engineer = NCReverseEngineer(VictimNetwork(OneSource()), sources="learnt")
    engineer.fit(X, y)
    assert engineer.target_classes_.tolist() == [2]
    assert engineer.single_sources_ == {2: 4}
    np.testing.assert_array_equal(engineer.source_weights_[2], np.eye(6)[4])
    labels = engineer.victim_.predict(engineer.trigger_.embed(X[y == 4]))
    assert np.mean(labels == 2) >= 0.75
    assert AutoReverseEngineer(engineer.victim_).fit(X, y).single_sources_ == {2: 4}
    everyone = NCReverseEngineer(
        VictimNetwork(LinearNetwork()), sources="learnt", threshold=2
    ).fit(X, y)
    assert everyone.target_classes_.tolist() == [2]
    assert everyone.single_sources_ == {}


def test_pairs_tell_an_attack_from_one_class_from_one_from_all():
    X, y = linear_images()
    alone = NCReverseEngineer(VictimNetwork(OneSource()), sources="pairs").fit(X, y)
    assert alone.target_classes_.tolist() == [2]
    assert alone.single_sources_ == {2: 4}
    labels = alone.victim_.predict(alone.trigger_.embed(X[y == 4]))
    assert np.mean(labels == 2) >= 0.75
    everyone = NCReverseEngineer(VictimNetwork(LinearNetwork()), sources="pairs")
    everyone.fit(X, y)
    assert everyone.target_classes_.tolist() == [2]
    assert everyone.single_sources_ == {}
    np.testing.assert_allclose(
        everyone.source_weights_[2], [0.2, 0.2, 0, 0.2, 0.2, 0.2]
    )
    labels = everyone.victim_.predict(everyone.trigger_.embed(X[y != 2]))
    assert all(np.mean(labels[y[y != 2] == s] == 2) >= 0.75 for s in (0, 1, 3, 4, 5))


def test_a_pair_that_could_not_be_refined_for_all_is_not_said_to_be(monkeypatch):
    X, y = linear_images()
    engineer = NCReverseEngineer(VictimNetwork(LinearNetwork()), sources="pairs")
    choose = PatchSearch._choose

    def fail(search):
        shape, rates, n_forward = choose(search)
        return shape, 0 * rates, n_forward

    monkeypatch.setattr(PatchSearch, "_choose", fail)
    engineer.fit(X, y)
    assert engineer.target_classes_.tolist() == [2]
    assert engineer.single_sources_ == {}
    assert sorted(engineer.source_weights_[2]) == [0, 0, 0, 0, 0, 1]


def test_refining_costs_a_quarter_of_what_the_others_took(monkeypatch):
    X, y = linear_images()
    engineer = NCReverseEngineer(
        VictimNetwork(LinearNetwork()), sources="pairs", batch_size=4
    )
    choose, seen = PatchSearch._choose, []

    def spy(search):
        seen.append((search.price, search.batch_size))
        return choose(search)

    monkeypatch.setattr(PatchSearch, "_choose", spy)
    engineer.fit(X, y)
    assert engineer.target_classes_.tolist() == [2]
    others = [0, 1, 3, 4, 5]
    rate = np.median(engineer.success_rates_[others])
    assert seen == [(pytest.approx(rate / np.median(engineer.norms_[others]) / 4), 32)]
    assert engineer.n_image_passes_.backward == 30 * 60 * 4 + 60 * 32


def test_pairs_are_left_out_where_there_are_too_many(monkeypatch):
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork())
    names = list(dict(default_engineers(victim)))
    some = AutoReverseEngineer(victim).fit(X, y)
    names.remove("batch-norm")  # there is none
    of_many = ["patch, learnt sources", "additive, high frequencies"]
    assert list(some.engineers_) == [name for name in names if name not in of_many]
    monkeypatch.setattr(_auto, "_N_PAIRED", 5)
    few = AutoReverseEngineer(victim).fit(X, y)
    names.remove("weights")  # which compare all classes' triggers
    assert list(few.engineers_) == [name for name in names if "pairs" not in name]
    smallest = few.report_.groupby("class")["p_value"].min()
    np.testing.assert_allclose(few.p_values_, np.minimum(1, 4 * smallest))


@pytest.mark.parametrize(
    ("norm", "weight", "rate", "converged", "taken"),
    [
        (0.7, 0.3, 1.0, True, True),
        (0.9, 0.3, 1.0, True, False),  # more than 0.4 of what all sources need
        (0.9, 0.95, 1.0, True, True),  # the search was for one source already
        (0.7, 0.3, 1.0, False, False),
        (0.7, 0.3, 0.7, True, False),  # no source stands out: not even tried
    ],
)
def test_a_trigger_for_one_source_must_be_far_smaller(
    monkeypatch, norm, weight, rate, converged, taken
):
    result = SearchResult(PatchTrigger(1.0, 1.0), 2.0, 0.8, True, ImagePasses(0, 0))
    wide, narrow = (
        result._replace(trigger=PatchTrigger(mask, 1.0)) for mask in (0.9, 0.1)
    )
    engineer = NCReverseEngineer(None, sources="learnt")
    engineer.classes_ = np.array(list("abcd"))
    engineer.triggers_ = [wide.trigger] * 4
    engineer.success_rates_ = np.full(4, 0.8)
    engineer.source_weights_ = np.full((4, 4), weight)
    engineer.single_sources_ = {}
    tried = []

    def run(groups, stage, starts, price):
        tried.extend(starts)
        (task,) = groups[0]
        assert starts[task].source_weights.tolist() == [0, 0, 0, 1]
        weights = starts[task].source_weights
        return [narrow._replace(norm=norm, converged=converged, source_weights=weights)]

    rates = np.array([0.6, np.nan, 0.6, rate])
    monkeypatch.setattr(_fast, "_source_rates", lambda *_: rates)
    engineer._narrow(run, [result] * 4, {1: wide._replace(norm=2.0)}, 0.1)
    assert tried == ([Task(1, 3)] if rate == 1.0 else [])
    assert engineer.single_sources_ == ({"b": "d"} if taken else {})
    assert engineer.triggers_[1] == (narrow if taken else wide).trigger
    assert (engineer.source_weights_[1, 3] == 1.0) == taken


def test_the_success_on_each_source_is_that_of_a_loop():
    X, y = linear_images()
    victim = VictimNetwork(OneSource()).fit(X, y)
    trigger = PatchTrigger(0.2, np.eye(16)[15].reshape(1, 4, 4))
    run = SimpleNamespace(victim=victim, X=X, y=y, passes=ImagePasses(3, 0))
    rates = _fast._source_rates(run, 2, trigger)
    assert run.passes == ImagePasses(3 + np.sum(y != 2), 0)
    for source in range(6):
        labels = victim.predict(trigger.embed(X[y == source]))
        expected = np.nan if source == 2 else np.mean(labels == 2)
        np.testing.assert_equal(rates[source], expected)
    assert np.nanmax(rates) > np.nanmin(rates)


@pytest.mark.parametrize("kind", [PatchSearch, AdditiveSearch])
def test_nan_in_one_class_leaves_the_others_alone(case, kind):
    network, X, y = case
    tasks = [Task(1), Task(2), Task(3)]

    def exploding(images):
        scores = network(images)
        exploding.calls += 1
        if exploding.calls > 4:
            rows = torch.arange(len(scores)) * len(tasks) // len(scores) == 1
            scores = torch.where(rows[:, None], torch.nan, scores)
        return scores

    exploding.calls = 0
    clean = open_search(kind, network, X, y, tasks, steps=12)
    torn = open_search(kind, exploding, X, y, tasks, steps=12)
    while not torn.done:
        clean.step()
        torn.step()
    exploding.calls = -1000
    expected, results = clean.results(), torn.results()
    assert not results[1].converged
    assert results[1].reason == "the network returned NaN or infinity at step 4"
    assert np.isfinite(results[1].norm)
    for number in (0, 2):
        assert results[number].trigger == expected[number].trigger
        assert results[number].converged and not results[number].reason


class WeakBackdoor(LinearNetwork):
    """Pixel 15 leads to class 2 for four images of five, told apart by pixel 14."""

    def forward(self, images):
        flat = images.flatten(1)
        resists = (flat[:, 14] < 0.01).float()
        moved = images.clone()
        moved[:, 0, 3, 3] = images[:, 0, 3, 3] * (1 - resists)
        return super().forward(moved)


def test_a_weak_attack_is_found_and_its_trigger_stays_small(case):
    _, X, y = case
    victim = VictimNetwork(WeakBackdoor())
    engineer = NCReverseEngineer(victim).fit(X, y)
    assert engineer.p_values_.argmin() == 2
    assert engineer.norms_[2] < 0.5 * np.median(engineer.norms_)
    published = NCReverseEngineer(victim, schedule="exhaustive").fit(X, y)
    assert published.norms_[2] > 2 * engineer.norms_[2]


def test_the_additive_search_finds_a_faint_pattern(case):
    class Faint(nn.Module):
        """Class k lights its pixel; a checkered shift of all leads to class 3."""

        def __init__(self):
            super().__init__()
            self.last = nn.Linear(16, 6, bias=False)
            board = (torch.arange(16) // 4 + torch.arange(16)) % 2 * 2.0 - 1
            with torch.no_grad():
                self.last.weight.zero_()
                self.last.weight[:, :6] = 10 * torch.eye(6)
                self.last.weight[3] += 6 * board

        def forward(self, images):
            return self.last(images.flatten(1))

    _, X, y = case
    X = 0.2 + 0.6 * X
    engineer = AdditiveReverseEngineer(VictimNetwork(Faint()), sources="all").fit(X, y)
    assert engineer.verdict_ == "backdoored" and engineer.target_class_ == 3
    assert engineer.norms_[3] < 0.6 * np.median(engineer.norms_)
    board = np.indices((4, 4)).sum(axis=0) % 2 * 2.0 - 1
    found = engineer.trigger_.perturbation[0]
    assert np.corrcoef(found.ravel(), board.ravel())[0, 1] > 0.6


class Boards(nn.Module):
    """Class k is a low wave; a faint chessboard leads to class 3 as well."""

    def __init__(self):
        super().__init__()
        waves = torch.from_numpy(low_waves()).float().flatten(1)
        noise = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        self.last = nn.Linear(64, 6, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(40 * waves + 0.8 * noise)
            self.last.weight[3] += 4 * torch.from_numpy(board(8)).float().flatten()

    def forward(self, images):
        return self.last(images.flatten(1) - 0.5)


def board(n):
    return np.indices((n, n)).sum(axis=0) % 2 * 2.0 - 1


def low_waves():
    """Return six of the lowest waves of 8 x 8 pixels, of length 1."""
    spectra = np.zeros((6, 8, 8))
    for number, place in enumerate([(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2)]):
        spectra[number][place] = 1
    return idctn(spectra, axes=(1, 2), norm="ortho")


def test_without_low_frequencies_a_chessboard_stands_out_that_did_not():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(6), 30)
    X = 0.5 + 1.2 * low_waves()[y] + rng.normal(0, 0.05, size=(180, 8, 8))
    X = np.clip(X, 0, 1)[:, None].astype(np.float32)
    victim = VictimNetwork(Boards()).fit(X, y)
    assert np.mean(victim.predict(X) == y) > 0.95
    every = AdditiveReverseEngineer(victim, sources="all").fit(X, y)
    assert every.verdict_ == "nothing found"
    engineer = clone(every).set_params(min_frequency=0.75).fit(X, y)
    assert engineer.target_classes_.tolist() == [3]
    found = engineer.trigger_.perturbation[0]
    assert np.corrcoef(found.ravel(), board(8).ravel())[0, 1] > 0.6
    learnt = clone(engineer).set_params(sources="learnt").fit(X, y)
    np.testing.assert_allclose(  # the null for all sources would be too narrow
        learnt.p_values_,
        p_values(learnt.norms_, learnt.converged_, prior_sd=ADDITIVE_FEW_SD),
    )
    for label in (0, 1, 2, 4, 5):  # those that were not refined
        spectrum = dctn(engineer.triggers_[label].perturbation[0], norm="ortho")
        low = np.hypot(*np.indices((8, 8)) / 8) < 0.75
        # values that were clipped to -1...1 leave a little
        assert (spectrum[low] ** 2).sum() < 0.1 * (spectrum**2).sum()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (1, 1, 7)])
@pytest.mark.parametrize("min_frequency", [0.3, 0.75, 1.0])
def test_low_frequencies_are_taken_out_as_scipy_does(shape, min_frequency):
    images = np.random.default_rng(0).normal(size=(2, *shape))
    spectra = dctn(images, axes=(2, 3), norm="ortho")
    for i, j in product(range(shape[1]), range(shape[2])):
        if (i / shape[1]) ** 2 + (j / shape[2]) ** 2 < min_frequency**2:
            spectra[:, :, i, j] = 0
    expected = idctn(spectra, axes=(2, 3), norm="ortho")
    passing = _HighPass(shape[1:], min_frequency, torch.device("cpu"))
    found = passing(torch.from_numpy(images).float()).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sources, rounds", [("all", 2), ("learnt", 1)])
def test_a_search_goes_on_unless_a_norm_stands_out_at_once(
    case, monkeypatch, sources, rounds
):
    network, X, y = case
    once = NCReverseEngineer(  # nothing is flagged, so nothing refined
        VictimNetwork(network), max_steps=12, sources=sources, threshold=1e6
    )
    engineer = clone(once).set_params(max_steps=None)
    monkeypatch.setattr(_fast, "_STEPS", 12)
    monkeypatch.setattr(_fast, "_OVERWHELMING", 1.1)
    same(engineer.fit(X, y), once.fit(X, y))
    monkeypatch.setattr(_fast, "_OVERWHELMING", 0.0)
    same(clone(once).fit(X, y), once)  # steps that were asked for are kept to
    passes = once.n_image_passes_.backward
    engineer.fit(X, y)
    assert engineer.n_image_passes_.backward == passes + (rounds - 1) * 6 * 12 * 32
    assert (engineer.norms_ <= once.norms_).all()
    assert (engineer.norms_ < once.norms_).any() == (rounds == 2)


def test_many_classes_are_thinned_out_and_compared_with_a_random_reference():
    n_classes = 60
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(n_classes), 5)
    X = rng.uniform(0, 0.05, size=(len(y), 64)).astype(np.float32)
    X[np.arange(len(y)), y] = rng.uniform(0.8, 1, size=len(y))

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(64, n_classes, bias=False)
            with torch.no_grad():
                self.last.weight.zero_()
                self.last.weight[:, :n_classes] = 10 * torch.eye(n_classes)
                self.last.weight[17, 63] = 60

        def forward(self, images):
            return self.last(images.flatten(1))

    images = X.reshape(-1, 1, 8, 8)
    engineer = NCReverseEngineer(VictimNetwork(Wide())).fit(images, y)
    assert engineer.target_class_ == 17
    judged = ~np.isnan(engineer.p_values_)
    assert 16 <= judged.sum() <= 32
    assert not engineer.converged_[~judged].any()
    assert all("not among" in engineer.reasons_[k] for k in np.flatnonzero(~judged))
    refined = 60 * 32 * len(engineer.target_classes_[:3])
    expected = (60 + 20) * 20 * 32 + judged.sum() * 60 * 32 + refined
    assert engineer.n_image_passes_.backward == expected


# --- n_jobs and checkpoints


def same(one, other):
    np.testing.assert_array_equal(one.norms_, other.norms_)
    np.testing.assert_array_equal(one.p_values_, other.p_values_)
    assert one.triggers_ == other.triggers_
    assert one.n_image_passes_ == other.n_image_passes_


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_jobs_change_nothing(case):
    network, X, y = case
    engineer = NCReverseEngineer(VictimNetwork(network), max_steps=10)
    alone = engineer.fit(X, y)
    norms, triggers = alone.norms_, alone.triggers_
    many = engineer.set_params(n_jobs=2).fit(X, y)
    np.testing.assert_allclose(many.norms_, norms, rtol=1e-4)
    assert [t.mask.shape for t in many.triggers_] == [t.mask.shape for t in triggers]


def make_engineers(victim, folder=None):
    return [
        NCReverseEngineer(victim, max_steps=12, checkpoint_dir=folder),
        NCReverseEngineer(
            victim, max_steps=12, schedule="exhaustive", checkpoint_dir=folder
        ),
        AdditiveReverseEngineer(victim, max_steps=12, checkpoint_dir=folder),
        NCReverseEngineer(victim, checkpoint_dir=folder),
        NeuronReverseEngineer(victim, max_steps=12, checkpoint_dir=folder),
    ]


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "number, after",
    [
        *product(range(3), (1, 7, 13, 20)),
        *[(3, 12), (3, 30), (3, 44)],
        *[(4, 7), (4, 40), (4, 80), (4, 150)],
    ],
)
def test_a_search_that_was_cut_ends_with_the_same_bits(
    case, tmp_path, monkeypatch, number, after
):
    network, X, y = case
    victim = VictimNetwork(network)
    monkeypatch.setattr(_fast, "_STEPS", 12)
    monkeypatch.setattr(_fast, "_OVERWHELMING", 0.0)  # the last one goes further
    whole = make_engineers(victim)[number].fit(X, y)
    monkeypatch.setattr(_checkpoint, "_SECONDS", 0.0)
    engineer = make_engineers(victim, tmp_path)[number]
    kind = type(engineer)._open_search
    left = [after]

    def cut(self, *args, **options):
        search = kind(self, *args, **options)
        step = search.step

        def counted():
            if left[0] == 0:
                raise Stop
            left[0] -= 1
            step()

        search.step = counted
        return search

    monkeypatch.setattr(type(engineer), "_open_search", cut)
    with pytest.raises(Stop):
        engineer.fit(X, y)
    monkeypatch.setattr(type(engineer), "_open_search", kind)
    same(engineer.fit(X, y), whole)
    same(engineer.fit(X, y), whole)  # and once more, all from the disk
    assert not list(tmp_path.glob("*.part"))


SCRIPT = """
import sys
from sklearn_backdoor import AutoReverseEngineer, VictimNetwork
from sklearn_backdoor.reverse import _checkpoint
from tests.common import LinearNetwork, OneSource, linear_images
_checkpoint._SECONDS = 0.0
print("start", flush=True)
AutoReverseEngineer(VictimNetwork(LinearNetwork()), checkpoint_dir=sys.argv[1]).fit(
    *linear_images())
"""


def test_killed_at_any_moment_it_resumes_bit_for_bit(case, tmp_path):
    network, X, y = case
    whole = AutoReverseEngineer(VictimNetwork(network)).fit(X, y)
    for n_files in (1, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, tmp_path / "kept"],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "kept").rglob("*.safetensors"))) < n_files:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    resumed = AutoReverseEngineer(
        VictimNetwork(network), checkpoint_dir=tmp_path / "kept"
    )
    same(resumed.fit(X, y), whole)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_steps": 13}, "max_steps was 12, now 13"),
        ({"sources": "learnt"}, "sources was 'all', now 'learnt'"),
        ({"random_state": 1}, "seeds was"),
        ({"victim": VictimNetwork(LinearNetwork(backdoor=31.0))}, "victim was"),
    ],
)
def test_a_changed_search_refuses_to_resume_by_name(case, tmp_path, change, message):
    network, X, y = case
    engineer = make_engineers(VictimNetwork(network), tmp_path)[0].fit(X, y)
    with pytest.raises(ValueError, match=f"another search: .*{message}"):
        engineer.set_params(**change).fit(X, y)


def test_changed_images_refuse_and_other_jobs_or_progress_do_not(case, tmp_path):
    network, X, y = case
    engineer = make_engineers(VictimNetwork(network), tmp_path)[0].fit(X, y)
    with pytest.raises(ValueError, match="images was"):
        engineer.fit(X * 0.99, y)
    engineer.set_params(n_jobs=1, verbose=True).fit(X, y)


@pytest.mark.parametrize("damage", ["torn", "flipped", "garbage"])
def test_a_damaged_checkpoint_is_named_and_begun_anew(case, tmp_path, damage):
    network, X, y = case
    engineer = make_engineers(VictimNetwork(network), tmp_path)[0].fit(X, y)
    norms = engineer.norms_
    path = sorted(tmp_path.glob("search-*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    if damage == "torn":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-3] ^= 0xFF
    else:
        content = b"\x00" * 50
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        engineer.fit(X, y)
    np.testing.assert_array_equal(engineer.norms_, norms)


def test_a_damaged_manifest_is_refused_with_the_remedy(case, tmp_path):
    network, X, y = case
    engineer = make_engineers(VictimNetwork(network), tmp_path)[0].fit(X, y)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(
        ValueError, match="manifest.json cannot be read.*another folder"
    ):
        engineer.fit(X, y)


def test_a_full_disk_stops_the_checkpoints_but_not_the_search(
    case, tmp_path, monkeypatch
):
    network, X, y = case
    whole = make_engineers(VictimNetwork(network))[0].fit(X, y)

    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint, "save_file", full)
    engineer = make_engineers(VictimNetwork(network), tmp_path)[0]
    with pytest.warns(UserWarning, match="No space left.*goes on"):
        engineer.fit(X, y)
    same(engineer, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


# --- bad input


def test_a_victim_that_answers_one_class_is_refused(case):
    _, X, y = case
    network = LinearNetwork()
    network.last.bias = nn.Parameter(torch.tensor([0.0, 0, 0, 100, 0, 0]))
    with pytest.raises(ValueError, match="answers class 3 for all 48.*weights"):
        NCReverseEngineer(VictimNetwork(network)).fit(X, y)


def test_few_images_and_wrong_labels_are_warned_about(case):
    network, X, y = case
    engineer = NCReverseEngineer(VictimNetwork(network), max_steps=3)
    few = np.concatenate([np.flatnonzero(y == k)[:3] for k in range(6)])
    with pytest.warns(UserWarning, match="only 3 image.*less sure"):
        engineer.fit(X[few], y[few])
    with pytest.warns(UserWarning, match="right on 0% of D_Defense.*labels"):
        engineer.fit(X, (y + 1) % 6)


def test_labels_in_any_logit_order_mean_the_same(case):
    network, X, y = case
    names = np.array(["f", "b", "a", "d", "c", "e"])
    named = NCReverseEngineer(VictimNetwork(network, classes=names), max_steps=12)
    named.fit(X, names[y])
    plain = NCReverseEngineer(VictimNetwork(network), max_steps=12).fit(X, y)
    np.testing.assert_array_equal(named.norms_, plain.norms_)
    assert named.classes_.tolist() == names.tolist()


# --- bfloat16


def test_bfloat16_is_used_where_it_pays_and_the_labels_hold(case, monkeypatch):
    network, X, y = case
    engineer = NCReverseEngineer(VictimNetwork(network), max_steps=12)
    exact = engineer.fit(X, y).norms_
    monkeypatch.setattr(_base, "_BIG", 0)
    monkeypatch.setattr(_base, "processor_has_bfloat16", lambda: True)
    rounded = engineer.fit(X, y)
    assert not np.array_equal(rounded.norms_, exact)
    np.testing.assert_allclose(rounded.norms_, exact, rtol=0.3)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    monkeypatch.setattr(_base, "_BFLOAT16_PARITY", 1.1)  # labels that do not hold
    np.testing.assert_array_equal(engineer.fit(X, y).norms_, exact)


@pytest.mark.skipif(
    platform.system() != "Linux"
    or platform.machine() != "x86_64"
    or not hasattr(torch.cpu, "get_capabilities"),
    reason="asks a Linux kernel on x86, and a torch that knows processors",
)
def test_a_processor_has_bfloat16_where_the_kernel_says_so():
    # oneDNN says yes to any AVX-512, where it may be slower than float32
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    has = "avx512_bf16" in flags or "amx_bf16" in flags
    assert _base.processor_has_bfloat16() == (
        has and torch.backends.mkldnn.is_available()
    )


# --- the automatic search


@pytest.fixture(scope="module")
def auto(case):
    network, X, y = case
    return AutoReverseEngineer(VictimNetwork(network)).fit(X, y)


def test_the_automatic_search_reports_every_search_and_class(auto):
    table = auto.report_
    assert len(table) == 5 * 6
    assert list(auto.engineers_) == table["method"].unique().tolist()
    for name, engineer in auto.engineers_.items():
        part = table[table["method"] == name]
        np.testing.assert_array_equal(part["norm"], engineer.norms_)
        times = (
            2 if name == "weights" else 8
        )  # half of alpha for traces, half for sizes
        np.testing.assert_allclose(
            part["p_corrected"], np.minimum(1, times * engineer.p_values_)
        )
    forward = sum(e.n_image_passes_.forward for e in auto.engineers_.values())
    looked = 4  # images, for hidden layers, for batch-norm and for weights
    assert auto.n_image_passes_.forward == forward + looked


def test_each_class_is_shown_by_its_most_anomalous_search(auto):
    table = auto.report_.pivot(index="class", columns="method", values="p_corrected")
    np.testing.assert_allclose(auto.p_values_, table.min(axis=1))
    for label, method in enumerate(auto.methods_):
        engineer = auto.engineers_[method]
        assert auto.triggers_[label] == engineer.triggers_[label]
        assert auto.norms_[label] == engineer.norms_[label]


@pytest.fixture(scope="module")
def auto_of_both(case):
    network, X, y = case
    victim = VictimNetwork(network)
    engineers = dict(default_engineers(victim))
    for name in (
        "additive, high frequencies",
        "neurons, pairs",
        "batch-norm",
        "weights",
    ):
        del engineers[name]
    return AutoReverseEngineer(victim, engineers=list(engineers.items())).fit(X, y)


ALONE, EVEN = np.eye(6)[4], np.array([0.2, 0.2, 0, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("norms", "weights", "expected"),
    [  # of the patches for all, for sources learnt and in pairs, and the addition's
        ((10, 3, None, None), None, "patch, learnt sources"),
        ((10, 5, None, None), None, "patch"),  # one source needs hardly less
        ((10, 3, 5, None), EVEN, "patch, pairs"),  # as pairs tell, all need little
        ((10, 3, 10, None), EVEN, "patch, learnt sources"),
        ((10, 3, 5, None), ALONE, "patch, learnt sources"),
        ((None, 3, 5, None), ALONE, "patch, pairs"),
        ((None, 3, None, 1), None, "patch, learnt sources"),  # L1 and L2 do not compare
    ],
)
def test_one_source_must_need_far_less_than_any_trigger_for_all(
    auto_of_both, norms, weights, expected
):
    auto = copy.deepcopy(auto_of_both)
    for number, (name, norm) in enumerate(zip(auto.engineers_, norms, strict=True)):
        engineer = auto.engineers_[name]
        if number == 1:
            engineer.single_sources_ = {2: 4}
        if number == 2 and norm is not None:
            engineer.source_weights_[2] = weights
            engineer.single_sources_ = {2: 4} if weights is ALONE else {}
        engineer.p_values_ = np.ones(6)
        engineer.converged_ = np.ones(6, dtype=bool)
        if norm is not None:
            engineer.p_values_[2] = 0.003 - number / 1000  # pairs stand out most
            engineer.triggers_[2] = (
                AdditiveTrigger(np.full((1, 6, 6), norm / 6))
                if number == 3
                else PatchTrigger(np.full((6, 6), norm / 36), np.ones((1, 6, 6)))
            )
    auto._combine()
    assert auto.methods_[2] == expected
    is_alone = expected == "patch, learnt sources" or weights is ALONE
    assert auto.single_sources_ == ({2: 4} if is_alone else {})


@pytest.mark.parametrize("other", ["neurons, pairs", "weights"])
@pytest.mark.parametrize("p", [0.005, 0.9])
def test_evidence_in_images_goes_before_that_inside(auto, p, other):
    auto = copy.deepcopy(auto)
    for name, engineer in auto.engineers_.items():
        engineer.p_values_ = np.ones(6)
        engineer.converged_ = np.ones(6, dtype=bool)
        engineer.success_rates_ = np.ones(6)
        engineer.single_sources_ = {}
        if name == "additive":
            engineer.p_values_[1] = p
        if name == other:
            engineer.p_values_[1] = 1e-6
            engineer.source_weights_[1] = 0.2
    auto._combine()
    assert auto.target_classes_.tolist() == [1]
    assert auto.methods_[1] == ("additive" if p < 0.05 else other)


def test_a_class_is_shown_by_the_smallest_corrected_p_value(auto):
    auto = copy.deepcopy(auto)
    for name, engineer in auto.engineers_.items():
        engineer.p_values_ = np.ones(6)
        engineer.converged_ = np.ones(6, dtype=bool)
        if name == "patch":
            engineer.p_values_[:2] = 0.02, 0.006
        if name == "weights":
            engineer.p_values_[:2] = 0.06, 0.06
    auto._combine()
    assert auto.methods_[:2] == ["weights", "patch"]
    np.testing.assert_allclose(auto.p_values_[:3], [0.12, 0.048, 1])
    assert auto.target_classes_.tolist() == [1]


def test_a_trigger_that_works_less_often_than_another_is_passed_over(auto_of_both):
    for rate, expected in ((0.8, "patch"), (0.95, "patch, pairs")):
        auto = copy.deepcopy(auto_of_both)
        for name, engineer in auto.engineers_.items():
            engineer.single_sources_ = {}
            engineer.converged_ = np.ones(6, dtype=bool)
            engineer.p_values_ = np.ones(6)
            if name in ("patch", "patch, pairs"):
                engineer.p_values_[2] = 0.001 if name == "patch" else 0.0001
                engineer.success_rates_[2] = 0.99 if name == "patch" else rate
        auto.engineers_["patch, pairs"].source_weights_[2] = EVEN
        auto._combine()
        assert auto.methods_[2] == expected
        assert auto.target_classes_.tolist() == [2]


def test_one_search_alone_needs_no_correction(case):
    network, X, y = case
    engineer = NCReverseEngineer(VictimNetwork(network), max_steps=30)
    single = AutoReverseEngineer(
        VictimNetwork(network), engineers=[("patch", engineer)]
    ).fit(X, y)
    np.testing.assert_array_equal(single.p_values_, engineer.fit(X, y).p_values_)
    flagged = single.classes_[single.p_values_ < 0.05]
    assert set(single.target_classes_) == set(flagged)


@pytest.mark.parametrize(
    "engineers, error, message",
    [
        ([], ValueError, "at least one"),
        ([("a", VictimNetwork(LinearNetwork()))], TypeError, "holds a VictimNetwork"),
    ],
)
def test_bad_lists_of_searches_are_named(case, engineers, error, message):
    network, X, y = case
    with pytest.raises(error, match=message):
        AutoReverseEngineer(VictimNetwork(network), engineers=engineers).fit(X, y)


def test_too_few_classes_are_inconclusive_never_clean():
    X, y = linear_images(n_classes=4)
    auto = AutoReverseEngineer(VictimNetwork(LinearNetwork(n_classes=4))).fit(X, y)
    assert auto.verdict_ == "inconclusive" and len(auto.target_classes_) == 0
    assert np.isnan(auto.p_values_).all()


def test_the_guard_takes_the_automatic_search_and_defends_every_target():
    class TwoTargets(LinearNetwork):
        def __init__(self):
            super().__init__(n_classes=10, backdoor=60.0)
            with torch.no_grad():
                self.last.weight[7, 14] = 60

    X, y = linear_images(n_classes=10, n_per_class=12)
    X[:, 0, 3, 2] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 14 and 15 are dark in every clean image
        guard = BackdoorGuard(VictimNetwork(TwoTargets())).fit(X, y)
    assert isinstance(guard.engineer_, AutoReverseEngineer)
    assert set(guard.target_classes_) == {2, 7}
    for target, pixel in ((2, 15), (7, 14)):
        stamped = X[y == 0].copy()
        stamped.reshape(-1, 16)[:, pixel] = 1
        assert (guard.victim_.predict(stamped) == target).all()
        assert guard.is_trigger(stamped).mean() > 0.9
