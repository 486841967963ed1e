import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from sklearn_backdoor import BackdoorGuard, NCReverseEngineer, VictimNetwork
from sklearn_backdoor.cli import _verdicts
from tests.cli_common import (
    one_line,
    run,
    suspect,
    write_ground,
    write_guard,
    write_images,
)
from tests.common import LinearNetwork, corner_trigger, linear_images

NETWORK = ["--architecture", "suspects:make", "--weights", "suspect.safetensors"]
CLEAN = ["--images", "clean", "--channels", "1"]
SEARCH = ["--method", "patch"]


@pytest.fixture
def ground(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "suspects", raising=False)
    write_ground(tmp_path)
    return tmp_path


def check(*more):
    return run("guard", "check", "guard", *NETWORK, *more)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- guard fit, scan --report


def test_one_search_gives_verdict_guard_and_report(ground, monkeypatch):
    searches = []
    search = NCReverseEngineer._search
    monkeypatch.setattr(
        NCReverseEngineer,
        "_search",
        lambda self, run: searches.append(1) or search(self, run),
    )
    where = ["--out", "new/guard", "--report", "new/report.html"]
    done = run("guard", "fit", *NETWORK, *CLEAN, *SEARCH, *where)
    assert done.exit_code == 1, done.output
    assert len(searches) == 1
    assert "BACKDOORED: target class 2" in done.stdout
    assert "of target class 2" in done.stdout
    assert sorted(os.listdir("new")) == ["guard", "report.html"]
    assert "</html>" in Path("new/report.html").read_text()
    guard = BackdoorGuard.load("new/guard", VictimNetwork(suspect()))
    assert guard.target_classes_.tolist() == ["2"]
    assert guard.engineer_.method == "NCReverseEngineer"
    assert guard.provenance_["architecture"] == "suspects:make"
    assert guard.provenance_["weights_file"] == "suspect.safetensors"
    assert len(guard.provenance_["weights_sha256"]) == 64
    X, y = linear_images(3)
    stamped = corner_trigger().embed(X[y != 2])
    np.testing.assert_array_equal(guard.predict(stamped), y[y != 2].astype(str))


def test_a_guard_is_kept_where_nothing_is_flagged_and_says_that_labels_pass(ground):
    save_file(LinearNetwork(backdoor=0.0).state_dict(), "suspect.safetensors")
    done = run("guard", "fit", *NETWORK, *CLEAN, *SEARCH, "--out", "kept")
    assert done.exit_code == 0, done.output
    assert "passes all labels through" in done.stdout
    done = run("guard", "check", "kept", "incoming", *NETWORK, "--jsonl", "v.jsonl")
    assert done.exit_code == 0
    assert "NOTHING IS GUARDED" in done.stdout
    rows = [json.loads(line) for line in Path("v.jsonl").read_text().splitlines()]
    assert {row["verdict"] for row in rows} == {"not guarded"}


def test_scan_reports_on_its_own_search(ground, monkeypatch):
    from sklearn_backdoor import report

    def write_report(path, guard, X, y, *, provenance):
        seen.append((path, guard, X, y, provenance))

    seen: list = []
    monkeypatch.setattr(report, "write_report", write_report)
    done = run("scan", *NETWORK, *CLEAN, *SEARCH, "--report", "report.html")
    assert done.exit_code == 1, done.output
    assert "report    report.html" in done.stdout
    [(path, guard, X, y, provenance)] = seen
    assert path == Path("report.html") and guard.target_class_ == "2"
    assert X.shape == (36, 1, 4, 4) and len(y) == 36
    assert provenance["data_source"] == "image folder clean"


def test_too_few_images_for_a_guard_are_refused_before_the_search(ground, monkeypatch):
    monkeypatch.setattr(NCReverseEngineer, "_search", lambda self, run: 1 / 0)
    for command in (["scan", "--report", "r.html"], ["guard", "fit", "--out", "kept"]):
        done = run(*command, *NETWORK, *CLEAN, *SEARCH, "--per-class", "2")
        assert "need 3 a class at least" in one_line(done)
    assert not Path("r.html").exists() and not Path("kept").exists()


def test_a_place_that_holds_something_else_is_refused_before_the_search(
    ground, monkeypatch
):
    monkeypatch.setattr(NCReverseEngineer, "_search", lambda self, run: 1 / 0)
    fit = ["guard", "fit", *NETWORK, *CLEAN, *SEARCH]
    before = sorted(os.listdir("clean"))
    assert "something else than a guard" in one_line(run(*fit, "--out", "clean"))
    assert sorted(os.listdir("clean")) == before
    done = run(*fit, "--out", "suspects.py/guard")
    assert "suspects.py is no folder" in one_line(done)
    done = run(*fit, "--out", "kept", "--report", "suspect.safetensors")
    assert "holds what the command reads" in one_line(done)


# ---- guard check


def test_triggered_images_are_flagged_with_their_source_class(ground):
    done = check("incoming", "clean", "--csv", "v.csv", "--jsonl", "v.jsonl")
    assert done.exit_code == 1, done.output
    assert "TRIGGER in 10 of 48 images (guarded: class 2)" in done.stdout
    rows = rows_of("v.csv")
    lines = [json.loads(line) for line in Path("v.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 48
    for row, line in zip(rows, lines, strict=True):
        assert list(row) == list(line) == list(_verdicts.FIELDS)
        assert row["file"] == line["file"] and row["label"] == line["label"]
        name = Path(row["file"])
        origin = name.name[0] if name.parts[0] == "incoming" else name.parts[1]
        triggered = name.parts[0] == "incoming" and origin != "2"
        sent = "2" if name.parts[0] == "incoming" else origin
        verdict = (
            "trigger" if triggered else "accepted" if sent == "2" else "not guarded"
        )
        assert line["verdict"] == row["verdict"] == verdict
        assert line["victim_label"] == sent and line["label"] == origin
        assert line["source_class"] == (origin if triggered else None)
        assert (line["score"] is None) == (verdict == "not guarded")
        assert line["score"] is None or (line["score"] > 0) == triggered
        assert line["error"] is None
    assert sorted(os.listdir()) == sorted(
        "clean guard incoming suspect.safetensors suspects.py v.csv v.jsonl".split()
    )


def test_batches_change_no_answer(ground, monkeypatch):
    check("incoming", "clean", "--csv", "whole.csv")
    monkeypatch.setattr(_verdicts, "_MOST_IN_BATCH", 7)
    check("incoming", "clean", "--csv", "parts.csv")
    whole, parts = rows_of("whole.csv"), rows_of("parts.csv")
    scores = [[float(row.pop("score") or 0) for row in rows] for rows in (whole, parts)]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    assert whole == parts


def test_clean_images_end_with_status_0(ground):
    done = check("clean")
    assert done.exit_code == 0 and "NO TRIGGER in 36 images" in done.stdout


def test_unreadable_images_are_rows_of_their_own(ground):
    Path("incoming/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    os.mkfifo("incoming/pipe.png")
    Image.new("L", (5, 6)).save("incoming/size.png")
    done = check("incoming", "--csv", "v.csv")
    assert done.exit_code == 1, done.output
    assert "error               3  files could not be read" in done.stdout
    found = {row["file"]: row["error"] for row in rows_of("v.csv") if row["error"]}
    assert "no readable image" in found["incoming/broken.png"]
    assert "no regular file" in found["incoming/pipe.png"]
    assert "6x5 pixels" in found["incoming/size.png"]
    assert "4x4" in found["incoming/size.png"]
    assert "--resize" in found["incoming/size.png"]
    done = check("incoming", "--strict", "--csv", "strict.csv")
    assert one_line(done) == "Error: --strict: 3 files could not be read."
    assert len(rows_of("strict.csv")) == 15
    done = check("incoming", "--resize")
    assert "error               2" in done.stdout


def test_nothing_to_read_leaves_no_table(ground):
    Path("empty").mkdir()
    done = check("empty", "--csv", "out/v.csv")
    assert "none of the images could be read: there are none" in one_line(done)
    done = check("suspects.py", "--csv", "out/v.csv")
    assert "none of BMP, JPEG" in one_line(done)
    assert not list(ground.rglob("*v.csv*"))


def test_another_network_is_refused(ground):
    save_file(LinearNetwork(backdoor=7.0).state_dict(), "suspect.safetensors")
    assert "weights" in one_line(check("clean"))


def test_an_altered_guard_is_refused(ground):
    text = Path("guard/guard.json").read_text()
    Path("guard/guard.json").write_text(text.replace("backdoored", "inconclusive"))
    assert "guard.json" in one_line(check("clean"))
    Path("guard/guard.json").unlink()
    assert "guard.json does not exist" in one_line(check("clean"))


@pytest.mark.parametrize("name", ["=1+1.png", "-1.png", "+1.png", "@SUM(A1).png"])
def test_names_of_files_become_no_formulas(ground, monkeypatch, name):
    os.rename("incoming/0-0.png", name)
    done = check("--csv", "v.csv", "--", name)
    assert done.exit_code == 1
    assert rows_of("v.csv")[0]["file"] == f"'{name}"


def test_hostile_names_reach_no_terminal_and_json_keeps_them(ground):
    names = ["\x1b[31mred.png", "a\nTRIGGER in 9.png", "\u202egnp.exe.png"]
    names.append(b"\xff.png".decode(errors="surrogateescape"))
    for source, name in zip(sorted(os.listdir("incoming")), names, strict=False):
        os.rename(f"incoming/{source}", f"incoming/{name}")
    done = check("incoming", "--csv", "v.csv", "--jsonl", "v.jsonl")
    assert done.exit_code == 1, done.output
    content = Path("v.csv").read_bytes()
    for bad in ("\x1b", "\u202e"):
        assert bad not in done.output and bad.encode() not in content
    assert r"\x1b[31mred.png" in done.output
    assert "\nTRIGGER in 9" not in done.output
    assert len(content.splitlines()) == 13
    lines = Path("v.jsonl").read_bytes().splitlines()
    kept = {json.loads(line)["file"] for line in lines}
    assert {f"incoming/{name}" for name in names} < kept


def test_hostile_class_names_are_escaped(ground):
    names = ["=a", "b\x1b[31m", "\u202ec", "-d", "@e", "f"]
    write_guard(ground / "guard", names)
    done = check("incoming", "--csv", "v.csv")
    assert done.exit_code == 1, done.output
    assert "\x1b" not in done.output and "\u202e" not in done.output
    labels = {row["label"] for row in rows_of("v.csv")}
    assert labels == {"'=a", r"b\x1b[31m", r"\u202ec", "'-d", "'@e", "f"}


def test_a_failing_disk_leaves_no_table(ground, monkeypatch):
    def replace(old, new):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", replace)
    done = check("clean", "--csv", "out/v.csv")
    assert "no space left" in one_line(done)
    assert not Path("out").exists()


def test_ctrl_c_leaves_no_table(ground, monkeypatch):
    def inspect(self, X):
        raise KeyboardInterrupt

    monkeypatch.setattr(BackdoorGuard, "inspect", inspect)
    done = check("clean", "--csv", "out/v.csv", "--jsonl", "v.jsonl")
    assert one_line(done, 130) == "Interrupted."
    assert not Path("out").exists() and not Path("v.jsonl").exists()


@pytest.mark.parametrize(
    "value, safe",
    [
        (None, ""),
        (-1.5, -1.5),
        ("cat", "cat"),
        ("=1+1", "'=1+1"),
        ("\t=1", r"\t=1"),
        ("\r=1", r"\r=1"),
        ("＝1", "'＝1"),
        ("", ""),
    ],
)
def test_a_cell_is_no_formula(value, safe):
    assert _verdicts.cell(value) == safe


# ---- report


def test_a_report_of_a_saved_guard_with_checked_images(ground, monkeypatch):
    Path("incoming/broken.png").write_bytes(b"nothing")
    report = ["report", "guard", *NETWORK, *CLEAN]
    done = run(
        *report, "--check", "incoming", "--check", "clean/2", "--out", "a/r.html"
    )
    assert done.exit_code == 0, done.output
    assert "Left out: 'incoming/broken.png'" in done.stderr
    text = Path("a/r.html").read_text()
    assert "incoming/0-0.png" in text and "</html>" in text
    shapes = []
    monkeypatch.setattr(
        "sklearn_backdoor.report.write_report",
        lambda *args, X_check, **settings: shapes.append(X_check.shape),
    )
    done = run(*report, "--check", "clean", "--most", "3")
    assert "draw 3 of 36 images" in done.stderr
    assert shapes == [(3, 1, 4, 4)]


def test_a_report_on_other_images_is_refused(ground):
    write_images(ground / "more", 7)
    report = ["report", "guard", *NETWORK, "--out", "r.html", "--images"]
    assert "channels of guard fit" in one_line(run(*report, "clean"))
    assert "'6'" in one_line(run(*report, "more", "--channels", "1"))
    assert not Path("r.html").exists()
