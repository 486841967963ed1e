"""Generated command lines and files that are wrong: one line, status 2, no leavings."""

import json
import os
import shutil
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sklearn_backdoor import demo as demonstration
from sklearn_backdoor.reverse._base import BaseReverseEngineer
from tests.cli_common import one_line, run, suspect, write_ground

QUIET = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
NETWORK = {"--architecture": "suspects:make", "--weights": "suspect.safetensors"}
CLEAN = {"--images": "clean", "--channels": "1"}
SEARCH = {"--method": "patch", "--report": "out/report.html"}
LINES = {  # command: what it takes, all of it right
    "scan": NETWORK | CLEAN | SEARCH | {"--out": "out", "--json": "out/a.json"},
    "guard fit": NETWORK | CLEAN | SEARCH | {"--out": "out/guard"},
    "guard check": NETWORK
    | {
        "--csv": "out/a.csv",
        "--jsonl": "out/a",
        "GUARD": "guard",
        "IMAGES": "incoming",
    },
    "report": NETWORK
    | CLEAN
    | {"--check": "incoming", "--out": "out/r.html", "GUARD": "guard"},
    "convert": {"IN": "suspect.pt", "OUT": "out/a.safetensors"},
    "demo": {"--out": "out", "--json": "out/a.json"},
    "info": {},
}
ODD = [
    "",
    " ",
    "\udcff",
    "\x1b[31m",
    "\u202e",
    "%s",
    "../..",
    "~",
    "a\nError: b",
    "9" * 400,
]
TEXT = st.text(max_size=30).filter(lambda text: "\0" not in text)  # no argument has it
ANYTHING = st.one_of(TEXT, st.sampled_from(ODD))
BROKEN = ["empty", "text", "cut.safetensors", "cut.pt", "pickle.pt", "clean", "absent"]


def is_number(text, kind=float):
    try:
        kind(text)
    except ValueError:
        return False
    return True


def no_whole(low):
    """Return texts that are no whole number from ``low`` on."""
    texts = ANYTHING.filter(lambda text: not is_number(text, int))
    return texts | st.integers(-(10**20), low - 1).map(str) | st.floats().map(str)


def wrong_file(*names):
    return st.sampled_from(names) | ANYTHING.map(lambda text: f"absent/{text}")


def one_of(*names):
    return st.sampled_from(names)


def choice(*right):
    return ANYTHING.filter(lambda text: text not in right)


NUMBERS = ANYTHING.filter(lambda text: not all(map(is_number, text.split(","))))
WRONG = {
    "--architecture": ANYTHING
    | one_of("suspects:absent", "suspects:number", "suspects:needs", "os:getcwd", ":")
    | one_of(
        "torchvision:", "torchvision:resnet18", "timm:x", "lenet5", "a:b:c", "..:x"
    ),
    "--weights": wrong_file(*BROKEN),
    "--n-classes": no_whole(2) | one_of("7", "1000000"),
    "--mean": NUMBERS | one_of("nan", "inf", "1,,2", "1e9", "0.1,0.2"),
    "--std": NUMBERS | one_of("0", "-1", "nan", "inf", "0.1,0.2"),
    "--images": wrong_file("suspects.py", "empty folder", "broken", "guard"),
    "--channels": choice("1", "3") | one_of("3"),
    "--classes": ANYTHING.filter(lambda text: text != "0,1,2,3,4,5"),
    "--image-size": st.text("x,. -", max_size=4) | one_of("0", "8", "-1x2", "9x9x9"),
    "--dataset": ANYTHING | one_of("digits"),
    "--data-dir": wrong_file("suspects.py") | one_of("clean"),
    "--per-class": no_whole(2),
    "--method": choice("auto", "patch", "additive", "tabor", "b3d"),
    "--seed": no_whole(0) | one_of(str(2**32)),
    "--jobs": no_whole(1) | one_of("1025"),
    "--checkpoint-dir": one_of("suspects.py", "suspects.py/a", "suspect.pt/b"),
    "--report": one_of("clean", "suspect.safetensors", "suspects.py/a"),
    "--json": one_of("clean", "suspects.py/a", "guard", "/"),
    "--csv": one_of("clean", "suspect.safetensors", "suspects.py/a", "out/a", "/"),
    "--jsonl": one_of("clean", "suspect.safetensors", "suspects.py/a", "/"),
    "--most": no_whole(1),
    "--check": wrong_file("empty folder", "suspects.py", "broken"),
    "--attack": choice("white-box"),
    "--source-classes": ANYTHING.filter(
        lambda text: text != "all" and not is_number(text, int)
    )
    | one_of("9", "0,12"),
    "--epochs": no_whole(1),
    "GUARD": wrong_file("clean", "suspects.py", "empty folder", "cut guard"),
    "IMAGES": wrong_file(
        "empty folder", "suspects.py", "broken", "incoming/absent.png"
    ),
    "IN": wrong_file(*BROKEN, "suspect.safetensors"),
    "OUT": one_of("suspect.pt", "clean", "a", "suspects.py/a.safetensors", "guard"),
    "--unknown": ANYTHING,
}
MORE = {  # options that the right lines leave out
    "scan": "--n-classes --mean --std --image-size --classes --dataset --data-dir "
    "--per-class --seed --jobs --checkpoint-dir",
    "guard fit": "--n-classes --classes --jobs --checkpoint-dir --seed",
    "guard check": "--n-classes --mean --std",
    "report": "--n-classes --std --image-size --per-class --most",
    "demo": "--attack --source-classes --seed --epochs",
}


@st.composite
def lines(draw):
    """Draw a command line that is right but for one option."""
    command = draw(st.sampled_from(sorted(LINES)))
    given = dict(LINES[command])
    wrong = [*given, *MORE.get(command, "").split(), "--unknown"]
    name = draw(st.sampled_from([name for name in wrong if name in WRONG]))
    given[name] = draw(WRONG[name])
    options = [f"{key}={value}" for key, value in given.items() if key[0] == "-"]
    places = [value for key, value in given.items() if key[0] != "-"]
    return [*command.split(), *options, "--", *places]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Enter a folder with all that a command needs, and what it must refuse."""
    folder = tmp_path_factory.mktemp("malformed")
    write_ground(folder)
    weights = (folder / "suspect.safetensors").read_bytes()
    torch.save(suspect().state_dict(), folder / "suspect.pt")
    torch.save({"code": print}, folder / "pickle.pt")
    (folder / "cut.safetensors").write_bytes(weights[:-9])
    (folder / "cut.pt").write_bytes((folder / "suspect.pt").read_bytes()[:-9])
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_bytes(b"no weights\n")
    (folder / "empty folder").mkdir()
    (folder / "broken/0").mkdir(parents=True)
    (folder / "broken/0/a.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    shutil.copytree(folder / "guard", folder / "cut guard")
    arrays = folder / "cut guard/guard.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-1])

    def reached(*args, **settings):
        raise AssertionError("reached the work")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.delitem(sys.modules, "suspects", raising=False)
        patch.setattr(BaseReverseEngineer, "fit", reached)
        patch.setattr(demonstration, "run_demo", reached)
        patch.setattr("sklearn_backdoor.report.write_report", reached)
        yield folder
    sys.modules.pop("suspects", None)


def listing(folder):
    return sorted(
        (os.path.join(place, name), os.stat(os.path.join(place, name)).st_size)
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if "__pycache__" not in (name, os.path.basename(place))
    )


@given(line=lines())
@settings(QUIET, max_examples=200)
def test_a_wrong_command_line_is_refused_in_one_line_and_leaves_nothing(ground, line):
    before = listing(ground)
    message = one_line(run(*line))
    assert message.startswith("Error: ") and message.isprintable()
    assert listing(ground) == before


FILES = {  # what is damaged: where it stands in a right line of `guard check`
    "guard/guard.json": ["guard check", "GUARD"],
    "guard/guard.safetensors": ["guard check", "GUARD"],
    "suspect.safetensors": ["guard check", "--weights"],
    "incoming/0-0.png": ["guard check", "IMAGES"],
}


@st.composite
def damages(draw):
    """Draw what to do to the content of a file."""
    where = draw(st.floats(0, 1, exclude_max=True))
    new = draw(st.binary(min_size=1, max_size=20))
    return (
        draw(st.sampled_from(["cut", "insert", "replace", "all", "empty"])),
        where,
        new,
    )


def damaged(content, damage):
    kind, where, new = damage
    at = int(where * len(content))
    return {
        "cut": content[:at],
        "insert": content[:at] + new + content[at:],
        "replace": content[:at] + new + content[at + len(new) :],
        "all": new,
        "empty": b"",
    }[kind]


@given(name=st.sampled_from(sorted(FILES)), damage=damages())
@settings(QUIET, max_examples=100)
def test_a_damaged_file_is_refused_or_read_and_leaves_nothing(ground, name, damage):
    content = (ground / name).read_bytes()
    line = dict(LINES["guard check"])
    if name.startswith("incoming"):
        line["IMAGES"] = name
    options = [f"{key}={value}" for key, value in line.items() if key[0] == "-"]
    before = listing(ground)
    try:
        (ground / name).write_bytes(damaged(content, damage))
        done = run("guard", "check", *options, "--", line["GUARD"], line["IMAGES"])
    finally:
        (ground / name).write_bytes(content)
    assert "Traceback" not in done.output
    if done.exit_code == 2:
        one_line(done)
    else:  # an image may have lost nothing that counts, and weights their padding
        assert done.exit_code in (0, 1) and not name.startswith("guard"), done.output
        for row in (ground / "out/a").read_text().splitlines():
            assert json.loads(row)["verdict"] in ("trigger", "accepted", "not guarded")
        shutil.rmtree(ground / "out")
    assert listing(ground) == before


def test_the_right_lines_are_right_but_for_what_is_drawn(ground):
    """Else the lines above would be refused for another reason."""
    for command in ("scan", "guard fit", "report", "demo"):
        line = [f"{k}={v}" for k, v in LINES[command].items() if k[0] == "-"]
        places = [v for k, v in LINES[command].items() if k[0] != "-"]
        done = run(*command.split(), *line, "--", *places)
        assert done.exit_code == 3 and "reached the work" in done.stderr, done.output
