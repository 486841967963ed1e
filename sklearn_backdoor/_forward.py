"""A network opened for inspection: logits and features from one pass."""

from typing import NamedTuple

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import nn

from sklearn_backdoor._exclusive import evaluation_mode
from sklearn_backdoor._torch import to_tensor

_TINY = torch.finfo(torch.float32).tiny


def module_of(net):
    """Return the trained module itself.

    Raises
    ------
    TypeError, ValueError
        If ``net`` is neither a module nor a fitted skorch net.
    """
    if isinstance(net, nn.Module):
        return net
    if hasattr(net, "module") and hasattr(net, "initialize"):  # a skorch net
        if not getattr(net, "initialized_", False):
            raise ValueError(
                f"the skorch net {type(net).__name__} was never fitted, so it has no "
                "weights to inspect. Fit it (or load its parameters) first."
            )
        return net.module_
    raise TypeError(
        f"net has type {type(net).__name__}, expected a trained torch.nn.Module or a "
        "fitted skorch net. A class or a file name is not enough: build the network "
        "and load its weights."
    )


def device_of(network):
    """Return the device of the network's first parameter or buffer, else the CPU."""
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


def output_of(returned):
    """Return the 2-D tensor in what a network returned.

    Raises
    ------
    TypeError
        If there is no tensor of shape (n_samples, n_classes) in it.
    """
    logits = returned
    if isinstance(returned, dict):
        logits = returned.get("logits")
    elif isinstance(returned, tuple | list) and not hasattr(returned, "logits"):
        logits = returned[0] if returned else None
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        found = (
            f"a tensor of shape {tuple(logits.shape)}"
            if isinstance(logits, torch.Tensor)
            else f"{type(returned).__name__}"
        )
        raise TypeError(
            f"the network returned {found}, expected logits of shape (n_samples, "
            "n_classes). Wrap it in a module whose forward returns the logits."
        )
    return logits


class LogitsAndFeatures(nn.Module):
    """Return (logits, features) of a network: skorch's multi-output convention.

    Parameters
    ----------
    network : torch.nn.Module
        Left as it is; a hook is set and removed within each pass.
    layer : str
        Name of a submodule.
    at_input : bool
        Whether the features are the layer's input, instead of its output.
    logits_layer : str or None
        Name of the submodule whose output the logits are; None takes what the network
        returns.
    probabilities : bool
        Whether the network returns probabilities, to be turned into logarithms.
    """

    def __init__(self, network, layer, at_input, logits_layer, probabilities):
        super().__init__()
        self.network = network
        self.layer = layer
        self.at_input = at_input
        self.logits_layer = logits_layer
        self.probabilities = probabilities

    def forward(self, images):
        """Return logits (n, n_classes) and features (n, n_features)."""
        caught = {}

        def catch_features(module, inputs, output):
            caught["features"] = inputs[0] if self.at_input else output

        def catch_logits(module, inputs, output):
            caught["logits"] = output

        hooks = [(self.layer, catch_features)]
        if self.logits_layer is not None:
            hooks.append((self.logits_layer, catch_logits))
        handles = [
            self.network.get_submodule(name).register_forward_hook(hook)
            for name, hook in hooks
        ]
        try:
            returned = output_of(self.network(images))
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(caught.get("features"), torch.Tensor):
            raise ValueError(
                f"feature_layer={self.layer!r} gave no tensor in a forward pass. "
                f"Choose one of: {layer_names(self.network)}."
            )
        logits = caught.get("logits", returned)
        if self.probabilities:
            logits = logits.clamp_min(_TINY).log()
        features = caught["features"]
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        return logits, features.flatten(1)


class InspectionNet(NeuralNetClassifier):
    """The skorch net around `LogitsAndFeatures`; it evaluates and never trains."""

    def initialize_optimizer(self, *args, **kwargs):
        """Make no optimizer: the victim is evidence."""
        return self

    def evaluation_step(self, batch, training=False):
        """Run one batch in evaluation mode, one thread at a time; then as before."""
        with evaluation_mode(self.module_):
            return super().evaluation_step(batch, training=False)

    def partial_fit(self, *args, **kwargs):
        """Refuse to train.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError(
            "the network under inspection is evidence and is never trained. Train "
            "your own module or skorch net, then give it to VictimNetwork."
        )


def layer_names(network):
    """Return the names of all submodules, for messages."""
    return ", ".join(name for name, _ in network.named_modules() if name) or "none"


class Opening(NamedTuple):
    """Where logits and features are in a network; the first four open it."""

    layer: str
    at_input: bool
    logits_layer: str | None
    probabilities: bool
    n_logits: int
    n_features: int


def open_network(network, feature_layer, images):
    """Find logits and features in a network by running a few images through it.

    Parameters
    ----------
    network : torch.nn.Module
        In evaluation mode.
    feature_layer : str or None
        None looks for the ``nn.Linear`` whose output is the returned logits.
    images : torch.Tensor of shape (n_samples, n_channels, height, width)
        A few are enough.

    Returns
    -------
    Opening

    Raises
    ------
    ValueError
        If the layer does not exist, or the output is not what a Linear layer gave.
    """
    if feature_layer is not None:
        names = [name for name, _ in network.named_modules() if name]
        if feature_layer not in names:
            raise ValueError(
                f"feature_layer={feature_layer!r} does not exist. Choose one of: "
                f"{layer_names(network)}."
            )
    calls = {}

    def record(name):
        def catch(module, inputs, output):
            calls[name] = output

        return catch

    handles = [
        module.register_forward_hook(record(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        returned = output_of(network(images))
    finally:
        for handle in handles:
            handle.remove()
    if returned.isnan().any():
        raise ValueError(
            "the network returned NaN for the first images: its weights are damaged, "
            "or it overflows. Load them again, in float32."
        )
    if returned.shape[1] < 2:
        raise ValueError(
            f"the network returns {returned.shape[1]} logit(s) an image, expected one "
            "a class, two at least. Wrap a yes-or-no output into two logits."
        )
    linear, relation = _match(calls, returned)
    if relation == "sigmoid":
        raise ValueError(
            "the network returns sigmoids of its last nn.Linear, one yes or no a "
            "class; expected logits or a softmax. Remove the sigmoid."
        )
    sums_to_one = bool(
        (returned >= 0).all() and ((returned.sum(1) - 1).abs() < 1e-4).all()
    )
    if feature_layer is None and linear is None:
        what = "probabilities" if sums_to_one else "values"
        raise ValueError(
            f"the network returns {what} that are not the output of an nn.Linear (its "
            f"Linear layers: {', '.join(calls) or 'none'}). Name the penultimate layer "
            f"with feature_layer=...; it has: {layer_names(network)}."
        )
    found = (
        feature_layer or linear,
        feature_layer is None,
        linear if relation == "softmax" else None,
        linear is None and sums_to_one,
    )
    logits, features = LogitsAndFeatures(network, *found)(images)
    return Opening(*found, logits.shape[1], features.shape[1])


def _match(calls, returned):
    """Return the Linear layer behind the returned values, and by which function."""
    relations = {
        "identity": lambda z: z,
        "log_softmax": lambda z: z.log_softmax(1),
        "softmax": lambda z: z.softmax(1),
        "sigmoid": torch.sigmoid,
    }
    returned = returned.float()
    for relation, function in relations.items():
        for name, output in reversed(calls.items()):
            if output.shape == returned.shape and torch.allclose(
                function(output.float()), returned, rtol=1e-5, atol=1e-6
            ):
                return name, relation
    return None, None


def probe(X, key, victim):
    """Find logits and features; ``key`` is what the cache goes by."""
    network = module_of(victim.net)
    images = to_tensor(X, device_of(network))
    # no_grad: a tensor that a network keeps from inference_mode could never be
    # differentiated through afterwards
    with evaluation_mode(network), torch.no_grad():
        try:
            return open_network(network, victim.feature_layer, images)
        except RuntimeError as error:
            dtypes = {str(p.dtype) for p in network.parameters()} - {"torch.float32"}
            remedy = (
                f"Its weights are {', '.join(sorted(dtypes))}: call .float() on it."
                if dtypes
                else "Give it the image size and channels that it was made for."
            )
            raise ValueError(
                f"the network cannot process float32 images of shape {X.shape[1:]}: "
                f"{error}. {remedy}"
            ) from error


def forward_pass(X, key, victim):
    """Return logits and features, float32; ``key`` is what the cache goes by."""
    if len(X) == 0:
        n_features = victim._n_features_out
        return np.empty((0, len(victim.classes_))), np.empty((0, n_features))
    batches = [
        (logits.float().cpu().numpy(), features.float().cpu().numpy())
        for logits, features in victim.net_.forward_iter(X)
    ]
    logits, features = (np.concatenate(part) for part in zip(*batches, strict=True))
    return logits, features


def check_finite(logits, features, first):
    """Refuse answers that are no numbers, for images from number ``first`` on.

    Raises
    ------
    ValueError
        If a logit is NaN, or a feature NaN or infinite.
    """
    bad = np.isnan(logits).any(axis=1) | ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise ValueError(
            f"the network returned NaN or infinity for {bad.sum()} of {len(logits)} "
            f"images, first for image {first + np.flatnonzero(bad)[0]}. Its weights "
            "are damaged, or it overflows in half precision: use float32."
        )
