"""The demo's picture: the attack, the finding and the defence on one sheet."""

import numpy as np
from matplotlib.figure import Figure

from sklearn_backdoor.displays import AnomalyIndexDisplay, LikelihoodRatioDisplay
from sklearn_backdoor.displays._style import (
    AMBER,
    GREY,
    INK,
    RED,
    TEAL,
    nothing,
    pixels,
    show,
)

_N_EXAMPLES = 6


def draw_story(story):
    """Draw triggers, examples, p-values and the likelihood-ratio histogram.

    Parameters
    ----------
    story : Story
        Of `run_demo`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = Figure(figsize=(15, 10.5), facecolor="white")
    _headline(figure, story)
    _triggers(figure, story)
    _examples(figure, story)
    _anomalies(figure.add_axes((0.055, 0.075, 0.36, 0.3)), story)
    _histogram(figure.add_axes((0.52, 0.075, 0.445, 0.3)), story)
    return figure


def _headline(figure, story):
    figures = story.figures
    found, truth = figures["found"], figures["target_class"]
    if found is None:
        text, color = f"{figures['verdict'].capitalize()}: no class was flagged", AMBER
    elif found == truth:
        text, color = f"Backdoor found: target class {found}", RED
    else:
        text = f"Backdoor reported for class {found}, but the truth is {truth}"
        color = AMBER
    figure.text(0.03, 0.945, text, size=27, weight="bold", color=color)
    attack = story.attack.replace("-", " ")
    figure.text(
        0.03,
        0.913,
        f"{story.dataset}, {attack}   |   the victim is right on {figures['acc']:.1%} "
        f"of clean images, and says {truth} to {figures['asr']:.1%} of triggered ones",
        size=13,
        color=INK,
    )


def _triggers(figure, story):
    figure.text(0.03, 0.865, "The trigger", size=15, weight="bold", color=INK)
    true = figure.add_axes((0.03, 0.66, 0.12, 0.17))
    show(true, story.true_trigger.to_image())
    _title(true, "the attacker's", INK)
    estimate = figure.add_axes((0.165, 0.66, 0.12, 0.17))
    guard = story.guard
    if guard.target_class_ is None:
        nothing(estimate, "no estimate")
        _tiles(figure, story)
        return
    trigger = guard.triggers_[guard.target_class_]
    show(estimate, trigger.to_image())
    _title(estimate, "our estimate", TEAL)
    asr = f"{story.figures['asr']:.0%}"
    estimated = f"{story.figures['asr_estimated']:.0%}"
    for axes, rate in ((true, asr), (estimate, estimated)):
        axes.set_xlabel(f"attack success {rate}", size=11, color=GREY, labelpad=5)
    _tiles(figure, story)


def _title(axes, text, color):
    axes.set_title(text, size=12, color=color, pad=5)


def _tiles(figure, story):
    """Write the guard's three rates large, with their intervals."""
    figure.text(0.03, 0.575, "The guard", size=15, weight="bold", color=INK)
    rates = (
        ("tpr", "triggers\ndetected", TEAL),
        ("fpr", "clean images\nrejected", RED),
        ("sia", "sources named\nrightly", TEAL),
    )
    for column, (name, text, color) in enumerate(rates):
        row = story.report.loc[name]
        if np.isnan(row["score"]):
            continue
        left = 0.03 + 0.09 * column
        figure.text(
            left, 0.528, f"{row['score']:.1%}", size=20, weight="bold", color=color
        )
        figure.text(left, 0.522, text, size=10.5, color=INK, va="top")
        figure.text(
            left,
            0.484,
            f"{row['low']:.1%} to {row['high']:.1%}\nn = {row['n']:.0f}",
            size=9.5,
            color=GREY,
            va="top",
        )


def _examples(figure, story):
    seen = story.evaluation
    figure.text(
        0.335,
        0.865,
        "Unseen images: clean above, with the attacker's trigger below",
        size=15,
        weight="bold",
        color=INK,
    )
    target = story.figures["target_class"]
    for column, row in enumerate(_pick(seen, target)):
        left = 0.335 + column * 0.107
        image = seen.loc[row]
        clean = figure.add_axes((left, 0.68, 0.095, 0.136))
        stamped = figure.add_axes((left, 0.5, 0.095, 0.136))
        show(clean, pixels(story.clean_images[row]))
        _title(clean, f"a {image['origin']}", INK)
        show(stamped, pixels(story.images[row]))
        right = image["label"] == image["origin"]
        stamped.text(
            0.5,
            -0.08,
            f"victim says {image['victim_label']}",
            color=RED if image["victim_label"] == target else INK,
            size=11,
            ha="center",
            va="top",
            transform=stamped.transAxes,
        )
        stamped.text(
            0.5,
            -0.23,
            f"guard says {image['label']}",
            color=TEAL if right else AMBER,
            weight="bold",
            size=12,
            ha="center",
            va="top",
            transform=stamped.transAxes,
        )


def _pick(seen, target):
    """Take the first triggered image of each source class, spread over the classes."""
    sent = seen[(seen["origin"] != target) & (seen["victim_label"] == target)]
    firsts = sent.groupby("origin").head(1).sort_values("origin").index.tolist()
    chosen = (
        [firsts[i] for i in np.unique(np.linspace(0, len(firsts) - 1, 6).astype(int))]
        if firsts
        else []
    )
    rest = [row for row in sent.index if row not in chosen]
    return (chosen + rest)[:_N_EXAMPLES]


def _anomalies(axes, story):
    AnomalyIndexDisplay.from_estimator(story.guard, ax=axes)


def _histogram(axes, story):
    target = story.figures["target_class"]
    if target not in story.guard.target_classes_:
        nothing(axes, f"class {target} is not defended: its labels pass through")
        return
    seen = story.evaluation[story.evaluation["victim_label"] == target]
    LikelihoodRatioDisplay.from_predictions(
        seen["trigger_score"], seen["origin"], target_class=target, ax=axes
    )
