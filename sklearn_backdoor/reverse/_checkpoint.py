"""Searches kept on disk, so that one which was killed goes on where it was."""

import hashlib
import json
import os
import time
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 1
_SECONDS = 10.0  # between two saves within a group


class CheckpointFolder:
    """A folder of packed searches that belong to one victim, data and settings.

    Parameters
    ----------
    folder : path-like
        Made where it is missing.
    identity : dict
        All that the search depends on; plain values.

    Raises
    ------
    ValueError
        If the folder belongs to another search; the message names what differs.
    """

    def __init__(self, folder, identity):
        self.folder = Path(folder)
        self.identity = json.loads(
            json.dumps({"format": FORMAT, **identity}, default=_plain)
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            self._compare(manifest)
        else:
            self._replace(manifest, json.dumps(self.identity, indent=1).encode())
        text = json.dumps(self.identity, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self._saved = time.monotonic()

    def _compare(self, manifest):
        try:
            found = json.loads(manifest.read_text())
            names = sorted({*found, *self.identity})
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{manifest} cannot be read ({error}): the folder is damaged, or is no "
                "checkpoint_dir. Delete it, or give another folder."
            ) from None
        changed = [name for name in names if found.get(name) != self.identity.get(name)]
        if changed:
            what = "; ".join(
                f"{name} was {found.get(name)!r}, now {self.identity.get(name)!r}"
                for name in changed
            )
            raise ValueError(
                f"checkpoint_dir={str(self.folder)!r} holds another search: {what}. "
                "Go back to those settings to resume it, or give another folder."
            )

    def load(self, name):
        """Return (tensors, numbers) of a search, or None where none was kept.

        A file that is torn or damaged is named in a warning, and its search is begun
        anew.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            if about["key"] != self.key or about["digest"] != _digest(tensors):
                raise ValueError("its content does not match its digest")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"the checkpoint {path} is damaged ({error}): this part of the search "
                "is begun anew.",
                stacklevel=2,
            )
            return None
        return tensors, about["numbers"]

    def save(self, name, search, *, now=False):
        """Keep a search, unless the last save was a moment ago."""
        if not now and 0 <= time.monotonic() - self._saved < _SECONDS:
            return  # less than 0: another machine's clock
        tensors, numbers = search.pack()
        about = {"key": self.key, "digest": _digest(tensors), "numbers": numbers}
        path = self._path(name)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file(tensors, part, metadata={"about": json.dumps(about)})
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            warnings.warn(
                f"the checkpoint {path} could not be written ({error}). The search "
                "goes on, but would not resume from here: free space on the disk.",
                stacklevel=2,
            )
        self._saved = time.monotonic()

    def _path(self, name):
        return self.folder / f"{name}.safetensors"

    def _replace(self, path, content):
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(content)
        os.replace(part, path)


def _plain(value):
    """Return a NumPy scalar, such as a grid search sets, as a Python one."""
    return value.item() if hasattr(value, "item") else str(value)


def _digest(tensors):
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
