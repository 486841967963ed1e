"""The import statements keep the layout's direction."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sklearn_backdoor"
LEVELS = {
    "_validation": 0,
    "_torch": 0,
    "_likelihood": 0,
    "_fingerprint": 0,
    "_notebook": 0.25,
    "_trigger": 0.5,
    "_exclusive": 0,
    "_stream": 0,
    "_forward": 1,
    "_sharing": 1.5,
    "triggers": 1,
    "trojan": 2,
    "attacks": 2,
    "classifier": 1,
    "_defender": 2,
    "metrics": 1,
    "victim": 2,
    "embedding": 2,
    "reverse": 3,
    "detectors": 4,
    "_guard_values": 2,
    "_guard_disk": 3,
    "_guard_module": 3,
    "_guard_parts": 3.3,
    "_guard_files": 3.6,
    "guard": 4,
    "displays": 4,
    "networks": 0,
    "_class_order": 0,
    "_text": 0,
    "io": 1,
    "_image_files": 0,
    "_scan_input": 2,
    "datasets": 1,
    "training": 1,
    "demo": 5,
    "_picture": 5,
    "scan": 5,
    "_scan_picture": 5,
    "_report_guard": 5,
    "_report_pictures": 5,
    "_report_provenance": 5,
    "_report_search": 5,
    "report": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 6,
}


def imports(path):
    """Return the modules that a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield node.module
            if node.module == "sklearn_backdoor":
                yield from (f"sklearn_backdoor.{alias.name}" for alias in node.names)


def place(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else path.stem


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_run_one_way(path):
    own = place(path)
    for module in imports(path):
        root, *rest = module.split(".")
        assert root not in ("benchmarks", "tests")
        if root == "sklearn_backdoor" and rest and rest[0] != own:
            assert LEVELS[rest[0]] < LEVELS[own], f"{own} imports {module}"
    if own in ("classifier", "metrics", "_likelihood", "_validation"):
        assert not any(m.split(".")[0] in ("torch", "skorch") for m in imports(path))


def test_no_file_is_unpickled():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for word in ("pickle.load", "joblib.load", "torch.load", "weights_only=False"):
            if (word, path.name, path.parent.name) == ("torch.load", "_child.py", "io"):
                assert text.count(word) == text.count("weights_only=True") == 1
            else:
                assert word not in text, f"{path.name} holds {word}"


def test_importing_the_package_loads_neither_torchvision_nor_matplotlib():
    code = (
        "import sys, sklearn_backdoor, sklearn_backdoor.io; "
        "print([m for m in ('torchvision', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    import sklearn_backdoor

    for name in sklearn_backdoor.__all__:
        assert getattr(sklearn_backdoor, name).__doc__
    assert sorted(sklearn_backdoor.__all__) == sklearn_backdoor.__all__
