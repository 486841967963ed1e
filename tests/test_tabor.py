import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sklearn_backdoor import VictimNetwork
from sklearn_backdoor._torch import torch_generator
from sklearn_backdoor.reverse._forms import PatchSearch
from sklearn_backdoor.reverse._search import Problem, Task
from sklearn_backdoor.reverse._tabor import (
    WEIGHTS,
    TABORReverseEngineer,
    TABORSearch,
    elastic_net,
    total_variation,
)
from tests.common import CountingNetwork, LinearNetwork, count_passes, linear_images

NONE = dict.fromkeys(WEIGHTS, 0.0)


def open_search(weights, *, kind=TABORSearch, n_channels=1, **options):
    X, y = linear_images()
    network = LinearNetwork()
    if n_channels > 1:
        X = np.repeat(X, n_channels, axis=1)
    images = torch.from_numpy(X)
    problem = Problem(
        lambda images: network(images.mean(1)), images, torch.from_numpy(y), 6
    )
    tasks = [Task(2), Task(4)]
    generators = [torch_generator(seed) for seed in (0, 1)]
    options = {"steps": 6, "batch_size": 8, "success_rate": 0.75} | options
    if kind is TABORSearch:
        options["weights"] = NONE | weights
    return kind(problem, tasks, generators, **options)


def penalty(search):
    for number in range(2):
        search._draw(number)
    return search._penalty().detach()


# --- the penalties


def test_total_variation_is_that_of_a_double_loop_along_both_axes():
    values = torch.rand((2, 3, 4, 6), generator=torch_generator(0))
    expected = np.zeros(2)
    for n in range(2):
        for c in range(3):
            image = values[n, c].double().numpy()
            for i in range(4):
                for j in range(6):
                    if i + 1 < 4:
                        expected[n] += (image[i + 1, j] - image[i, j]) ** 2 / 3
                    if j + 1 < 6:
                        expected[n] += (image[i, j + 1] - image[i, j]) ** 2 / 3
    np.testing.assert_allclose(total_variation(values).numpy(), expected, rtol=1e-5)


def test_total_variation_of_hand_written_masks():
    spot = [[0, 0, 0], [0, 1, 0], [0, 0, 0]]  # four edges
    row = [[0, 0, 0], [1, 1, 1], [0, 0, 0]]  # six edges, all along the height
    column = [[0, 1, 0], [0, 1, 0], [0, 1, 0]]
    slope = [[0, 0.5, 1], [0, 0.5, 1], [0, 0.5, 1]]  # six edges of a half
    masks = torch.tensor([spot, row, column, slope])[:, None]
    assert total_variation(masks).tolist() == [4, 6, 6, 1.5]


def test_elastic_net_is_the_l1_norm_plus_the_squared_l2_norm():
    values = torch.tensor([[[[0.5, 0.0], [1.0, 0.25]]]])
    assert float(elastic_net(values)) == 1.75 + (0.25 + 1 + 0.0625)
    assert float(elastic_net(values.repeat(1, 3, 1, 1))) == 3.0625  # mean of channels


def test_penalties_of_size_and_smoothness_follow_a_naive_computation():
    search = open_search(
        {
            "mask_size": 2.0,
            "pattern_size": 3.0,
            "mask_smoothness": 5.0,
            "pattern_smoothness": 7.0,
        },
        n_channels=3,
    )
    found = penalty(search).numpy()
    for n in range(2):
        mask = search.tensors["mask"][n].detach().double().numpy()
        outside = (1 - mask) * search.tensors["pattern"][n].detach().double().numpy()
        expected = 2 * (mask.sum() + (mask**2).sum())
        expected += 3 * (outside.sum() + (outside**2).sum()) / 3
        expected += 5 * sum((np.diff(mask, axis=k) ** 2).sum() for k in (1, 2))
        expected += 7 * sum((np.diff(outside, axis=k) ** 2).sum() for k in (1, 2)) / 3
        cost = 1 / 16  # at first
        assert found[n] == pytest.approx(cost * expected, rel=1e-5)


@pytest.mark.parametrize("blocking, overlaying", [(0.5, 0.0), (0.0, 0.5), (0.3, 0.7)])
def test_blocking_asks_for_the_true_label_and_overlaying_for_the_target(
    blocking, overlaying
):
    search = open_search({"blocking": blocking, "overlaying": overlaying})
    found = penalty(search)
    network = LinearNetwork().requires_grad_(False)
    for n, task in enumerate(search.tasks):
        mask = search.tensors["mask"][n].detach()
        pattern = search.tensors["pattern"][n].detach()
        rows = search._drawn[n]
        expected = 0.0
        for row in rows.tolist():
            blocked = search.problem.images[row] * (1 - mask)
            true = search.problem.y[row][None]
            assert int(true) != task.target
            expected += blocking * cross_entropy(network(blocked), true) / len(rows)
        target = torch.tensor([task.target])
        expected += overlaying * cross_entropy(network(mask * pattern), target)
        assert float(found[n]) == pytest.approx(float(expected), rel=1e-4)


def test_gradients_of_all_penalties_are_those_of_differences():
    search = open_search(WEIGHTS)
    for number in range(2):
        search._draw(number)
    mask = search.tensors["mask"]
    (gradient,) = torch.autograd.grad(search._penalty().sum(), [mask])
    for pixel in ((0, 0, 1, 2), (1, 0, 3, 3)):
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                mask[pixel] += step
                values.append(float(search._penalty().sum()))
                mask[pixel] -= step
        difference = (values[0] - values[1]) / 2e-2
        assert float(gradient[pixel]) == pytest.approx(difference, rel=0.02, abs=1e-3)


def test_with_half_the_mask_term_alone_full_pixels_cost_what_they_do_in_nc():
    search = open_search({"mask_size": 0.5})
    plain = open_search({}, kind=PatchSearch)
    for one in (search, plain):
        with torch.no_grad():
            one.tensors["mask"].copy_(torch.eye(4))
    torch.testing.assert_close(penalty(search), plain._penalty().detach())


# --- the search


@pytest.fixture(scope="module")
def fitted():
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork(backdoor=60.0))
    return TABORReverseEngineer(victim).fit(X, y), X, y


def test_the_target_and_its_pixel_are_found(fitted):
    engineer, X, y = fitted
    assert engineer.verdict_ == "backdoored" and engineer.target_class_ == 2
    assert engineer.trigger_.mask.argmax() == 15
    assert engineer.norms_.argmin() == 2 and engineer.p_values_[2] < 0.05
    others = engineer.transform(X[y != 2])
    assert np.mean(engineer.victim_.predict(others) == 2) > 0.75


def test_a_network_without_a_backdoor_is_left_in_peace(images):
    victim = VictimNetwork(LinearNetwork(backdoor=0.0))
    assert TABORReverseEngineer(victim).fit(*images).verdict_ == "nothing found"


def test_overlaying_makes_a_trigger_that_works_on_a_black_image(images):
    victim = VictimNetwork(LinearNetwork())
    weights = NONE | {"mask_size": 0.5, "overlaying": 1.0}
    engineer = TABORReverseEngineer(victim, weights=weights).fit(*images)
    black = np.zeros((1, 1, 4, 4), dtype=np.float32)
    for label, trigger in enumerate(engineer.triggers_):
        assert engineer.victim_.predict(trigger.embed(black))[0] == label


@pytest.mark.parametrize(
    "weights, n_extra", [({}, 9), ({"blocking": 0}, 1), ({"overlaying": 0.0}, 8)]
)
def test_image_passes_are_counted_exactly(tmp_path, images, weights, n_extra):
    log = tmp_path / "passes"
    victim = VictimNetwork(CountingNetwork(log))
    engineer = TABORReverseEngineer(victim, weights=weights, max_steps=5, batch_size=8)
    engineer.set_params(alpha=0.0).fit(*images)  # nothing refined
    opening = 4  # two images twice, to find logits and features
    assert count_passes(log) == engineer.n_image_passes_.forward + opening
    assert engineer.n_image_passes_.backward == 6 * 5 * (8 + n_extra)


@pytest.mark.parametrize("sources", ["learnt", "pairs"])
def test_the_target_is_found_for_other_sources(images, sources):
    victim = VictimNetwork(LinearNetwork(backdoor=60.0))
    engineer = TABORReverseEngineer(victim, sources=sources, max_steps=20)
    assert engineer.fit(*images).norms_.argmin() == 2


def test_a_search_packed_midway_goes_on_with_the_same_bits():
    whole, first, second = (open_search(WEIGHTS) for _ in range(3))
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    second.unpack(*first.pack())
    while not second.done:
        second.step()
    assert second.numbers == whole.numbers
    for name, value in whole.tensors.items():
        assert torch.equal(value, second.tensors[name]), name
    for one, other in zip(whole.results(), second.results(), strict=True):
        assert one.trigger == other.trigger and one.passes == other.passes


def test_nan_of_one_task_leaves_the_other_alone():
    search = open_search(WEIGHTS)
    logits = search.problem.logits

    def breaking(images):
        scores = logits(images)
        n_tasks = len(search.tasks)
        if len(images) == n_tasks * 9:  # blocked images, and the trigger alone
            scores = scores.view(n_tasks, 9, -1).clone()
            scores[1] = torch.nan
            scores = scores.flatten(0, 1)
        return scores

    search.problem = search.problem._replace(logits=breaking)
    before = search.tensors["mask"][1].detach().clone()
    search.step()
    assert search.tensors["nan_step"].tolist() == [-1, 0]
    assert torch.equal(search.tensors["mask"][1], before)
    assert search.tensors["mask"].isfinite().all()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"weights": {"mask": 1.0}}, ValueError, "the key 'mask', expected some of"),
        ({"weights": {"blocking": -1}}, ValueError, r"weights\['blocking'\]=-1"),
        ({"weights": {"blocking": "a"}}, TypeError, r"weights\['blocking'\]='a'"),
        ({"weights": [1, 2]}, TypeError, r"weights=\[1, 2\], expected a dict"),
        ({"alpha": 2}, ValueError, "alpha=2"),
        ({"sources": "some"}, ValueError, "sources='some'"),
        ({"max_steps": 0}, ValueError, "max_steps=0"),
    ],
)
def test_bad_settings_are_named(linear, images, options, error, message):
    with pytest.raises(error, match=message):
        TABORReverseEngineer(VictimNetwork(linear), **options).fit(*images)
