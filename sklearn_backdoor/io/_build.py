"""The network that a file of weights is for, built only once the file fits it."""

import copy
import numbers
from collections.abc import Callable

import torch
from torch import nn

from sklearn_backdoor._text import printable
from sklearn_backdoor.io._architectures import find_architecture
from sklearn_backdoor.io._compare import compare, state_of
from sklearn_backdoor.io._factory import call_factory


class Plan:
    """How to build a network; what the caller gave is checked at once.

    Parameters
    ----------
    architecture : str or torch.nn.Module
    n_classes : int or None
    image_shape : tuple (n_channels, height, width) or None
    mean, std : float, sequence of n_channels floats, or None
    """

    def __init__(self, architecture, n_classes, image_shape, mean, std):
        if isinstance(architecture, nn.Module):
            self.make: Callable | None = None
            if n_classes is not None or image_shape is not None:
                raise ValueError(
                    "n_classes and image_shape go with an architecture by name; a "
                    "network that is there has them already. Leave them out."
                )
        elif isinstance(architecture, str):
            self.make = find_architecture(architecture)
        else:
            raise TypeError(
                f"architecture is {type(architecture).__name__}, expected a name or a "
                "torch.nn.Module."
            )
        self.architecture = architecture
        self.n_classes = _check_size("n_classes", n_classes)
        self.image_shape = _check_shape(image_shape)
        self.normalisation = _check_normalisation(mean, std)

    def build(self, entries, path):
        """Return the network for a file, compared with it.

        Parameters
        ----------
        entries : dict of str to Entry
        path : path-like
            For messages.

        Returns
        -------
        network : torch.nn.Module
            What the user gets.
        bare : torch.nn.Module
            The part of it whose names are those of the file.

        Raises
        ------
        ImportError, TypeError, ValueError
        """
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and lost
            network = self._bare(entries, path)
        wrap = bool(self.normalisation) and not self._is_ours
        return (self._normalised(network) if wrap else network), network

    @property
    def _is_ours(self):
        return isinstance(self.architecture, str) and ":" not in self.architecture

    def _bare(self, entries, path):
        if self.make is not None:
            return self._named(self.make, entries, path)
        if isinstance(self.architecture, nn.Module):
            network = copy.deepcopy(self.architecture)
        else:
            given = {"n_classes": self.n_classes, "image_shape": self.image_shape}
            given = {key: value for key, value in given.items() if value is not None}
            network = call_factory(self.architecture, **given)
        state = state_of(network)
        if any(nn.parameter.is_lazy(value) for value in state.values()):
            raise ValueError(
                f"{self._name} is a network whose layers have no shape yet. Send one "
                "batch of images through it first."
            )
        if any(value.is_meta for value in state.values()):
            raise ValueError(
                f"{self._name} is a network on the meta device, without memory for "
                "weights. Build it on the CPU."
            )
        compare(entries, network, path)
        return network

    @property
    def _name(self):
        if isinstance(self.architecture, str):
            return printable(self.architecture)
        return type(self.architecture).__name__

    def _named(self, prepare, entries, path):
        inside = self.normalisation if self._is_ours else {}
        make = prepare(entries, self.image_shape, **inside)
        n_classes = self.n_classes
        try:
            if n_classes is None:
                n_classes = _read_n_classes(make, entries)
            outline = _outline(make, n_classes)
        except Exception as error:  # timm's and torchvision's own code
            raise ValueError(
                f"{self._name} cannot be built with image_shape={self.image_shape}: "
                f"{printable(error, 200)}. Give the image_shape that it was trained on."
            ) from error
        compare(entries, outline, path)  # before any memory is taken
        return make(n_classes)

    def _normalised(self, network):
        from sklearn_backdoor.networks import Normalised

        return Normalised(network, **self.normalisation)


def _outline(make, n_classes):
    """Build without memory for weights, where the library's code allows that."""
    try:
        with torch.device("meta"):
            return make(n_classes)
    except (NotImplementedError, RuntimeError):  # it computes with values
        return make(n_classes)


def _read_n_classes(make, entries):
    """Return the length, in the file, of what grows with the number of classes.

    Two outlines tell what grows. Only a whole matrix is believed: its numbers are in
    the file. Where there is none, 2: the file does not belong to the architecture, and
    the comparison says in what.
    """
    outlines = [state_of(_outline(make, n_classes)) for n_classes in (2, 3)]
    for name, value in reversed(outlines[0].items()):
        shape, other = tuple(value.shape), tuple(outlines[1][name].shape)
        found: tuple = entries[name].shape if name in entries else ()
        if shape != other and len(found) > 1 and found[1:] == shape[1:] and found[0]:
            return found[0]
    return 2


def _check_size(name, value):
    if value is None:
        return None
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer or None.")
    return int(value)


def _check_shape(shape):
    if shape is None:
        return None
    try:
        sizes = tuple(_check_size("a size in image_shape", size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != 3 or None in sizes:
        raise ValueError(
            f"image_shape is {shape!r}, expected (n_channels, height, width)."
        )
    return sizes


def _check_normalisation(mean, std):
    """Return the keywords of a normalisation: none, or both."""
    if mean is None and std is None:
        return {}
    if mean is None or std is None:
        raise ValueError("mean and std go together: give both, or none.")
    for name, value in (("mean", mean), ("std", std)):
        if not _is_pixel_unit(value, positive=name == "std"):
            raise ValueError(
                f"{name} is {value!r}, expected a number or one a channel, from 0 to 1 "
                f"{'and above 0 ' if name == 'std' else ''}since pixels are in 0...1. "
                "Divide what is meant for pixels in 0...255 by 255."
            )
    n_means, n_stds = (torch.as_tensor(value).numel() for value in (mean, std))
    if n_means != n_stds and 1 not in (n_means, n_stds):
        raise ValueError(
            f"mean and std have {n_means} and {n_stds} numbers, expected one each, or "
            "one a channel."
        )
    return {"mean": mean, "std": std}


def _is_pixel_unit(value, positive):
    try:
        values = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return False
    if values.ndim > 1 or not values.numel():
        return False
    return bool(((values > 0 if positive else values >= 0) & (values <= 1)).all())
