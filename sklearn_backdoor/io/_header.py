"""The header of a safetensors file, checked before anything else reads the file.

Reference: the format's README, "Format" and "Design choices".
"""

import json
import math
from typing import NamedTuple

from sklearn_backdoor._text import printable
from sklearn_backdoor.io._errors import UnsafeFileError, damaged

MAX_HEADER = 8 * 2**20  # some 50 000 tensors
_MAX_DIMENSIONS = 16
_ITEM_SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8},
}


class Entry(NamedTuple):
    """A tensor in a file: the name of its type, such as "F32", and its shape."""

    dtype: str
    shape: tuple


def kind(dtype):
    """Return the kind of a type by its name in a file.

    Parameters
    ----------
    dtype : str
        Such as "F32", "BF16", "I64", "BOOL".

    Returns
    -------
    {"floating point", "integer", "boolean", "complex"}
    """
    if dtype == "BOOL":
        return "boolean"
    return {"F": "floating point", "B": "floating point", "C": "complex"}.get(
        dtype[0], "integer"
    )


def read_header(file, size, path):
    """Return the tensors that a safetensors file holds.

    Parameters
    ----------
    file : file
        Binary.
    size : int
        Of the file in bytes.
    path : path-like
        For messages.

    Returns
    -------
    dict of str to Entry

    Raises
    ------
    UnsafeFileError
        If the header is longer than the file or 8 MB, no JSON, or names a tensor twice;
        or the tensors overlap, leave gaps, or their shapes do not fit their bytes.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise damaged(path, f"its header claims {length:,} bytes of a file of {size:,}")
    if length > MAX_HEADER:
        raise UnsafeFileError(
            f"{printable(path, None)} has a header of {length:,} bytes, expected at "
            f"most {MAX_HEADER:,}. Get the weights alone, as "
            "safetensors.torch.save_file writes them."
        )
    header = _parse(file.read(length), path)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict):
        raise damaged(path, "__metadata__ is no object")
    spans = []
    entries = {}
    for name, value in header.items():
        entries[name], span = _entry(name, value, path)
        spans.append((*span, name))
    _check_spans(spans, size - 8 - length, path)
    return entries


def _parse(content, path):
    try:
        header = json.loads(content.decode(), object_pairs_hook=_once)
    except UnsafeFileError as error:
        raise damaged(path, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is no JSON ({printable(error, 80)})") from None
    if not isinstance(header, dict):
        raise damaged(path, "its header is no object")
    return header


def _once(pairs):
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise UnsafeFileError(f"it names {printable(name)} twice")
        found[name] = value
    return found


def _entry(name, value, path):
    shown = printable(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{shown} lacks type, shape or place, or has more")
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise UnsafeFileError(
            f"{printable(path, None)} holds {shown} of type {printable(dtype, 20)}, "
            f"expected one of {', '.join(_ITEM_SIZES)}. Have the weights saved in "
            "float32 or float16."
        )
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise damaged(path, f"the shape of {shown} is no list of sizes")
    if not _are_sizes(span) or len(span) != 2:
        raise damaged(path, f"the place of {shown} is no pair of offsets")
    n_bytes = math.prod(shape) * _ITEM_SIZES[dtype]
    if span[1] - span[0] != n_bytes:
        raise damaged(
            path,
            f"{shown} of shape {tuple(shape)} takes {n_bytes:,} bytes, not "
            f"{span[1] - span[0]:,}",
        )
    return Entry(dtype, tuple(shape)), span


def _are_sizes(values):
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**48 for value in values
    )


def _check_spans(spans, n_bytes, path):
    """Refuse tensors that overlap, leave gaps or do not end with the file."""
    stop = 0
    for start, end, name in sorted(spans):
        if start != stop:
            what = "overlaps another tensor" if start < stop else "leaves a gap"
            raise damaged(path, f"{printable(name)} {what}")
        stop = end
    if stop != n_bytes:
        raise damaged(path, f"its tensors take {stop:,} bytes, but it has {n_bytes:,}")
