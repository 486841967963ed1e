"""The attacker's part: train a network. The defence never calls this."""

import numpy as np
import torch
from sklearn.utils import check_random_state
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, LRScheduler
from torch import nn

from sklearn_backdoor._torch import SliceLoader, borrowed_random_state
from sklearn_backdoor._validation import check_images


def train_network(
    network,
    X,
    y,
    *,
    epochs=10,
    lr=1e-3,
    batch_size=128,
    random_state=0,
    on_epoch=None,
):
    """Train a network on images by cross-entropy with Adam and a one-cycle rate.

    Parameters
    ----------
    network : callable returning a torch.nn.Module
        A factory, so that the initial weights come from ``random_state`` too.
    X : ndarray of shape (n_samples, n_channels, height, width)
        ``uint8`` in 0...255 or floating point in 0...1.
    y : ndarray of shape (n_samples,) of int
        Labels 0...K-1.
    epochs, batch_size : int
        Passes over ``X``, and images a step.
    lr : float, default=1e-3
        Peak of the one-cycle learning rate.
    random_state : int, RandomState instance or None, default=0
        Initial weights, order of the images and dropout.
    on_epoch : callable, default=None
        Called after each epoch with (epoch, training loss).

    Returns
    -------
    torch.nn.Module
        Trained, in evaluation mode.

    References
    ----------
    Smith, Topin: Super-convergence. 2019 (the one-cycle rate).
    """
    X = check_images(X, ndim=4)
    random_state = check_random_state(random_state)
    with borrowed_random_state(random_state):
        net = NeuralNetClassifier(
            network,
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.Adam,
            lr=lr,
            max_epochs=epochs,
            batch_size=batch_size,
            iterator_train=SliceLoader,
            iterator_train__random_state=random_state,
            train_split=None,
            classes=np.unique(y),
            callbacks=[
                (
                    "one_cycle",
                    LRScheduler(
                        torch.optim.lr_scheduler.OneCycleLR,
                        max_lr=lr,
                        step_every="batch",
                        total_steps=epochs * -(-len(X) // batch_size),
                    ),
                ),
                ("progress", _Progress(on_epoch)),
            ],
            verbose=0,
        )
        net.fit(X, np.asarray(y, dtype=np.int64))
    net.module_.zero_grad(set_to_none=True)
    return net.module_.eval()


class _Progress(Callback):
    """Call back after each epoch, with its number and training loss."""

    def __init__(self, on_epoch):
        self.on_epoch = on_epoch

    def on_epoch_end(self, net, **kwargs):
        if self.on_epoch is not None:
            self.on_epoch(len(net.history) - 1, net.history[-1, "train_loss"])
