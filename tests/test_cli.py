import json
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sklearn_backdoor import NCReverseEngineer
from sklearn_backdoor.__main__ import main
from sklearn_backdoor.cli._outcome import Command, Group, refusing
from tests.cli_common import one_line, run, suspect, write_ground

COMMANDS = ["scan", "guard fit", "guard check", "report", "convert", "info", "demo"]


def failing(error):
    """Return a command line whose command raises."""

    @click.group(cls=Group)
    def top():
        pass

    @top.command()
    def fail():
        raise error

    return lambda *options: CliRunner().invoke(top, ["fail", *options])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = run(*command.split(), "--help")
    assert done.exit_code == 0
    assert "Example" in done.stdout and f"sklearn_backdoor {command}" in done.stdout
    assert "--debug" in done.stdout
    assert "status 0 whatever" in done.stdout or "Exit status" in done.stdout


def test_the_names_of_the_commands():
    assert list(main.commands) == ["scan", "guard", "report", "convert", "info", "demo"]
    assert list(main.commands["guard"].commands) == ["fit", "check"]
    assert run().exit_code == run("guard").exit_code == 2
    assert "Usage" in run().stderr


@pytest.mark.parametrize(
    "error, status, words",
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (MemoryError(), 3, "out of memory"),
        (RuntimeError("CUDA out of memory: tried"), 3, "out of memory"),
        (RuntimeError("can't allocate memory: 9 bytes"), 3, "out of memory"),
        (ZeroDivisionError("a\nb\x1b[31m"), 3, r"ZeroDivisionError: a b\x1b[31m"),
        (ValueError("unforeseen"), 3, "Internal error: ValueError: unforeseen"),
        (SystemExit(0), 3, "SystemExit: 0"),
        (SystemExit(1), 3, "SystemExit: 1"),
        (click.ClickException("wrong"), 2, "Error: wrong"),
        (click.UsageError("wrong"), 2, "Error: wrong"),
        (click.Abort(), 130, "Interrupted."),
        (RecursionError("too deep"), 3, "Internal error"),
    ],
)
def test_whatever_goes_wrong_ends_with_one_line_and_never_with_status_1(
    error, status, words
):
    run_it = failing(error)
    assert words in one_line(run_it(), status)
    done = run_it("--debug")
    assert done.exit_code == status and "Traceback" in done.stderr
    assert "\x1b" not in done.output


def test_bad_input_is_told_from_a_fault_of_ours():
    for kind in (ValueError, TypeError, OSError, ImportError):
        with pytest.raises(click.ClickException, match="bad") as caught, refusing():
            raise kind("bad")
        assert caught.value.exit_code == 2
    with pytest.raises(KeyError), refusing():
        raise KeyError("ours")


def test_warnings_are_lines_without_source(monkeypatch):
    @click.group(cls=Group)
    def top():
        pass

    @top.command(cls=Command)
    def warn():
        warnings.simplefilter("always")
        warnings.warn("take\ncare \x1b[31m", UserWarning, stacklevel=1)

    done = CliRunner().invoke(top, ["warn"])
    assert done.exit_code == 0
    assert done.stderr == "Warning: take care \\x1b[31m\n"


@pytest.mark.parametrize(
    "line, words",
    [
        (["scna"], "Did you mean 'scan'"),
        (["scan", "--imagse", "x"], "'--images'"),
        (["guard", "chekc"], "'check'"),
        (["scan", "--method", "magic"], "is not one of"),
    ],
)
def test_a_typing_error_is_answered_with_what_was_meant(line, words):
    message = one_line(run(*line))
    assert words in message and "--help'" in message


def test_info_shows_versions_devices_extras_and_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache/sklearn_backdoor/MNIST/raw").mkdir(parents=True)
    done = run("info", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["devices"]["cpu_threads"] == torch.get_num_threads()
    assert found["devices"]["cuda"] is torch.cuda.is_available()
    assert set(found["extras"]) == {"timm", "onnx", "onnxruntime", "onnxscript"}
    assert found["data"]["mnist"] is True and found["data"]["cifar10"] is False
    text = run("info").stdout
    assert "torch" in text and "mnist             yes" in text


def test_info_names_an_extra_that_is_missing(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "timm              not installed" in run("info").stdout


def test_a_state_dict_becomes_a_safetensors_file(tmp_path):
    source, out = tmp_path / "suspect.pt", tmp_path / "suspect.safetensors"
    state = suspect().state_dict()
    torch.save(state, source)
    done = run("convert", source, out)
    assert done.exit_code == 0, done.output
    assert "2 tensors, 352 numbers" in done.stdout and "SHA-256" in done.stdout
    found = load_file(out)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert "already" in one_line(run("convert", out, tmp_path / "b.safetensors"))
    assert "end in .safetensors" in one_line(run("convert", source, tmp_path / "b"))
    assert sorted(os.listdir(tmp_path)) == ["suspect.pt", "suspect.safetensors"]


def test_outputs_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "suspects", raising=False)
    monkeypatch.setattr(NCReverseEngineer, "fit", lambda *_: 1 / 0)
    write_ground(tmp_path)
    scan = ["scan", "--architecture", "suspects:make", "--images", "clean"]
    scan += ["--weights", "suspect.safetensors", "--channels", "1"]
    before = sorted(map(str, Path().rglob("*")))
    for options, words in [
        (["--json", "a/b.json", "--report", "a/b.json"], "named for two outputs"),
        (["--json", "suspects.py/b.json"], "suspects.py is no folder"),
        (["--out", "suspects.py"], "--out"),
        (["--report", "clean"], "is a directory"),
        (["--checkpoint-dir", "suspects.py/search"], "suspects.py is no folder"),
    ]:
        assert words in one_line(run(*scan, *options))
    assert sorted(map(str, Path().rglob("*"))) == before


def test_a_network_of_ours_is_named_with_its_normalisation(tmp_path, monkeypatch):
    from sklearn_backdoor.networks import LeNet5

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file(LeNet5(10, (1, 16, 16)).state_dict(), "lenet.safetensors")
    seen = []

    def fit(self, X, y):
        seen.append(self.victim.network_)
        raise ValueError("enough")

    monkeypatch.setattr(NCReverseEngineer, "fit", fit)
    scan = ["scan", "--architecture", "lenet5", "--weights", "lenet.safetensors"]
    scan += ["--dataset", "digits", "--method", "patch"]
    assert "enough" in one_line(run(*scan, "--mean", "0.25", "--std", "0.125"))
    assert seen[0].mean.item() == 0.25 and seen[0].std.item() == 0.125
    for options, words in [
        (["--std", "0"], "std"),
        (["--mean", "a"], "expected numbers"),
        (["--mean", "nan"], "expected numbers"),
        (["--n-classes", "7"], "does not belong to this network"),
        (["--architecture", "lenet6"], "Did you mean"),
        (["--architecture", "torchvision:resnet19"], "Did you mean"),
    ]:
        assert words in one_line(run(*scan, *options))
    assert not Path("scan").exists()


def test_help_needs_nothing_heavy_but_the_package():
    code = (
        "import sys\n"
        "from sklearn_backdoor.cli import main\n"
        "try:\n"
        "    main(['scan', '--help'])\n"
        "except SystemExit:\n"
        "    heavy = ('torchvision', 'matplotlib', 'jinja2', 'timm', 'onnx')\n"
        "    print([m for m in heavy if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_closed_pipe_ends_help_without_a_word(monkeypatch):
    import errno

    def echo(*args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(click.core, "echo", echo)
    monkeypatch.setattr(click.decorators, "echo", echo)
    with pytest.raises(SystemExit) as caught:
        main(["scan", "--help"])
    assert caught.value.code == 0
