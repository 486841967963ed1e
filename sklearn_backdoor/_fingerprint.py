"""A digest of a network that is the same in every process.

joblib's hash of a torch module differs between processes, and a hash of the weights
alone is blind to the code of ``forward``: both are in here.
"""

import hashlib
import types

import numpy as np
import torch

_LIBRARIES = ("torch", "torchvision", "numpy")
_OF_TORCH = set(vars(torch.nn.Module()))  # mode, hooks, and what is digested by itself


def fingerprint(network):
    """Digest weights, buffers, settings and code of a network.

    Parameters
    ----------
    network : torch.nn.Module
        Never modified.

    Returns
    -------
    str
        64 hexadecimal digits (SHA-256), equal in every process of one Python version.

    Notes
    -----
    Code means the methods of each module's class outside torch, and the functions and
    plain values that they name as globals, followed to the end. Settings are the
    module's attributes that are numbers, strings, arrays, tensors, functions, or
    lists, tuples and dicts of plain values; other objects are not seen.
    """
    digest = hashlib.sha256()
    seen: set = set()
    for name, module in network.named_modules():
        _add(digest, name, type(module).__module__, type(module).__qualname__)
        _add_plain_attributes(digest, module)
        for base in type(module).__mro__:
            if base not in seen and base.__module__.split(".")[0] not in _LIBRARIES:
                seen.add(base)
                _add_class(digest, base, seen)
    tensors = [*network.named_parameters(), *network.named_buffers()]
    for name, tensor in tensors:
        _add(digest, name, tensor.dtype, tuple(tensor.shape))
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _add(digest, *parts):
    digest.update(repr(parts).encode())


def _bytes_of(tensor):
    raw = tensor.detach().cpu().contiguous().reshape(-1)
    return raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b""


def _is_plain(value):
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(
        value, bool | int | float | complex | str | bytes | np.generic
    )


def _add_plain_attributes(digest, module):
    for name, value in sorted(vars(module).items()):
        if name in _OF_TORCH:
            continue
        if isinstance(value, types.FunctionType):
            _add_function(digest, value, set())
        elif _is_plain(value):
            _add(digest, name, value)
        elif isinstance(value, torch.Tensor):
            digest.update(_bytes_of(value))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            digest.update(value.tobytes())


def _add_class(digest, cls, seen):
    for name, value in sorted(vars(cls).items()):
        value = getattr(value, "__func__", value)  # static and class methods
        value = getattr(value, "fget", value)  # properties
        if isinstance(value, types.FunctionType):
            _add_function(digest, value, seen)
        elif _is_plain(value) and not name.startswith("__"):
            _add(digest, name, value)


def _add_function(digest, function, seen):
    if function in seen:
        return
    seen.add(function)
    _add(digest, function.__defaults__ if _is_plain(function.__defaults__) else "")
    for cell in function.__closure__ or ():
        _add_value(digest, cell.cell_contents, seen)
    names = _add_code(digest, function.__code__)
    for name in sorted(names):
        if name in function.__globals__:
            _add_value(digest, function.__globals__[name], seen)


def _add_value(digest, value, seen):
    if _is_plain(value):
        _add(digest, value)
    elif isinstance(value, torch.Tensor):
        digest.update(_bytes_of(value))
    elif isinstance(value, types.FunctionType):
        if (value.__module__ or "").split(".")[0] not in _LIBRARIES:
            _add_function(digest, value, seen)


def _add_code(digest, code):
    """Add bytecode and constants, nested functions included; return the names used."""
    digest.update(code.co_code)
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _add_code(digest, constant)
        elif _is_plain(constant):
            _add(digest, constant)
    _add(digest, sorted(code.co_names), code.co_varnames)
    return names


def weights_digest(network):
    """Digest parameters and buffers of a network: what a guard was fitted on.

    Parameters
    ----------
    network : torch.nn.Module
        Never modified.

    Returns
    -------
    str
        64 hexadecimal digits (SHA-256), the same in every process, on every device and
        under every version of Python and torch.

    Notes
    -----
    - Unlike `fingerprint`, blind to code, whose bytes differ between Python versions:
      it tells weights apart, not architectures without any.
    - Buffers outside the state dict are digested too, since normalisation often is
      one. The batch counters of batch normalisation are not: they play no part in
      evaluation, and files of weights often lack them.
    """
    digest = hashlib.sha256()
    tensors = {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in sorted(tensors.items()):
        if not name.endswith("num_batches_tracked"):
            _add(digest, name, str(tensor.dtype), tuple(tensor.shape))
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()
