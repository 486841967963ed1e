"""The scan's picture: every class's trigger, what it does, and how it compares."""

import io
import unicodedata
from functools import cache

import numpy as np
from matplotlib import font_manager, style
from matplotlib.figure import Figure
from matplotlib.textpath import text_to_path

from sklearn_backdoor._picture import _AMBER, _GREY, _INK, _PALE, _RED, _TEAL
from sklearn_backdoor._text import printable

_N_CELLS = 12
_N_TRIED = 32  # clean images, to find one that the trigger moves
_WIDTH, _CELL, _HEAD, _FOOT = 15.0, 2.35, 1.25, 4.0  # inches
_COLORS = (_INK, _AMBER, _TEAL, "#7a5aa6", "#8a5a3b", "#4f86c6")
_MARKS = "osD^vP"


def picture_png(scan, dpi=110):
    """Return the picture of a scan as a PNG file.

    Parameters
    ----------
    scan : Scan
    dpi : int, default=110

    Returns
    -------
    bytes
    """
    content = io.BytesIO()
    with style.context("default"):  # a user's TeX would run the names of classes
        draw_scan(scan).savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def draw_scan(scan):
    """Draw the triggers of all classes, and the figures that they were judged by.

    Parameters
    ----------
    scan : Scan
        Of `run_scan`. Of more than 12 classes the most suspicious 12 are drawn.

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = scan.summary.head(_N_CELLS).to_dict("records")
    height = _HEAD + _CELL * -(-len(rows) // 2) + _FOOT
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    _headline(figure, scan, height, len(rows))
    for number, row in enumerate(rows):
        left = 0.45 + (number % 2) * (_WIDTH / 2 - 0.1)
        top = height - _HEAD - _CELL * (number // 2)
        _cell(figure, scan, row, left, top, height)
    bottom, chart = 0.95 / height, (_FOOT - 1.85) / height
    _evidence(figure.add_axes((0.062, bottom, 0.385, chart)), scan, rows)
    _norms(figure.add_axes((0.535, bottom, 0.305, chart)), scan, rows)
    return figure


def legible(name, inches, size, weight="normal"):
    """Return a name that the font can draw, that is no formula and that fits.

    Parameters
    ----------
    name : str
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
    font = font_manager.FontProperties(family="DejaVu Sans", size=size, weight=weight)

    def fits(text):
        return text_to_path.get_text_width_height_descent(text, font, False)[0] < (
            72 * inches
        )

    whole, name = name, name.rstrip("…")
    while name and not fits(whole):
        name = name[:-1]
        whole = name + "…"
    return whole.replace("$", r"\$")


@cache
def _glyphs():
    known = None
    for weight in ("normal", "bold"):
        found = font_manager.FontProperties(family="DejaVu Sans", weight=weight)
        own = set(font_manager.get_font(font_manager.findfont(found)).get_charmap())
        known = own if known is None else known & own
    return known


def _headline(figure, scan, height, n_drawn):
    size, room = (24, 2.4) if len(scan.targets) > 1 else (27, 6.8)
    names = [legible(name, room, size, "bold") for name in scan.targets[:2]]
    text, color = {
        "backdoored": ("Backdoor found", _RED),
        "nothing found": ("Nothing found (not proof of being clean)", _TEAL),
        "inconclusive": ("Inconclusive: no class could be judged", _AMBER),
    }[scan.verdict]
    if names:
        word = "classes" if len(names) > 1 else "class"
        more = f" and {len(scan.targets) - 2} more" * (len(scan.targets) > 2)
        text += f": target {word} {', '.join(names)}{more}"
    place = {"transform": figure.dpi_scale_trans}
    figure.text(
        0.45, height - 0.62, text, size=size, weight="bold", color=color, **place
    )
    left_out = len(scan.summary) - n_drawn
    shown = (
        f"the {n_drawn} most suspicious of {len(scan.summary)} classes, the other "
        f"{left_out} left out"
        if left_out
        else f"all {n_drawn} classes, the most suspicious first"
    )
    figure.text(
        0.45,
        height - 0.95,
        f"{shown}   |   right on {scan.accuracy:.1%} of {len(scan.X)} clean images   |"
        f"   flagged: {scan.rule.words}",
        size=12.5,
        color=_INK,
        **place,
    )


def _cell(figure, scan, row, left, top, height):
    """Draw one class: mask, trigger, a clean image, and that image with it."""
    color = _RED if row["flagged"] else _INK
    frame = color if row["flagged"] else _GREY
    name = legible(row["class"], 4.3, 13.5, "bold")
    title = f"class {name}" + "   FLAGGED" * row["flagged"]
    place = {"va": "top", "transform": figure.dpi_scale_trans}
    figure.text(left, top - 0.1, title, size=13.5, weight="bold", color=color, **place)
    figure.text(
        left + 0.02,
        top - 0.42,
        _facts(row),
        size=10.5,
        color=color,
        linespacing=1.35,
        **place,
    )
    trigger = scan.engineer.triggers_[row["position"]]
    strength, what, most = _strength(trigger)
    clean, stamped, was, now = _example(scan, trigger, row)
    was, says = (legible(label, 1.2, 9.5) for label in (was, now))
    panels = (
        (strength, what, most, _GREY),
        (trigger.to_image(), "the trigger\non its own", 1, _GREY),
        (_pixels(clean), f"clean: called\n{was}", 1, _INK),
        (_pixels(stamped), f"with the trigger\n{says}", 1, color),
    )
    for column, (image, caption, limit, shade) in enumerate(panels):
        x, y, side = left + 1.62 + column * 1.38, top - 1.69, 1.26
        axes = figure.add_axes(
            (x / _WIDTH, y / height, side / _WIDTH, side / height), label=str(column)
        )
        axes.imshow(image, cmap="gray", vmin=0, vmax=limit, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(caption, size=9.5, color=shade, labelpad=3)
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=0.8)


def _facts(row):
    facts = [*row["method"].split(", "), ""]
    if row["converged"]:
        facts.append(f"norm {_short(row['norm'])}")
    else:
        facts.append("not converged")
    facts.append(f"success {row['success_rate']:.0%}")
    if np.isfinite(row["p_corrected"]):
        facts.append(f"p-value {row['p_corrected']:.2g}")
    if np.isfinite(row["anomaly_index"]):
        facts.append(f"index {row['anomaly_index']:.1f}")
    return "\n".join(facts)


def _strength(trigger):
    """Return how strongly each pixel is changed, in words, and the largest value."""
    if hasattr(trigger, "mask"):
        image, what, most = trigger.mask, "mask,\n0 to 1", 1.0
    else:
        image = np.abs(trigger.perturbation)
        most = max(float(image.max()), 1e-12)
        what = f"size of change,\n0 to {most:.2g}"
    image = np.broadcast_to(image, (*image.shape[:-2], *trigger.image_shape[-2:]))
    return image.reshape(-1, *image.shape[-2:]).mean(axis=0), what, most


def _example(scan, trigger, row):
    """Return an image of another class, with and without the trigger, and answers."""
    others = np.flatnonzero(scan.y != row["class"])
    tried = others[:: -(-len(others) // _N_TRIED)]
    stamped = trigger.embed(scan.X[tried])
    was = scan.engineer.victim_.predict(scan.X[tried])
    now = scan.engineer.victim_.predict(stamped)
    moved = (was == scan.y[tried]).astype(int) + 2 * (now == row["class"])
    best = int(np.argmax(moved))
    return scan.X[tried[best]], stamped[best], str(was[best]), str(now[best])


def _pixels(image):
    image = image / 255 if image.dtype == np.uint8 else image
    return image.transpose(1, 2, 0)[:, :, :3] if len(image) >= 3 else image[0]


def _short(value):
    if not np.isfinite(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _evidence(axes, scan, rows):
    """Draw a bar a class: the p-value's, or the anomaly index where that decides."""
    rule = scan.rule
    if rule.column == "anomaly_index":
        index = [row["anomaly_index"] * (row["relative"] < 1) for row in rows]
        values = np.asarray(index, dtype=float)
        title, limit = "Anomaly index of small norms", rule.threshold
    else:
        smallest = 1e-16
        p = np.array([row["p_corrected"] for row in rows], dtype=float)
        values = -np.log10(np.maximum(p, smallest))
        title = "How improbable is a trigger as small?  p-value"
        limit = -np.log10(rule.threshold) if rule.column == "p_corrected" else None
    _titled(axes, title)
    if np.isnan(values).all():
        _nothing(axes, "too few classes converged for a statistic")
        return
    values = np.nan_to_num(values)
    colors = [_RED if row["flagged"] else _INK for row in rows]
    axes.bar(np.arange(len(rows)), values, color=colors, width=0.66)
    top = 1.15 * max(values.max(), 1.25 * (limit or 1))
    if limit is not None:
        _threshold(axes, limit, f"flagged\nabove {rule.threshold:g}")
    if rule.column != "anomaly_index":
        ticks = np.arange(0, top, max(1, int(top / 5)))
        axes.set_yticks(ticks, [f"{10.0**-tick:g}" for tick in ticks])
        if limit is not None:
            axes.texts[-1].set_text(f"flagged\nbelow {rule.threshold:g}")
    axes.set_ylim(0, top)
    _name_classes(axes, rows)


def _norms(axes, scan, rows):
    """Draw each search's norm a class, over the median of that search."""
    _titled(axes, "How small is it?  Norm over the median of its search")
    places = {row["class"]: number for number, row in enumerate(rows)}
    searches = list(scan.table.groupby("method", sort=False))
    drawn = False
    for number, (name, part) in enumerate(searches):
        limits = part["norm"].where(part["converged"], np.inf)
        median = limits.median()
        seen = part["class"].isin(places) & part["converged"]
        if not np.isfinite(median) or not seen.any():
            continue
        shift = 0.16 * (number - (len(searches) - 1) / 2)
        axes.scatter(
            [places[label] + shift for label in part.loc[seen, "class"]],
            np.maximum(limits[seen] / max(median, 1e-12), 1e-4),
            s=34,
            marker=_MARKS[number % len(_MARKS)],
            color=_COLORS[number % len(_COLORS)],
            label=name,
            alpha=0.9,
            linewidths=0,
        )
        drawn = True
    if not drawn:
        _nothing(axes, "too few classes converged to compare norms")
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low, high = min(low / 1.2, 0.4), max(high, 2.5)
    axes.set_ylim(low, high)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [step * 10.0**k for k in range(-5, 4) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.axhline(1, color=_GREY, linewidth=0.9, zorder=0)
    if scan.rule.column == "relative":
        _threshold(axes, scan.rule.threshold, "")
    axes.legend(
        frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1.01, 1.02)
    )
    _name_classes(axes, rows)


def _threshold(axes, value, text):
    axes.axhline(value, color=_RED, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.text(
        1.01,
        value,
        text,
        size=10,
        color=_RED,
        va="center",
        transform=axes.get_yaxis_transform(),
    )


def _titled(axes, text):
    axes.set_title(text, loc="left", size=13.5, weight="bold", color=_INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)


def _name_classes(axes, rows):
    names = [legible(row["class"], 0.85, 10) for row in rows]
    long = max(map(len, names)) > 4
    axes.set_xlim(-0.6, len(rows) - 0.4)
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(np.arange(len(rows)), names, **turned)
    for label, row in zip(axes.get_xticklabels(), rows, strict=True):
        label.set_color(_RED if row["flagged"] else _INK)


def _nothing(axes, text):
    axes.set(xticks=[], yticks=[], facecolor=_PALE)
    axes.spines[:].set_visible(False)
    axes.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        size=12,
        color=_GREY,
        transform=axes.transAxes,
    )
