"""A suspect network from its architecture's code and a file of weights."""

import warnings

from safetensors import SafetensorError, safe_open

from sklearn_backdoor._text import printable
from sklearn_backdoor.io._build import Plan
from sklearn_backdoor.io._compare import state_of
from sklearn_backdoor.io._errors import damaged, handful
from sklearn_backdoor.io._weights_file import open_weights


def load_network(
    path, architecture, *, n_classes=None, image_shape=None, mean=None, std=None
):
    """Build a network and load its weights, unpickling nothing in this process.

    Parameters
    ----------
    path : path-like
        The network's whole state dict: a safetensors file, or what torch.save wrote of
        it (torch 1.6 or later), told apart by content. The latter is looked at from
        outside, then read by a process of its own with limits. Floating point weights
        of another precision are converted to the network's own.
    architecture : str or torch.nn.Module
        One of ours (``"lenet5"``, ``"resnet18"``, ``"vgg16"``), ``"torchvision:NAME"``,
        ``"timm:NAME"`` (an extra), or ``"package.module:factory"``, a callable that
        returns the network: its module is imported, from the current directory too, so
        its code runs and has to be trusted. A network is copied, not altered.
    n_classes : int, default=None
        Number of logits; None reads it off the file. A factory gets it where it is
        given.
    image_shape : tuple (n_channels, height, width), default=None
        Needed where the file does not tell it, as for some ``"lenet5"`` and for vision
        transformers of other sizes. A factory gets it where it is given.
    mean, std : float or sequence of n_channels floats, default=None
        The normalisation that the network was trained with, of pixels in 0...1. Ours
        have one inside; in front of any other it is put by `Normalised`. None adds
        none.

    Returns
    -------
    torch.nn.Module
        In evaluation mode.

    Raises
    ------
    ImportError
        If the factory or timm cannot be imported.
    OSError
        If the file cannot be read.
    TypeError
        If the architecture is no name and no network, or the factory makes none.
    UnsafeFileError
        If the file is unsafe, damaged, or of a kind that is not read: a pickle,
        TorchScript, a .pt2 program, HDF5, ... It is a ValueError.
    ValueError
        If the names, shapes or types in the file are not those of the network, a weight
        is NaN or infinite, or a parameter is out of range.
    RuntimeError
        If no process could be started to read a state dict of torch.save.

    Warns
    -----
    UserWarning
        If something in the file was left out, such as the number of an epoch.
    """
    plan = Plan(architecture, n_classes, image_shape, mean, std)
    with open_weights(path) as weights:
        network, bare = plan.build(weights.entries, path)
        tensors = _read(weights.path, state_of(bare), path)
    bare.load_state_dict(tensors, strict=False)  # compared before
    if weights.notes:
        said = f"{printable(path, None)}: {'; '.join(weights.notes)}."
        warnings.warn(said, UserWarning, stacklevel=2)
    return network.eval()


def _read(file, state, path):
    """Return the tensors of a compared file, all finite, in the network's types."""
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys()) & set(state)
            tensors = {
                name: opened.get_tensor(name).to(state[name].dtype) for name in names
            }
    except SafetensorError as error:
        raise damaged(path, printable(error, 200)) from None
    wrong = sorted(name for name in names if not tensors[name].isfinite().all())
    if wrong:
        raise ValueError(
            f"{printable(path, None)} holds NaN or infinity in {handful(wrong)}: such "
            "a network answers nothing, and no search can judge it. Get the weights "
            "again."
        )
    return tensors
