"""The documentation is whole, and what it shows compiles, or runs where marked."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import sklearn_backdoor
from sklearn_backdoor import BackdoorGuard, NCReverseEngineer, VictimNetwork
from tests.common import LinearNetwork, linear_images

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.rst"), *DOCS.glob("user_guide/*.rst")])
EXAMPLES = sorted(DOCS.glob("gallery/plot_*.py"))
_BLOCK = re.compile(
    r"^(?P<runnable>\.\. runnable\n\n)?\.\. code-block:: python\n\n"
    r"(?P<code>(?:(?: {3,}.*)?\n)+)",
    re.MULTILINE,
)


def python_blocks(path):
    """Return (code, runnable) of the Python blocks of a page."""
    text = path.read_text() + "\n"
    if path.suffix == ".md":
        found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        return [(code, False) for code in found]
    return [
        (textwrap.dedent(match["code"]), match["runnable"] is not None)
        for match in _BLOCK.finditer(text)
    ]


RUNNABLE = [
    path for path in PAGES if any(runnable for _, runnable in python_blocks(path))
]


def test_every_public_name_is_in_the_api_page():
    listed = set((DOCS / "api" / "index.rst").read_text().split())
    assert set(sklearn_backdoor.__all__) <= listed


@pytest.mark.parametrize("module", ["io", "displays", "reverse", "detectors", "report"])
def test_public_names_of_modules_are_in_the_api_page(module):
    names = __import__(f"sklearn_backdoor.{module}", fromlist=["x"])
    public = getattr(names, "__all__", ["write_report", "render_report"])
    listed = set((DOCS / "api" / "index.rst").read_text().split())
    assert all({name, f"{module}.{name}"} & listed for name in public)


def test_gallery_has_six_examples_and_lists_each():
    helpers = (DOCS / "_ext" / "helpers.py").read_text()
    listed = re.findall(r'"(plot_\w+\.py)"', helpers)
    assert len(EXAMPLES) >= 6
    assert sorted(listed) == [path.name for path in EXAMPLES]


def test_examples_import_only_what_is_there():
    for path in EXAMPLES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if module.startswith("sklearn_backdoor"):
                found = __import__(module, fromlist=["x"])
                missing = {a.name for a in node.names} - set(dir(found))
                assert not missing, f"{path.name}: {missing}"


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_python_blocks_compile(path):
    for code, _ in python_blocks(path):
        compile(code, str(path), "exec")


def test_blocks_are_found():
    assert len(python_blocks(ROOT / "README.md")) >= 2
    assert len(python_blocks(DOCS / "start.rst")) >= 2
    assert sum(runnable for path in PAGES for _, runnable in python_blocks(path)) >= 4


class Suspect(LinearNetwork):
    """With a backdoor to class 9, as the pages have it."""

    target = 9


@pytest.fixture(scope="module")
def names():
    """Return what the pages take for given."""
    network = Suspect(n_classes=10, backdoor=90.0).eval()  # a mask of a ninth does
    X, y = linear_images(n_per_class=10, n_classes=10)
    victim = VictimNetwork(network)
    engineer = NCReverseEngineer(victim).fit(X, y)
    guard = BackdoorGuard(victim, engineer.trigger_, target_class=9).fit(X, y)
    return {
        "network": network,
        "X_defense": X,
        "y_defense": y,
        "X": X,
        "victim": victim,
        "engineer": engineer,
        "guard": guard,
    }


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda p: p.name)
def test_blocks_marked_runnable_run(path, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(names)
    for code, runnable in python_blocks(path):
        if runnable:
            exec(compile(code, str(path), "exec"), names)


def test_the_first_screen_finds_the_backdoor(names):
    assert names["engineer"].target_classes_.tolist() == [9]


def test_nothing_comes_from_elsewhere_when_pages_are_built_or_read():
    conf = (DOCS / "conf.py").read_text()
    assert "intersphinx" not in conf and "http" not in conf
    for path in [*PAGES, *DOCS.glob("**/*.html"), *DOCS.glob("_static/*")]:
        if "_build" not in path.parts:
            assert not re.search(r'(src|href)="https?:|image:: *http', path.read_text())


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(
    "status, expected", [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (130, 2)]
)
def test_gate_lets_only_status_0_pass(tmp_path, status, expected):
    command = tmp_path / "sklearn-backdoor"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit {status}\n')
    command.chmod(0o755)
    ended = subprocess.run(
        ["sh", DOCS / "user_guide" / "gate.sh", "suspect.safetensors", "clean images"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == expected
    assert "gate:" in ended.stdout + ended.stderr
    asked = (tmp_path / "asked").read_text()
    assert "--weights suspect.safetensors --images clean images" in asked


def test_options_of_the_gate_exist():
    from sklearn_backdoor.cli import main

    script = (DOCS / "user_guide" / "gate.sh").read_text()
    known = {opt for param in main.commands["scan"].params for opt in param.opts}
    assert set(re.findall(r"(--[a-z-]+)", script)) <= known
