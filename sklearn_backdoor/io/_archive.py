"""The ZIP file of a state dict, looked at from outside before torch opens it.

Whatever `torch.save` does not write is refused: two readers that take such a file
differently are how a check is passed by a file that is another for the reader.

Reference: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.4.
"""

import re
import stat
import struct
import zipfile
import zlib
from typing import NamedTuple

from sklearn_backdoor._text import printable
from sklearn_backdoor.io._errors import UnsafeFileError, damaged, refused

MAX_ENTRIES = 20_000
MAX_DIRECTORY = 4 * 2**20
MAX_PICKLE = 4 * 2**20  # of names and shapes; the largest networks take 0.3 MB
_MAX_SMALL = 4096  # bytes of a version, a byte order, an alignment
_CHUNK = 2**20
_WHAT = "ZIP file of torch.save"
_KNOWN = re.compile(
    r"data\.pkl|data/[0-9]{1,9}|version|byteorder|\.data/serialization_id"
    r"|\.format_version|\.storage_alignment"
)
_OTHERS = {  # a name that gives a kind of file away
    r"[^/]+/(code/.*|constants\.pkl|bytecode\.pkl)": (
        "is a TorchScript archive: it holds code. Have the state dict saved instead"
    ),
    r"([^/]+/)?(archive_format|serialized_exported_program\.json|models/.*\.json)": (
        "is a .pt2 exported program, whose reading falls back to unpickling"
    ),
    r".*\.npy": "is a NumPy .npz file",
    r"schema\.json": "is a skops file",
    r"model\.weights\.h5": "is a Keras file",
    r".*\.(zip|pt|pth|pkl|bin|ckpt|joblib)": "holds another file",
}


class Archive(NamedTuple):
    """What a ZIP file of torch.save holds: the pickle, and bytes a storage."""

    pickle: bytes
    storages: dict


def read_archive(file, size, path):
    """Return the pickle and the sizes of the storages, everything checked.

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
    Archive

    Raises
    ------
    UnsafeFileError
        If the file is cut off, something stands before, between or after its entries;
        an entry is compressed, encrypted, a link, twice there, overlaps another, has a
        name that torch.save does not write, or another size or checksum than it claims.
    """
    directory = _check_end(file, size, path)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise damaged(path, printable(error, 100), _WHAT) from None
    if len(entries) != directory.n_entries:
        raise damaged(path, "its directory claims another number of entries", _WHAT)
    names = _check_names(entries, path)
    starts = _check_places(file, entries, directory.start, path)
    content, storages = b"", {}
    for name, entry, start in zip(names, entries, starts, strict=True):
        if name.startswith("data/"):
            storages[name.removeprefix("data/")] = entry.file_size
        elif entry.file_size > (MAX_PICKLE if name == "data.pkl" else _MAX_SMALL):
            raise UnsafeFileError(
                f"{printable(path, None)} holds {name} of {entry.file_size:,} bytes, "
                "more than a state dict needs. Get the state dict alone."
            )
        read = _read(file, entry, start, path, keep=name == "data.pkl")
        content = content or read
    if not content:
        raise refused(path, "is a ZIP file without data.pkl: torch.save did not write")
    return Archive(content, storages)


class _Directory(NamedTuple):
    start: int
    n_entries: int


def _check_end(file, size, path):
    """Return place and count of the entries, which both end records have to agree on.

    Python's reader takes the whole directory into memory: bounded here, before it.
    """
    file.seek(max(size - 98, 0))
    end = file.read(98)
    if len(end) < 22 or end[-22:-18] != b"PK\x05\x06":
        raise damaged(
            path, "its end record is not at its end: cut off, or continued", _WHAT
        )
    disk, first, *narrow, _ = struct.unpack("<4H2LH", end[-18:])
    n_here, n_entries, n_bytes, start = narrow
    stop = size - 22
    if end[-42:-38] == b"PK\x06\x07" and len(end) == 98:
        wide = struct.unpack("<4sQ2H2L4Q", end[:56])
        agree = all(
            a == b or a in (0xFFFF, 0xFFFFFFFF)
            for a, b in zip(narrow, wide[6:], strict=True)
        )
        if wide[0] != b"PK\x06\x06" or not agree:
            raise damaged(path, "its two end records differ", _WHAT)
        n_here, n_entries, n_bytes, start = wide[6:]
        stop = size - 98
    if disk or first or n_here != n_entries or start + n_bytes != stop:
        raise damaged(path, "its directory is not where its end record says", _WHAT)
    if n_entries > MAX_ENTRIES or n_bytes > MAX_DIRECTORY:
        raise UnsafeFileError(
            f"{printable(path, None)} has {n_entries:,} entries in a directory of "
            f"{n_bytes:,} bytes, expected at most {MAX_ENTRIES:,}. Get the state dict "
            "alone."
        )
    return _Directory(start, n_entries)


def _check_names(entries, path):
    """Return the names below the one folder; refuse what torch.save never writes."""
    for entry in entries:
        shown = printable(entry.orig_filename)
        mode = entry.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or entry.is_dir():
            raise refused(path, f"holds {shown}, a link or folder")
        if entry.flag_bits & 0x2041:
            raise refused(path, f"holds {shown}, which is encrypted")
        parts = entry.orig_filename.split("/")
        if re.search(r"[\\\x00:]", entry.orig_filename) or {"", "..", "."} & set(parts):
            raise refused(path, f"holds {shown}, a name that leads elsewhere")
    _name_others([entry.orig_filename for entry in entries], path)
    roots = {entry.orig_filename.partition("/")[0] for entry in entries}
    if len(roots) != 1:
        raise refused(path, f"is a ZIP file of {len(roots)} folders, expected one")
    names = [entry.orig_filename.partition("/")[2] for entry in entries]
    for name, entry in zip(names, entries, strict=True):
        if not _KNOWN.fullmatch(name):
            shown = printable(entry.orig_filename)
            raise refused(path, f"holds {shown}, which torch.save does not write")
        if entry.compress_type != zipfile.ZIP_STORED:
            ratio = entry.file_size / max(entry.compress_size, 1)
            raise refused(
                path,
                f"holds {printable(name)} compressed to a {ratio:,.0f}th, which "
                "torch.save never does",
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise refused(path, f"holds {printable(twice)} twice")
    return names


def _name_others(names, path):
    """Refuse another kind of file by what it is, where a name gives it away."""
    unknown = [name for name in names if not _KNOWN.fullmatch(name.partition("/")[2])]
    for pattern, what in _OTHERS.items():
        if any(re.fullmatch(pattern, name, re.DOTALL) for name in unknown):
            raise refused(path, f"{what}, whatever its name")


def _check_places(file, entries, directory, path):
    """Return where the content of each entry starts; none may overlap another."""
    starts, stop = {}, 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        shown = printable(entry.orig_filename)
        if entry.header_offset < stop or (stop == 0 and entry.header_offset != 0):
            raise damaged(path, f"{shown} overlaps another entry, or a gap", _WHAT)
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise damaged(path, f"{shown} is not where the directory says", _WHAT)
        flags, method = struct.unpack("<2H", header[6:10])
        n_name, n_extra = struct.unpack("<2H", header[26:30])
        name = file.read(n_name).decode("utf-8", "replace")
        if name != entry.orig_filename or method != 0 or flags != entry.flag_bits:
            raise damaged(path, f"{shown} is another in its place", _WHAT)
        if entry.file_size != entry.compress_size:
            raise damaged(path, f"{shown} claims two sizes", _WHAT)
        starts[entry.header_offset] = entry.header_offset + 30 + n_name + n_extra
        stop = starts[entry.header_offset] + entry.file_size
        if stop > directory:
            raise damaged(path, f"{shown} runs into the directory", _WHAT)
    return [starts[entry.header_offset] for entry in entries]


def _read(file, entry, start, path, keep):
    """Read an entry, counting; return its content where it is kept."""
    file.seek(start)
    kept, checksum, left = [], 0, entry.file_size
    while left:
        chunk = file.read(min(_CHUNK, left))
        if not chunk:
            raise damaged(path, "it ends within an entry", _WHAT)
        left -= len(chunk)
        checksum = zlib.crc32(chunk, checksum)
        if keep:
            kept.append(chunk)
    if checksum != entry.CRC:
        shown = printable(entry.orig_filename)
        raise damaged(path, f"the checksum of {shown} is wrong", _WHAT)
    return b"".join(kept)
