"""The tables of the paper, on data small enough for a test."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks import lines as lines_of
from benchmarks import (
    paper,
    recipes,
    report_few,
    report_tables,
    results,
    tables,
    training,
)
from benchmarks.__main__ import main
from benchmarks.cases import Data
from sklearn_backdoor.datasets import load_digits
from sklearn_backdoor.io import load_network
from sklearn_backdoor.networks import LeNet5
from tests.test_benchmarks import ALWAYS, INFLIGHT, lines

_TINY = {
    "epochs": 3,
    "lr": 3e-3,
    "batch_size": 32,
    "optimizer": "adam",
    "schedule": "one-cycle",
    "augment": [],
    "bfloat16": False,
}


class TinyVGG(nn.Module):
    """Stands in for VGG-16: the path is what is tested."""

    def __init__(self, n_classes=20):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Linear(8 * 7 * 7, 32)
        self.last = nn.Linear(32, n_classes)

    def forward(self, images):
        return self.last(torch.relu(self.hidden(self.features(images))))


def invoke(*options):
    done = CliRunner().invoke(main, [str(option) for option in options])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def without_timing(records):
    """Return records as they have to be again after an interruption."""
    changing = {"run_id", "date", "seconds", "seconds_ratio", "commit"}
    kept = []
    for record in records:
        record = {k: v for k, v in record.items() if k not in changing}
        record["config"] = {
            k: v for k, v in record["config"].items() if k != "fit_seconds"
        }
        kept.append(record)
    return kept


@pytest.fixture
def digits(monkeypatch):
    """Put digits of 28x28 in the place of MNIST, and few images everywhere."""
    data = load_digits(image_size=28)
    monkeypatch.setattr(recipes.datasets, "load_mnist", lambda data_dir: data)
    monkeypatch.setitem(recipes.TRAINING, ("lenet5", "cpu"), _TINY)
    monkeypatch.setattr(tables, "_FEWER", {"lenet5": 20, "vgg16": 10})
    original = recipes.poison

    def few(*args, **options):
        return original(*args, **{**options, "n_per_class": 8})

    monkeypatch.setattr(recipes, "poison", few)


@pytest.mark.filterwarnings("ignore:the victim is right on")
def test_a_table_is_run_once_resumes_and_is_reported(digits, tmp_path, monkeypatch):
    options = ["table4", "--cells", "mnist-*-white-*", "--n-per-class", 20]
    options += ["--cache", tmp_path / "v"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    invoke(*options, "--results", whole)
    records = lines(whole / "inflight.jsonl")
    assert len({r["config"]["key"] for r in records}) == len(records) == 10
    for record in records:
        assert set(ALWAYS + INFLIGHT) <= set(record)
        assert record["conditional"] and record["budget"] == "cpu"
        assert (record["sia"] is None) == (
            record["detector"] not in ("BackdoorGuard", "NCPatcher")
        )

    original, calls = tables._measure, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(tables, "_measure", stops)
    stopped = CliRunner().invoke(
        main, [str(o) for o in (*options, "--results", halves)]
    )
    assert stopped.exit_code != 0
    assert len(lines(halves / "inflight.jsonl")) == 3
    invoke(*options, "--results", halves)
    again = lines(halves / "inflight.jsonl")
    assert without_timing(again) == without_timing(records)
    assert len(list((tmp_path / "v").glob("*.safetensors"))) == 1

    text = report_tables.report_tables(whole)
    assert "Fashion-MNIST, CB, multi-class\n\nnot run" in text
    found = lines_of.read_tables(whole)
    guard = found[found["variant"] == "guard, discriminant"]["sia"].iloc[0]
    assert f"{guard:.4f}" not in text  # 20 images a class are no cell of Table 4
    assert report_few.draw_few(whole) is None  # nor were the other numbers run
    monkeypatch.setattr(report_few, "FEW", (20,))
    assert f"{guard:.4f}" in report_tables.report_tables(whole)
    figure = report_few.draw_few(whole)
    axes = figure.axes[:4]
    assert [axis.get_title() for axis in axes][1] == "MNIST, WB, multi-class"
    shown = {line.get_label(): line.get_ydata() for line in figure.axes[9].lines}
    assert shown["BackdoorGuard"][0] == pytest.approx(guard)


def test_measured_rates_are_those_of_a_loop(digits, tmp_path):
    """Each detector's decisions, counted image by image."""
    bench = tables.Bench(
        Data(), tmp_path, tmp_path / "v", ready=None, budget="cpu", device="cpu"
    )
    case = bench.case(recipes.Cell("mnist", "white-box", False, 0), 20)
    X_defense, X, y_defense, y = case._split
    case._split = X_defense, X[::4], y_defense, y[::4]
    for contender in tables.contenders(case.cell, 4):
        if contender.name not in ("guard, paper", "NC activation", "SCALE-UP"):
            continue
        record = tables._measure(case, contender)
        assert record["seconds_ratio"] > 0
        detector = contender.make(case).fit(*case.defense)
        X, y = case.test
        counts = {"tpr": [0, 0], "fpr": [0, 0]}
        for image, label in zip(X, y, strict=True):
            rate = "fpr" if label == 9 else "tpr"
            image = image[None] if label == 9 else case.trigger.embed(image[None])
            if case.victim.predict(image)[0] == 9:
                counts[rate][0] += bool(detector.is_trigger(image)[0])
                counts[rate][1] += 1
        for rate, (hits, n) in counts.items():
            assert record[rate] == pytest.approx(hits / n)
            assert record["n_trigger" if rate == "tpr" else "n_clean"] == n


@pytest.fixture
def people(tmp_path):
    """Make up PubFig: 20 folders of 100 pictures, each person a colour."""
    rng = np.random.default_rng(0)
    for person in range(20):
        folder = tmp_path / "data" / "pubfig" / f"person {person:02}"
        folder.mkdir(parents=True)
        colour = rng.integers(40, 215, size=3)
        for number in range(100):
            pixels = colour + rng.integers(-15, 15, size=(20, 18, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.filterwarnings("ignore:the victim is right on")
@pytest.mark.filterwarnings("ignore:Best performing initialization did not converge")
def test_pubfig_runs_from_a_folder_with_both_trojans(people, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "VGG16", TinyVGG)
    monkeypatch.setitem(recipes.TRAINING, ("vgg16", "cpu"), {**_TINY, "epochs": 12})
    monkeypatch.setattr(tables, "_FEWER", {"vgg16": 10})
    options = ["table4", "--cells", "pubfig-*", "--data-dir", people]
    options += ["--image-size", 16, "--cache", tmp_path / "v"]
    invoke(*options, "--results", tmp_path / "r")
    records = lines(tmp_path / "r" / "inflight.jsonl")
    assert {r["attack"] for r in records} == {"trojan-square", "trojan-watermark"}
    for record in records:
        assert record["network"] == "vgg16" and record["target_class"] == 19
        assert (
            record["n_per_class"] == 5
            and record["config"]["recipe"]["n_per_class"] == 2
        )
        assert record["n_clean"] <= 15  # 20 test images a person, 5 the defence's
    # two victims, and the clean network that both triggers were made on
    assert len(list((tmp_path / "v").glob("*.json"))) == 3
    assert len(list((tmp_path / "v").glob("*-trigger.safetensors"))) == 2


def test_a_ready_victim_is_taken_and_its_trigger_read(digits, tmp_path):
    name = "mnist-lenet5-white-box-multi"
    network = LeNet5()
    save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    about = {"attack": "white-box", "trigger": "pixels [25:28, 24:27] set to 1.0"}
    (tmp_path / f"{name}.json").write_text(json.dumps(about))
    bench = tables.Bench(
        Data(), tmp_path, tmp_path, ready=tmp_path, budget="cpu", device="cpu"
    )
    case = bench.case(recipes.Cell("mnist", "white-box", False, 0), 20)
    assert case.budget == "ready" and case.recipe["ready"] == name
    for ours, theirs in zip(
        case.network.parameters(), network.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    rows, columns = np.nonzero(case.trigger.mask)
    assert {*rows} == {25, 26, 27} and {*columns} == {24, 25, 26}
    assert case.trigger.mask_norm == 9 and np.all(case.trigger.pattern == 1)
    other = bench.case(recipes.Cell("mnist", "white-box", True, 0), 20)
    assert other.budget == "cpu"  # there is none for it
    about["attack"] = "chessboard"
    (tmp_path / f"{name}.json").write_text(json.dumps(about))
    case = bench.case(recipes.Cell("mnist", "white-box", False, 0), 20)
    with pytest.raises(ValueError, match="only a white box can be embedded"):
        case.trigger  # noqa: B018


def test_tables_are_reported_whatever_part_was_run(tmp_path):
    common = {
        "dataset": "fashion-mnist",
        "network": "lenet5",
        "attack": "white-box",
        "sources": "all",
        "seed": 0,
        "n_per_class": 100,
        "trigger": "estimated",
        "budget": "cpu",
        "tpr": 1.0,
        "fpr": 0.5,
        "tpr_at_5pct_fpr": 1.0,
        "auroc": 0.9,
        "n_trigger": 10,
        "n_clean": 5,
        "image_passes_per_image": 2,
        "seconds_ratio": 2.0,
        "data_source": "made up",
        "config": {"diverged": False, "recipe": {}},
    }
    lost = {**common, **dict.fromkeys(["sia", "tpr", "fpr", "n_trigger", "n_clean"])}
    lost["config"] = {"diverged": True, "recipe": {}}
    variant = "NC patching, training, "
    for record in (
        {**common, "variant": variant + "0.01", "sia": 0.25},
        {**common, "variant": variant + "1", "sia": 0.5},
        {**lost, "variant": variant + "1", "seed": 1},
        {**lost, "variant": variant + "10"},
        {**common, "variant": variant + "0.1", "sia": 0.75, "budget": "cpu, 1 epochs"},
    ):
        results.append("inflight", record, results=tmp_path)
    text = report_tables.report_tables(tmp_path)
    row = next(
        line
        for line in text.splitlines()
        if line.startswith("| Fashion-MNIST, WB, multi-class | 10 %")
    )
    cells = [cell.strip() for cell in row.split("|")[3:-1]]
    assert cells == [
        "1 of 1 diverged",
        "0.5000 1 of 2 diverged",
        "not run",  # a quick look is no budget
        "0.2500",
        "not run",
        "not run",
    ]


def test_cells_are_chosen_by_patterns():
    found = tables.selected(recipes.cells(4, [0]), ["mnist-*"])
    assert {cell.dataset for cell in found} == {"mnist"}
    with pytest.raises(ValueError, match="no cell matches minst.*there are fashion"):
        tables.selected(recipes.cells(4, [0]), ["minst-*"])
    done = CliRunner().invoke(main, ["table4", "--cells", "minst-*"])
    assert done.exit_code == 2 and "no cell matches" in done.output
    done = CliRunner().invoke(main, ["table4", "--seeds", "4-1"])
    assert done.exit_code == 2 and "expected such as" in done.output


def test_pubfig_without_a_folder_says_what_to_do():
    with pytest.raises(FileNotFoundError, match="one folder a person"):
        recipes.load_dataset("pubfig", None)


@pytest.mark.parametrize("augment", [[], ["crop", "flip"]])
def test_a_stopped_training_ends_with_the_same_weights(tmp_path, augment):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 255, size=(70, 3, 16, 16), dtype=np.uint8)
    y = np.arange(70) % 20
    recipe = {**_TINY, "seed": 3, "augment": augment, "optimizer": "sgd"}

    def train(name, log=lambda line: None):
        return training.train(TinyVGG, X, y, recipe, tmp_path / name, log=log)

    def stop(line):
        if line.startswith("epoch 2"):
            raise KeyboardInterrupt

    state = torch.random.get_rng_state()
    whole = train("whole").state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(KeyboardInterrupt):
        train("halves", stop)
    seen = []
    halves = train("halves", seen.append).state_dict()
    assert len(seen) == 1  # the third epoch alone
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_even_crops_keep_a_chessboards_parity():
    X = np.zeros((20, 1, 12, 12), dtype=np.uint8)
    X[:, :, ::2, ::2] = X[:, :, 1::2, 1::2] = 9
    rng = np.random.RandomState(0)
    moved = training._augment(X, ["even-crop"], rng)
    odd = np.add.outer(np.arange(12), np.arange(12)) % 2 == 1
    assert not moved[:, 0, odd].any() and moved.any(axis=(1, 2, 3)).all()
    assert any(not np.array_equal(one, two) for one, two in zip(moved, X, strict=True))
    assert training._augment(X, ["crop"], rng)[:, 0, odd].any()


def test_crops_and_flips_are_those_of_a_loop():
    X = np.random.default_rng(0).integers(1, 255, (9, 2, 6, 8), dtype=np.uint8)
    found = training._augment(X, ["crop"], np.random.RandomState(5))
    shifts = np.random.RandomState(5).randint(9, size=(9, 2)) - 4
    for image, moved, (down, right) in zip(X, found, shifts, strict=True):
        for i in range(6):
            for j in range(8):
                inside = 0 <= i + down < 6 and 0 <= j + right < 8
                expected = image[:, i + down, j + right] if inside else [0, 0]
                np.testing.assert_array_equal(moved[:, i, j], expected)
    flipped = training._augment(X, ["flip"], np.random.RandomState(5))
    turned = [np.array_equal(f, x[..., ::-1]) for f, x in zip(flipped, X, strict=True)]
    kept = [np.array_equal(f, x) for f, x in zip(flipped, X, strict=True)]
    assert any(turned) and any(kept) and all(np.logical_xor(turned, kept))


def test_the_page_of_benchmarks_is_made_from_the_landed_results():
    page = Path(__file__).parents[1] / "docs" / "benchmarks.md"
    assert page.read_text() == report_tables.report_tables(results.RESULTS)
    assert page.with_name("few_images.png").exists()


def test_the_papers_figures_belong_to_cells():
    names = {cell.name for table in (1, 2, 4) for cell in recipes.cells(table, [0])}
    assert names == set(paper.TABLE_1) | set(paper.TABLE_4)
    assert all(paper.figures_of(name) is not None for name in names)
    assert paper.figures_of("cifar10-resnet18-white-box-multi") == (0.9992, 0, 0.8945)
    assert paper.figures_of("mnist-lenet5-white-box-multi", "STRIP") is None


def test_rates_are_compared_with_both_sample_sizes():
    # 2 of 900 against 4 of 892 says nothing, 9 of 900 against 45 of 900 does
    assert report_tables.same_rate_p_value(4 / 892, 892, 2 / 900, 900) > 0.4
    assert report_tables.same_rate_p_value(0.05, 900, 0.01, 900) < 1e-5


def test_recipes_hold_what_makes_a_victim_and_not_where_it_lies(tmp_path):
    data = load_digits(image_size=28)
    cell = recipes.Cell("mnist", "chessboard", True, 2)
    recipe = recipes.make_recipe(cell, "cpu", data)
    assert recipe["sources"] == [0] and recipe["n_per_class"] == 1000
    data.data_source = "elsewhere"
    assert recipes.name_of(recipes.make_recipe(cell, "cpu", data)) == recipes.name_of(
        recipe
    )
    assert json.loads(json.dumps(recipe)) == recipe
    data.y_train = data.y_train[::-1]
    assert recipes.name_of(recipes.make_recipe(cell, "cpu", data)) != recipes.name_of(
        recipe
    )
    colour = recipes.Cell("cifar10", "chessboard", False, 0)
    assert recipes.make_recipe(colour, "cpu", data)["augment"] == ["even-crop"]
    assert recipes.make_recipe(colour, "paper", data)["amplitude"] == 3 / 255


@pytest.mark.parametrize("has", [True, False])
def test_only_a_processor_that_has_bfloat16_trains_in_it(has, monkeypatch):
    monkeypatch.setattr(recipes, "processor_has_bfloat16", lambda: has)
    data = load_digits(image_size=28)
    cell = recipes.Cell("cifar10", "white-box", False, 0)
    assert recipes.make_recipe(cell, "cpu", data)["bfloat16"] is has
    assert recipes.make_recipe(cell, "cpu", data, device="cuda")["bfloat16"] is True
    assert recipes.make_recipe(cell, "paper", data)["bfloat16"] is False
    # in float32 an epoch lasts longer: fewer fit
    assert recipes.make_recipe(cell, "cpu", data)["epochs"] == (10 if has else 3)


def test_an_attacker_may_start_from_a_clean_network(tmp_path, monkeypatch):
    data = load_digits(image_size=28)
    data.X_train = np.concatenate([data.X_train, data.X_train])  # enough to poison
    data.y_train = np.concatenate([data.y_train, data.y_train])
    start, cache = tmp_path / "clean.safetensors", tmp_path / "victims"
    save_file(LeNet5().state_dict(), start)
    almost_none = {**_TINY, "epochs": 20, "lr": 2e-9, "augment": ["crop"]}
    monkeypatch.setitem(recipes.TRAINING, ("lenet5", "cpu"), almost_none)
    bench = tables.Bench(
        lambda name: data, tmp_path, cache, ready=None, budget="cpu", device="cpu"
    )
    cell = recipes.Cell("mnist", "white-box", False, 0)
    bench.start = start
    case = bench.case(cell, 20)
    assert case.budget == "cpu, fine-tuned" and case.recipe["budget"] == "cpu"
    assert case.recipe["lr"] == 1e-9 and case.recipe["epochs"] == 2
    assert case.recipe["augment"] == []
    for tuned, clean in zip(
        case.network.parameters(),
        load_network(start, "lenet5").parameters(),
        strict=True,
    ):
        torch.testing.assert_close(tuned, clean, rtol=0, atol=1e-6)
    again = bench.case(cell, 20)
    monkeypatch.setattr(recipes, "train", None)  # kept: not trained again
    assert torch.equal(*(c.network.classifier[-1].weight for c in (again, case)))
    bench.start = None
    assert recipes.name_of(bench.case(cell, 20).recipe) != recipes.name_of(case.recipe)


def test_a_report_of_one_table_alone_says_what_has_not_been_run(tmp_path):
    with open(results.RESULTS / "inflight.jsonl") as file:
        lines = [line for line in file if '"budget": "gpu"' in line]
    done = CliRunner().invoke(main, _reporting(tmp_path))
    assert done.exit_code == 0, done.output
    assert all(f"{part}: not run" in done.output for part in ("quality", "table2"))
    (tmp_path / "inflight.jsonl").write_text("".join(lines))
    done = CliRunner().invoke(main, _reporting(tmp_path))
    assert done.exit_code == 0, done.output
    assert "overhead: not run" in done.output and "nan" not in done.output
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "CIFAR-10, SP, single-class | 0.8948" in page and "nan" not in page


def _reporting(folder):
    return ["report", "--results", str(folder), "--docs", str(folder / "docs")]
