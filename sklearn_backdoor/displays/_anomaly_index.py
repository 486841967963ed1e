"""How suspicious each class is: a bar a class, and the threshold."""

import numpy as np
from sklearn.utils import check_consistent_length
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_backdoor._validation import check_target_class
from sklearn_backdoor.displays._lettering import legible, short, width
from sklearn_backdoor.displays._source import search_of
from sklearn_backdoor.displays._style import (
    GREY,
    INK,
    PALE,
    RED,
    dress,
    nothing,
    open_axes,
)
from sklearn_backdoor.reverse._rule import figures_of, rule_of
from sklearn_backdoor.triggers import PatchTrigger

_SMALLEST = 1e-16  # p-value drawn
_STATISTICS = {
    "p-value": ("How improbable is each class's trigger by chance?", "p-value"),
    "anomaly index": (
        "How unusually small is each class's trigger?",
        "anomaly index of small norms",
    ),
    "median / norm": (
        "How many times smaller than the median is each class's trigger?",
        "median norm / norm",
    ),
}
_OF_COLUMN = {
    "p_corrected": "p-value",
    "anomaly_index": "anomaly index",
    "relative": "median / norm",
}


class AnomalyIndexDisplay:
    """Bars that tell how abnormally small each class's trigger is.

    Made by `from_estimator`; the parameters are stored as attributes. A taller bar is
    more suspicious, whatever the statistic.

    Parameters
    ----------
    classes : array-like of shape (n_classes,)
        Labels.
    figures : array-like of shape (n_classes,)
        What the statistic says of each class; NaN where it says nothing.
    norms : array-like of shape (n_classes,) or None
        Of each class's smallest trigger; None writes none, as where some are of masks
        and others of perturbations.
    converged : array-like of bool, shape (n_classes,)
        Whether the search reached its success rate.
    target_classes : array-like
        Labels that were flagged; drawn in red.
    statistic : {"p-value", "anomaly index", "median / norm"}, default="p-value"
        Drawn as -log10; as it is, negative ones as 0; as it is.
    threshold : float, default=0.05
        Classes beyond it are flagged: below for p-values, else above.

    Attributes
    ----------
    heights_ : ndarray of shape (n_classes,)
        Of the bars.
    bars_ : matplotlib BarContainer or None
        None where no class has a figure.
    line_ : matplotlib Line2D or None
        The threshold.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(
        self,
        *,
        classes,
        figures,
        norms,
        converged,
        target_classes=(),
        statistic="p-value",
        threshold=0.05,
    ):
        self.classes = classes
        self.figures = figures
        self.norms = norms
        self.converged = converged
        self.target_classes = target_classes
        self.statistic = statistic
        self.threshold = threshold

    @classmethod
    def from_estimator(cls, estimator, *, classes=None, ax=None):
        """Draw what a search compared, by the statistic that it flags by.

        Parameters
        ----------
        estimator : reverse engineer, SearchRecord, BackdoorGuard or TriggerEmbedder
            Fitted, by a search.
        classes : array-like of labels, default=None
            Those to draw, in this order; None takes all.
        ax : matplotlib Axes, default=None
            None opens a figure.

        Returns
        -------
        AnomalyIndexDisplay

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        TypeError, ValueError
            If it is of another kind, its trigger was given and not searched for, or a
            class is not known.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        search = search_of(estimator)
        labels = search.classes_.tolist()
        classes = labels if classes is None else classes
        places = [labels.index(check_target_class(c, labels)) for c in classes]
        rule, figures = rule_of(search), figures_of(search)
        statistic = _OF_COLUMN[rule.column]
        threshold = rule.threshold
        if statistic == "median / norm":  # turned over: a taller bar is more suspicious
            figures = 1 / np.maximum(figures, 1e-12)
            threshold = 1 / threshold
        kinds = {type(search.triggers_[place]) for place in places}
        methods = getattr(search, "methods_", None) or [""] * len(labels)
        of_one = len({methods[place] for place in places}) == 1
        alike = len(kinds) == 1 and (of_one or kinds == {PatchTrigger})
        display = cls(
            classes=search.classes_[places],
            figures=figures[places],
            # L1 of patches beside L2 of other things would be compared
            norms=search.norms_[places] if alike else None,
            converged=search.converged_[places],
            target_classes=search.target_classes_,
            statistic=statistic,
            threshold=threshold,
        )
        return display.plot(ax)

    def plot(self, ax=None, *, title=None):
        """Draw the bars.

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

        Raises
        ------
        ValueError
            If the arrays differ in length, or the statistic is not known.
        """
        self._check()
        ax, sizes = open_axes(self, ax, (7, 3.8))
        own, ylabel = _STATISTICS[self.statistic]
        title = own if title is None else title
        self.bars_, self.line_ = None, None
        figures = np.asarray(self.figures, dtype=float)
        self.heights_, limit = self._heights(figures)
        if np.isnan(figures).all():
            n_converged = np.sum(self.converged)
            nothing(
                ax,
                f"No verdict: {n_converged} of {len(figures)} classes converged, too "
                "few to tell which one stands out",
                sizes,
            )
            dress(ax, sizes, title=title)
            return self
        flagged = np.isin(self.classes, self.target_classes)
        places = np.arange(len(figures))
        self.bars_ = self._draw_bars(ax, flagged)
        top = 1.2 * max(self.heights_.max(), 1.25 * limit) or 1
        ax.set_ylim(0, top)
        self._draw_threshold(ax, sizes, limit)
        if self.statistic == "p-value":
            ticks = np.arange(0, top, max(1, int(top / 4)))
            ax.set_yticks(ticks, [f"{10.0**-tick:g}" for tick in ticks])
        xlabel = "class" + self._draw_censored(ax, 0.035 * top)
        named = self._name_classes(ax, sizes, flagged)
        if len(named) < len(places):
            xlabel = f"{len(places)} classes, the most suspicious named" + xlabel[5:]
        xlabel += self._draw_norms(ax, sizes, named)
        dress(ax, sizes, title=title, xlabel=xlabel, ylabel=ylabel)
        for place, label in zip(named, ax.get_xticklabels(), strict=True):
            label.set_color(RED if flagged[place] else INK)
        return self

    def _check(self):
        check_consistent_length(self.classes, self.figures, self.norms, self.converged)
        if self.statistic not in _STATISTICS:
            raise ValueError(
                f"statistic={self.statistic!r}, expected one of "
                f"{', '.join(map(repr, _STATISTICS))}."
            )

    def _draw_bars(self, ax, flagged):
        colors = np.where(flagged, RED, INK)
        bars = ax.bar(np.arange(len(flagged)), self.heights_, color=colors, width=0.72)
        for bar, height in zip(bars, self.heights_, strict=True):
            if height:  # seen among hundreds too
                bar.set(linewidth=0.8, edgecolor=bar.get_facecolor())
        return bars

    def _heights(self, figures):
        """Return the bars' heights and the threshold's."""
        if self.statistic != "p-value":
            return np.maximum(np.nan_to_num(figures), 0), self.threshold
        p = np.nan_to_num(figures, nan=1.0)
        heights = -np.log10(np.clip(p, _SMALLEST, 1)) + 0.0
        return heights, -np.log10(max(self.threshold, _SMALLEST))

    def _draw_threshold(self, ax, sizes, limit):
        """Draw the threshold, with room to its right for what it means."""
        side = "below" if self.statistic == "p-value" else "above"
        lines = ["flagged", f"{side} {self.threshold:.3g}"]
        room = max(width(line, sizes.small) for line in lines) + 0.08
        share = min(room / sizes.width, 0.5)
        n_classes = len(self.heights_)
        left = min(-0.6, -0.17 * n_classes / sizes.width)  # half a norm's width
        ax.set_xlim(left, n_classes - 0.5 + n_classes * share / (1 - share))
        self.line_ = ax.axhline(limit, color=RED, linewidth=1.1, linestyle=(0, (5, 3)))
        ax.annotate(
            "\n".join(lines),
            (0.998, limit),
            (0, 2),
            xycoords=ax.get_yaxis_transform(),
            textcoords="offset points",
            size=sizes.small,
            color=RED,
            ha="right",
            va="bottom",
            linespacing=1.15,
        )

    def _draw_censored(self, ax, height):
        """Mark classes that no bar stands for; return what the marks mean."""
        judged = ~np.isnan(np.asarray(self.figures, dtype=float))
        converged = np.asarray(self.converged, dtype=bool)
        words = ""
        for chosen, hatch, text in (
            (judged & ~converged, "////", "hatched: search did not converge"),
            (~judged, "", "pale: not among the contenders"),
        ):
            if not chosen.any():
                continue
            places = np.flatnonzero(chosen)
            ax.bar(places, height, color=PALE, edgecolor=GREY, hatch=hatch, width=0.72)
            words += f"; {text} ({len(places)})"
        return words

    def _name_classes(self, ax, sizes, flagged):
        """Write the names that there is room for; return the places named."""
        low, high = ax.get_xlim()
        pitch = sizes.width / (high - low)
        line = 1.35 * sizes.small / 72
        room = float(np.clip(0.38 * sizes.height, 0.6, 1.3))
        names = [legible(label, room, sizes.small) for label in self.classes]
        widest = max(width(name, sizes.small) for name in names)
        flat, named = widest <= 0.94 * pitch, np.arange(len(names))
        if not flat and pitch < line:
            gap = max(2 * line, 0.36)
            flat = widest <= 0.94 * gap
            named = _spread(self.heights_ + 1e6 * flagged, gap / pitch)
            names = [names[place] for place in named]
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(named, names, **({} if flat else turned))
        return named

    def _draw_norms(self, ax, sizes, named):
        """Write the norms over the bars named; return what they are."""
        from matplotlib.patheffects import withStroke

        if self.norms is None:
            return ""
        low, high = ax.get_xlim()
        pitch = sizes.width / (high - low)
        gap = np.diff(named).min() * pitch if len(named) > 1 else np.inf
        texts = [
            short(self.norms[place]) if self.converged[place] else "" for place in named
        ]
        if max(width(text, sizes.small) for text in texts) > 0.94 * gap:
            return ""
        for place, text in zip(named, texts, strict=True):
            ax.annotate(
                text,
                (place, self.heights_[place]),
                (0, 2),
                textcoords="offset points",
                ha="center",
                size=sizes.small,
                color=GREY,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
        return "; above a bar: norm of the smallest trigger"


def _spread(suspicion, gap):
    """Return the places of the most suspicious that do not crowd each other."""
    kept: list = []
    for place in np.argsort(-suspicion, kind="stable"):
        if suspicion[place] <= 0 and kept:
            break
        if all(abs(place - other) >= gap for other in kept):
            kept.append(int(place))
    return np.sort(kept)
