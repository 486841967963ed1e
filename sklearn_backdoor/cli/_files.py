"""Files that a command writes: found writable before the work, written whole."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path


def as_path(text):
    """Return an option's value as a Path; None stays."""
    return None if text is None else Path(text)


def check_writable(*outputs, inputs=()):
    """Find out, leaving nothing behind, that files can be written.

    Parameters
    ----------
    *outputs : path-like or None
        Files; their folders may not exist yet.
    inputs : iterable of path-like
        What the command reads, and no output may overwrite.

    Raises
    ------
    OSError, ValueError
        If one cannot be written, is no regular file, or is among the inputs.
    """
    paths = [Path(one) for one in outputs if one is not None]
    for number, path in enumerate(paths):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no regular file. Give another name.")
        for other in inputs:
            if path.exists() and path.samefile(other):
                raise ValueError(
                    f"{path} holds what the command reads, such as the weights. Give "
                    "another name."
                )
        if path.absolute() in [one.absolute() for one in paths[:number]]:
            raise ValueError(f"{path} is named for two outputs. Give another name.")
        check_folder(path.parent)


def check_folder(folder):
    """Find out, leaving nothing behind, that files can be written in a folder.

    Parameters
    ----------
    folder : path-like
        May not exist yet.

    Raises
    ------
    OSError
    """
    folder = Path(folder).absolute()
    while not folder.exists():  # the nearest that does is where it will be made
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder. Give another name.")
    probe = folder / f".{os.getpid()}.part"
    try:
        probe.write_bytes(b"")
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def folder_of(path):
    """Make the folder of a file, and take it away again if writing the file fails.

    Parameters
    ----------
    path : Path
    """
    made = [one for one in path.parents if not one.exists()]  # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def writing(path):
    """Open a binary file that appears whole, at the end, or not at all.

    Parameters
    ----------
    path : Path
        Its folder is made.

    Yields
    ------
    file
    """
    part = path.with_name(f".{path.name[:80]}.{os.getpid()}.part")
    with folder_of(path):
        try:
            with part.open("wb") as file:
                yield file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_whole(path, content):
    """Write a file whole or not at all, once the outcome is on the screen.

    Parameters
    ----------
    path : Path
    content : bytes

    Raises
    ------
    OSError
        That names the file and says that the outcome holds.
    """
    try:
        with writing(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(
            f"the outcome above holds, but {path} could not be written ({error})."
        ) from error
