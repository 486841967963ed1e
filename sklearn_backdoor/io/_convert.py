"""State dicts of torch.save as safetensors files."""

import hashlib
import math
import os
import tempfile
from pathlib import Path

from sklearn_backdoor._text import printable
from sklearn_backdoor.io._errors import UnsafeFileError
from sklearn_backdoor.io._files import (
    check_unchanged,
    file_digest,
    kind_of,
    open_file,
    signature,
)
from sklearn_backdoor.io._sandbox import to_safetensors
from sklearn_backdoor.io._weights_file import header_of


def convert(path, out):
    """Turn a state dict that torch.save wrote into a safetensors file.

    The file is looked at from outside, then read by a process of its own with limits;
    nothing is unpickled here. Values are kept as they are, NaN included.

    Parameters
    ----------
    path : path-like
        A .pt or .pth file of a state dict, or of a dict with one state dict in it.
    out : path-like
        The .safetensors file to write, whole or not at all. An older one is replaced.

    Returns
    -------
    dict
        ``n_tensors``, ``n_parameters`` (numbers in them), ``sha256_in``,
        ``sha256_out`` (hexadecimal), and ``notes`` (list of str): what was left out,
        which tensors shared memory, where NaN or infinity is.

    Raises
    ------
    OSError
        If a file cannot be read or written.
    UnsafeFileError
        If ``path`` is unsafe, damaged or of another kind.
    ValueError
        If ``out`` is the file itself or no regular file.
    RuntimeError
        If no process could be started.
    """
    path, out = Path(path), Path(out)
    with open_file(path) as file:
        if kind_of(file, path) == "safetensors":
            raise UnsafeFileError(
                f"{printable(path, None)} is a safetensors file already, whatever its "
                "name. Load it as it is."
            )
        if out.exists() and (not out.is_file() or out.samefile(path)):
            raise ValueError(
                f"{printable(out, None)} is the file itself, or no regular file. Give "
                "another name."
            )
        if not out.parent.is_dir():
            raise FileNotFoundError(
                f"{printable(out.parent, None)} is no folder. Make it first."
            )
        before = signature(file)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        # beside the result, so that it can be moved in one step
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=out.parent) as folder:
            part = Path(folder) / "weights.safetensors"
            notes = to_safetensors(file, path, part)
            entries = header_of(part, path)
            converted = file_digest(part)
            check_unchanged(file, before, path)
            os.replace(part, out)
    return {
        "n_tensors": len(entries),
        "n_parameters": sum(math.prod(entry.shape) for entry in entries.values()),
        "sha256_in": digest,
        "sha256_out": converted,
        "notes": notes,
    }
