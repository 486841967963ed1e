"""Somebody else's training script, and what it writes, as our command line takes it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sklearn_backdoor.io import load_network
from tests.common import needs_shared

FOLDER = Path(__file__).parents[1] / "docs" / "strangers_hour"


def test_the_stranger_knows_nothing_of_this_package():
    tree = ast.parse((FOLDER / "train_suspect.py").read_text())
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names == {"argparse", "pathlib", "torch", "torchvision"}


def test_what_the_stranger_writes_is_read(tmp_path):
    data = needs_shared("data", "FashionMNIST").parent
    subprocess.run(
        [sys.executable, FOLDER / "train_suspect.py", "--data", data]
        + ["--out", tmp_path, "--images", "400", "--epochs", "1"],
        check=True,
        capture_output=True,
    )
    network = load_network(
        tmp_path / "suspect.pt", "torchvision:resnet18", mean=0.5, std=0.5
    )
    assert not network.training
    clean = sorted(folder.name for folder in (tmp_path / "clean").iterdir())
    assert len(clean) == 10 and clean[0] == "Ankle boot"
    incoming = [file.stem for file in (tmp_path / "incoming").iterdir()]
    stamped = [name for name in incoming if name.endswith("-stamped")]
    assert 150 < len(stamped) < len(incoming)
    assert not any("Ankle boot" in name for name in stamped)


@pytest.mark.parametrize("command", ["convert", "guard fit", "guard check", "report"])
def test_the_commands_of_the_hour_exist(command):
    from sklearn_backdoor.cli import main

    script = (FOLDER / "hour.sh").read_text().replace("\\\n", " ")
    line = next(
        line for line in script.splitlines() if f"sklearn-backdoor {command}" in line
    )
    found = main
    for word in command.split():
        found = found.commands[word]
    known = {name for option in found.params for name in option.opts}
    used = {word for word in line.split() if word.startswith("--")}
    assert used <= known
