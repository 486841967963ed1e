import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sklearn_backdoor._image_files import (
    find_classes,
    find_images,
    read_image,
    read_images,
)
from sklearn_backdoor._scan_input import load_folder


def names(folder):
    return [os.path.relpath(path, folder) for path in find_images(folder)]


def save(path, size=(2, 2), mode="RGB", color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_images_are_found_in_order_by_their_endings(tmp_path):
    for name in ("b.png", "a.JPG", "c/d.webp", "c/.hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert names(tmp_path) == ["a.JPG", "b.png", "c/.hidden.png", "c/d.webp"]


def test_links_to_folders_are_not_followed_and_links_to_files_are(tmp_path):
    save(tmp_path / "in/a.png")
    save(tmp_path / "out/b.png")
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    (tmp_path / "in/self").symlink_to("self")
    (tmp_path / "in/away").symlink_to(tmp_path / "out")
    (tmp_path / "in/b.png").symlink_to(tmp_path / "out/b.png")
    assert names(tmp_path / "in") == ["a.png", "b.png"]
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes/cat").symlink_to(tmp_path / "in")
    (tmp_path / "classes/self").symlink_to("self")
    assert list(find_classes(tmp_path / "classes")) == ["cat"]


def test_folders_nested_past_what_a_path_can_say_are_an_error_of_their_own(tmp_path):
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(50):
        os.mkdir("d" * 100, dir_fd=place)
        inner = os.open("d" * 100, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    save(tmp_path / "e/a.png")
    failed = []
    assert list(find_images(tmp_path, failed.append)) == [str(tmp_path / "e/a.png")]
    assert len(failed) == 1 and "too long" in str(failed[0])
    with pytest.raises(OSError, match="too long"):
        list(find_images(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", b"\x89PNG\r\n\x1a\nnothing", b"GIF89a" + bytes(40), b"%!PS\n"],
)
def test_what_is_no_image_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a\x1b.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\\x1b.png' is no readable image: .*emove"):
        read_image(path)


def test_a_pipe_a_folder_and_nothing_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, words in [
        ("pipe.png", "no regular file"),
        ("folder.png", "no regular file"),
        ("absent.png", "No such file"),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            read_image(tmp_path / name)


def bomb(width, height):
    """Return a PNG of a few bytes that claims to be large."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(bomb(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="bomb.png"):
            read_image(tmp_path / "bomb.png")


def test_a_truncated_image_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for suffix in (".png", ".jpg", ".bmp", ".tif", ".webp", ".ppm"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(pixels).save(path)
        content = path.read_bytes()
        assert read_image(path).shape == (3, 40, 40)
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="no readable image"):
            read_image(path)


def test_more_than_8_bits_are_refused_and_not_cut_off(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((2, 2), 1000, dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match="more than 8 bits"):
        read_image(path, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pixels_are_channels_first_in_the_channels_asked_for(tmp_path, mode):
    save(tmp_path / "a.png", (3, 2), mode, 1)
    expected = Image.open(tmp_path / "a.png")
    grey = np.asarray(expected.convert("L"))
    colour = np.asarray(expected.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 1), grey[None])
    found = read_image(tmp_path / "a.png", 3)
    assert found.shape == (3, 2, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, colour.transpose(2, 0, 1))
    assert read_image(tmp_path / "a.png", 3, (5, 4)).shape == (3, 5, 4)


def test_sizes_that_differ_are_refused_with_the_remedy(tmp_path):
    save(tmp_path / "a.png", (3, 2))
    save(tmp_path / "b.png", (2, 2))
    with pytest.raises(ValueError, match=r"b.png.*\(2, 2\).*\(2, 3\).*--image-size"):
        read_images([tmp_path / "a.png", tmp_path / "b.png"])


def test_images_are_drawn_before_they_are_read(tmp_path):
    for number in range(9):
        save(tmp_path / f"cat/{number}.png", mode="L", color=number)
    kept = load_folder(tmp_path, per_class=3, n_channels=1)
    drawn = np.sort(np.random.default_rng(0).permutation(9)[:3])
    np.testing.assert_array_equal(kept.X[:, 0, 0, 0], drawn)
    for number in set(range(9)) - set(drawn.tolist()):
        (tmp_path / f"cat/{number}.png").write_bytes(b"broken")
    again = load_folder(tmp_path, per_class=3, n_channels=1)
    np.testing.assert_array_equal(again.X, kept.X)
