import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from sklearn_backdoor import AutoReverseEngineer, NCReverseEngineer
from sklearn_backdoor import scan as scanning
from sklearn_backdoor.__main__ import main
from sklearn_backdoor._class_order import check_class_order
from sklearn_backdoor._scan_picture import draw_scan, picture_png
from sklearn_backdoor._text import printable
from sklearn_backdoor.scan import METHODS, run_scan, screen, to_json
from tests.cli_common import FACTORY, suspect, write_images
from tests.common import LinearNetwork, OneSource, linear_images

HOSTILE = [
    "<script>alert(1)</script>",
    "\x1b[31mred\x1b[0m",
    "$x^2$",
    "\u202egnp.exe",
    "a" * 150,
    r"\frac{$",
]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks gain nothing from threads, and lose much on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Return a folder with a factory, weights and images, and the options for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "suspects", raising=False)
    (tmp_path / "suspects.py").write_text(FACTORY)
    save_file(suspect().state_dict(), "suspect.safetensors")
    write_images(tmp_path / "clean")
    return [
        *("--architecture", "suspects:make", "--weights", "suspect.safetensors"),
        *("--images", "clean", "--channels", "1", "--method", "patch"),
    ]


def scan(options, *more):
    return CliRunner().invoke(main, ["scan", *options, *more])


def refused(done, *words):
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.output
    return done.output


def test_a_backdoor_ends_with_status_1_and_names_its_class_by_all_searches(case):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sklearn_backdoor", "scan", *case]
        + ["--method", "auto", "--json", "new/verdict.json", "--out", "pictures"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1, done.stderr
    assert "BACKDOORED: target class 2" in done.stdout
    assert len(done.stdout.splitlines()) <= 24
    assert max(map(len, done.stdout.splitlines())) < 100
    assert "Traceback" not in done.stderr and "it/s" not in done.stderr
    found = json.loads(Path("new/verdict.json").read_text(), parse_constant=pytest.fail)
    assert found["verdict"] == "backdoored" and found["target_classes"] == ["2"]
    assert found["exit_status"] == 1
    assert len(found["table"]) == 5 * 6
    fields = (
        "method class norm success_rate converged reason anomaly_index p_value "
        "p_corrected flagged"
    )
    assert all(set(fields.split()) == set(row) for row in found["table"])
    flagged = {row["class"] for row in found["table"] if row["flagged"]}
    assert flagged == {"2"}
    content = Path("suspect.safetensors").read_bytes()
    assert found["weights_sha256"] == hashlib.sha256(content).hexdigest()
    assert found["image_passes"]["backward"] > 0 and found["seconds"] > 0
    assert found["settings"]["architecture"] == "suspects:make"
    assert found["n_images_per_class"] == dict.fromkeys("012345", 6)
    assert set(found["versions"]) >= {"sklearn_backdoor", "torch", "numpy", "python"}
    assert found["pictures"] == [str(Path("pictures/suspect.png"))]
    picture = np.asarray(Image.open("pictures/suspect.png"))
    assert picture.shape[0] > 800 and picture.std() > 20
    assert sorted(os.listdir("pictures")) == ["suspect.png"]  # nothing half written


def test_a_single_class_attack_is_named_on_the_screen_and_in_json():
    X, y = linear_images()
    names = ["cat", "dog", "owl", "fox", "bat", "e" * 90]
    found = run_scan(OneSource(), X, np.array(names)[y], names)
    assert "the trigger for owl is for images of bat alone" in screen(found)
    assert to_json(found)["single_sources"] == {"owl": "bat"}


@pytest.mark.parametrize("method", ["auto", "patch", "additive"])
def test_a_network_without_backdoor_ends_with_status_0(case, method):
    state = LinearNetwork(backdoor=0.0).state_dict()
    save_file(state, "suspect.safetensors")
    done = scan(case, "--method", method, "--json", "verdict.json")
    assert done.exit_code == 0, done.output
    assert "NOTHING FOUND (not proof of being clean)" in done.output
    assert json.loads(Path("verdict.json").read_text())["target_classes"] == []


def test_too_few_classes_end_with_status_4_and_strict_json(case):
    save_file(LinearNetwork(4).state_dict(), "suspect.safetensors")
    write_images(Path("four"), 4)
    options = ["--architecture", "suspects:small", "--images", "four"]
    done = scan(case, *options, "--json", "verdict.json")
    assert done.exit_code == 4, done.output
    assert "INCONCLUSIVE: 4 classes are too few" in done.output
    text = Path("verdict.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)  # no NaN
    assert all(row["p_value"] is None for row in found["table"])


def test_searches_that_do_not_converge_are_inconclusive_and_say_why():
    X, y = linear_images()

    class Brief(NCReverseEngineer):
        def __init__(self, victim, *, random_state, n_jobs, verbose, checkpoint_dir):
            super().__init__(victim, max_steps=1, success_rate=1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning.reverse, "NCReverseEngineer", Brief)
        found = run_scan(
            LinearNetwork().eval(), X, y.astype(str), list("012345"), method="patch"
        )
    assert found.status == 4
    assert "INCONCLUSIVE: search patch: 2 of 6 classes converged" in screen(found)
    assert "Give more clean images" in screen(found)
    assert len(picture_png(found, dpi=30)) > 1000


def test_the_logit_order_can_be_given(case):
    names = list("fedcba")  # alphabetical order is not that of the logits
    write_images(Path("letters"), names=names)
    options = ["--images", "letters"]
    done = scan(case, *options, "--classes", ",".join(names))
    assert done.exit_code == 1 and "target class d" in done.output
    output = refused(scan(case, *options), '--classes "f,e,d,c,b,a"')
    assert "is right on 0% " in output and "would be on 100% " in output
    refused(scan(case, *options, "--classes", "f,e,d,c,b"), "lacks", "['a']")
    refused(scan(case, *options, "--classes", "f,e,d,c,b,x"), "no folder", "['x']")
    refused(scan(case, *options, "--classes", "f,e,d,c,b,a,a"), "named twice")


def test_folders_that_are_numbers_are_announced_in_their_order(case):
    write_images(Path("numbers"), names=["0", "1", "10", "2", "3", "4"])
    done = scan(case, "--images", "numbers")
    assert done.exit_code == 1
    assert "alphabetical order: 0, 1, 10, 2, ..." in done.output
    assert "target class 10" in done.output


def test_images_are_limited_a_class_and_resized(case):
    done = scan(case, "--per-class", "5", "--image-size", "4x4")
    assert done.exit_code == 1 and "30 clean images, 5 a class" in done.output
    refused(scan(case, "--image-size", "8"), "shape (1, 8, 8)", "--image-size")
    refused(scan(case, "--image-size", "big"), "expected height and width")
    refused(scan(case, "--channels", "3"), "shape (3, 4, 4)", "--channels")


def test_a_data_set_gives_its_test_images(case):
    Path("suspects.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))\n"
    )
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    save_file(layer.state_dict(), "suspect.safetensors")
    options = [*case[:4], "--method", "patch", "--dataset", "digits"]
    done = scan(options, "--per-class", "6", "--json", "verdict.json")
    assert done.exit_code in (0, 1, 4), done.output
    found = json.loads(Path("verdict.json").read_text())
    assert found["n_images"] == 60 and found["image_shape"] == [1, 16, 16]


def test_the_methods_are_those_of_the_command():
    method = next(o for o in main.commands["scan"].params if o.name == "method")
    assert list(method.type.choices) == list(METHODS)
    assert METHODS["auto"] == AutoReverseEngineer.__name__


# ---- weights


def test_missing_weights_are_refused(case):
    refused(scan(case, "--weights", "absent.safetensors"), "does not exist")


def test_weights_of_another_network_are_refused_by_name(case):
    state = LinearNetwork(7).state_dict()
    state["extra\x1b[31m"] = torch.zeros(2)
    del state["hidden.weight"]
    save_file(state, "suspect.safetensors")
    message = refused(
        scan(case),
        "lacks hidden.weight",
        r"unexpected extra\x1b[31m",
        "last.weight (F32 (7, 16), not floating point (6, 16))",
        "Give the factory",
    )
    assert "\x1b" not in message


def test_weights_of_a_data_parallel_network_say_so(case):
    state = {f"module.{k}": v for k, v in LinearNetwork().state_dict().items()}
    save_file(state, "suspect.safetensors")
    refused(scan(case), "DataParallel")


@pytest.mark.parametrize("name", ["suspect.safetensors", "suspect.pt"])
def test_a_pickle_is_refused_and_not_run(case, name):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    Path(name).write_bytes(pickle.dumps(Bomb()))
    refused(scan(case, "--weights", name), "pickle", "safetensors.torch.save_file")
    torch.save(Bomb(), name)
    refused(scan(case, "--weights", name), name)
    assert not Path("exploded").exists()


def test_weights_are_told_by_content_and_damage_is_refused(case):
    content = Path("suspect.safetensors").read_bytes()
    Path("suspect.bin").write_bytes(content)
    assert scan(case, "--weights", "suspect.bin").exit_code == 1
    for damaged in (b"", content[:100], content[:-10], b"\xff" * 100):
        Path("suspect.safetensors").write_bytes(damaged)
        refused(scan(case), "suspect.safetensors", "Get the file again")


def test_a_state_dict_of_torch_is_read(case):
    torch.save(suspect().state_dict(), "suspect.pt")
    assert scan(case, "--weights", "suspect.pt").exit_code == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(case, value):
    state = LinearNetwork().state_dict()
    state["last.weight"][0, 0] = value
    save_file(state, "suspect.safetensors")
    refused(scan(case), "NaN or infinity in last.weight", "again")


@pytest.mark.parametrize(
    "factory, words",
    [
        ("suspects", "expected package.module:factory"),
        ("nowhere_at_all:make", "Start the command in the folder"),
        ("suspects:absent", "suspects has no 'absent'"),
        ("suspects:number", "is int, expected a class or function"),
        ("suspects:a_network", "is LinearNetwork, expected a class or function"),
        ("suspects:needs", "called without arguments"),
        ("builtins:dict", "returned dict, expected a torch.nn.Module"),
        ("broken:make", "importing broken raised SyntaxError"),
        ("quits:make", "importing quits raised SystemExit"),
    ],
)
def test_a_factory_that_makes_no_network_is_refused(case, factory, words):
    Path("broken.py").write_text("def (:\n")
    Path("quits.py").write_text("import sys\nsys.exit(0)\n")
    refused(scan(case, "--architecture", factory), words)


# ---- images, options, outputs


def test_an_unreadable_image_is_refused_by_name(case):
    Path("clean/3/18.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    refused(scan(case), "18.png", "no readable image")


def test_a_folder_without_images_is_refused(case):
    refused(scan(case, "--images", "absent"), "expected <class>/<image>")
    Path("clean/9").mkdir()
    refused(scan(case), "expected <class>/<image>")


def test_a_class_too_many_is_refused(case):
    write_images(Path("seven"), 7)
    message = refused(scan(case, "--images", "seven"), "returns 6 logits", "--classes")
    assert "'6'" in message


def test_a_victim_that_answers_one_class_is_refused(case):
    state = LinearNetwork().state_dict()
    state["last.weight"][:] = 0
    save_file(state, "suspect.safetensors")
    refused(scan(case), "answers class 0 for all 36 images", "Are its weights loaded")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dataset", "digits"], "either --images FOLDER or --dataset"),
        (["--data-dir", "clean"], "--data-dir goes with --dataset only"),
        (["--classes", "a,,b"], "empty name"),
        (["--per-class", "1"], "--per-class"),
        (["--method", "magic"], "--method"),
        (["--json", "clean"], "is a directory"),
        (["--json", "/dev/null"], "no regular file"),
        (["--json", "suspect.safetensors"], "holds what the command reads"),
        (["--out", "suspect.safetensors/x"], "suspect.safetensors"),
        (["--checkpoint-dir", "suspects.py"], "is a file"),
    ],
)
def test_bad_options_end_with_status_2(case, options, words):
    before = Path("suspect.safetensors").read_bytes()
    refused(scan(case, *options), words)
    assert Path("suspect.safetensors").read_bytes() == before


def test_a_method_that_is_missing_is_refused(case, monkeypatch):
    monkeypatch.delattr(scanning.reverse, "NCReverseEngineer")
    refused(scan(case, "--method", "patch"), "not in this version")


@pytest.mark.parametrize("error", [RuntimeError("a\x1bb\nc"), SystemExit(0)])
def test_an_internal_error_ends_with_status_3_in_one_line(case, monkeypatch, error):
    def fit(self, X, y):
        raise error

    monkeypatch.setattr(NCReverseEngineer, "fit", fit)
    done = scan(case)
    assert done.exit_code == 3
    last = done.output.splitlines()[-1]
    assert last.startswith("Internal error") and "file this" in last
    assert "Traceback" not in done.output and "\x1b" not in done.output
    done = scan(case, "--debug")
    assert done.exit_code == 3 and "Traceback" in done.output


def test_an_error_within_the_search_is_no_bad_input(case, monkeypatch):
    def _search(self, run):
        raise ValueError("mask ranges from nan to nan")

    monkeypatch.setattr(NCReverseEngineer, "_search", _search)
    done = scan(case)
    assert done.exit_code == 3 and "the search failed: mask ranges" in done.output


def test_an_output_that_fails_at_the_end_keeps_the_verdict_on_the_screen(
    case, monkeypatch
):
    def replace(old, new):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", replace)
    done = scan(case, "--json", "verdict.json")
    assert done.exit_code == 2
    assert "BACKDOORED" in done.output and "could not be written" in done.output
    assert not Path("verdict.json").exists()
    assert not list(Path().rglob(".*part")) and not Path("scan").exists()


def test_a_picture_that_fails_does_not_cost_the_figures(case, monkeypatch):
    from sklearn_backdoor import _scan_picture

    monkeypatch.setattr(_scan_picture, "picture_png", lambda scan: 1 / 0)
    done = scan(case, "--json", "verdict.json")
    assert done.exit_code == 3 and "BACKDOORED" in done.output
    found = json.loads(Path("verdict.json").read_text())
    assert found["verdict"] == "backdoored" and found["pictures"] == []


@pytest.mark.parametrize("kept", [True, False])
def test_ctrl_c_ends_with_status_130_and_says_how_to_resume(case, kept):
    options = ["--architecture", "suspects:Slow"]
    options += ["--checkpoint-dir", "kept"] if kept else []
    process = subprocess.Popen(
        [sys.executable, "-m", "sklearn_backdoor", "scan", *case, *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # a shell that runs the tests in the background has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        for line in process.stderr:
            if line.startswith("search a trigger"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    if kept:
        assert "run the same command to resume" in rest
    else:
        assert "--checkpoint-dir" in rest


def test_a_checkpoint_of_another_search_is_refused(case):
    options = ["--checkpoint-dir", "kept"]
    assert scan(case, *options).exit_code == 1
    assert scan(case, *options).exit_code == 1  # resumes
    refused(scan(case, *options, "--seed", "1"), "holds another search", "seeds")


def test_the_verdict_survives_a_closed_pipe(case):
    command = [sys.executable, "-m", "sklearn_backdoor", "scan", *case]
    save_file(LinearNetwork(backdoor=0.0).state_dict(), "suspect.safetensors")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    with process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 0  # not 1, which would mean a backdoor


# ---- hostile names, the picture


def test_hostile_class_names_break_neither_screen_nor_picture():
    X, y = linear_images()
    found = run_scan(suspect(), X, np.array(HOSTILE)[y], HOSTILE)
    text = screen(found)
    assert "target class $x^2$" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert r"\x1b[31mred" in text and r"\u202egnp.exe" in text
    assert max(map(len, text.splitlines())) < 120
    json.dumps(to_json(found), allow_nan=False)
    figure = draw_scan(found)
    assert texts_inside(figure)
    assert len(picture_png(found, dpi=40)) > 5000


def test_hostile_folder_names_pass_through_the_command(case):
    names = ["a\x1b[31m", "b<script>", "c$x^2$", "d\u202ee", "e" * 200, "f\u4e2d"]
    write_images(Path("hostile"), names=names)
    done = scan(case, "--images", "hostile", "--json", "verdict.json")
    assert done.exit_code == 1 and "target class c$x^2$" in done.output
    assert "\x1b" not in done.output and "\u202e" not in done.output
    assert json.loads(Path("verdict.json").read_text())["target_classes"] == ["c$x^2$"]


def texts_inside(figure):
    """Return whether each text lies on the sheet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    sheet = figure.bbox
    boxes = [text.get_window_extent() for text in figure.texts]
    boxes += [
        label.get_window_extent()
        for whole in figure.axes
        for axes in (whole, *whole.child_axes)
        for label in (axes.xaxis.label, *axes.get_xticklabels())
        if label.get_text()
    ]
    return all(
        sheet.x0 <= box.x0 and box.x1 <= sheet.x1 and sheet.y0 <= box.y0
        for box in boxes
    )


def test_a_picture_of_many_classes_shows_the_most_suspicious():
    n_classes = 14
    X, y = linear_images(3, n_classes)
    names = [f"a class with a long name {number}" for number in range(n_classes)]
    found = run_scan(suspect(n_classes), X, np.array(names)[y], names)
    figure = draw_scan(found)
    assert texts_inside(figure)
    assert len(figure.axes) == 12 + 2
    assert sum(len(axes.child_axes) for axes in figure.axes) == 12 * 4
    shown = " ".join(text.get_text() for text in figure.texts)
    assert "12 most suspicious of 14 classes" in shown and "2 left out" in shown
    assert "FLAGGED" in shown
    assert "and 4 classes less suspicious" in screen(found)
    assert any("only 3 image(s)" in note for note in found.notes)


@pytest.mark.parametrize(
    "text, safe",
    [
        ("ship", "ship"),
        ("a\x00b\x9bc\u2028d", r"a\x00b\x9bc\u2028d"),
        ("\ud800", r"\ud800"),
        ("x" * 50, "x" * 39 + "…"),
        ("\u4e2d\u6587", "\u4e2d\u6587"),
    ],
)
def test_printable_writes_what_a_terminal_would_obey_as_escapes(text, safe):
    assert printable(text) == safe


def test_a_network_that_is_wrong_in_every_order_is_no_matter_of_order():
    y = np.repeat(list("abcdef"), 10)
    check_class_order(np.full(60, "a"), y, list("abcdef"))
    check_class_order(np.tile(list("abcdef"), 10), y, list("abcdef"))
    check_class_order(y, y, list("abcdef"))
