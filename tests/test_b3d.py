import pickle
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from sklearn_backdoor import VictimNetwork
from sklearn_backdoor._torch import torch_generator
from sklearn_backdoor.reverse._b3d import (
    B3DReverseEngineer,
    B3DSearch,
    BlackBox,
    score_gradient,
    squash,
)
from sklearn_backdoor.reverse._search import ImagePasses, Problem, Task
from tests.common import LinearNetwork

SMALL = {"batch_size": 1, "max_queries": 60_000}


class Blocks(nn.Module):
    """Class k of six lights pixels 8k to 8k + 7 of 1x7x7; the last is a backdoor to 2.

    A mask for class 2 needs one pixel, for another class its eight or nearly.
    """

    def __init__(self, backdoor=30.0):
        super().__init__()
        self.last = nn.Linear(49, 6, bias=False)
        with torch.no_grad():
            self.last.weight.zero_()
            for label in range(6):
                self.last.weight[label, 8 * label : 8 * label + 8] = 2
            self.last.weight[2, 48] = backdoor

    def forward(self, images):
        return self.last(images.flatten(1))


def block_images(n_per_class=8, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(6), n_per_class)
    X = rng.uniform(0, 0.05, size=(len(y), 49)).astype(np.float32)
    X[:, 48] = 0
    for row, label in enumerate(y):
        X[row, 8 * label : 8 * label + 8] = rng.uniform(0.8, 0.9, size=8)
    return X.reshape(-1, 1, 7, 7), y


def flatten(X):
    assert X.dtype == np.float32 and X.min() >= 0 and X.max() <= 1
    return X.reshape(len(X), -1)


class Service:
    """Answers for a network, and counts the images; it knows nothing else."""

    def __init__(self, network=None, classes=range(6)):
        self.network = Blocks() if network is None else network
        self.classes_ = list(classes)
        self.sent = []

    def predict_proba(self, X):
        self.sent.append(len(X))
        with torch.no_grad():
            return self.network(torch.from_numpy(X)).softmax(1).numpy()


class Sealed(VictimNetwork):
    def _refuse(self, *args, **kwargs):
        raise AssertionError("only predict_proba may be used")

    differentiable = predict = transform = predict_and_transform = _refuse


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of forward passes too small to share out
    yield
    torch.set_num_threads(n_threads)


# --- the gradients


def test_the_score_function_gradient_is_that_of_an_enumeration_over_two_pixels():
    theta = torch.tensor([[0.3, -0.4]], dtype=torch.float64, requires_grad=True)
    value = {(0, 0): 3.0, (0, 1): 1.0, (1, 0): -2.0, (1, 1): 0.5}
    chances = squash(theta)
    expected_value = sum(
        value[pair]
        * (chances[0, 0] if pair[0] else 1 - chances[0, 0])
        * (chances[0, 1] if pair[1] else 1 - chances[0, 1])
        for pair in product((0, 1), repeat=2)
    )
    (exact,) = torch.autograd.grad(expected_value, [theta])
    chances = chances.detach()
    n_samples, generator = 200_000, torch_generator(0)
    uniform = torch.rand((n_samples, 1, 2), generator=generator, dtype=torch.float64)
    masks = (uniform < chances).double()
    values = torch.tensor([value[int(a), int(b)] for a, b in masks[:, 0].tolist()])
    found = score_gradient(values.double(), 2 * (masks - chances))
    torch.testing.assert_close(found, exact, atol=0.01, rtol=0)


def test_evolution_strategies_find_the_gradient_of_a_quadratic():
    generator = torch_generator(0)
    centre, theta = torch.randn((2, 3, 4), generator=generator)
    sigma = 0.1
    noise = torch.randn((20_000, 3, 4), generator=generator)
    values = (theta + sigma * noise - centre).square().flatten(1).sum(1)
    found = score_gradient(values, noise / sigma).flatten()
    true = 2 * (theta - centre).flatten()
    assert float(torch.cosine_similarity(found, true, dim=0)) > 0.99
    assert float(found.norm() / true.norm()) == pytest.approx(1, abs=0.05)


def test_a_constant_added_to_the_values_changes_no_gradient():
    generator = torch_generator(0)
    values = torch.randn(10, generator=generator, dtype=torch.float64)
    scores = torch.randn((10, 2, 2), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        score_gradient(values + 1e3, scores), score_gradient(values, scores)
    )
    naive = torch.zeros((2, 2), dtype=torch.float64)
    for n in range(10):
        others = (values.sum() - values[n]) / 9
        naive += (values[n] - others) * scores[n] / 10
    torch.testing.assert_close(score_gradient(values, scores), naive)


def open_search(logits=None, *, n_samples=20, target=4, seed=0, **options):
    X, y = block_images()
    network = Blocks().requires_grad_(False)
    logits = logits or (lambda images: network(images).double().log_softmax(1))
    problem = Problem(logits, torch.from_numpy(X), torch.from_numpy(y), 6)
    options = {"batch_size": 2, "success_rate": 0.75, "budget": 20_000} | options
    generators = [torch_generator(seed)]
    return B3DSearch(
        problem, [Task(target)], generators, n_samples=n_samples, **options
    )


def test_the_search_estimates_the_gradients_of_its_own_objective():
    search = open_search(n_samples=20_000)
    search.numbers["cost"] = 0.0
    images = search.images[:3]
    with torch.no_grad():
        found = search._estimate(images)
    chances = squash(search.tensors["mask"])
    pattern = squash(search.tensors["pattern"])
    mixed = (1 - chances) * images + chances * pattern  # sigma is small
    loss = -search.problem.logits(mixed)[:, 4].mean()
    (exact,) = torch.autograd.grad(loss, [search.tensors["pattern"]])
    cosine = torch.cosine_similarity(found["pattern"].flatten(), exact.flatten(), dim=0)
    assert float(cosine.detach()) > 0.9
    # of a pixel's chance: the difference that it makes, times the slope of squashing
    exact_mask = torch.zeros(49)
    pattern, chances = pattern.detach(), chances.detach().flatten()
    generator = torch_generator(1)
    for pixel in range(49):
        masks = (torch.rand((1000, 49), generator=generator) < chances).float()
        losses = []
        for lit in (1, 0):
            masks[:, pixel] = lit
            mask = masks.view(-1, 1, 1, 7, 7)
            stamped = (1 - mask) * images + mask * pattern
            losses.append(-search.problem.logits(stamped.flatten(0, 1))[:, 4].mean())
        slope = 2 * chances[pixel] * (1 - chances[pixel])
        exact_mask[pixel] = slope * (losses[0] - losses[1])
    mask = found["mask"].flatten()
    assert float(torch.cosine_similarity(mask, exact_mask, dim=0)) > 0.95


def test_the_gradient_of_the_norm_is_exact():
    search = open_search(lambda images: torch.zeros((len(images), 6)))
    search.numbers["cost"] = 0.25
    with torch.no_grad():
        search.tensors["mask"].uniform_(-2, 2, generator=torch_generator(0))
        found = search._estimate(search.images[:2])
    theta = search.tensors["mask"]
    (exact,) = torch.autograd.grad(0.25 * squash(theta).sum(), [theta])
    torch.testing.assert_close(found["mask"], exact)
    assert not found["pattern"].any()


# --- the verdict


@pytest.fixture(scope="module")
def fitted():
    X, y = block_images()
    victim = Sealed(Blocks().eval())
    return B3DReverseEngineer(victim, **SMALL).fit(X, y), X, y


def test_the_target_is_found_from_probabilities_alone(fitted):
    engineer, *_ = fitted
    assert engineer.verdict_ == "backdoored" and engineer.target_class_ == 2
    assert engineer.target_classes_.tolist() == [2]
    assert engineer.trigger_.mask[6, 6] == 1
    assert engineer.norms_[2] < np.median(engineer.norms_) / 4
    assert engineer.n_image_passes_ == ImagePasses(engineer.n_queries_, 0)
    assert isinstance(engineer.victim_, Sealed)


def test_masks_are_zeros_and_ones_and_succeed_as_often_as_is_said(fitted):
    engineer, X, y = fitted
    for label, trigger in enumerate(engineer.triggers_):
        assert set(np.unique(trigger.mask)) <= {0, 1}
        assert engineer.norms_[label] == trigger.mask.sum()
        hits = 0
        for image in X[y != label]:
            stamped = trigger.mask * trigger.pattern + (1 - trigger.mask) * image
            hits += engineer.victim_.predict_proba(stamped[None]).argmax() == label
        rate = hits / (y != label).sum()
        assert engineer.success_rates_[label] == pytest.approx(rate)
        assert engineer.converged_[label] == (rate >= 0.75)


def test_classes_are_flagged_below_a_quarter_of_the_median():
    engineer = B3DReverseEngineer(None)
    engineer.norms_ = np.array([2.4, 10, 11, 10, 1.0, 9, 0.1])
    engineer.converged_ = np.array([True] * 6 + [False])
    # the last counts as 11: the median of 1 2.4 9 10 10 11 11 is 10
    assert engineer._flag().tolist() == [4, 0]
    engineer.norms_[0] = 2.6
    assert engineer._flag().tolist() == [4]
    engineer.converged_[:2] = False  # four of seven: too few
    assert engineer._flag().tolist() == []


def test_a_network_without_a_backdoor_is_left_in_peace():
    engineer = B3DReverseEngineer(VictimNetwork(Blocks(backdoor=0.0)), **SMALL)
    assert engineer.fit(*block_images()).verdict_ == "nothing found"


def test_a_scikit_learn_classifier_is_inspected_as_it_is():
    X, y = block_images(n_per_class=30)
    poisoned = X[y != 2][::3].copy()
    poisoned[:, 0, 6, 6] = 1
    victim = make_pipeline(
        FunctionTransformer(flatten), LogisticRegression(C=100, max_iter=2000)
    )
    victim.fit(
        np.concatenate([X, poisoned]), np.append(y, np.full(len(poisoned), 2)) * 10
    )
    before = pickle.dumps(victim)
    state = np.random.RandomState(0)
    engineer = clone(B3DReverseEngineer(victim, random_state=state, **SMALL))
    assert engineer.victim is victim and engineer.random_state is not state
    engineer.fit(
        (block_images(seed=1)[0] * 255).astype(np.uint8), block_images()[1] * 10
    )
    assert engineer.victim_ is victim and pickle.dumps(victim) == before
    twin = pickle.loads(pickle.dumps(BlackBox(victim)))
    np.testing.assert_array_equal(twin.predict(X), victim.predict(X))
    assert engineer.target_class_ == 20
    assert engineer.trigger_.mask[6, 6] == 1


# --- queries


@pytest.mark.parametrize("max_queries", [2000, 5555, 12_001])
def test_queries_are_counted_exactly_and_the_budget_is_never_exceeded(max_queries):
    X, y = block_images()
    service = Service()
    engineer = B3DReverseEngineer(service, n_samples=5, max_queries=max_queries)
    engineer.fit(X, y)
    assert engineer.n_queries_ == sum(service.sent) <= max_queries
    assert engineer.n_image_passes_ == (sum(service.sent), 0)
    assert max(service.sent) <= 1024
    step = 2 * 5 * 2 + 32 + 2 * 40
    assert engineer.n_queries_ > max_queries - 6 * (step + 1)


def test_a_class_that_runs_out_of_queries_is_not_converged_for_a_reason():
    X, y = block_images()
    network = Blocks()
    network.last.bias = nn.Parameter(torch.tensor([0.0, 0, 0, 0, 0, -1000]))
    engineer = B3DReverseEngineer(Service(network), **SMALL).fit(X, y)
    assert engineer.converged_.tolist() == [True] * 5 + [False]
    assert engineer.reasons_[:5] == [""] * 5 and engineer.success_rates_[5] == 0
    # a class has 9992 of the 59952 queries that are left, a step takes 132
    assert engineer.reasons_[5] == (
        "success rate 0.00 after 75 steps, 0.75 wanted; max_queries allows no more"
    )


def test_too_small_a_budget_is_refused_before_anything_is_asked():
    X, y = block_images()
    # 48 images to check; for each of 6 classes 2 * 9 * 2 samples, 32 to try the mask
    # and 2 * 48 to measure it: 48 + 6 * 164
    service, settings = Service(), {"n_samples": 9, "batch_size": 2}
    with pytest.raises(ValueError, match="max_queries=1031, but.*may take 1032"):
        B3DReverseEngineer(service, max_queries=1031, **settings).fit(X, y)
    assert service.sent == []
    B3DReverseEngineer(service, max_queries=1032, **settings).fit(X, y)
    assert 0 < sum(service.sent) <= 1032


def test_a_search_packed_midway_goes_on_with_the_same_bits():
    whole, first = open_search(target=2), open_search(target=2)
    late = open_search(target=2, seed=7)
    while not whole.done:
        whole.step()
    assert whole.numbers["best_norm"] is not None
    for _ in range(whole.numbers["step"] // 2):
        first.step()
    late.unpack(*first.pack())
    while not late.done:
        late.step()
    assert late.numbers == whole.numbers
    for name, value in whole.tensors.items():
        assert torch.equal(value, late.tensors[name]), name
    assert late.results()[0].trigger == whole.results()[0].trigger


def test_a_fit_that_was_killed_resumes_with_the_same_bits(tmp_path, monkeypatch):
    X, y = block_images()
    victim, settings = VictimNetwork(Blocks()), {"n_samples": 5, "max_queries": 5000}
    whole = B3DReverseEngineer(victim, **settings).fit(X, y)
    monkeypatch.setattr("sklearn_backdoor.reverse._checkpoint._SECONDS", 0)
    engineer = B3DReverseEngineer(victim, checkpoint_dir=tmp_path, **settings)
    step, n_steps = B3DSearch.step, [0]

    def killed(search):
        n_steps[0] += 1
        if n_steps[0] == 20:
            raise KeyboardInterrupt
        step(search)

    monkeypatch.setattr(B3DSearch, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        engineer.fit(X, y)
    monkeypatch.setattr(B3DSearch, "step", step)
    engineer.fit(X, y)
    assert engineer.triggers_ == whole.triggers_
    assert engineer.n_queries_ == whole.n_queries_


# --- bad input


class NaNs(Service):
    def predict_proba(self, X):
        probabilities = super().predict_proba(X)
        probabilities[X[:, 0, 6, 6] > 0.1] = np.nan
        return probabilities


def test_nan_answers_are_no_hits_and_leave_everything_finite():
    engineer = B3DReverseEngineer(NaNs(), n_samples=10, max_queries=20_000)
    engineer.fit(*block_images())
    assert np.isfinite(engineer.norms_).all()
    for label, trigger in enumerate(engineer.triggers_):
        if engineer.converged_[label]:
            assert trigger.mask[6, 6] * trigger.pattern[0, 6, 6] <= 0.1


def test_victims_that_cannot_answer_are_named():
    X, y = block_images()
    with pytest.raises(TypeError, match="LinearNetwork and no predict_proba"):
        B3DReverseEngineer(LinearNetwork()).fit(X, y)
    with pytest.raises(NotFittedError):
        B3DReverseEngineer(LogisticRegression()).fit(X, y)
    with pytest.raises(ValueError, match=r"shape \(48, 6\), expected \(48, 7\)"):
        BlackBox(Service(classes=range(7))).predict(X)
    with pytest.raises(ValueError, match="answers class 0 for all"):
        B3DReverseEngineer(Service(lambda images: torch.zeros(len(images), 6))).fit(
            X, y
        )


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"success_rate": 1.5}, ValueError, "success_rate=1.5"),
        ({"n_samples": 1}, ValueError, "n_samples=1"),
        ({"batch_size": 2.5}, TypeError, "batch_size=2.5"),
        ({"max_queries": 0}, ValueError, "max_queries=0"),
    ],
)
def test_bad_settings_are_named(options, error, message):
    service = Service()
    with pytest.raises(error, match=message):
        B3DReverseEngineer(service, **options).fit(*block_images())
    assert service.sent == []
