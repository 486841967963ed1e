"""Files of safetensors whose header lies, or whose weights do not fit."""

import json
import math
import os
import pickle
import struct
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from tests.hostile.making import CASES, Payload, case, state, write

# ---- safetensors


def raw(folder, header, body=b"", name="weights.safetensors"):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return write(folder, struct.pack("<Q", len(header)) + header + body, name)


def entry(start, stop, shape=None, dtype="F32"):
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def tensors(folder, **changes):
    """Save the network's own weights with changes; None leaves one out."""
    content = {**state(), **{k.replace("__", "."): v for k, v in changes.items()}}
    kept = {name: value for name, value in content.items() if value is not None}
    save_file(kept, Path(folder) / "weights.safetensors")
    return Path(folder) / "weights.safetensors"


@case("is empty")
def nothing(folder):
    return write(folder, b"", "weights.safetensors")


@case("starts like no known file")
def seven_bytes(folder):
    return write(folder, b"\x00" * 7, "weights.safetensors")


@case("starts like no known file")
def noise(folder):
    return write(folder, b"\xff" * 1000, "weights.safetensors")


@case("starts like no known file")
def header_of_no_length(folder):
    return raw(folder, b"")


@case("header claims")
def header_longer_than_the_file(folder):
    return write(folder, struct.pack("<Q", 2**62) + b'{"a":1}', "weights.safetensors")


@case("has a header of 100,000,000 bytes")
def header_of_100_megabytes(folder):
    path = write(folder, struct.pack("<Q", 10**8) + b"{", "weights.safetensors")
    os.truncate(path, 10**8 + 100)
    return path


@case("no JSON")
def header_that_is_no_json(folder):
    return raw(folder, b"{'a': 1}")


@case("no JSON")
def header_that_is_no_text(folder):
    return raw(folder, b"{\xff\xfe}")


@case("no JSON")
def header_nested_deeply(folder):
    return raw(folder, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@case("no JSON")
def header_with_a_number_of_a_million_digits(folder):
    return raw(folder, b'{"a":' + b"9" * 1_000_000 + b"}")


@case("twice")
def tensor_named_twice(folder):
    one = json.dumps(entry(0, 4))
    return raw(
        folder, f'{{"last.weight":{one},"last.weight":{one}}}'.encode(), bytes(4)
    )


@case("overlaps another tensor")
def tensors_that_overlap(folder):
    return raw(folder, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))


@case("leaves a gap")
def tensors_with_a_gap(folder):
    return raw(folder, {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))


@case("takes 4 bytes")
def tensor_whose_end_is_before_its_start(folder):
    return raw(folder, {"a": entry(4, 0, [1])}, bytes(4))


@case("but it has 4")
def tensor_beyond_the_file(folder):
    return raw(folder, {"a": entry(0, 400)}, bytes(4))


@case("takes 4,000,000,000,000 bytes, not 4")
def shape_that_does_not_fit_its_bytes(folder):
    return raw(folder, {"a": entry(0, 4, [10**6, 10**6])}, bytes(4))


@case("no list of sizes")
def shape_that_is_negative(folder):
    return raw(folder, {"a": entry(0, 4, [-1, -1])}, bytes(4))


@case("no list of sizes")
def shape_of_a_thousand_dimensions(folder):
    return raw(folder, {"a": entry(0, 4, [1] * 1000)}, bytes(4))


@case("differs in last.weight (F32 (100000000000, 0)")
def shape_that_is_huge_and_empty(folder):
    header = {"hidden.weight": entry(0, 1024, [16, 16])}
    header["last.weight"] = entry(1024, 1024, [10**11, 0])
    return raw(folder, header, bytes(1024))


@case("of type F8_E4M3")
def type_that_is_not_read(folder):
    return raw(folder, {"a": entry(0, 4, dtype="F8_E4M3")}, bytes(4))


@case("no object")
def metadata_that_is_a_list(folder):
    return raw(folder, {"__metadata__": [1], "a": entry(0, 4)}, bytes(4))


@case("lacks type, shape or place")
def entry_that_is_a_number(folder):
    return raw(folder, {"a": 1}, bytes(4))


def cut_safetensors(n_bytes):
    def make(folder):
        return write(folder, save(state())[:n_bytes], "weights.safetensors")

    return make


for n_bytes in (8, 20, 150, -1000, -1):
    CASES[f"safetensors_cut_off_at_{n_bytes}"] = cut_safetensors(n_bytes), ("again",)


@case("but it has")
def safetensors_with_a_pickle_behind(folder):
    return write(folder, save(state()) + pickle.dumps(Payload(folder)), "w.safetensors")


@case("last.weight (F32 (7, 16), not floating point (6, 16))")
def shape_of_another_network(folder):
    return tensors(folder, last__weight=torch.zeros(7, 16))


@case("lacks last.weight")
def tensor_left_out(folder):
    return tensors(folder, last__weight=None)


@case("unexpected", r"\x1b[31m\u202egnp.exe")
def tensor_of_a_name_with_escapes(folder):
    return tensors(folder, **{"\x1b[31m\u202egnp.exe": torch.zeros(2)})


@case("(I32 (6, 16), not floating point")
def whole_numbers(folder):
    return tensors(folder, last__weight=torch.zeros(6, 16, dtype=torch.int32))


@case("(BOOL (6, 16), not floating point")
def booleans(folder):
    return tensors(folder, last__weight=torch.zeros(6, 16, dtype=torch.bool))


@case("(C64 (6, 16), not floating point")
def complex_numbers(folder):
    return tensors(folder, last__weight=torch.zeros(6, 16, dtype=torch.complex64))


@case("NaN or infinity in last.weight")
def weights_of_nan(folder):
    return tensors(folder, last__weight=torch.full((6, 16), math.nan))


@case("NaN or infinity in hidden.weight")
def one_infinite_weight(folder):
    weight = torch.eye(16)
    weight[3, 4] = -math.inf
    return tensors(folder, hidden__weight=weight)


@case("NaN or infinity in last.weight")
def weights_too_large_for_the_network(folder):
    weight = torch.full((6, 16), 1e300, dtype=torch.float64)
    return tensors(folder, last__weight=weight)


@case("DataParallel")
def data_parallel(folder):
    path = Path(folder) / "weights.safetensors"
    save_file({f"module.{name}": value for name, value in state().items()}, path)
    return path
