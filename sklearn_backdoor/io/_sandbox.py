"""A state dict of torch.save turned into safetensors, by a process with limits.

First the file is looked at from outside (`read_archive`, `check_pickle`): nearly all
that is hostile ends there. What is left is read with ``weights_only=True`` by a child
that may take little memory, time and disk, and inherits nothing.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors
import torch

from sklearn_backdoor._text import printable
from sklearn_backdoor.io import _child
from sklearn_backdoor.io._archive import read_archive
from sklearn_backdoor.io._errors import UnsafeFileError, handful, refused
from sklearn_backdoor.io._files import check_unchanged, signature
from sklearn_backdoor.io._pickle import check_pickle

_MEGABYTE = 2**20
# what loaders of libraries need, and no more
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH", "SYSTEMROOT")
_SAFETENSORS = str(safetensors.__file__)
_MAX_ANSWER = _MEGABYTE


def to_safetensors(file, path, out):
    """Write the tensors of a state dict to a safetensors file.

    Parameters
    ----------
    file : file
        The state dict, a ZIP file.
    path : path-like
        For messages.
    out : Path
        Where the safetensors file goes, in a private folder.

    Returns
    -------
    list of str
        Notes: what was left out, and what is odd.

    Raises
    ------
    UnsafeFileError
        If the file is more than a state dict, or the child was stopped.
    RuntimeError
        If no child could be started.
    """
    before = signature(file)
    size = before[2]
    archive = read_archive(file, size, path)
    limits = limits_of(size)
    check_pickle(archive.pickle, archive.storages, limits["n_bytes"], path)
    about = _run(file, path, out, limits)
    check_unchanged(file, before, path)
    if "refused" in about:
        raise refused(path, printable(about["refused"], 300))
    return _notes(about)


def limits_of(size):
    """Return what a child may take for a file.

    Parameters
    ----------
    size : int
        Bytes of the file.

    Returns
    -------
    dict
        ``n_bytes`` of tensors, ``memory`` beyond torch itself in bytes,
        ``cpu_seconds`` beyond its import, and ``wall_seconds``.
    """
    return {
        "n_bytes": 2 * size + 16 * _MEGABYTE,  # tied tensors are written out twice
        "memory": 3 * size + 256 * _MEGABYTE,
        "cpu_seconds": 20 + size // (20 * _MEGABYTE),
        "wall_seconds": 120 + size // (10 * _MEGABYTE),
    }


def _run(file, path, out, limits):
    """Run the child; return its answer, or say how it ended."""
    packages = {str(Path(one).parents[1]) for one in (torch.__file__, _SAFETENSORS)}
    out = out.resolve()  # the child starts elsewhere
    order = {**limits, "out": str(out), "packages": sorted(packages)}
    command = [sys.executable, "-I", "-B", _child.__file__, json.dumps(order)]
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
        try:
            status = subprocess.run(
                command,
                stdin=file,
                stdout=answer,
                stderr=errors,
                env=_environment(),
                cwd=out.parent,
                timeout=limits["wall_seconds"],
            ).returncode
        except subprocess.TimeoutExpired:
            raise _stopped(path, f"{limits['wall_seconds']} s were over") from None
        answer.seek(0)
        lines = answer.read(_MAX_ANSWER).decode(errors="replace").splitlines()
        if not lines or lines[0] != "ready":
            errors.seek(0)
            said = errors.read(_MAX_ANSWER).decode(errors="replace").strip()
            raise RuntimeError(
                f"the process that reads {printable(path, None)} could not start "
                f"(status {status}): {printable(said[-300:], None)}. Convert the file "
                "elsewhere, to safetensors."
            )
    if status < 0:
        raise _stopped(path, signal.strsignal(-status) or f"signal {-status}")
    if status or len(lines) != 2:
        raise _stopped(path, f"it ended with status {status}")
    return json.loads(lines[1])


def _environment():
    """Return the environment of the child: one thread, no GPU, no secrets."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _stopped(path, why):
    return UnsafeFileError(
        f"{printable(path, None)} could not be read by a process with limits on memory "
        f"and time ({printable(why, 100)}). It is damaged or hostile: get weights as a "
        ".safetensors file instead."
    )


def _notes(about):
    notes = []
    if about["wrapper"] is not None:
        notes.append(f"the weights are those under '{printable(about['wrapper'])}'")
    for key, what in (
        ("ignored", "entries that are no weights were left out"),
        ("tied", "tensors that share memory with others were written on their own"),
        ("not_finite", "NaN or infinity is in"),
    ):
        found = about[key]
        if found["count"]:
            more = [""] * (found["count"] - len(found["names"]))
            notes.append(f"{what}: {handful(found['names'] + more)}")
    return notes
