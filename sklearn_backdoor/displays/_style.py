"""The look that all pictures share: colours, sizes, axes."""

from typing import NamedTuple

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_backdoor.displays._lettering import FONT, wrapped

INK, GREY, PALE = "#1d2b3a", "#66727f", "#e9edf1"
RED, TEAL, AMBER = "#c8423b", "#1f8a84", "#e0a030"
# Nine that the colour-blind tell apart: after P. Tol's "muted"
SERIES = (
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933"),
    *("#c8a415", "#cc6677", "#882255", "#aa4499"),
)
MARKS = "o^s"


class Sizes(NamedTuple):
    """Room that an axes has, in inches, and sizes of text that suit it, in points."""

    width: float
    height: float
    title: float
    label: float
    small: float


def open_axes(display, ax, figsize):
    """Return the axes to draw on, dark on white whatever the user's style.

    A figure that has no layout engine gets a constrained layout, so that no label is
    cut, unless the axes was placed by hand.

    Parameters
    ----------
    display : object
        Whose plot it is, for the message if matplotlib is missing.
    ax : matplotlib Axes or None
        None opens a figure by pyplot, as scikit-learn's displays do.
    figsize : tuple of float
        Of that figure, in inches.

    Returns
    -------
    ax : matplotlib Axes
    sizes : Sizes
    """
    check_matplotlib_support(f"{type(display).__name__}.plot")
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    figure = ax.figure.figure  # that of a subfigure, too
    if ax.get_subplotspec() is not None and figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")
    figure.set_facecolor("white")
    ax.set_facecolor("white")
    display.ax_, display.figure_ = ax, ax.figure
    return ax, sizes_of(ax)


def sizes_of(ax):
    """Return the room of an axes and the sizes of text that suit it.

    Parameters
    ----------
    ax : matplotlib Axes

    Returns
    -------
    Sizes
    """
    box = ax.get_window_extent()
    width, height = box.width / ax.figure.dpi, box.height / ax.figure.dpi
    label = float(np.clip(10.5 * np.sqrt(min(width / 5, height / 2.2)), 6.5, 10.5))
    return Sizes(width, height, 1.28 * label, label, max(0.9 * label, 6))


def dress(ax, sizes, *, title="", xlabel="", ylabel=""):
    """Give an axes its title and labels, and let nothing obey a user's TeX.

    Parameters
    ----------
    ax : matplotlib Axes
        With all that it shows.
    sizes : Sizes
    title, xlabel, ylabel : str
    """
    from matplotlib.text import Text

    ax.set_title(
        wrapped(title, sizes.width, sizes.title, "bold"),
        loc="left",
        size=sizes.title,
        weight="bold",
        color=INK,
        pad=0.6 * sizes.title,
    )
    ax.set_xlabel(
        wrapped(xlabel, sizes.width, sizes.label),
        size=sizes.label,
        color=INK,
        labelpad=3,
    )
    ax.set_ylabel(
        wrapped(ylabel, sizes.height, sizes.label),
        size=sizes.label,
        color=INK,
        labelpad=3,
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(
        labelsize=sizes.small, color=GREY, length=2.5, pad=2.5, labelcolor=INK
    )
    ax.get_xticklabels(), ax.get_yticklabels()  # these are made when asked for
    for text in ax.findobj(Text):
        text.set(usetex=False, fontfamily=FONT)


def nothing(ax, text, sizes=None):
    """Say on an axes why there is nothing to show.

    Parameters
    ----------
    ax : matplotlib Axes
    text : str
    sizes : Sizes, default=None
        None measures.
    """
    sizes = sizes or sizes_of(ax)
    ax.set(xticks=[], yticks=[], facecolor=PALE)
    ax.spines[:].set_visible(False)
    ax.text(
        0.5,
        0.5,
        wrapped(text, 0.9 * sizes.width, 1.1 * sizes.label),
        ha="center",
        va="center",
        size=1.1 * sizes.label,
        color=GREY,
        transform=ax.transAxes,
    )


def show(ax, image, *, caption="", color=INK, size=10, most=1.0):
    """Show an image with a caption under it.

    Parameters
    ----------
    ax : matplotlib Axes
    image : ndarray of shape (height, width) or (height, width, 3)
    caption : str
    color : str
        Of the caption.
    size : float
        Of the caption, in points.
    most : float
        Value that is drawn white, where the image has one channel.
    """
    ax.imshow(image, cmap="gray", vmin=0, vmax=most, interpolation="nearest")
    ax.set(xticks=[], yticks=[], facecolor="white")
    ax.set_xlabel(
        caption, size=size, color=color, labelpad=3, usetex=False, fontfamily=FONT
    )
    ax.spines[:].set(color=GREY, linewidth=0.8)


def pixels(image):
    """Return an image (n_channels, height, width) as `imshow` takes it, in 0...1."""
    image = image / 255 if image.dtype == np.uint8 else image
    return image.transpose(1, 2, 0)[:, :, :3] if len(image) >= 3 else image[0]
