"""JSON lines with all that is needed to believe and to repeat a figure."""

import json
import os
import platform
import subprocess
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("numpy", "scipy", "scikit-learn", "skorch", "torch", "torchvision")


def append(name, record, *, results=RESULTS):
    """Append one object to ``<results>/<name>.jsonl``.

    Parameters
    ----------
    name : {"inflight", "levers", "overhead", "scan"}
        The file.
    record : dict
        ``seed``, ``config``, ``data_source``, ``seconds`` and the file's own fields.
    results : path-like
        The folder; made where it is missing.
    """
    line = {
        "run_id": uuid.uuid4().hex,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        **record,
    }
    folder = Path(results)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash left half a line: do not add to it
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def read(name, *, results=RESULTS):
    """Return the objects of ``<results>/<name>.jsonl``; none if it is missing.

    A line that a crash left half written is skipped.
    """
    path = Path(results) / f"{name}.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def settings_of(estimator):
    """Return every setting as text, defaults included.

    Parameters
    ----------
    estimator : scikit-learn estimator

    Returns
    -------
    dict
        Without networks, triggers and folders.
    """
    hidden = ("victim", "steps", "trigger", "checkpoint_dir")
    return {
        name: str(value)
        for name, value in estimator.get_params().items()
        if not name.startswith(hidden)
    }


def _commit():
    """Return the commit, with a plus sign if the code was changed since."""
    folder = Path(__file__).parent

    def git(*words):
        return subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "*.py", "../sklearn_backdoor")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [
        line.split(":")[1].strip() for line in lines if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()
