"""Neural Cleanse's patching: a copy of the network that unlearns the trigger."""

import copy
import math

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch.nn.functional import cross_entropy

from sklearn_backdoor._forward import device_of
from sklearn_backdoor._notebook import NotebookMixin
from sklearn_backdoor._torch import borrowed_random_state, to_tensor
from sklearn_backdoor._validation import check_images, check_labels, check_number
from sklearn_backdoor.embedding import resolve_trigger
from sklearn_backdoor.reverse._search import ImagePasses
from sklearn_backdoor.victim import check_victim

_MOMENTUM = 0.9


class DivergedError(ValueError):
    """Fine-tuning ended in infinite or undefined weights."""


class NCPatcher(NotebookMixin, ClassifierMixin, BaseEstimator):
    """Classify with a copy of the victim that was taught to ignore the trigger.

    ``fit`` fine-tunes the copy on clean images, a fraction of which carry the trigger
    under their true labels. ``predict`` is the patched network's answer: for a
    triggered image, the class that it infers. **The victim itself is not altered.**

    Parameters
    ----------
    victim : VictimNetwork
        Its network is copied, weights and all.
    trigger : Trigger or reverse engineer
        A trigger value needs ``target_class``; a reverse engineer, such as
        ``NCReverseEngineer(victim)``, is cloned and fitted.
    target_class : label, default=None
        Where the trigger leads. With a reverse engineer, None takes the class that it
        finds.
    lr : float, default=0.01
        Learning rate.
    n_epochs : int, default=10
        Passes over the images.
    fraction : float in 0...1, default=0.2
        Of the images that carry the trigger, rounded up; drawn once, from all classes.
    batch_size : int, default=128
        Images a step at most; the batches of an epoch are about equally large.
    random_state : int, RandomState instance or None, default=0
        Which images carry the trigger, the order of the images, and dropout.

    Attributes
    ----------
    patched_ : VictimNetwork
        Fitted, around the patched copy, which is in evaluation mode.
    victim_ : VictimNetwork
        Fitted.
    classes_ : ndarray of shape (n_classes,)
        The victim's labels, in logit order.
    trigger_ : Trigger
        What was unlearnt.
    target_class_ : label
        Where it leads.
    engineer_ : reverse engineer or None
        Fitted; None where ``trigger`` is a value.
    n_image_passes_ : ImagePasses
        Images that fine-tuning sent forward and backward, and forward once more to
        check the patched network. A reverse engineer counts its own.

    Notes
    -----
    Every parameter of the copy is trained, also one that required no gradient; batch
    norm is in training mode meanwhile.

    Deviations from the source:

    - It fine-tunes on a tenth of the clean **training set**; a defender has D_Defense
      alone. ``fit`` uses the images that it is given.
    - It trains one epoch; here 10 by default, since D_Defense is small.
    - Li et al. sweep the rate from 10 to 1e-4 and report the best, which a defender
      without triggered images cannot know. Here it is a parameter.
    - SGD with momentum 0.9 is our choice.

    References
    ----------
    Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: identifying and
    mitigating backdoor attacks in neural networks. S&P 2019, §VI-C.

    Li, Xiang, Miller, Kesidis: Test-time detection of backdoor triggers for poisoned
    deep neural networks, Table 3.
    """

    def __init__(
        self,
        victim,
        trigger,
        *,
        target_class=None,
        lr=0.01,
        n_epochs=10,
        fraction=0.2,
        batch_size=128,
        random_state=0,
    ):
        self.victim = victim
        self.trigger = trigger
        self.target_class = target_class
        self.lr = lr
        self.n_epochs = n_epochs
        self.fraction = fraction
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, X, y):
        """Fine-tune a copy of the victim on clean and on triggered images.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            Clean images, ``uint8`` in 0...255 or floating point in 0...1.
        y : array-like of shape (n_samples,)
            Their true labels.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If images, labels, victim, trigger and settings do not fit each other, or
            fine-tuning diverged: features or loss are not finite.
        """
        X = check_images(X, ndim=4)
        self._check_params()
        victim = check_victim(self.victim).set_params(memory=None).fit(X, y)
        y = check_labels(y, victim.classes_, len(X))
        trigger, target_class, engineer = resolve_trigger(
            self.trigger, self.target_class, X, y, classes=victim.classes_
        )
        random_state = check_random_state(self.random_state)
        n_stamped = math.ceil(round(self.fraction * len(X), 6))  # 0.07 * 100 > 7
        rows = random_state.permutation(len(X))[:n_stamped]
        mixed = X.copy()
        mixed[rows] = trigger.embed(X[rows])
        labels = (y[:, None] == victim.classes_).argmax(axis=1)  # in logit order
        patched = copy.deepcopy(victim)
        self._fine_tune(patched._opened, mixed, labels, random_state)
        n_backward = self.n_epochs * len(X)
        self.n_image_passes_ = ImagePasses(n_backward + len(X), n_backward)
        self.engineer_ = engineer
        self.trigger_ = trigger
        self.target_class_ = target_class
        self.victim_ = victim
        self.classes_ = victim.classes_
        self.patched_ = patched
        return self

    def _check_params(self):
        check_number(self.lr, "lr", 0)
        check_number(self.n_epochs, "n_epochs", 1, integer=True)
        check_number(self.fraction, "fraction", 0, 1)
        check_number(self.batch_size, "batch_size", 1, integer=True)

    def _fine_tune(self, network, X, labels, random_state):
        """Train the network in place, and check what it answers."""
        network.requires_grad_(True)
        optimizer = torch.optim.SGD(network.parameters(), self.lr, _MOMENTUM)
        with borrowed_random_state(random_state), torch.enable_grad():
            network.train()
            for _ in range(self.n_epochs):
                for rows in self._batches(random_state.permutation(len(X))):
                    loss = self._loss(network, X[rows], labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        network.zero_grad(set_to_none=True)
        network.eval()
        with torch.no_grad():
            for rows in self._batches(np.arange(len(X))):
                self._loss(network, X[rows], labels[rows])

    def _batches(self, rows):
        # of equal size: batch norm cannot do with one image that was left over
        return np.array_split(rows, -(-len(rows) // self.batch_size))

    def _loss(self, network, X, labels):
        """Return the cross-entropy, or say that training diverged."""
        device = device_of(network)
        logits, features = network(to_tensor(X, device))
        loss = cross_entropy(logits.float(), torch.as_tensor(labels, device=device))
        if not (loss.isfinite() and features.isfinite().all()):
            raise DivergedError(
                f"fine-tuning diverged at lr={self.lr}: the network's features or loss "
                f"became infinite or NaN. Lower lr, for instance to {self.lr / 10:g}."
            )
        return loss

    def predict(self, X):
        """Return the patched network's labels: the classes inferred.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`, triggered or not.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        check_is_fitted(self)
        return self.patched_.predict(X)

    def predict_proba(self, X):
        """Return the patched network's probabilities.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`, triggered or not.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), float64 in 0...1
            In the order of ``classes_``.
        """
        check_is_fitted(self)
        return self.patched_.predict_proba(X)

    def is_trigger(self, X):
        """Return which images the victim sends to the target, and the patched not.

        **It takes two forward passes an image**, one through each network.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            As in `fit`.

        Returns
        -------
        ndarray of bool, shape (n_samples,)
        """
        check_is_fitted(self)
        before, after = self.victim_.predict(X), self.patched_.predict(X)
        return (before == self.target_class_) & (after != self.target_class_)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        return tags
