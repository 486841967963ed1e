"""Files of other kinds, and what is no file."""

import gzip
import os
import socket
import zlib
from pathlib import Path

from tests.hostile.making import (
    CASES,
    case,
    write,
)

# ---- other files, and no files


def magic(name, content, words):
    CASES[name] = (lambda folder: write(folder, content, "weights.pt")), (words,)


magic("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file")
magic("numpy", b"\x93NUMPY\x01\x00" + bytes(100), "is a NumPy file")
magic("gguf", b"GGUF" + bytes(100), "is a GGUF file")
magic("gzip_of_weights", gzip.compress(b"PK\x03\x04" * 99), "is a gzip file")
magic("zlib_bomb", zlib.compress(bytes(10**7)), "is a zlib stream")
magic("web_page", b"<!DOCTYPE html><html>Sign in</html>", "is a web page")
magic("pointer_of_lfs", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")
magic("elf", b"\x7fELF" + bytes(100), "is a program")


@case("is no regular file")
def folder_of_weights(folder):
    return Path(folder)


@case("is no regular file")
def pipe_that_nobody_writes_to(folder):
    os.mkfifo(Path(folder) / "weights.pt")
    return Path(folder) / "weights.pt"


@case("is no regular file")
def device_that_never_ends(folder):
    (Path(folder) / "weights.safetensors").symlink_to("/dev/zero")
    return Path(folder) / "weights.safetensors"


@case("is no regular file")
def socket_of_a_server(folder):
    here = os.getcwd()
    os.chdir(folder)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("weights.pt")
    finally:
        os.chdir(here)
    return Path(folder) / "weights.pt"


@case("does not exist")
def link_to_nothing(folder):
    (Path(folder) / "weights.pt").symlink_to("absent")
    return Path(folder) / "weights.pt"


@case("bytes, expected at most")
def file_of_a_terabyte(folder):
    path = write(folder, b"PK\x03\x04")
    os.truncate(path, 2**40)
    return path
