"""Where images lie in the victim's features: two principal components."""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_backdoor._validation import check_images, check_labels
from sklearn_backdoor.displays._lettering import legible, width
from sklearn_backdoor.displays._source import defended_class
from sklearn_backdoor.displays._style import (
    AMBER,
    INK,
    MARKS,
    RED,
    SERIES,
    TEAL,
    dress,
    open_axes,
)

_MOST_SOURCES = 20  # classes that are told apart
_NAME = 0.9  # inches for a class's name


class FeatureSpaceDisplay:
    """Features in 2-D: clean target images, triggered source images, what was checked.

    Made by `from_estimator` or `from_predictions`; the parameters are stored as
    attributes. A triggered image lies where its source class's images lie, and not
    where clean images of the target class do: that is what the guard goes by.

    Parameters
    ----------
    points : ndarray of shape (n_samples, 2)
        Of clean target images, and of images of the other classes with the trigger.
    y : ndarray of shape (n_samples,)
        Class of origin.
    target_class : label
    explained : array-like of shape (2,), default=None
        Share of the variance that each axis explains, in 0...1.
    points_check : ndarray of shape (n_checked, 2), default=None
        Of images that were checked.
    flagged : array-like of bool, shape (n_checked,), default=None
        Whether they were found to carry the trigger; None where it is not known.
    n_others : int, default=0
        Images checked that the victim does not call the target class.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self,
        *,
        points,
        y,
        target_class,
        explained=None,
        points_check=None,
        flagged=None,
        n_others=0,
    ):
        self.points = points
        self.y = y
        self.target_class = target_class
        self.explained = explained
        self.points_check = points_check
        self.flagged = flagged
        self.n_others = n_others

    @classmethod
    def from_estimator(cls, guard, X, y, *, X_check=None, target_class=None, ax=None):
        """Draw the features that a guard compares.

        Parameters
        ----------
        guard : BackdoorGuard
            Fitted.
        X : array-like of shape (n_samples, n_channels, height, width)
            D_Defense: clean images, ``uint8`` in 0...255 or floating point in 0...1.
            **The guard's trigger is embedded here**, into all but the target's.
        y : array-like of shape (n_samples,)
            Their labels.
        X_check : array-like of shape (n_checked, ...), default=None
            Images to check, as they arrive, of the shape of ``X``. Only those that the
            victim calls the target class are drawn: others pass.
        target_class : label, default=None
            None takes the most anomalous one that is defended.
        ax : matplotlib Axes, default=None
            None opens a figure.

        Returns
        -------
        FeatureSpaceDisplay

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the guard is not fitted.
        TypeError, ValueError
            If it is no guard, does not defend the class, or the images do not fit.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        target = defended_class(guard, target_class)
        X = check_images(X, ndim=4)
        y = check_labels(y, guard.classes_, len(X))
        embedded = X.copy()
        sources = y != target
        embedded[sources] = guard.triggers_[target].embed(X[sources])
        Z = guard.victim_.transform(embedded)
        if X_check is None:
            return cls._from(Z, y, target).plot(ax)
        seen = guard.inspect(X_check)
        sent = (seen["victim_label"] == target).to_numpy()
        X_check = np.asarray(X_check)[sent]
        Z_check = guard.victim_.transform(X_check) if len(X_check) else None
        flagged = seen["is_trigger"].to_numpy()[sent]
        display = cls._from(Z, y, target, Z_check, flagged, int(np.sum(~sent)))
        return display.plot(ax)

    @classmethod
    def from_predictions(
        cls, Z, y, *, Z_check=None, is_trigger=None, target_class, ax=None
    ):
        """Draw given features.

        Parameters
        ----------
        Z : array-like of shape (n_samples, n_features)
            Features of clean target images, and of images of the other classes with the
            trigger.
        y : array-like of shape (n_samples,)
            Class of origin.
        Z_check : array-like of shape (n_checked, n_features), default=None
            Features of images that were checked.
        is_trigger : array-like of bool, shape (n_checked,), default=None
            What was found of them.
        target_class : label
        ax : matplotlib Axes, default=None
            None opens a figure.

        Returns
        -------
        FeatureSpaceDisplay

        Raises
        ------
        ValueError
            If shapes differ, a feature is not finite, or all rows are the same.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        return cls._from(Z, y, target_class, Z_check, is_trigger).plot(ax)

    @classmethod
    def _from(cls, Z, y, target, Z_check=None, flagged=None, n_others=0):
        Z = check_array(Z, dtype=np.float64, input_name="Z")
        check_consistent_length(Z, y)
        if np.all(np.ptp(Z, axis=0) == 0):
            raise ValueError(
                f"all {len(Z)} rows of features are the same, so there is nothing to "
                "spread out. Give at least two different images."
            )
        # standardised, as the guard's classifier sees them
        project = make_pipeline(
            StandardScaler(), PCA(min(2, *Z.shape), random_state=0)
        ).fit(Z)
        explained = project[-1].explained_variance_ratio_
        points_check = None
        if Z_check is not None and len(Z_check):
            points_check = _plane(project.transform(check_array(Z_check)))
        return cls(
            points=_plane(project.transform(Z)),
            y=np.asarray(y),
            target_class=target,
            explained=np.append(explained, [0.0])[:2],
            points_check=points_check,
            flagged=flagged,
            n_others=n_others,
        )

    def plot(self, ax=None, *, title=None):
        """Draw the points.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            None opens a figure. The figure's ground is made white; without a layout
            engine, it is given a constrained layout.
        title : str, default=None
            None takes the display's own.

        Returns
        -------
        self
        """
        check_consistent_length(self.points, self.y)
        ax, sizes = open_axes(self, ax, (7, 5))
        y = np.asarray(self.y)
        side = np.clip(400 * sizes.width * sizes.height / len(y), 8, 26)
        name = legible(self.target_class, _NAME, sizes.small)
        clean = self.points[y == self.target_class]
        # drawn last, over the others, but first in the legend
        _scatter(ax, clean, f"{name}, clean", 1.8 * side, INK, edge="white", zorder=3)
        self._draw_sources(ax, sizes, side)
        self._draw_checked(ax, 2.4 * side)
        _make_legend(ax, sizes)
        labels = ["first component", "second component"]
        if self.explained is not None:
            labels = [
                f"{label} ({share:.0%} of variance)"
                for label, share in zip(labels, self.explained, strict=True)
            ]
        if self.n_others:
            labels[0] += f"; {self.n_others} checked with other labels not drawn"
        own = "Features: clean target, triggered others"
        title = own if title is None else title
        dress(ax, sizes, title=title, xlabel=labels[0], ylabel=labels[1])
        return self

    def _draw_sources(self, ax, sizes, side):
        """Draw the triggered images, told apart by class if the classes are few."""
        y = np.asarray(self.y)
        labels = np.unique(y[y != self.target_class]).tolist()
        if len(labels) > _MOST_SOURCES:
            text = f"{len(labels)} others, triggered"
            points = self.points[y != self.target_class]
            _scatter(ax, points, text, 0.8 * side, SERIES[1])
            return
        for number, label in enumerate(labels):
            mark, color = divmod(number, len(SERIES))
            text = legible(label, _NAME, sizes.small)
            points = self.points[y == label]
            _scatter(ax, points, text, side, SERIES[color], MARKS[mark])

    def _draw_checked(self, ax, side):
        if self.points_check is None:
            return
        if self.flagged is None:
            flagged = np.zeros(len(self.points_check), dtype=bool)
            color, text = AMBER, "checked"
        else:
            flagged = np.asarray(self.flagged, dtype=bool)
            color, text = TEAL, "accepted"
        rings = self.points_check[~flagged]
        crosses = self.points_check[flagged]
        options = {"linewidths": 1.5, "zorder": 4}
        if len(rings):
            text = f"{text} ({len(rings)})"
            ax.scatter(
                *rings.T,
                side,
                facecolors="none",
                edgecolors=color,
                label=text,
                **options,
            )
        if len(crosses):
            text = f"flagged ({len(crosses)})"
            ax.scatter(*crosses.T, side, color=RED, marker="x", label=text, **options)


def _plane(points):
    """Return two columns, the second 0 where there is but one."""
    return np.column_stack([points, np.zeros(len(points))])[:, :2]


def _scatter(ax, points, text, side, color, mark="o", *, edge="none", zorder=2):
    ax.scatter(
        *points.T,
        s=side,
        color=color,
        marker=mark,
        edgecolors=edge,
        linewidths=0.7,
        alpha=0.8 if edge == "none" else 1,
        label=text,
        zorder=zorder,
    )


def _make_legend(ax, sizes):
    """Write the legend on the right, in room that is made beside the points."""
    handles, texts = ax.get_legend_handles_labels()
    n_lines = max(1, int(sizes.height / (1.5 * sizes.small / 72)))
    n_columns = -(-len(texts) // n_lines)
    widest = max(width(text, sizes.small) for text in texts)
    room = n_columns * (widest + 2.6 * sizes.small / 72) + 0.1
    share = min(room / sizes.width, 0.6)
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + (high - low) * share / (1 - share))
    legend = ax.legend(
        ncols=n_columns,
        loc="upper right",
        frameon=False,
        fontsize=sizes.small,
        labelcolor=INK,
        borderaxespad=0,
        borderpad=0.1,
        labelspacing=0.3,
        handlelength=1,
        handletextpad=0.5,
        columnspacing=0.8,
    )
    for handle in legend.legend_handles:
        handle.set_sizes([4.5 * sizes.small])
