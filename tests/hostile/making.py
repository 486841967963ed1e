"""What all files share: how one is registered, written, and would run code."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from tests.common import LinearNetwork

CASES: dict = {}  # name -> (function of a folder that returns the path, words)
IN_CHILD = set()  # names of those that pass every look from outside


def case(*words, child=False):
    """Register a function that makes a file, and what its refusal says."""

    def register(make):
        name = make.__name__.strip("_")
        CASES[name] = make, words
        if child:
            IN_CHILD.add(name)
        return make

    return register


def write(folder, content, name="weights.pt"):
    path = Path(folder) / name
    path.write_bytes(content)
    return path


class Payload:
    """What a pickle would run: it makes the folder "canary"."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/canary",)


def state():
    return LinearNetwork().state_dict()


def torch_save(folder, content, **options):
    path = Path(folder) / "weights.pt"
    torch.save(content, path, **options)
    return path


class Code(bytes):
    """Instructions as they are."""


def code(value):
    """Return the instructions of protocol 2 that make a value."""
    if isinstance(value, Code):
        return value
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if abs(value) < 2**31:
            return b"J" + struct.pack("<i", value)
        long = pickle.encode_long(value)
        return b"\x8a" + bytes([len(long)]) + long
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, dict):
        items = b"".join(code(k) + code(v) for k, v in value.items())
        return b"}(" + items + b"u"
    start, stop = {tuple: (b"(", b"t"), list: (b"](", b"e")}[type(value)]
    return start + b"".join(map(code, value)) + stop


def find(module, name):
    return Code(f"c{module}\n{name}\n".encode())


def call(function, *given):
    return Code(code(function) + code(given) + b"R")


def tensor(shape, strides, n_items, *, offset=0, key="0", kind="FloatStorage"):
    storage = code(("storage", find("torch", kind), key, "cpu", n_items)) + b"Q"
    return call(
        find("torch._utils", "_rebuild_tensor_v2"),
        *(Code(storage), offset, shape, strides, False),
        call(find("collections", "OrderedDict")),
    )


def archive(folder, entries, *, name="weights.pt"):
    """Write a ZIP file as torch.save lays it out; contents are bytes by name."""
    path = Path(folder) / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for entry, content in entries.items():
            file.writestr(entry, content)
    return path


def parts(value, storages=None):
    """Return the entries of a ZIP file of torch.save by name."""
    return {
        "archive/data.pkl": b"\x80\x02" + code(value) + b".",
        "archive/byteorder": b"little",
        **{f"archive/data/{key}": one for key, one in (storages or {}).items()},
        "archive/version": b"3\n",
    }


def program(folder, value, storages=None):
    return archive(folder, parts(value, storages))


def honest():
    """Return the entries of an honest state dict by hand."""
    network = {
        "hidden.weight": tensor((16, 16), (16, 1), 256),
        "last.weight": tensor((6, 16), (16, 1), 96, key="1"),
    }
    return parts(network, {"0": bytes(1024), "1": bytes(384)})
