"""One thread at a time in a network, and the network as before afterwards.

A forward pass in evaluation mode changes the network while it lasts: modes are flipped,
hooks catch features, parameters may be swapped. Whoever looks at a network meanwhile,
or copies it, must wait.
"""

import copy
import itertools
import os
import threading
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch

# by module, not by network: a wrapper or a part of a network shares the modules whose
# mode is flipped. Outside the modules, so that no pickle, hash or deepcopy sees them.
_locks: WeakKeyDictionary = WeakKeyDictionary()
_registry = threading.Lock()
_numbers = itertools.count()
_passes: dict = {}  # what to restore, for a fork in the middle of another thread's pass


class _Lock:
    """A lock with a place in the order in which locks are taken."""

    def __init__(self):
        self.number = next(_numbers)
        self.lock = threading.RLock()


@contextmanager
def exclusive(network):
    """Hold the network and all that shares a submodule with it.

    The same thread may enter again.
    """
    with ExitStack() as stack:
        for lock in _locks_of(network):
            stack.enter_context(lock.lock)
        yield


@contextmanager
def evaluation_mode(network):
    """Hold the network in evaluation mode, one thread at a time; then as before."""
    with exclusive(network):
        before = [
            # hooks and parameters as well: others restore these, but not after a fork
            (module, module.training, *map(dict, _changed_by_a_pass(module)))
            for module in network.modules()
        ]
        token = object()
        _passes[token] = (threading.get_ident(), before)
        for module, *_ in before:
            module.training = False
        try:
            yield
        finally:
            for module, training, *_ in before:
                module.training = training
            del _passes[token]


def snapshot(network, *modules):
    """Copy modules between two passes, thus without hooks and in their own modes.

    Parameters
    ----------
    network : torch.nn.Module
        Nothing runs through it meanwhile.
    *modules : torch.nn.Module
        What to copy; parameters, buffers and other tensors are shared.

    Returns
    -------
    list of torch.nn.Module
        Modules that shared submodules still do.
    """
    with exclusive(network):
        parts = [part for module in modules for part in module.modules()]
        tensors = [
            value
            for part in parts
            for values in (vars(part), part._parameters, part._buffers)
            for value in values.values()
            if isinstance(value, torch.Tensor)
        ]
        shared = {id(tensor): tensor for tensor in tensors}
        return copy.deepcopy(list(modules), shared)


def _locks_of(network):
    """Return the locks of all submodules in order; those without one join the first."""
    with _registry:
        modules = list(network.modules())
        found = {_locks[module] for module in modules if module in _locks} or {_Lock()}
        # two networks that were used on their own, then in one ensemble, have two
        locks = sorted(found, key=lambda lock: lock.number)
        for module in modules:
            _locks.setdefault(module, locks[0])
    return locks


def _changed_by_a_pass(module):
    return module._forward_hooks, module._forward_pre_hooks, module._parameters


def _after_fork():
    """Free the child of passes of threads that it does not have."""
    global _registry
    _registry = threading.Lock()
    _locks.clear()
    for token, (thread, before) in list(_passes.items()):
        if thread == threading.get_ident():
            continue
        del _passes[token]
        for module, training, *contents in before:
            module.training = training
            for changed, content in zip(
                _changed_by_a_pass(module), contents, strict=True
            ):
                changed.clear()
                changed.update(content)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
