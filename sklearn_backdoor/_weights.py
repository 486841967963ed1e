"""A suspect network from its architecture's code and a file of weights.

The architecture is code that the user trusts; the weights are evidence. They are read
from safetensors alone, and compared with the architecture before any is assigned.
"""

import hashlib
import importlib
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sklearn_backdoor._text import printable

_MAGIC = {
    b"PK\x03\x04": "a zip file, as torch.save writes (pickle inside)",
    b"\x80": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    b"\x93NUMPY": "a NumPy file",
}
_REMEDY = (
    "Weights are read from safetensors only, since a pickle can run any code. Have it "
    "converted by whom you have it from, or where it can do no harm: "
    "safetensors.torch.save_file(network.state_dict(), 'weights.safetensors')."
)
_HANDFUL = 5


def load_network(factory, weights):
    """Build a network and load its weights, unpickling nothing.

    Parameters
    ----------
    factory : str
        ``"package.module:name"`` of a callable without arguments that returns a
        torch.nn.Module. The module is imported, from the current directory too: its
        code runs and has to be trusted.
    weights : path-like
        A .safetensors file of the network's whole state dict. Floating point weights
        of another precision are converted to the network's own.

    Returns
    -------
    torch.nn.Module
        In evaluation mode.

    Raises
    ------
    ImportError
        If the module or the name in it cannot be imported.
    OSError
        If the file cannot be read.
    TypeError
        If the factory is no callable that returns a network.
    ValueError
        If the file is no safetensors file, its names, shapes or types are not those of
        the network, or a weight is NaN or infinite.
    """
    path = Path(weights)
    _check_file(path)
    network = _build(factory)
    state = {
        name: value
        for name, value in network.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    if any(nn.parameter.is_lazy(value) for value in state.values()):
        raise ValueError(
            f"{factory} returns a network whose layers have no shape yet. Send one "
            "batch of images through it in the factory."
        )
    try:
        with safe_open(path, "pt") as file:
            _compare(file, state, path)
            tensors = {
                name: _convert(file.get_tensor(name), value.dtype)
                for name, value in state.items()
                if name in file.keys()  # noqa: SIM118 (no dict)
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, or no safetensors file: {printable(error, 200)}. Get "
            "the file again."
        ) from None
    damaged = [name for name, value in tensors.items() if not value.isfinite().all()]
    if damaged:
        raise ValueError(
            f"{path} holds NaN or infinity in {_handful(damaged)}: such a network "
            "answers nothing, and no search can judge it. Get the weights again."
        )
    network.load_state_dict(tensors, strict=False)  # compared above
    return network.eval()


def file_digest(path):
    """Return the SHA-256 of a file, in hexadecimal.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    str
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path):
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Give the .safetensors file of the network."
        )
    if not path.is_file():
        raise ValueError(f"{path} is no regular file. Give a .safetensors file.")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{":  # where a safetensors header starts
        for magic, what in _MAGIC.items():
            if head.startswith(magic):
                raise ValueError(f"{path} is {what}, whatever its name. {_REMEDY}")
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file. {_REMEDY}")


def _build(factory):
    make = _find(factory)
    if isinstance(make, nn.Module) or not callable(make):
        raise TypeError(
            f"{factory} is {type(make).__name__}, expected a class or function that, "
            "called without arguments, returns the network."
        )
    try:
        network = make()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{factory}() raised {type(error).__name__}: {printable(error, 300)}. It "
            "is called without arguments: write a function that passes those needed."
        ) from error
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{factory}() returned {type(network).__name__}, expected a "
            "torch.nn.Module."
        )
    return network


def _find(factory):
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"network {factory!r}, expected package.module:factory, such as "
            "my_networks:make_lenet."
        )
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # and stays, for the processes of a parallel search
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{factory}: {error}. Start the command in the folder that holds "
            f"{module_name.split('.')[0]}, or install what is missing."
        ) from error
    except (Exception, SystemExit) as error:
        raise ImportError(
            f"{factory}: importing {module_name} raised {type(error).__name__}: "
            f"{printable(error, 300)}. Repair that file first."
        ) from error
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ImportError(
                f"{module_name} has no {name!r}. Give the name of a class or function "
                "in it that makes the network."
            )
        found = getattr(found, part)
    return found


def _compare(file, state, path):
    """Refuse a file whose names, shapes or kinds are not those of the network."""
    names = set(file.keys())
    # a batch counter plays no part in evaluation, and is often left out
    missing = [
        name
        for name in state
        if name not in names and not name.endswith("num_batches_tracked")
    ]
    unexpected = sorted(names - set(state))
    parts = [
        f"{what} {_handful(found)}"
        for what, found in (("lacks", missing), ("has unexpected", unexpected))
        if found
    ]
    differing = []
    for name in sorted(names & set(state)):
        entry, value = file.get_slice(name), state[name]
        shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if shape != tuple(value.shape) or _kind_of(dtype) != _kind(value.dtype):
            own = tuple(value.shape)
            differing.append(
                f"{printable(name)} ({dtype} {shape}, not {_kind(value.dtype)} {own})"
            )
    if differing:
        parts.append(f"differs in {_handful(differing, None)}")
    if parts:
        prefix = unexpected and all(name.startswith("module.") for name in names)
        raise ValueError(
            f"{path} does not belong to this network: it {'; it '.join(parts)}. "
            + (
                "It was saved from a DataParallel: save network.module.state_dict()."
                if prefix
                else "Give the factory that these weights were trained with."
            )
        )


def _kind_of(name):
    """Return the kind of a type by its name in the file: F32, I64, BOOL, C64, ..."""
    if name == "BOOL":
        return "boolean"
    return {"F": "floating point", "B": "floating point", "C": "complex"}.get(
        name[0], "integer"
    )


def _kind(dtype):
    if dtype == torch.bool:
        return "boolean"
    if dtype.is_complex:
        return "complex"
    return "floating point" if dtype.is_floating_point else "integer"


def _convert(value, dtype):
    return value if value.dtype == dtype else value.to(dtype)


def _handful(names, limit=40):
    shown = ", ".join(printable(name, limit) for name in names[:_HANDFUL])
    more = len(names) - _HANDFUL
    return shown + (f" and {more} more" if more > 0 else "")
