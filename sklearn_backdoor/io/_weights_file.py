"""A file of weights, opened as safetensors whatever it was."""

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sklearn_backdoor.io._errors import UnsafeFileError
from sklearn_backdoor.io._files import (
    check_unchanged,
    kind_of,
    open_file,
    signature,
)
from sklearn_backdoor.io._header import read_header
from sklearn_backdoor.io._sandbox import to_safetensors


class WeightsFile(NamedTuple):
    """A safetensors file whose header was checked.

    ``path`` is where it lies, ``entries`` a dict of name to `Entry`, ``notes`` what was
    left out on the way.
    """

    path: Path
    entries: dict
    notes: list


@contextmanager
def open_weights(path):
    """Open a file of weights by its content; a state dict is converted on the side.

    Parameters
    ----------
    path : path-like

    Yields
    ------
    WeightsFile

    Raises
    ------
    OSError
        If the file cannot be read.
    UnsafeFileError
        If it is unsafe, damaged or of another kind, or changes meanwhile.
    """
    with open_file(path) as file:
        before = signature(file)
        try:
            if kind_of(file, path) == "safetensors":
                yield WeightsFile(Path(path), read_header(file, before[2], path), [])
            else:
                with tempfile.TemporaryDirectory(prefix="sklearn-backdoor-") as folder:
                    out = Path(folder) / "weights.safetensors"
                    notes = to_safetensors(file, path, out)
                    yield WeightsFile(out, header_of(out, path), notes)
        except UnsafeFileError:
            check_unchanged(file, before, path)  # then that is why
            raise
        check_unchanged(file, before, path)


def header_of(converted, path):
    """Return the tensors of a file that the child wrote; it too is not trusted.

    Parameters
    ----------
    converted : Path
    path : path-like
        Of the file that it was made from, for messages.

    Returns
    -------
    dict of str to Entry
    """
    with open_file(converted) as file:
        return read_header(file, signature(file)[2], path)
