"""Forward passes with hooks, which are gone afterwards."""

from contextlib import contextmanager

import torch


@contextmanager
def hooked(victim, hooks):
    """Open a network for passes without gradients, with hooks while it is held.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.
    hooks : list of (callable, callable)
        A module's method that registers a hook, and the hook.

    Yields
    ------
    callable
        From a tensor of images to logits.
    """
    with victim.differentiable() as logits, torch.no_grad():
        handles = [register(hook) for register, hook in hooks]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()
