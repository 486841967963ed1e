"""Passes with hooks, which are gone afterwards."""

from contextlib import contextmanager

import torch


@contextmanager
def hooked(victim, hooks, gradients=False):
    """Open a network for passes with hooks while it is held.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    hooks : list of (callable, callable)
        A module's method that registers a hook, and the hook.
    gradients : bool, default=False
        Whether passes can be differentiated.

    Yields
    ------
    callable
        From a tensor of images to logits.
    """
    with victim.differentiable() as logits, torch.set_grad_enabled(gradients):
        handles = [register(hook) for register, hook in hooks]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()
