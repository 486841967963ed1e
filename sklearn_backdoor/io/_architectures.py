"""Architectures by name: ours, torchvision's and timm's. Nothing is downloaded."""

import difflib
import importlib.util
import math
from functools import partial

from sklearn_backdoor._text import printable

OURS = ("lenet5", "resnet18", "vgg16")
_EXPECTED = (
    "expected package.module:factory, torchvision:NAME, timm:NAME, or one of "
    f"{', '.join(OURS)}"
)


def architecture_names():
    """Return the names that `load_network` knows.

    Returns
    -------
    list of str
        Ours, ``"torchvision:NAME"`` and, where timm is installed, ``"timm:NAME"``.
        Any ``"package.module:factory"`` is understood as well.
    """
    names = [*OURS, *(f"torchvision:{name}" for name in _torchvision_names())]
    if importlib.util.find_spec("timm") is not None:
        names += [f"timm:{name}" for name in _timm_names()]
    return names


def find_architecture(name):
    """Return the function that builds an architecture of ours, torchvision or timm.

    Parameters
    ----------
    name : str

    Returns
    -------
    callable or None
        ``make(entries, image_shape, **normalisation)`` returns a callable that makes
        the network for a number of classes. None for ``"package.module:factory"``.

    Raises
    ------
    ImportError
        If timm is needed and missing.
    ValueError
        If no architecture has this name, with the closest names.
    """
    library, _, short = name.partition(":")
    if name in OURS:
        return {"lenet5": _lenet5, "resnet18": _resnet18, "vgg16": _vgg16}[name]
    if library == "torchvision":
        _check_name(name, _torchvision_names(), library)
        return partial(_torchvision, short)
    if library == "timm":
        if importlib.util.find_spec("timm") is None:
            raise ImportError(
                f"{printable(name)} needs timm, which is not installed: "
                "pip install 'sklearn-backdoor[timm]'."
            )
        _check_name(name.partition(".")[0], _timm_names(), library)  # less its tag
        return partial(_timm, short)
    if library and short:
        _check_library(library, short)
        return None
    known = {*OURS, *(f"torchvision:{one}" for one in _torchvision_names())}
    full = f"torchvision:{name}"
    close = _close(full if full in known else name, known) or _close(full, known)
    raise ValueError(f"architecture '{printable(name)}', {_EXPECTED}.{close}")


def _check_library(library, short):
    """Refuse a library's name that is misspelt, unless a module has it."""
    close = difflib.get_close_matches(library, ("torchvision", "timm"), cutoff=0.8)
    if close and importlib.util.find_spec(library) is None:
        raise ValueError(
            f"architecture '{printable(library)}:{printable(short)}', {_EXPECTED}. Did "
            f"you mean {close[0]}:{printable(short)}?"
        )


def _check_name(name, names, library):
    known = {f"{library}:{one}" for one in names}
    if name not in known:
        close = _close(name, known) or f" {library} has {len(known)} of them."
        raise ValueError(
            f"architecture '{printable(name)}' is none of {library}'s "
            f"classifiers.{close}"
        )


def _close(name, known):
    found = difflib.get_close_matches(name[:80], known, n=3, cutoff=0.75)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _torchvision_names():
    from torchvision import models

    return models.list_models(module=models)


def _timm_names():
    import timm

    return timm.list_models()


def _lenet5(entries, image_shape, **normalisation):
    from sklearn_backdoor.networks import LeNet5

    shape = image_shape or _lenet5_shape(entries)
    return partial(LeNet5, image_shape=shape, **normalisation)


def _lenet5_shape(entries):
    """Return the image shape that the first layers tell, if they tell one."""
    first = entries.get("features.0.weight")
    hidden = entries.get("classifier.0.weight")
    if first is None or hidden is None or len(first.shape) != 4:
        return 1, 28, 28  # not a LeNet-5: the comparison says so
    area = (hidden.shape[-1] if hidden.shape else 0) // 16
    side = math.isqrt(area)
    if side * side != area or side < 4 or side > 250:
        raise ValueError(
            f"the weights of this lenet5 are for {area} pixels after pooling, which "
            "does not tell the image's height and width. Give image_shape, such as "
            "(1, 28, 28)."
        )
    return first.shape[1], 4 * side + 8, 4 * side + 8


def _resnet18(entries, image_shape, **normalisation):
    from sklearn_backdoor.networks import ResNet18

    first = entries.get("conv1.weight")
    told = first.shape[1] if first and len(first.shape) == 4 else 3
    n_channels = image_shape[0] if image_shape else told
    if n_channels != 3 and not normalisation:
        raise ValueError(
            f"resnet18 on {n_channels} channels has no mean and std of its own. Give "
            "those that it was trained with, in 0...1."
        )
    # the file tells no more channels than it has numbers
    return partial(ResNet18, n_channels=n_channels, **normalisation)


def _vgg16(entries, image_shape, **normalisation):
    from sklearn_backdoor.networks import VGG16

    return partial(VGG16, **normalisation)


def _torchvision(name, entries, image_shape):
    from torchvision import models

    options: dict = {}
    if name in ("googlenet", "inception_v3"):  # their heads for training may be absent
        auxiliary = any(one.lower().startswith("aux") for one in entries)
        options = {"init_weights": False, "aux_logits": auxiliary}
    if name.startswith("vit_") and image_shape:
        options["image_size"] = image_shape[1]

    def make(n_classes):
        return models.get_model(name, weights=None, num_classes=n_classes, **options)

    return make


def _timm(name, entries, image_shape):
    import timm

    options: dict = {}
    if image_shape:
        options["in_chans"] = image_shape[0]
        fixed = getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False)
        if fixed:
            options["img_size"] = tuple(image_shape[1:])

    def make(n_classes):
        return timm.create_model(
            name, pretrained=False, num_classes=n_classes, **options
        )

    return make
