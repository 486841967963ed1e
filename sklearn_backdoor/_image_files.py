"""Image files of unknown origin: found without loops, read without blocking."""

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = tuple(".bmp .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other decoder is run
_MODES = {1: "L", 3: "RGB"}


def find_images(folder, on_error=None):
    """Find the image files below a folder, in alphabetical order.

    Parameters
    ----------
    folder : path-like
    on_error : callable, default=None
        Called with the OSError of a folder that cannot be listed; None raises it.

    Yields
    ------
    str
        Paths that end like an image's. Links to files are among them. Links to folders
        are not followed: they may lead in circles, or out of ``folder``.
    """
    waiting = [os.fspath(folder)]
    while waiting:  # no recursion: folders may be nested without end
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        inner = []
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                yield entry.path
        waiting += reversed(inner)


def find_classes(folder):
    """Find the image files of each class of ``folder/<class>/<image>``.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    dict from str to list of str
        Paths by the names of the folders, both in alphabetical order. The folder of a
        class may be a link.

    Raises
    ------
    FileNotFoundError
        If there are no folders, or one has no images.
    """
    expected = f"{str(folder)!r} holds no images in folders, expected <class>/<image>"
    try:
        with os.scandir(folder) as entries:
            names = sorted(one.name for one in entries if os.path.isdir(one.path))
    except OSError as error:
        raise FileNotFoundError(f"{expected} ({error.strerror}).") from None
    found = {name: list(find_images(Path(folder) / name)) for name in names}
    empty = [name for name, paths in found.items() if not paths]
    if empty or not found:
        why = f"no images for {empty[:5]}" if empty else "no folders"
        raise FileNotFoundError(
            f"{expected} ({why}; images end in {', '.join(SUFFIXES)})."
        )
    return found


def read_image(path, n_channels=3, image_size=None):
    """Read one image, or say why not.

    Parameters
    ----------
    path : path-like
        A bitmap of 8 bits a channel: BMP, JPEG, PNG, PPM, TIFF or WebP, by content.
    n_channels : {1, 3}, default=3
        Grey or RGB, into which others are converted.
    image_size : tuple (height, width), default=None
        Resize to this (bilinear).

    Returns
    -------
    ndarray of shape (n_channels, height, width), uint8

    Raises
    ------
    ValueError
        If it is no regular file (a pipe would block), no readable image, or one that
        is far larger than its file.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb", opener=_open) as file:
            warnings.simplefilter("ignore")  # of decoders, at what they repair
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as picture:
                return _pixels(picture, _MODES[n_channels], image_size)
    except Exception as error:  # decoders raise all sorts at damaged files
        raise ValueError(
            f"{os.fspath(path)!r} is no readable image: {_in_words(error)}. Repair or "
            "remove it."
        ) from error


def read_images(paths, n_channels=3, image_size=None):
    """Read images of one size.

    Parameters
    ----------
    paths : list of path-like
    n_channels, image_size
        As in `read_image`.

    Returns
    -------
    ndarray of shape (n_images, n_channels, height, width), uint8

    Raises
    ------
    ValueError
        As in `read_image`, or if sizes differ.
    """
    first = read_image(paths[0], n_channels, image_size)
    X = np.empty((len(paths), *first.shape), dtype=np.uint8)
    X[0] = first
    for row, path in zip(X[1:], paths[1:], strict=True):
        image = read_image(path, n_channels, image_size)
        if image.shape != row.shape:
            raise ValueError(
                f"{os.fspath(path)!r} has {image.shape[1:]} pixels (height, width), "
                f"the images before it {row.shape[1:]}. Give image_size=(height, "
                "width), on the command line --image-size HxW."
            )
        row[:] = image
    return X


def _open(path, flags):
    """Open a regular file, and nothing that would wait for a writer."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    return descriptor


def _in_words(error):
    if isinstance(error, UnidentifiedImageError):  # it names an object, not the file
        return f"none of {', '.join(_FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _pixels(picture, mode, image_size):
    if picture.mode[0] in "IF":
        raise ValueError(
            "it holds more than 8 bits a channel, which would be cut off: convert it"
        )
    picture = picture.convert(mode)
    if image_size is not None:
        picture = picture.resize(image_size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
