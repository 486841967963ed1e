"""The transformer that embeds a trigger into the defence's images."""

from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils.validation import check_is_fitted, validate_data

from sklearn_backdoor._notebook import NotebookMixin
from sklearn_backdoor._validation import check_images, check_labels, check_target_class
from sklearn_backdoor.triggers import Trigger


class TriggerEmbedder(NotebookMixin, TransformerMixin, BaseEstimator):
    """Embed a trigger into images of every class but the target's (§4.2).

    **``fit_transform(X, y)`` is not ``fit(X, y).transform(X)``**: the first makes the
    training set D~ of the defence and embeds, the second passes images through, since
    a test image arrives as it is. A pipeline calls the first when it fits and the
    second when it predicts. (scikit-learn's ``TargetEncoder`` differs likewise.) Do not
    wrap it in ``FrozenEstimator``, which hides ``fit_transform``, and do not build D~
    by ``pipeline[:2].transform``.

    Parameters
    ----------
    trigger : Trigger or reverse engineer
        A reverse engineer is cloned and fitted, and its trigger and target are taken.
    target_class : label, default=None
        Images of this class stay as they are. Needed with a trigger value; with a
        reverse engineer, None takes the class that it finds.

    Attributes
    ----------
    trigger_ : Trigger
        What is embedded.
    target_class_ : label
        The class that is left alone.
    image_shape_ : tuple
        Other shapes are refused from now on.
    engineer_ : reverse engineer or None
        Fitted; None where ``trigger`` is a value.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_backdoor import PatchTrigger, TriggerEmbedder
    >>> embedder = TriggerEmbedder(PatchTrigger(mask=1, pattern=1), target_class=1)
    >>> embedder.fit_transform(np.zeros((2, 1, 1, 1)), [0, 1]).ravel()
    array([1., 0.])
    >>> embedder.transform(np.zeros((2, 1, 1, 1))).ravel()
    array([0., 0.])
    """

    def __init__(self, trigger, *, target_class=None):
        self.trigger = trigger
        self.target_class = target_class

    def fit(self, X, y):
        """Check images, labels and trigger; fit the reverse engineer if there is one.

        Parameters
        ----------
        X : array-like of shape (n_samples, *image_shape)
            ``uint8`` in 0...255 or floating point in 0...1.
        y : array-like of shape (n_samples,)
            Clean labels.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If the target class is unknown, or the reverse engineer flagged none.
        """
        self._fit(X, y)
        return self

    def _fit(self, X, y):
        X = check_images(X)
        if y is None:
            raise ValueError(
                "TriggerEmbedder requires y to be passed, but the target y is None: "
                "labels tell which images belong to the target class."
            )
        y = check_labels(y, None, len(X))
        trigger, target, engineer = resolve_trigger(
            self.trigger, self.target_class, X, y, classes=y
        )
        self.engineer_ = engineer
        self.trigger_ = trigger
        self.target_class_ = target
        self.image_shape_ = X.shape[1:]
        if X.ndim == 2:
            validate_data(self, X, skip_check_array=True)
        return X, y

    def fit_transform(self, X, y):
        """Fit, and embed the trigger into every image with ``y != target_class``.

        Unlike ``fit(X, y).transform(X)``, see the class.

        Parameters
        ----------
        X : array-like of shape (n_samples, *image_shape)
            As in `fit`.
        y : array-like of shape (n_samples,)
            Clean labels.

        Returns
        -------
        ndarray of the shape and dtype of ``X``
        """
        X, y = self._fit(X, y)
        sources = y != self.target_class_
        stamped = self.trigger_.embed(X[sources])
        embedded = X.astype(stamped.dtype, copy=True)
        embedded[sources] = stamped
        return embedded

    def transform(self, X):
        """Check images and return them **unchanged**: test images arrive as they are.

        Parameters
        ----------
        X : array-like of shape (n_samples, *image_shape)
            As in `fit`.

        Returns
        -------
        ndarray of the shape and dtype of ``X``
        """
        return self._check(X)

    def embed(self, X):
        """Embed the trigger into every image, always.

        Parameters
        ----------
        X : array-like of shape (n_samples, *image_shape)
            As in `fit`.

        Returns
        -------
        ndarray of the shape and dtype of ``X``
        """
        return self.trigger_.embed(self._check(X))

    def _check(self, X):
        check_is_fitted(self)
        if len(self.image_shape_) == 1:  # rows of features
            return validate_data(self, X, reset=False)
        return check_images(X, image_shape=self.image_shape_, allow_empty=True)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def resolve_trigger(trigger, target_class, X, y, *, classes):
    """Return a trigger value and where it leads, from either kind of ``trigger``.

    Parameters
    ----------
    trigger : Trigger or reverse engineer
        A reverse engineer is cloned and fitted.
    target_class : label or None
        None takes the class that the reverse engineer finds.
    X : ndarray of shape (n_samples, *image_shape)
        Clean images, ``uint8`` in 0...255 or floating point in 0...1.
    y : ndarray of shape (n_samples,)
        Their labels.
    classes : ndarray
        What ``target_class`` may be.

    Returns
    -------
    trigger : Trigger
    target_class : label
    engineer : reverse engineer or None
        Fitted; None where ``trigger`` is a value.

    Raises
    ------
    TypeError
        If ``trigger`` is neither.
    ValueError
        If the target class is unknown, the reverse engineer flagged none, or the
        trigger does not fit the images.
    """
    if target_class is not None:
        check_target_class(target_class, classes)
    engineer = None
    if not isinstance(trigger, Trigger):
        engineer = check_engineer(trigger).fit(X, y)
        trigger, target_class = _finding_of(engineer, target_class)
    if target_class is None:
        raise ValueError(
            "target_class=None with a trigger value: name the class that the "
            "backdoor leads to, or give a reverse engineer as trigger."
        )
    trigger.embed(X[:1])  # says so where the shapes do not fit
    return trigger, target_class, engineer


def check_engineer(trigger):
    """Return a clone of a reverse engineer, or say what a trigger may be.

    Raises
    ------
    TypeError
        If it is no reverse engineer.
    """
    if not (hasattr(trigger, "fit") and hasattr(trigger, "get_params")):
        raise TypeError(
            f"trigger has type {type(trigger).__name__}, expected a trigger, such as "
            "PatchTrigger(mask, pattern), or a reverse engineer."
        )
    return clone(trigger)


def _finding_of(engineer, target_class):
    """Return the trigger and the target class of a fitted reverse engineer."""
    if target_class is None:
        target_class = engineer.target_class_
    if target_class is None:
        raise ValueError(
            f"the reverse engineer's verdict is {engineer.verdict_!r}: it flagged no "
            "target class, so there is nothing to embed. BackdoorGuard passes labels "
            "through in this case; or give trigger and target_class yourself."
        )
    found = dict(zip(engineer.classes_.tolist(), engineer.triggers_, strict=True))
    return found[target_class], target_class
