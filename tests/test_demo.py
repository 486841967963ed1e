import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    NCReverseEngineer,
    datasets,
)
from sklearn_backdoor.__main__ import main
from sklearn_backdoor._picture import draw_story
from sklearn_backdoor.demo import ATTACKS, DATASETS, run_demo, screen

FIELDS = (
    "target_class found verdict acc asr asr_estimated tpr fpr sia n_trigger n_clean "
    "seconds"
).split()


def test_the_demo_catches_a_backdoor_within_a_minute(tmp_path):
    out, file = tmp_path / "out", tmp_path / "result.json"
    command = [sys.executable, "-m", "sklearn_backdoor", "demo"]
    done = subprocess.run(
        [*command, "--out", out, "--json", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert set(FIELDS) <= set(figures)
    assert figures["target_class"] == figures["found"] == 9
    assert figures["verdict"] == "backdoored"
    assert figures["acc"] > 0.9 and figures["asr"] > 0.9
    assert figures["tpr"] > 0.95 and figures["fpr"] < 0.1 and figures["sia"] > 0.8
    assert figures["n_trigger"] > 500 and 0 < figures["n_clean"] <= 70
    assert "target class 9 (right)" in done.stdout
    for name in ("ACC", "ASR", "TPR", "FPR", "SIA"):
        assert name in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) < 24 and max(map(len, lines[:-2])) < 100
    assert "[3/4]" in done.stderr and "Traceback" not in done.stderr
    picture = np.asarray(Image.open(out / "digits-white-box.png"))
    assert picture.shape[0] > 1000 and picture.std() > 20


@pytest.fixture
def quick(monkeypatch):
    """Search briefly: these runs are about the way, not about the result."""
    from sklearn_backdoor import demo

    original = demo.AutoReverseEngineer

    def brief(victim, **options):
        engineers = [
            ("patch", NCReverseEngineer(victim, max_steps=4)),
            ("additive", AdditiveReverseEngineer(victim, max_steps=4)),
        ]
        return original(victim, engineers=engineers, **options)

    monkeypatch.setattr(demo, "AutoReverseEngineer", brief)


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_runs_and_can_be_drawn(quick, attack, tmp_path):
    story = run_demo("digits", attack, "all", None, seed=0, epochs=2)
    assert set(FIELDS) <= set(story.figures)
    text = screen(story)
    assert f"VERDICT      {story.figures['verdict']}" in text
    draw_story(story).savefig(tmp_path / "picture.png", dpi=40)
    json.dumps(story.figures)


def test_single_class_attacks_are_judged_on_their_source_alone(quick):
    story = run_demo("digits", "white-box", [3], None, seed=0, epochs=2)
    assert set(story.evaluation["origin"]) == {3, 9}
    assert story.figures["n_poisoned"] == 9  # 10 % of the images of class 3


def test_the_command_line_offers_all_attacks_and_data_sets():
    choices = {option.name: option.type for option in main.commands["demo"].params}
    assert tuple(choices["attack"].choices) == ATTACKS
    assert tuple(choices["dataset"].choices) == tuple(DATASETS)


def test_other_data_sets_come_from_data_dir(quick, tmp_path, monkeypatch):
    digits = datasets.load_digits(image_size=28)
    digits.X_train = np.repeat(digits.X_train, 12, axis=0)
    digits.y_train = np.repeat(digits.y_train, 12)
    digits.X_test = np.repeat(digits.X_test, 2, axis=0)
    digits.y_test = np.repeat(digits.y_test, 2)
    monkeypatch.setattr(datasets, "load_mnist", lambda data_dir: digits)
    story = run_demo("mnist", "white-box", [0], str(tmp_path), seed=0, epochs=1)
    assert story.figures["n_poisoned"] == 1000


@pytest.mark.parametrize(
    "options, message",
    [
        (["--source-classes", "x"], "expected 'all' or labels"),
        (["--source-classes", "9"], "without the target 9"),
        (["--source-classes", "0,12"], "expected labels from 0 to 9"),
        (["--dataset", "imagenet"], "is not one of"),
        (["--data-dir", "/nowhere"], "does not exist"),
    ],
)
def test_bad_options_end_with_status_2_and_no_traceback(options, message):
    done = CliRunner().invoke(main, ["demo", *options])
    assert done.exit_code == 2
    assert message in done.output and "Traceback" not in done.output


def test_a_broken_data_set_ends_with_status_2(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    options = ["demo", "--dataset", "mnist", "--data-dir", str(tmp_path)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 2 and "give data_dir" in done.output


def test_an_empty_data_dir_ends_with_status_2(tmp_path):
    options = ["demo", "--dataset", "mnist", "--data-dir", str(tmp_path)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 2 and "holds neither MNIST/raw" in done.output
