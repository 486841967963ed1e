"""What a trigger looks like, on its own and on an image."""

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_backdoor._validation import check_images, check_target_class
from sklearn_backdoor.displays._lettering import legible, width, wrapped
from sklearn_backdoor.displays._source import search_of
from sklearn_backdoor.displays._style import (
    GREY,
    INK,
    RED,
    dress,
    open_axes,
    pixels,
    show,
)
from sklearn_backdoor.triggers import Trigger

N_TRIED = 32  # clean images, to find one that the trigger moves


class TriggerDisplay:
    """Panels of a trigger: where it acts, what it is, and an image without and with it.

    Made by `from_estimator` or `from_trigger`; the parameters are stored as attributes.

    Parameters
    ----------
    trigger : Trigger
    label : label, default=None
        The class that it leads to.
    clean : ndarray of shape (n_channels, height, width), default=None
        An image, ``uint8`` in 0...255 or floating point in 0...1; None draws the
        trigger alone.
    clean_label, stamped_label : label, default=None
        What the victim calls the image without and with the trigger; None where it was
        not asked.

    Attributes
    ----------
    axes_ : list of matplotlib Axes
        The panels, inside ``ax_``.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self, *, trigger, label=None, clean=None, clean_label=None, stamped_label=None
    ):
        self.trigger = trigger
        self.label = label
        self.clean = clean
        self.clean_label = clean_label
        self.stamped_label = stamped_label

    @classmethod
    def from_estimator(cls, estimator, X=None, *, label=None, ax=None):
        """Draw the trigger that an estimator found, or was given.

        Parameters
        ----------
        estimator : reverse engineer, SearchRecord, BackdoorGuard or TriggerEmbedder
            Fitted. A guard's trigger is drawn as strong as it embeds it.
        X : array-like of shape (n_samples, n_channels, height, width), default=None
            Clean images. One of the first 32 is drawn: if there is a victim to ask, one
            that the trigger moves to the class.
        label : label, default=None
            The class whose trigger is drawn; None takes the target class.
        ax : matplotlib Axes, default=None
            Divided into panels; None opens a figure.

        Returns
        -------
        TriggerDisplay

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        TypeError, ValueError
            If it is of another kind, the class is not known, no class was flagged, or
            the images do not fit.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        trigger, label = _trigger_of(estimator, label)
        victim = getattr(estimator, "victim_", None)
        return cls._from(trigger, X, label, victim).plot(ax)

    @classmethod
    def from_trigger(cls, trigger, X=None, *, label=None, victim=None, ax=None):
        """Draw a trigger value.

        Parameters
        ----------
        trigger : Trigger
        X : array-like of shape (n_samples, n_channels, height, width), default=None
            As in `from_estimator`.
        label : label, default=None
            The class that it leads to, if that is known.
        victim : fitted classifier, default=None
            Asked what it calls the image without and with the trigger.
        ax : matplotlib Axes, default=None
            Divided into panels; None opens a figure.

        Returns
        -------
        TriggerDisplay

        Raises
        ------
        TypeError, ValueError
            If it is no trigger, or the images do not fit.
        """
        check_matplotlib_support(f"{cls.__name__}.from_trigger")
        if not isinstance(trigger, Trigger):
            raise TypeError(
                f"trigger has type {type(trigger).__name__}, expected a trigger such "
                "as PatchTrigger(mask, pattern). Use from_estimator for an estimator."
            )
        return cls._from(trigger, X, label, victim).plot(ax)

    @classmethod
    def _from(cls, trigger, X, label, victim):
        if X is None:
            return cls(trigger=trigger, label=label)
        X = check_images(X[:N_TRIED], ndim=4)
        stamped = trigger.embed(X)
        if victim is None:
            return cls(trigger=trigger, label=label, clean=X[0])
        was, now = _answers(victim, X), _answers(victim, stamped)
        moved = (was != label).astype(int) + 2 * (now == label)
        best = 0 if label is None else int(np.argmax(moved))
        return cls(
            trigger=trigger,
            label=label,
            clean=X[best],
            clean_label=was[best],
            stamped_label=now[best],
        )

    def plot(self, ax=None, *, title=None):
        """Draw the panels.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Divided into panels; None opens a figure. The figure's ground is made white;
            without a layout engine, it is given a constrained layout.
        title : str, default=None
            None takes the display's own, "" none.

        Returns
        -------
        self
        """
        panels = self._panels()
        ax, sizes = open_axes(self, ax, (2.1 * len(panels), 2.8))
        if title is None:
            name = legible(self.label, 0.5 * sizes.width, sizes.title, "bold")
            title = "Trigger" if self.label is None else f"Trigger to class {name}"
        ax.set(xticks=[], yticks=[])
        dress(ax, sizes, title=title)
        ax.set_axis_off()
        n_rows = 1 if len(panels) == 2 or sizes.width > 1.6 * sizes.height else 2
        n_columns = len(panels) // n_rows
        across, tall = sizes.width / n_columns, sizes.height / n_rows
        size = float(np.clip(7 * min(across, tall), 6, 10))
        share = 1 - min(3 * size / 72 / tall, 0.6)  # two lines of caption below
        self.axes_ = []
        for number, (image, most, words, name, color) in enumerate(panels):
            row, column = divmod(number, n_columns)
            corner = (column + 0.04) / n_columns, (n_rows - row - share) / n_rows
            panel = ax.inset_axes((*corner, 0.92 / n_columns, share / n_rows))
            panel.set_anchor("N")
            caption = _caption(words, name, 0.95 * across, size)
            show(panel, image, most=most, caption=caption, color=color, size=size)
            self.axes_.append(panel)
        return self

    def _panels(self):
        """Return image, value drawn white, words, name and colour of each panel."""
        image, most, words = _strength(self.trigger)
        panels = [
            (image, most, words, None, GREY),
            (self.trigger.to_image(), 1.0, "the trigger alone", None, GREY),
        ]
        if self.clean is None:
            return panels
        stamped = self.trigger.embed(self.clean[None])[0]
        asked = self.clean_label is not None
        fooled = asked and self.stamped_label == self.label
        color = RED if fooled else INK
        clean = "clean: called" if asked else "clean"
        with_it = "with it: called" if asked else "with the trigger"
        return [
            *panels,
            (pixels(self.clean), 1.0, clean, self.clean_label, INK),
            (pixels(stamped), 1.0, with_it, self.stamped_label, color),
        ]


def _trigger_of(estimator, label):
    """Return the trigger to a class, by default the target class, and the class."""
    given = getattr(estimator, "triggers_", None)
    if isinstance(given, dict) and (label in given or label is None and given):
        label = estimator.target_class_ if label is None else label  # a guard's own
        return given[label], label
    if hasattr(estimator, "embed") and hasattr(estimator, "trigger_"):
        if label is None or label == estimator.target_class_:
            return estimator.trigger_, estimator.target_class_
    search = search_of(estimator)
    if label is None:
        label = search.target_class_
    if label is None:
        raise ValueError(
            f"no target class was flagged (verdict: {search.verdict_!r}), so there is "
            "no trigger to draw by default. Name the class whose estimate to draw: "
            f"label=..., one of {search.classes_.tolist()[:10]}."
        )
    check_target_class(label, search.classes_)
    return search.triggers_[search.classes_.tolist().index(label)], label


def _caption(words, name, inches, size):
    """Return words, and a name after or below them."""
    if name is None:
        return wrapped(words, inches, size)
    name = legible(name, inches, size)
    fits = width(f"{words} {name}", size) < inches
    return f"{words} {name}" if fits else f"{words}\n{name}"


def _answers(victim, X):
    """Return the labels that a victim gives to images, whatever classifier it is."""
    X = (X / 255 if X.dtype == np.uint8 else X).astype(np.float32)
    return np.asarray(victim.classes_)[np.argmax(victim.predict_proba(X), axis=1)]


def _strength(trigger):
    """Return how strongly each pixel is changed, the largest value, and words."""
    if hasattr(trigger, "mask"):
        image, most, words = trigger.mask, 1.0, "mask, 0 to 1"
    else:
        image = np.abs(trigger.perturbation)
        most = max(float(image.max()), 1e-12)
        words = f"size of change, 0 to {most:.2g}"
    image = np.broadcast_to(image, (*image.shape[:-2], *trigger.image_shape[-2:]))
    return image.reshape(-1, *image.shape[-2:]).mean(axis=0), most, words
