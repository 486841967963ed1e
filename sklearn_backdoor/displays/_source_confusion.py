"""Which class an image really is of: true origin against inferred origin."""

import numpy as np
from sklearn.metrics import confusion_matrix
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_backdoor._validation import check_labels
from sklearn_backdoor.displays._lettering import legible, width
from sklearn_backdoor.displays._source import defended_class
from sklearn_backdoor.displays._style import (
    INK,
    TEAL,
    dress,
    nothing,
    open_axes,
)
from sklearn_backdoor.metrics import fpr_score, sia_score, tpr_score

_NAME = 0.8  # inches for a class's name
_MOST_NUMBERS = 20  # classes whose counts are written


class SourceConfusionDisplay:
    """Counts of images by true class of origin and by the origin inferred.

    Made by `from_estimator` or `from_predictions`; the parameters are stored as
    attributes. The target's row holds clean images, all others triggered ones; the
    target's column is what was accepted.

    Parameters
    ----------
    confusion : ndarray of int, shape (n_classes, n_classes)
        Rows are true, columns inferred.
    labels : array-like of shape (n_classes,)
    target_class : label
    rates : dict from str to float, default=None
        "TPR", "FPR" and "SIA" in 0...1; NaN over no image.
    n_others : int, default=0
        Images that the victim does not call the target class; not counted.

    Attributes
    ----------
    im_ : matplotlib AxesImage or None
        Shares of each row; None where there is no image.
    text_ : list of matplotlib Text
        The counts; empty where there is no room.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(self, *, confusion, labels, target_class, rates=None, n_others=0):
        self.confusion = confusion
        self.labels = labels
        self.target_class = target_class
        self.rates = rates
        self.n_others = n_others

    @classmethod
    def from_estimator(cls, guard, X, y, *, target_class=None, ax=None):
        """Draw which origin a guard infers.

        Parameters
        ----------
        guard : BackdoorGuard
            Fitted.
        X : array-like of shape (n_samples, n_channels, height, width)
            As they arrive: triggered images of the source classes and clean ones of the
            target class, ``uint8`` in 0...255 or floating point in 0...1. Only those
            that the victim sends to the target class count.
        y : array-like of shape (n_samples,)
            Class of origin.
        target_class : label, default=None
            None takes the most anomalous one that is defended.
        ax : matplotlib Axes, default=None
            None opens a figure.

        Returns
        -------
        SourceConfusionDisplay

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the guard is not fitted.
        TypeError, ValueError
            If it is no guard, does not defend the class, or the images do not fit.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        target = defended_class(guard, target_class)
        seen = guard.inspect(X)
        y = check_labels(y, guard.classes_, len(seen))
        sent = (seen["victim_label"] == target).to_numpy()
        display = cls._from(
            y[sent], seen["label"].to_numpy()[sent], target, guard.classes_
        )
        display.n_others = int(np.sum(~sent))
        return display.plot(ax)

    @classmethod
    def from_predictions(cls, y_true, y_pred, *, target_class, labels=None, ax=None):
        """Draw given origins.

        Parameters
        ----------
        y_true : array-like of shape (n_samples,)
            Class of origin: ``target_class`` for clean images.
        y_pred : array-like of shape (n_samples,)
            The origin inferred, ``target_class`` where the image was accepted. All are
            images that the victim sends to the target class.
        target_class : label
        labels : array-like, default=None
            Order of the classes; None sorts. Those without an image are left out.
        ax : matplotlib Axes, default=None
            None opens a figure.

        Returns
        -------
        SourceConfusionDisplay

        Raises
        ------
        ValueError
            If the lengths differ, or a label is missing from ``labels``.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        y_true, y_pred = column_or_1d(y_true), column_or_1d(y_pred)
        check_consistent_length(y_true, y_pred)
        if labels is None:
            labels = np.unique(np.concatenate([y_true, y_pred, [target_class]]))
        check_labels(y_true, np.asarray(labels), len(y_true))
        check_labels(y_pred, np.asarray(labels), len(y_pred))
        return cls._from(y_true, y_pred, target_class, labels).plot(ax)

    @classmethod
    def _from(cls, y_true, y_pred, target, labels):
        rates = {}
        for name, score, among in (
            ("TPR", tpr_score, y_true != target),
            ("FPR", fpr_score, y_true == target),
            ("SIA", sia_score, y_true != target),
        ):
            rates[name] = np.nan
            if among.any():
                rates[name] = score(y_true, y_pred, target_class=target)
        seen = [
            label
            for label in np.asarray(labels).tolist()
            if label == target or np.any(y_true == label) or np.any(y_pred == label)
        ]
        counts = np.full((len(seen), len(seen)), len(y_true))
        if len(seen) > 1:  # scikit-learn warns of a single class, fails on no image
            counts = confusion_matrix(y_true, y_pred, labels=seen)
        return cls(confusion=counts, labels=seen, target_class=target, rates=rates)

    def plot(self, ax=None, *, title=None):
        """Draw the matrix.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            None opens a figure. The figure's ground is made white; without a layout
            engine, it is given a constrained layout.
        title : str, default=None
            None takes the display's own: the rates.

        Returns
        -------
        self
        """
        ax, sizes = open_axes(self, ax, (6, 5.4))
        self.im_, self.text_ = None, []
        if title is None:
            title = f"Where do the images come from?\n{_in_words(self.rates)}".strip()
        totals = np.sum(self.confusion, axis=1, keepdims=True)
        if not totals.any():
            name = legible(self.target_class, 1.5, sizes.label)
            text = f"None of {self.n_others} images is called {name}: nothing to judge"
            nothing(ax, text, sizes)
            dress(ax, sizes, title=title)
            return self
        shares = self.confusion / np.maximum(totals, 1)
        self.im_ = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        self._write_counts(ax, sizes, shares)
        self._name_classes(ax, sizes)
        xlabel = "origin inferred (shade: share of its row)"
        if self.n_others:
            xlabel += f"; {self.n_others} images with other labels not judged"
        ylabel = "true origin (framed: clean target)"
        dress(ax, sizes, title=title, xlabel=xlabel, ylabel=ylabel)
        return self

    def _write_counts(self, ax, sizes, shares):
        n_classes = len(self.labels)
        if n_classes > _MOST_NUMBERS:
            return
        widest = width(str(np.max(self.confusion)), sizes.small)
        room = min(
            0.9 * sizes.width / n_classes / widest,
            0.8 * sizes.height / n_classes / (sizes.small / 72),
            1.0,
        )
        if room * sizes.small < 4.5:
            return
        for (row, column), count in np.ndenumerate(self.confusion):
            self.text_.append(
                ax.text(
                    column,
                    row,
                    str(count),
                    ha="center",
                    va="center",
                    size=room * sizes.small,
                    color="white" if shares[row, column] > 0.55 else INK,
                    alpha=1 if count else 0.35,
                )
            )

    def _name_classes(self, ax, sizes):
        """Write the names that there is room for; frame the row of the target."""
        from matplotlib.patches import Rectangle

        n_classes = len(self.labels)
        target = list(self.labels).index(self.target_class)
        names = [legible(label, _NAME, sizes.small) for label in self.labels]
        widest = max(width(name, sizes.small) for name in names)
        line = 1.35 * sizes.small / 72
        rows = _every(n_classes, target, line * n_classes / sizes.height)
        ax.set_yticks(rows, [names[row] for row in rows])
        flat = widest < max(0.92 * sizes.width / n_classes, 2 * line)
        gap = widest / 0.92 if flat else line
        columns = _every(n_classes, target, gap * n_classes / sizes.width)
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(
            columns, [names[column] for column in columns], **({} if flat else turned)
        )
        corner = -0.5, target - 0.5
        frame = Rectangle(corner, n_classes, 1, fill=False, color=TEAL, linewidth=1.6)
        ax.add_patch(frame).set_clip_on(False)


def _every(n_classes, target, step):
    """Return places at least ``step`` apart, the target's among them."""
    step = max(1, int(np.ceil(step)))
    return list(range(target % step, n_classes, step))


def _in_words(rates):
    texts = [
        f"{name} " + ("-" if np.isnan(rate) else f"{rate:.1%}")
        for name, rate in (rates or {}).items()
    ]
    return ", ".join(texts)
