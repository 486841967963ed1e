"""The scan's picture: every class's trigger, what it does, and how it compares."""

import io

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from sklearn_backdoor.displays import AnomalyIndexDisplay, TriggerDisplay
from sklearn_backdoor.displays._lettering import legible, short
from sklearn_backdoor.displays._style import AMBER, GREY, INK, RED, TEAL, nothing
from sklearn_backdoor.displays._trigger import N_TRIED

_N_CELLS = 12
_WIDTH, _CELL, _HEAD, _FOOT = 15.0, 2.35, 1.25, 4.0  # inches
_COLORS = (INK, AMBER, TEAL, "#7a5aa6", "#8a5a3b", "#4f86c6")
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


def _headline(figure, scan, height, n_drawn):
    size, room = (24, 2.4) if len(scan.targets) > 1 else (27, 6.8)
    names = [legible(name, room, size, "bold") for name in scan.targets[:2]]
    text, color = {
        "backdoored": ("Backdoor found", RED),
        "nothing found": ("Nothing found (not proof of being clean)", TEAL),
        "inconclusive": ("Inconclusive: no class could be judged", AMBER),
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
        color=INK,
        **place,
    )


def _cell(figure, scan, row, left, top, height):
    """Draw one class: mask, trigger, a clean image, and that image with it."""
    color = RED if row["flagged"] else INK
    frame = color if row["flagged"] else GREY
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
    images = scan.X[scan.y != row["class"]]
    x, y = (left + 1.56) / _WIDTH, (top - 2.14) / height
    axes = figure.add_axes((x, y, 5.5 / _WIDTH, 1.74 / height), label=str(left + top))
    display = TriggerDisplay.from_estimator(
        scan.engineer,
        images[:: -(-len(images) // N_TRIED)],
        label=row["class"],
        ax=axes,
    )
    axes.set_title("", loc="left")
    display.axes_[-1].xaxis.label.set_color(color)
    for panel in display.axes_:
        panel.spines[:].set_color(frame)


def _facts(row):
    facts = [*row["method"].split(", "), ""]
    if row["converged"]:
        facts.append(f"norm {short(row['norm'])}")
    else:
        facts.append("not converged")
    facts.append(f"success {row['success_rate']:.0%}")
    if np.isfinite(row["p_corrected"]):
        facts.append(f"p-value {row['p_corrected']:.2g}")
    if np.isfinite(row["anomaly_index"]):
        facts.append(f"index {row['anomaly_index']:.1f}")
    return "\n".join(facts)


def _evidence(axes, scan, rows):
    """Draw a bar a class: what the search flags by."""
    classes = [row["class"] for row in rows]
    AnomalyIndexDisplay.from_estimator(scan.engineer, classes=classes, ax=axes)


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
        nothing(axes, "too few classes converged to compare norms")
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
    axes.axhline(1, color=GREY, linewidth=0.9, zorder=0)
    if scan.rule.column == "relative":
        axes.axhline(scan.rule.threshold, color=RED, linewidth=1.1, linestyle="--")
    axes.legend(
        frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1.01, 1.02)
    )
    _name_classes(axes, rows)


def _titled(axes, text):
    axes.set_title(text, loc="left", size=13.5, weight="bold", color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)


def _name_classes(axes, rows):
    names = [legible(row["class"], 0.85, 10) for row in rows]
    long = max(map(len, names)) > 4
    axes.set_xlim(-0.6, len(rows) - 0.4)
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(np.arange(len(rows)), names, **turned)
    for label, row in zip(axes.get_xticklabels(), rows, strict=True):
        label.set_color(RED if row["flagged"] else INK)
