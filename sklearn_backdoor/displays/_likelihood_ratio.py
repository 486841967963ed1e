"""How the guard judged: a histogram of likelihood ratios, decided at 0."""

import numpy as np
from sklearn.utils import assert_all_finite, check_consistent_length, column_or_1d
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_backdoor.displays._lettering import legible, width
from sklearn_backdoor.displays._source import defended_class
from sklearn_backdoor.displays._style import INK, RED, TEAL, dress, nothing, open_axes

_FENCE = 3  # interquartile ranges from the quartiles; beyond, scores are clipped
_MOST_BINS = 60


class LikelihoodRatioDisplay:
    """Histogram of trigger scores: clean images of the target against triggered ones.

    Made by `from_estimator` or `from_predictions`; the parameters are stored as
    attributes. An image with a score above 0 is rejected: some other class explains its
    features better than the target class does.

    Parameters
    ----------
    trigger_score : array-like of shape (n_samples,)
        max over c != t of log L_c - log L_t, of images that the victim calls t.
    y_true : array-like of shape (n_samples,), default=None
        Class of origin: ``target_class`` for clean images, another for triggered ones.
        None where it is not known.
    target_class : label
        The class t that the guard defends.
    n_others : int, default=0
        Images that the victim calls something else, so that no score judges them.

    Attributes
    ----------
    bins_ : ndarray
        Edges of the bars; one of them is 0.
    counts_ : list of ndarray
        Images a bar: clean and triggered, or accepted and rejected where ``y_true`` is
        None.
    n_clipped_ : int
        Scores far out, drawn in the outermost bars.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    """

    def __init__(self, *, trigger_score, y_true=None, target_class, n_others=0):
        self.trigger_score = trigger_score
        self.y_true = y_true
        self.target_class = target_class
        self.n_others = n_others

    @classmethod
    def from_estimator(cls, guard, X, y=None, *, target_class=None, ax=None):
        """Draw how a guard judges images that its victim sends to the target class.

        Parameters
        ----------
        guard : BackdoorGuard
            Fitted.
        X : array-like of shape (n_samples, n_channels, height, width)
            As they arrive: clean or triggered. ``uint8`` in 0...255 or floating point
            in 0...1.
        y : array-like of shape (n_samples,), default=None
            Class of origin: the target for its clean images, another for triggered
            ones. None where it is not known.
        target_class : label, default=None
            None takes the most anomalous one that is defended.
        ax : matplotlib Axes, default=None
            None opens a figure.

        Returns
        -------
        LikelihoodRatioDisplay

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
        check_consistent_length(seen, y)
        sent = (seen["victim_label"] == target).to_numpy()
        display = cls(
            trigger_score=seen.loc[sent, "trigger_score"].to_numpy(),
            y_true=None if y is None else np.asarray(y)[sent],
            target_class=target,
            n_others=int(np.sum(~sent)),
        )
        return display.plot(ax)

    @classmethod
    def from_predictions(cls, trigger_score, y_true=None, *, target_class, ax=None):
        """Draw given scores.

        Parameters
        ----------
        trigger_score : array-like of shape (n_samples,)
            Of images that the victim sends to the target class.
        y_true : array-like of shape (n_samples,), default=None
            Class of origin.
        target_class : label
            The class that the guard defends.
        ax : matplotlib Axes, default=None
            None opens a figure.

        Returns
        -------
        LikelihoodRatioDisplay

        Raises
        ------
        ValueError
            If the lengths differ, or a score is not finite.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        display = cls(
            trigger_score=trigger_score, y_true=y_true, target_class=target_class
        )
        return display.plot(ax)

    def plot(self, ax=None, *, title=None):
        """Draw the histogram.

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
            If the lengths differ, or a score is not finite.
        """
        scores, parts = self._parts()
        ax, sizes = open_axes(self, ax, (7, 3.8))
        name = legible(self.target_class, 0.3 * sizes.width, sizes.title, "bold")
        if title is None:
            title = f"What the victim calls {name}: clean or trigger?"
        self.bins_, self.counts_, self.n_clipped_ = np.zeros(1), [], 0
        if not len(scores):
            text = f"None of {self.n_others} images is called {name}: nothing to judge"
            nothing(ax, text, sizes)
            dress(ax, sizes, title=title)
            return self
        low, high = _range([part for part, _, _ in parts], sizes.width, sizes.label)
        self.bins_ = _bins(low, high, len(scores))
        first, last = self.bins_[0], self.bins_[-1]
        self.n_clipped_ = int(np.sum((scores < first) | (scores > last)))
        for part, color, text in parts:
            counts, _ = np.histogram(np.clip(part, first, last), self.bins_)
            self.counts_.append(counts)
            share = 1 if self.y_true is None else 100 / max(len(part), 1)
            ax.bar(
                self.bins_[:-1],
                counts * share,
                np.diff(self.bins_),
                align="edge",
                color=color,
                alpha=0.75,
                label=f"{text} ({len(part)})",
            )
        _letter(ax, sizes, self.bins_)
        xlabel = f"trigger score: log-likelihood of the best other class minus {name}'s"
        if self.n_clipped_:
            xlabel += f"; {self.n_clipped_} far out, in the outermost bars"
        if self.n_others:
            xlabel += f"; {self.n_others} images with other labels not judged"
        ylabel = "images" if self.y_true is None else "% of the images"
        ax.xaxis.set_major_formatter("{x:g}")  # no power of ten for all ticks
        ax.yaxis.get_major_locator().set_params(integer=self.y_true is None)
        dress(ax, sizes, title=title, xlabel=xlabel, ylabel=ylabel)
        return self

    def _parts(self):
        """Return all scores, and each group's with its colour and its name."""
        scores = column_or_1d(self.trigger_score).astype(float)
        assert_all_finite(scores, input_name="trigger_score")
        if self.y_true is None:
            rejected = scores > 0
            words = "accepted", "rejected: trigger"
        else:
            check_consistent_length(scores, self.y_true)
            rejected = column_or_1d(self.y_true) != self.target_class
            name = legible(self.target_class, 1.2, 10)
            words = f"clean images of {name}", "images with the trigger"
        return scores, [
            (scores[~rejected], TEAL, words[0]),
            (scores[rejected], RED, words[1]),
        ]


def _range(groups, inches, size):
    """Return where the scores lie, far ones left out, with room for two words."""
    low = high = 0.0
    for group in groups:
        if len(group):
            first, third = np.quantile(group, [0.25, 0.75])
            fence = _FENCE * (third - first)
            near = group[(group >= first - fence) & (group <= third + fence)]
            low, high = min(low, near.min()), max(high, near.max())
    least = min(width("accepted  ", size) / inches, 0.4) + 0.02
    farthest = max(high, -low)
    room = least / (1 - least) * (farthest if farthest > 1e-6 else 1)
    return min(low, -room), max(high, room)


def _bins(low, high, n_scores):
    """Return edges of equal bars, of which one is 0."""
    n_bins = int(np.clip(4 * np.sqrt(n_scores), 16, _MOST_BINS))
    step = (high - low) / n_bins
    return step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)


def _letter(ax, sizes, bins):
    """Draw the decision and the legend, in room that is made above the bars."""
    top = max(ax.get_ylim()[1], 1e-9)
    band = 1.6 * sizes.small / 72 / sizes.height  # a line of text, of the axes' height
    legend = ax.legend(
        frameon=False,
        fontsize=sizes.small,
        loc="upper right",
        labelcolor=INK,
        borderaxespad=0.1,
        borderpad=0.2,
        labelspacing=0.25,
        handlelength=1.2,
    )
    lines = len(legend.get_texts()) * band
    ax.set_ylim(0, top / max(1 - lines - 1.6 * band, 0.3))
    ax.set_xlim(*bins[[0, -1]])
    ax.axvline(0, ymax=1 - lines - 0.2 * band, color=INK, linewidth=1.2)
    for text, side, color in (
        ("accepted  ", "right", TEAL),
        ("  rejected", "left", RED),
    ):
        ax.text(
            0,
            1 - lines - 0.2 * band,
            text,
            ha=side,
            va="top",
            size=sizes.small,
            color=color,
            transform=ax.get_xaxis_transform(),
        )
