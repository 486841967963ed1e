"""Names, shapes and kinds in a file against those of a network."""

import torch

from sklearn_backdoor._text import printable
from sklearn_backdoor.io._errors import handful
from sklearn_backdoor.io._header import kind


def state_of(network):
    """Return the tensors of a network's state dict.

    Parameters
    ----------
    network : torch.nn.Module

    Returns
    -------
    dict of str to torch.Tensor
    """
    return {
        name: value
        for name, value in network.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def compare(entries, network, path):
    """Refuse a file whose names, shapes or kinds are not those of a network.

    Parameters
    ----------
    entries : dict of str to Entry
    network : torch.nn.Module
        May be on the meta device.
    path : path-like
        For messages.

    Raises
    ------
    ValueError
    """
    state = state_of(network)
    # a batch counter plays no part in evaluation, and is often left out
    missing = [
        name
        for name in state
        if name not in entries and not name.endswith("num_batches_tracked")
    ]
    if missing:
        missing = _without_tied(missing, entries, network)
    unexpected = sorted(set(entries) - set(state))
    parts = [
        f"{what} {handful(found)}"
        for what, found in (("lacks", missing), ("has unexpected", unexpected))
        if found
    ]
    differing = []
    for name in sorted(set(entries) & set(state)):
        (dtype, shape), value = entries[name], state[name]
        own = tuple(value.shape)
        if shape != own or kind(dtype) != _kind(value.dtype):
            differing.append(
                f"{printable(name)} ({dtype} {shape}, not {_kind(value.dtype)} {own})"
            )
    if differing:
        parts.append(f"differs in {handful(differing, None)}")
    if parts:
        prefix = unexpected and all(name.startswith("module.") for name in entries)
        raise ValueError(
            f"{printable(path, None)} does not belong to this network: it "
            f"{'; it '.join(parts)}. "
            + (
                "It was saved from a DataParallel: save network.module.state_dict()."
                if prefix
                else "Give the factory or architecture that these weights were trained "
                "with."
            )
        )


def _without_tied(missing, entries, network):
    """Drop names whose tensor the file holds under another name."""
    tied: dict = {}
    for named in (network.named_parameters, network.named_buffers):
        for name, value in named(remove_duplicate=False):
            tied.setdefault(id(value), set()).add(name)
    held = set().union(*(names for names in tied.values() if names & set(entries)))
    return [name for name in missing if name not in held]


def _kind(dtype):
    if dtype == torch.bool:
        return "boolean"
    if dtype.is_complex:
        return "complex"
    return "floating point" if dtype.is_floating_point else "integer"
