import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import quality, report, report_scan, results, scan, victims
from benchmarks.__main__ import main
from benchmarks.overhead import medians
from benchmarks.report_cost import compare_schedules
from sklearn_backdoor.datasets import load_digits

ALWAYS = "run_id commit seed config versions machine data_source date seconds".split()
INFLIGHT = (
    "dataset network attack sources target_class detector pipeline n_per_class trigger "
    "budget acc asr asr_estimated tpr fpr sia auroc tpr_at_1pct_fpr n_trigger n_clean "
    "conditional image_passes_per_image"
).split()
SCAN = (
    "dataset network attack sources target_class asr method schedule flagged found "
    "asr_estimated image_passes"
).split()
OVERHEAD = "what network batch_size ratio".split()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_landed_results_follow_the_schema():
    ids = []
    for name, fields in (
        ("inflight", INFLIGHT),
        ("overhead", OVERHEAD),
        ("scan", SCAN),
    ):
        records = lines(results.RESULTS / f"{name}.jsonl")
        assert records
        for record in records:
            assert set(ALWAYS + fields) <= set(record)
        ids += [record["run_id"] for record in records]
    assert len(set(ids)) == len(ids)


def test_a_line_cut_by_a_crash_costs_no_other(tmp_path):
    for number in range(2):
        results.append("scan", {"number": number}, results=tmp_path)
    path = tmp_path / "scan.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    results.append("scan", {"number": 2}, results=tmp_path)
    found = [record["number"] for record in results.read("scan", results=tmp_path)]
    assert found == [0, 2]


def test_the_readmes_figures_are_those_of_the_results():
    text = Path(__file__).parents[1].joinpath("README.md").read_text()
    assert report.report(results.RESULTS) in text


@pytest.fixture
def small(monkeypatch):
    """Put digits of 28x28 in the place of MNIST, and few images a class."""
    data = load_digits(image_size=28)
    monkeypatch.setitem(victims.LOADERS, "mnist", lambda data_dir: data)
    monkeypatch.setattr(quality, "N_PER_CLASS", 20)
    original = victims.poison

    def few(*args, **options):
        return original(*args, **{**options, "n_per_class": 10})

    monkeypatch.setattr(victims, "poison", few)


def test_quality_trains_once_measures_and_appends(small, tmp_path):
    options = ["quality", "--dataset", "mnist", "--seeds", "1"]
    options += ["--victims", tmp_path / "v", "--results", tmp_path / "r"]
    done = CliRunner().invoke(main, [str(option) for option in options])
    assert done.exit_code == 0, done.output
    records = lines(tmp_path / "r" / "inflight.jsonl")
    assert len(records) == 8  # two pipelines, two triggers, conditional and not
    for record in records:
        assert set(ALWAYS + INFLIGHT) <= set(record)
        assert 0 <= record["fpr"] <= 1
    cells = {(r["pipeline"], r["trigger"], r["conditional"]) for r in records}
    assert len(cells) == 8
    (weights,) = (tmp_path / "v").glob("*.safetensors")
    data = victims.LOADERS["mnist"](None)
    before = weights.stat().st_mtime_ns
    network, *_ = victims.white_box_lenet5(
        "mnist", data, seed=0, victims=tmp_path / "v"
    )
    assert weights.stat().st_mtime_ns == before  # loaded, not trained again
    recipe = json.loads(weights.with_suffix(".json").read_text())
    assert recipe["seed"] == 0 and not network.training


def test_settings_are_ranked_beside_the_start(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        quality,
        "GRID",
        {"covariance_type": ["diag"], "n_components": [1, 2], "reg_covar": [1.0]},
    )
    monkeypatch.setattr(quality, "N_FOLDS", 2)
    options = ["settings", "--dataset", "mnist", "--seeds", "1"]
    done = CliRunner().invoke(main, [*options, "--victims", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()]
    start = next(row for row in rows if row[-5:-3] == ["2", "1.0"])
    assert [float(text) for text in start[-2:]] == [0, 0]  # difference from itself


def test_medians_take_functions_in_turn_and_leave_out_the_first_round():
    calls = []
    found = medians(lambda: calls.append("a"), lambda: calls.append("b"), n_repeats=3)
    assert "".join(calls) == "ab" * 4
    assert len(found) == 2 and np.all(np.array(found) >= 0)


@pytest.mark.filterwarnings("ignore:the victim is right on")
def test_scans_are_appended_once_and_make_a_table(monkeypatch, tmp_path):
    recipes = [
        {**victims.population(1)[number], "epochs": 1, "dataset": "digits"}
        for number in (0, 8)
    ]
    recipes = [{**r, "n_per_class": r["attack"] and 0.1} for r in recipes]
    monkeypatch.setattr(scan, "population", lambda seeds: recipes)
    original = scan.AutoReverseEngineer

    def brief(victim, **options):
        engineer = scan.NCReverseEngineer(victim, max_steps=3)
        searches = [("patch", engineer), ("additive", engineer)]
        return original(victim, engineers=searches, **options)

    monkeypatch.setattr(scan, "AutoReverseEngineer", brief)
    options = ["scan", "--part", "population", "--seeds", "1"]
    options += ["--victims", tmp_path / "v", "--results", tmp_path / "r"]
    for _ in range(2):  # the second time nothing is left to do
        done = CliRunner().invoke(main, [str(option) for option in options])
        assert done.exit_code == 0, done.output
        records = lines(tmp_path / "r" / "scan.jsonl")
        assert [r["attack"] for r in records] == ["white-box", None]
        assert all(set(ALWAYS + SCAN) <= set(record) for record in records)
    text = report_scan.report_scan(tmp_path / "r")
    assert "2 small victims" in text and "false alarms, of 1 clean" in text


def _searched(seed, schedule, target, smallest, **figures):
    """Return a line of a victim in which one class, or none, has a small norm."""
    norms = 10 + 0.5 * np.arange(10)
    if smallest is not None:
        norms[smallest] = 0.5
    return {
        "config": {
            "recipe": {"seed": seed},
            "norms": norms.tolist(),
            "converged": [True] * 10,
        },
        "method": "NCReverseEngineer",
        "schedule": schedule,
        "attack": None if target is None else "white-box",
        "target_class": target,
        "asr": None if target is None else 1.0,
        "flagged": [] if smallest is None else [smallest],
        **{"asr_estimated": None, "seconds": 1.0, **figures},
        "image_passes": {"forward": 10 if schedule == "fast" else 80, "backward": 10},
    }


def _automatic(seed, smallest):
    """Return a line of an automatic search that has the search for patches alone."""
    line = _searched(seed, "fast", None, smallest)
    seen = {name: line["config"][name] for name in ("norms", "converged")}
    line["config"]["methods"] = {"patch": seen}
    return {**line, "method": "AutoReverseEngineer"}


def test_schedules_are_compared_by_verdicts_that_are_right():
    records = [
        _searched(0, "fast", 3, 3, asr_estimated=0.99),
        _searched(0, "exhaustive", 3, 3, asr_estimated=0.96, seconds=4.0),
    ]
    for seed, target, fast, exhaustive in (
        (1, 3, 3, None),  # fast alone is right
        (2, 3, 4, 3),  # the same verdict, but of another class
        (3, None, None, None),
        (4, None, 5, None),  # a false alarm of the fast one
    ):
        records.append(_searched(seed, "fast", target, fast))
        records.append(_searched(seed, "exhaustive", target, exhaustive))
    records.append({**records[0], "config": {**records[0]["config"], "recipe": {}}})
    repeated = [
        _searched(0, "fast", 3, None),
        _searched(0, "exhaustive", 3, 3, asr_estimated=0.95),
        _searched(3, "fast", None, None),
        _searched(3, "exhaustive", None, None),
        _searched(4, "fast", None, 5),  # alone: the exhaustive line is not there
        _automatic(3, 3),
    ]
    scanned = [_automatic(seed, None) for seed in range(5)]
    table = dict(
        line.strip("| ").split(" | ")
        for line in compare_schedules(records, repeated, scanned).split("\n")[2:]
    )
    assert table["victims"] == "5"  # one has no exhaustive line
    assert table["image passes: ratio of sums, largest"] == "0.222, 0.222"
    assert table["seconds: ratio of sums, largest"] == "0.625, 1.000"
    assert table["same verdict, both by p < 0.05"].startswith("3/5 ")
    kept = table["right verdict and target where exhaustive has them"]
    assert kept.startswith("2/4 ")
    gained = next(value for name, value in table.items() if name.startswith("the same"))
    assert gained.startswith("1/1 ")
    gap = table["ASR of triggers on unseen images, fast less exhaustive"]
    assert gap == "0.030, 0.030 to 0.030, within 0.02: 0/1"
    for title, same in (
        ("both with other random numbers", "1/2 "),
        ("fast and itself with others", "2/3 "),
        ("exhaustive and itself with others", "2/2 "),
        ("AutoReverseEngineer with either's norms", "3/5 "),
        ("AutoReverseEngineer with either's, other random numbers", "1/1 "),
        ("AutoReverseEngineer and itself with others", "0/1 "),
    ):
        assert table[f"same verdict, {title}"].startswith(same)
    gap = table["ASR of triggers on unseen images, exhaustive less itself with others"]
    assert gap == "0.010, 0.010 to 0.010, within 0.02: 1/1"
