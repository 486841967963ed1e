"""ZIP files of another kind, and ZIP files that are broken or lie."""

import pickle
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np

from tests.hostile.making import (
    CASES,
    Payload,
    archive,
    case,
    honest,
    state,
    torch_save,
)

# ---- ZIP files of another kind, or broken


def by_zip(folder, entries, name):
    return archive(folder, {entry: b"{}" for entry in entries}, name=name)


@case("is a TorchScript archive")
def torchscript(folder):
    entries = {**honest(), "archive/constants.pkl": b"\x80\x02)."}
    entries["archive/code/__torch__.py"] = b"class Net(Module): ..."
    return archive(folder, entries, name="weights.pth")


@case("is a TorchScript archive")
def torchscript_for_mobiles(folder):
    return archive(folder, {**honest(), "archive/bytecode.pkl": b"\x80\x02)."})


@case("is a .pt2 exported program")
def exported_program(folder):
    names = ("archive_format", "models/model.json", "data/weights/model.pt")
    return by_zip(folder, [f"net/{name}" for name in names], "network.pt2")


@case("is a .pt2 exported program")
def exported_program_of_old(folder):
    names = ("serialized_exported_program.json", "serialized_state_dict.pt", "version")
    return by_zip(folder, names, "weights.safetensors")


@case("is a NumPy .npz file")
def numpy_archive_of_objects(folder):
    path = Path(folder) / "weights.npz"
    np.savez(path, w=np.array([Payload(folder)], dtype=object))
    return path


@case("is a skops file")
def skops_file(folder):
    return by_zip(folder, ["schema.json"], "model.skops")


@case("is a Keras file")
def keras_file(folder):
    names = ["metadata.json", "config.json", "model.weights.h5"]
    return by_zip(folder, names, "model.keras")


@case("holds another file")
def zip_in_a_zip(folder):
    inner = torch_save(folder, {"x": Payload(folder)}).read_bytes()
    return archive(folder, {"archive/weights.pt": inner}, name="outer.zip")


@case("data.pkl")
def zip_without_a_pickle(folder):
    entries = honest()
    del entries["archive/data.pkl"]
    return archive(folder, entries)


@case("ZIP file of torch.save|0 folders")
def zip_of_nothing(folder):
    return archive(folder, {})


@case("is a ZIP file of 2 folders")
def zip_of_two_folders(folder):
    return archive(folder, {**honest(), "other/data.pkl": b"\x80\x02N."})


@case("compressed to a")
def zip_bomb(folder):
    path = Path(folder) / "weights.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in honest().items():
            file.writestr(name, content)
        with file.open("archive/data/2", "w") as entry:
            for _ in range(100):
                entry.write(bytes(2**20))
    return path


def patched(folder, change, entries=None):
    """Write an honest archive, and let a function change its bytes."""
    path = archive(folder, entries or honest())
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)
    return path


def directory_place(content, number=0, field=0):
    """Return where a field of an entry of the central directory stands."""
    place = -1
    for _ in range(number + 1):
        place = content.index(b"PK\x01\x02", place + 1)
    return place + field


@case("runs into the directory|claims two sizes|overlaps")
def sizes_that_are_lies(folder):
    def change(content):
        place = directory_place(content, 2, 20)
        content[place : place + 8] = struct.pack("<2L", 2**31, 2**31)

    return patched(folder, change)


@case("claims two sizes")
def two_sizes_of_an_entry(folder):
    def change(content):
        place = directory_place(content, 2, 24)
        content[place : place + 4] = struct.pack("<L", 2**31)

    return patched(folder, change)


@case("is another in its place|overlaps")
def entries_that_overlap(folder):
    def change(content):
        target = directory_place(content, 3, 42)
        source = directory_place(content, 2, 42)
        content[target : target + 4] = content[source : source + 4]

    return patched(folder, change)


@case("is another in its place")
def entry_of_two_names(folder):
    def change(content):
        place = content.index(b"archive/data/0")  # the local header, not the directory
        content[place : place + 14] = b"archive/data/9"

    return patched(folder, change)


@case("encrypted")
def entry_that_is_encrypted(folder):
    def change(content):
        content[directory_place(content, 1, 8)] |= 1

    return patched(folder, change)


@case("a name that leads elsewhere")
def entry_of_an_absolute_name(folder):
    return archive(folder, {**honest(), "/etc/cron.d/x": b"x"})


@case("a name that leads elsewhere")
def entry_that_climbs(folder):
    return archive(folder, {**honest(), "archive/../../x": b"x"})


@case("a name that leads elsewhere")
def entry_with_a_backslash(folder):
    return archive(folder, {**honest(), "archive\\..\\x": b"x"})


@case("a link or folder")
def entry_that_is_a_link(folder):
    path = archive(folder, honest())
    entry = zipfile.ZipInfo("archive/data/7")
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(entry, "/etc/passwd")
    return path


@case("a link or folder")
def entry_that_is_a_folder(folder):
    return archive(folder, {"archive/": b"", **honest()})


@case("twice")
def entry_that_is_there_twice(folder):
    def change(content):  # in the local header and in the directory
        return content.replace(b"archive/data/1", b"archive/data/0")

    return patched(folder, change)


@case("which torch.save does not write")
def entry_in_capital_letters(folder):
    return archive(folder, {**honest(), "archive/DATA.PKL": pickle.dumps({})})


@case(r"\x1b[31m")
def entry_of_a_name_with_escapes(folder):
    return archive(folder, {**honest(), "archive/\x1b[31m\u202e": b"x"})


@case("checksum")
def one_bit_of_the_weights_flipped(folder):
    def change(content):
        content[content.index(b"archive/data/0") + 20] ^= 1

    return patched(folder, change)


@case("entries in a directory")
def thirty_thousand_entries(folder):
    many = {f"archive/data/{number}": b"" for number in range(30_000)}
    return archive(folder, {**honest(), **many})


@case("end record")
def zip_with_something_behind(folder):
    return patched(folder, lambda content: content + pickle.dumps(Payload(folder)))


@case("end record")
def zip_with_a_comment(folder):
    path = archive(folder, honest())
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"x" * 100
    return path


@case("is a program")
def program_with_a_zip_behind(folder):
    return patched(folder, lambda content: b"MZ" + bytes(100) + content)


@case("two end records differ")
def two_end_records(folder):
    path = torch_save(folder, state())
    content = bytearray(path.read_bytes())
    content[-74] ^= 1  # the count in the wide record
    path.write_bytes(content)
    return path


def cut(share):
    def make(folder):
        path = torch_save(folder, state())
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    return make


for percent in (1, 25, 50, 75, 99):
    CASES[f"torch_save_cut_off_at_{percent}_percent"] = (
        cut(percent / 100),
        ("cut off",),
    )
