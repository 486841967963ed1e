"""A guard's two files: written as one, and read only as they were written."""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import sklearn_backdoor
from sklearn_backdoor._guard_values import damaged, take
from sklearn_backdoor._text import printable

MANIFEST, ARRAYS = "guard.json", "guard.safetensors"
FORMAT, SCHEMA = "sklearn_backdoor guard", 1
_MOST_MANIFEST = 16 * 2**20  # bytes: 1000 classes need about one for each target
_MOST_ARRAYS = 4 * 2**30
_PART = ".guard-"  # prefix of what is being written


def write_files(directory, content, arrays):
    """Write manifest and arrays, both or none.

    Parameters
    ----------
    directory : path-like
        Made where it is missing. One that holds a guard has that replaced.
    content : dict
        Of plain values, for the manifest.
    arrays : dict from str to ndarray
        C-contiguous.

    Raises
    ------
    FileExistsError
        If the directory holds something else than a guard.
    OSError
        If the files cannot be written; nothing half-written is left.
    ValueError
        If they would be larger than `read_files` takes.
    """
    directory = Path(directory)
    _check_place(directory)
    n_bytes = sum(array.nbytes for array in arrays.values())
    if n_bytes > _MOST_ARRAYS:
        raise ValueError(
            f"the guard's arrays take {n_bytes} bytes, at most {_MOST_ARRAYS} are "
            "saved. Use fewer features (PCA, or the discriminant step) or diagonal "
            "covariances."
        )
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_PART, dir=directory) as part:
            _write_parts(Path(part), content, arrays)
            _move_into_place(Path(part), directory)
    except BaseException as error:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise OSError(
            f"the guard could not be written to {directory} ({error}). Free space, or "
            "give a directory that you may write to."
        ) from error


def _check_place(directory):
    if directory.is_dir():
        found = [one for one in directory.iterdir() if not one.name.startswith(_PART)]
        if not found or _is_guard(directory / MANIFEST):
            return
        what = f"holds {printable(found[0].name)} and no guard"
    elif directory.exists() or directory.is_symlink():
        what = "is no directory"
    else:
        return
    raise FileExistsError(
        f"{directory} {what}, and is left as it is. Give a new or empty directory."
    )


def _is_guard(path):
    try:
        return json.loads(_read_text(path))["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _write_parts(part, content, arrays):
    save_file(arrays, part / ARRAYS)
    tensors = {name: _listing(array) for name, array in arrays.items()}
    content = {
        "format": FORMAT,
        "schema": SCHEMA,
        **content,
        "arrays": {
            "bytes": (part / ARRAYS).stat().st_size,
            "sha256": _file_digest(part / ARRAYS),
            "tensors": tensors,
        },
    }
    text = _text_of(content)
    if len(text) > _MOST_MANIFEST:
        raise ValueError(
            f"the guard's {MANIFEST} would take {len(text)} bytes, at most "
            f"{_MOST_MANIFEST} are read: it has too many classes and densities."
        )
    (part / MANIFEST).write_bytes(text)
    for name in (ARRAYS, MANIFEST):  # on the disk before they get their names
        with open(part / name, "rb+") as file:
            os.fsync(file.fileno())


def _move_into_place(part, directory):
    fresh = not (directory / MANIFEST).exists()
    try:
        # between the two, the manifest (if any) does not match and is refused
        os.replace(part / ARRAYS, directory / ARRAYS)
        os.replace(part / MANIFEST, directory / MANIFEST)
    except OSError:
        if fresh:
            (directory / ARRAYS).unlink(missing_ok=True)
        raise


def _text_of(content):
    """Return the manifest's one text: any other is an altered one."""
    body = json.dumps(content, indent=1, allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def _listing(array):
    return [array.dtype.str, list(array.shape)]


def read_files(directory):
    """Read manifest and arrays, and compare them with their digests.

    Parameters
    ----------
    directory : path-like

    Returns
    -------
    content : dict
        As written; that its values are plain is all that is known of them.
    arrays : dict from str to ndarray

    Raises
    ------
    FileNotFoundError
        If one of them is missing.
    ValueError
        If one is altered, truncated, no regular file, or of an unknown schema.
    """
    directory = Path(directory)
    content = _read_manifest(directory / MANIFEST)
    try:
        return content, _read_arrays(directory / ARRAYS, take(content, "arrays", dict))
    except SafetensorError as error:
        raise damaged(f"{directory / ARRAYS} ({printable(error, 200)})") from None


def _read_manifest(path):
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(f"{path} cannot be read ({printable(error, 200)})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no guard's: expected what guard.save wrote.")
    if content.get("schema") != SCHEMA:
        versions = content.get("versions")
        raise ValueError(
            f"{path} has schema {printable(content.get('schema'))}, but this version "
            f"of sklearn_backdoor ({sklearn_backdoor.__version__}) reads {SCHEMA}. It "
            f"was written by {printable(versions, 200)}: use that, or fit again."
        )
    content.pop("sha256", None)
    try:
        same = _text_of(content) == text
    except ValueError:  # NaN, which no manifest has
        same = False
    if not same:
        raise damaged(f"{path} does not match its own digest")
    return content


def _read_text(path):
    size = _size_of_regular(path)
    if size > _MOST_MANIFEST:
        raise ValueError(
            f"{path} has {size} bytes, more than the {_MOST_MANIFEST} that a guard's "
            "may have. It is none that guard.save wrote."
        )
    with open(path, "rb") as file:
        return file.read(_MOST_MANIFEST)


def _size_of_regular(path):
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist. Give the directory that guard.save wrote, whole."
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"{path} is a link, a directory or a device, expected a regular file. Copy "
            "the directory that guard.save wrote, files and all."
        )
    return found.st_size


def _read_arrays(path, expected):
    size, limit = _size_of_regular(path), _MOST_ARRAYS + _MOST_MANIFEST
    if size != take(expected, "bytes", int) or size > limit:
        raise damaged(
            f"{path} has {size} bytes, expected {expected['bytes']} and at most "
            f"{limit}; perhaps it belongs to another {MANIFEST}"
        )
    if _file_digest(path) != take(expected, "sha256", str):
        raise damaged(
            f"{path} does not match the digest in {MANIFEST}; perhaps a save was cut "
            "off, or the files of two guards were mixed"
        )
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    listed = take(expected, "tensors", dict)
    if differing := sorted(arrays.keys() ^ listed.keys()):
        raise damaged(f"{path} lacks or adds {printable(differing, 200)}")
    for name, array in arrays.items():
        if _listing(array) != listed[name]:
            raise damaged(f"{path} has another dtype or shape of {printable(name)}")
    return arrays


def _file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
