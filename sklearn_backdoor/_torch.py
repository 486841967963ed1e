"""Batches, devices and random states for torch."""

from contextlib import contextmanager

import numpy as np
import torch
from sklearn.utils import check_random_state


def to_tensor(X, device="cpu"):
    """Copy images into a float32 tensor in 0...1.

    Parameters
    ----------
    X : ndarray of shape (n_samples, *image_shape)
        ``uint8`` (0...255) or floating point (0...1); any memory layout, read-only
        and memory-mapped arrays included.
    device : str or torch.device, default="cpu"
        Where the tensor goes.

    Returns
    -------
    torch.Tensor of shape (n_samples, *image_shape), float32 in 0...1
    """
    batch = torch.from_numpy(np.array(X, dtype=np.float32)).to(device)
    return batch.div_(255) if X.dtype == np.uint8 else batch


class SliceLoader:
    """Batches by slicing, in the shape that skorch wants of an iterator.

    torch's ``DataLoader`` collates image by image, which can cost more than a small
    network's forward pass, and draws from torch's global random state.

    Parameters
    ----------
    dataset : object with attributes ``X`` and ``y``
        What skorch builds; ``y`` may be None.
    batch_size : int
        Images a batch.
    random_state : int, RandomState instance or None, default=None
        Shuffles where given.
    """

    def __init__(self, dataset, batch_size, random_state=None):
        self.dataset = dataset
        self.batch_size = batch_size
        self.random_state = random_state

    def __iter__(self):
        X, y = self.dataset.X, self.dataset.y
        order = None
        if self.random_state is not None:
            order = self.random_state.permutation(len(X))
        for start in range(0, len(X), self.batch_size):
            rows = slice(start, start + self.batch_size)
            if order is not None:
                rows = order[rows]
            target = torch.tensor(0) if y is None else torch.as_tensor(y[rows])
            yield to_tensor(X[rows]), target


def processor_has_bfloat16():
    """Tell whether this processor computes in bfloat16 without imitating it slowly.

    Returns
    -------
    bool
    """
    if not torch.backends.mkldnn.is_available():
        return False
    # oneDNN says yes to any AVX-512; an older torch has nothing better
    own: dict = getattr(torch.cpu, "get_capabilities", dict)()
    if "avx512_bf16" in own:
        return bool(own["avx512_bf16"] or own["amx_bf16"])
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def torch_generator(random_state):
    """Make a ``torch.Generator`` from anything scikit-learn takes as random state."""
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    return torch.Generator().manual_seed(int(seed))


@contextmanager
def borrowed_random_state(random_state):
    """Let code that knows only torch's global generators draw from ours.

    Their states are as before afterwards.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        generator = torch_generator(random_state)
        torch.random.set_rng_state(generator.get_state())
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(generator.initial_seed())
        yield
