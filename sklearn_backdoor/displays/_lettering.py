"""Text that a picture can take: names of unknown origin, lines that fit."""

import unicodedata
from bisect import bisect_left
from functools import cache

from sklearn_backdoor._text import printable

FONT = "DejaVu Sans"  # comes with matplotlib, so that its glyphs are known


def legible(name, inches, size, weight="normal"):
    """Return a name that the font can draw, that is no formula and that fits.

    Parameters
    ----------
    name : object
        Taken as its ``str``.
    inches : float
        Room for it; longer names are cut.
    size : float
        Of the font, in points.
    weight : {"normal", "bold"}, default="normal"

    Returns
    -------
    str
        ``$`` is escaped; a character that the font lacks becomes a box.
    """
    name = unicodedata.normalize("NFC", printable(name, 80))
    name = "".join(c for c in name if unicodedata.category(c)[0] != "M")
    known = _glyphs()
    name = "".join(c if ord(c) in known else "□" for c in name)
    if width(name, size, weight) >= inches:

        def cut(length):
            return name[:length].rstrip("…") + "…"

        lengths = range(len(name))
        fits = bisect_left(lengths, inches, key=lambda n: width(cut(n), size, weight))
        name = cut(max(fits - 1, 0))
    return name.replace("$", r"\$")


def wrapped(text, inches, size, weight="normal"):
    """Return text broken into more lines at its spaces, so that it fits.

    Parameters
    ----------
    text : str
    inches : float
        Room for a line.
    size : float
        Of the font, in points.
    weight : {"normal", "bold"}, default="normal"

    Returns
    -------
    str
    """
    lines: list = []
    for paragraph in text.split("\n"):
        first, *words = paragraph.split(" ")
        lines.append(first)
        for word in words:
            longer = f"{lines[-1]} {word}"
            if width(longer, size, weight) > inches:
                lines.append(word)
            else:
                lines[-1] = longer
    return "\n".join(lines)


def width(text, size, weight="normal"):
    """Return how wide a line of text is, in inches.

    Parameters
    ----------
    text : str
    size : float
        Of the font, in points.
    weight : {"normal", "bold"}, default="normal"

    Returns
    -------
    float
    """
    return sum(_advance(char, weight) for char in text) * size / 72


@cache
def _advance(char, weight):
    """Return how far a character moves the pen, in units of the font's size."""
    font = _font(weight)
    font.set_size(100, 72)
    return font.load_char(ord(char)).linearHoriAdvance / 65536 / 100


@cache
def _glyphs():
    return set(_font("normal").get_charmap()) & set(_font("bold").get_charmap())


def _font(weight):
    from matplotlib import font_manager

    found = font_manager.FontProperties(family=FONT, weight=weight)
    return font_manager.get_font(font_manager.findfont(found))


def short(value):
    """Return a norm in few characters."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"
