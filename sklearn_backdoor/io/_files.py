"""Files by their content: never by the suffix, and never waiting for a pipe."""

import hashlib
import os
import pickletools
import stat

from sklearn_backdoor._text import printable
from sklearn_backdoor.io._errors import UnsafeFileError, damaged, refused

MAX_BYTES = 16 * 2**30  # no image classifier is larger
_HEAD = 2**16
_MAGIC = {
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": (
        "is of torch's format from before 1.6 (raw pickles)"
    ),
    b"\x89HDF": "is an HDF5 file, as Keras writes",
    b"\x1f\x8b": "is a gzip file",
    b"BZh": "is a bzip2 file",
    b"\xfd7zXZ": "is an xz file",
    b"(\xb5/\xfd": "is a zstd file",
    b"\x04\x22\x4d\x18": "is an lz4 file",
    b"7z\xbc\xaf": "is a 7-Zip file",
    b"Rar!": "is a RAR file",
    b"x\x01": "is a zlib stream, as joblib writes (a pickle inside)",
    b"x^": "is a zlib stream, as joblib writes (a pickle inside)",
    b"x\x9c": "is a zlib stream, as joblib writes (a pickle inside)",
    b"x\xda": "is a zlib stream, as joblib writes (a pickle inside)",
    b"]\x00\x00": "is an LZMA stream, as joblib writes (a pickle inside)",
    b"\x93NUMPY": "is a NumPy file",
    b"GGUF": "is a GGUF file",
    b"\x7fELF": "is a program",
    b"MZ": "is a program",
    b"version https://git-lfs": (
        "is a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
    ),
    b"<!DOCTYPE": "is a web page, not a file of weights: download the file itself",
    b"<html": "is a web page, not a file of weights: download the file itself",
}


def open_file(path):
    """Open a regular file for reading; a pipe or device is refused, not waited for.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    file
        Binary.

    Raises
    ------
    OSError
        If it does not exist or cannot be read.
    UnsafeFileError
        If it is no regular file, or larger than any weights.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    shown = printable(path, None)
    try:
        number = os.open(path, flags)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{shown} does not exist. Give the file of the network's weights."
        ) from None
    except OSError as error:
        if os.path.exists(path) and not os.path.isfile(path):  # a socket, say
            raise _irregular(shown) from None
        raise OSError(f"{shown} cannot be read: {error.strerror}.") from error
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        os.close(number)
        if not stat.S_ISREG(status.st_mode):
            raise _irregular(shown)
        raise UnsafeFileError(
            f"{shown} has {status.st_size:,} bytes, expected at most {MAX_BYTES:,} for "
            "the weights of an image classifier. Get the weights alone."
        )
    return os.fdopen(number, "rb")


def _irregular(shown):
    return UnsafeFileError(
        f"{shown} is no regular file. Give a .safetensors file, or a state dict that "
        "torch.save wrote."
    )


def signature(file):
    """Return what changes when a file is written to: device, inode, size and time.

    Parameters
    ----------
    file : file

    Returns
    -------
    tuple
    """
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(file, before, path):
    """Refuse a file that was written to while it was read.

    Parameters
    ----------
    file : file
    before : tuple
        Its `signature`.
    path : path-like
    """
    if signature(file) != before:
        raise UnsafeFileError(
            f"{printable(path, None)} changed while it was read. Wait until it is "
            "there whole, then try again."
        )


def file_digest(path):
    """Return the SHA-256 of a file, in hexadecimal.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    str

    Raises
    ------
    OSError
        If it does not exist or cannot be read.
    UnsafeFileError
        If it is no regular file.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of(file, path):
    """Tell a safetensors file from a ZIP file; refuse anything else by what it is.

    Parameters
    ----------
    file : file
    path : path-like

    Returns
    -------
    {"safetensors", "zip"}

    Raises
    ------
    UnsafeFileError
    """
    file.seek(0)
    head = file.read(_HEAD)
    size = os.fstat(file.fileno()).st_size
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")):
        return "zip"
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise refused(path, f"{what}, whatever its name")
    if head[257:262] == b"ustar":
        raise refused(path, "is a tar file, as torch wrote before 0.1.10")
    wanted = _pickled(head)
    if wanted is not None:
        raise refused(path, f"is a pickle{wanted}, whatever its name")
    raise damaged(path, "it is empty" if not head else _why(head, size))


def _why(head, size):
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{":
        return f"its header claims {length:,} bytes of a file of {size:,}"
    return "it starts like no known file of weights"


def _pickled(head):
    """Return whose objects a pickle asks for, "" if it asks for none, None if none."""
    steps, found, stopped = 0, "", False
    texts: list[str] = []
    try:
        for code, value, _ in pickletools.genops(head):
            steps += 1
            stopped = code.name == "STOP"
            if code.name in ("GLOBAL", "INST"):
                found = str(value).replace(" ", ".")
            elif code.name == "STACK_GLOBAL":
                found = ".".join(texts[-2:])
            elif isinstance(value, str):
                texts.append(value)
            if found:
                break
    except Exception:  # whatever garbage, or cut off: the question is how far it got
        pass
    if not (found or stopped or head[:1] == b"\x80" and 2 <= steps):
        return None
    return f" that asks for {printable(found, 80)}" if found else ""
