"""The network under inspection as a scikit-learn estimator."""

import os
from contextlib import contextmanager
from types import FunctionType

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import (
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    clone,
)
from sklearn.utils.validation import check_is_fitted, check_memory
from torch import nn

from sklearn_backdoor._exclusive import evaluation_mode, exclusive
from sklearn_backdoor._fingerprint import fingerprint
from sklearn_backdoor._forward import (
    InspectionNet,
    LogitsAndFeatures,
    check_finite,
    device_of,
    forward_pass,
    module_of,
    probe,
)
from sklearn_backdoor._notebook import NotebookMixin
from sklearn_backdoor._sharing import BaseSharedNetwork
from sklearn_backdoor._stream import gather, parts
from sklearn_backdoor._torch import SliceLoader
from sklearn_backdoor._validation import (
    check_images,
    check_kind,
    check_labels,
    check_number,
    check_pixels,
)


class VictimNetwork(
    NotebookMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    ClassifierMixin,
    BaseSharedNetwork,
):
    """A trained network as classifier and as transformer to penultimate features.

    The network is evidence: ``fit`` validates and **never trains**, and ``clone``
    **shares the weights**, so that no search can lose or retrain it. Its weights, mode,
    hooks and gradients are after each call what they were before.

    Parameters
    ----------
    net : torch.nn.Module or fitted skorch.NeuralNet
        Takes images in 0...1 as float32 of shape (n_samples, n_channels, height,
        width) and returns logits (a tensor, a tuple that starts with it, or an object
        with ``.logits``). A softmax is recognised and undone by its logarithm.
    feature_layer : str, default=None
        Name of a submodule, whose output (pooled over height and width, or flattened)
        are the features f_L. None takes the input of the ``nn.Linear`` whose output is
        the returned logits: the penultimate features.
    classes : array-like of shape (n_classes,), default=None
        Labels in logit order; None for 0...K-1.
    batch_size : int, default=256
        Images a forward pass.
    memory : str, path-like or joblib.Memory, default=None
        Caches forward passes by the content of network, settings and images, for all
        processes that use this folder. What is cached is a call, so that its features
        are in memory as a whole; without, memory does not grow with the images.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels in logit order.
    image_shape_ : tuple (n_channels, height, width)
        Other shapes are refused from now on.
    feature_layer_ : str
        The layer whose input or output the features are.
    net_ : skorch.NeuralNetClassifier
        Around a module that returns (logits, features); shares the weights.

    Notes
    -----
    ``get_params`` does not descend into ``net``: setting a skorch parameter would
    initialise the weights anew. A pickle holds the module, not a skorch wrapper.

    Examples
    --------
    >>> import numpy as np
    >>> from torch import nn
    >>> from sklearn_backdoor import VictimNetwork
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(),
    ...                         nn.Linear(3, 2))
    >>> images = np.zeros((5, 1, 2, 2), dtype=np.float32)
    >>> victim = VictimNetwork(network, classes=["cat", "dog"]).fit(images)
    >>> victim.transform(images).shape
    (5, 3)
    """

    def __init__(
        self, net, *, feature_layer=None, classes=None, batch_size=256, memory=None
    ):
        self.net = net
        self.feature_layer = feature_layer
        self.classes = classes
        self.batch_size = batch_size
        self.memory = memory

    def fit(self, X, y=None):
        """Check network, images and labels against each other. Trains nothing.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            ``uint8`` in 0...255 or floating point in 0...1.
        y : array-like of shape (n_samples,), default=None
            Checked against the victim's classes where given.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If one does not fit the others; the message says what would.
        """
        X = check_images(X, ndim=4)
        check_number(self.batch_size, "batch_size", 1, integer=True)
        network = module_of(self.net)
        found = self._remember(probe)(X[:2], self._key(network), self)
        classes = self._check_classes(found.n_logits)
        if y is not None:
            check_labels(y, classes, len(X))
        self.classes_ = classes
        self.image_shape_ = X.shape[1:]
        self.feature_layer_ = found.layer
        self._n_features_out = found.n_features
        self._opened = LogitsAndFeatures(network, *found[:4])
        self._open()
        return self

    def _check_classes(self, n_logits):
        if self.classes is None:
            return np.arange(n_logits)
        classes = check_kind(self.classes, "classes")
        if classes.shape != (n_logits,) or len(np.unique(classes)) != n_logits:
            raise ValueError(
                f"classes={classes.tolist()}, but the network returns {n_logits} "
                f"logits. Give {n_logits} different labels, in logit order."
            )
        return classes

    def _open(self):
        self.net_ = InspectionNet(
            self._opened,
            criterion=nn.CrossEntropyLoss,
            iterator_valid=SliceLoader,
            batch_size=self.batch_size,
            train_split=None,
            classes=self.classes_,
            device=str(device_of(self._opened)),
            verbose=0,
        ).initialize()

    def predict(self, X):
        """Return the victim's own labels f(x).

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        return self._answer(X, lambda logits, _: self._labels(logits))[0]

    def predict_proba(self, X):
        """Return the softmax of the logits.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), float64 in 0...1
        """
        return self._answer(
            X, lambda logits, _: softmax(logits.astype(np.float64), axis=1)
        )[0]

    def decision_function(self, X):
        """Return the logits (for a softmax network: log-probabilities).

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), float64
            Also for two classes: one column a logit.
        """
        return self._answer(X, lambda logits, _: logits.astype(np.float64))[0]

    def transform(self, X):
        """Return the features f_L(x).

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
        """
        return self._answer(X, lambda _, features: features.astype(np.float64))[0]

    def predict_and_transform(self, X):
        """Return labels and features from ONE forward pass an image.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        labels : ndarray of shape (n_samples,)
        Z : ndarray of shape (n_samples, n_features), float64
        """
        return tuple(
            self._answer(
                X,
                lambda logits, _: self._labels(logits),
                lambda _, features: features.astype(np.float64),
            )
        )

    def stream(self, X):
        """Go through images in parts, with ONE forward pass an image in all.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`; a memory-mapped array is never held as a whole. Its pixels are
            checked as they are reached.

        Yields
        ------
        rows : slice
            Of ``X``: whole batches of ``batch_size``, but the last. One empty slice
            where there is no image, and one for all where ``memory`` is set.
        labels : ndarray of shape (n_rows,)
        Z : ndarray of shape (n_rows, n_features), float64
        """
        for rows, logits, features in self._forward(self._check(X)):
            yield rows, self._labels(logits), features.astype(np.float64)

    @contextmanager
    def differentiable(self, *, bfloat16=False):
        """Open the network for gradients with respect to its input.

        Parameters
        ----------
        bfloat16 : bool, default=False
            Compute in bfloat16 where torch does so by itself (autocast); the logits
            are float32.

        Yields
        ------
        logits : callable
            From a tensor (n, n_channels, height, width) in 0...1 to logits. Ask for
            gradients with ``torch.autograd.grad``, which leaves the weights' alone.
        """
        check_is_fitted(self)
        kind = self.device_.type

        def logits(images):
            with torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
                return self._opened(images)[0].float()

        with evaluation_mode(self._opened.network), torch.enable_grad():
            yield logits

    @property
    def network_(self):
        """The torch.nn.Module itself."""
        return self._opened.network

    @property
    def device_(self):
        """The device on which the network lies."""
        return device_of(self._opened.network)

    def _check(self, X):
        """Check all but the pixels, which every pass does as it reaches them."""
        check_is_fitted(self)
        return check_images(
            X,
            image_shape=self.image_shape_,
            ndim=4,
            allow_empty=True,
            pixels=False,
        )

    def _labels(self, logits):
        return self.classes_[logits.argmax(axis=1)]

    def _answer(self, X, *questions):
        """Return an array for each function of logits and features."""
        X = self._check(X)
        answers = (
            (rows, [question(logits, features) for question in questions])
            for rows, logits, features in self._forward(X)
        )
        return gather(len(X), answers)

    def _forward(self, X):
        """Yield rows, logits and features, float32, of each part."""
        if self.memory is None:
            key, forward = None, forward_pass
            cut = parts(len(X), self.batch_size, self._n_features_out)
        else:  # the pass that is remembered is that of all images
            X = np.ascontiguousarray(X)  # joblib's hash goes by the layout too
            key, forward = self._key(self.network_), self._remember(forward_pass)
            cut = [slice(0, len(X))]
        for rows in cut:
            check_pixels(X[rows])
            logits, features = forward(X[rows], key, self)
            check_finite(logits, features, rows.start)
            yield rows, logits, features

    def _key(self, network):
        """Return all that a forward pass depends on, but the images."""
        if self.memory is None:
            return None
        with exclusive(network):
            return fingerprint(network), self.feature_layer, self.batch_size

    def _remember(self, function):
        if self.memory is None:
            return function
        memory = self.memory
        if isinstance(memory, os.PathLike):
            memory = os.fspath(memory)
        # joblib notes a function's code in a folder only where the function is new to
        # the process, and redoes what lies in a folder without: a copy is always new
        copied = FunctionType(
            function.__code__, function.__globals__, function.__name__
        )
        return check_memory(memory).cache(copied, ignore=["victim"])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.target_tags.required = False
        tags.requires_fit = True
        return tags


def check_victim(victim):
    """Return a clone of the victim, or say that a bare network needs wrapping.

    Raises
    ------
    TypeError
        If it cannot give labels and features.
    """
    if not hasattr(victim, "predict_and_transform"):
        raise TypeError(
            f"victim has type {type(victim).__name__}, expected a VictimNetwork. Wrap "
            "your network: VictimNetwork(network)."
        )
    return clone(victim)
