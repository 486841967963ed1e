"""The demo's picture: the attack, the finding and the defence on one sheet."""

import numpy as np
from matplotlib.figure import Figure

_INK, _GREY, _PALE = "#1d2b3a", "#8a97a5", "#e9edf1"
_RED, _TEAL, _AMBER = "#c8423b", "#1f8a84", "#e0a030"
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
        text, color = f"{figures['verdict'].capitalize()}: no class was flagged", _AMBER
    elif found == truth:
        text, color = f"Backdoor found: target class {found}", _RED
    else:
        text = f"Backdoor reported for class {found}, but the truth is {truth}"
        color = _AMBER
    figure.text(0.03, 0.945, text, size=27, weight="bold", color=color)
    attack = story.attack.replace("-", " ")
    figure.text(
        0.03,
        0.913,
        f"{story.dataset}, {attack}   |   the victim is right on {figures['acc']:.1%} "
        f"of clean images, and says {truth} to {figures['asr']:.1%} of triggered ones",
        size=13,
        color=_INK,
    )


def _show(axes, image, title, color=_INK, size=12):
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, size=size, color=color, pad=5)
    for spine in axes.spines.values():
        spine.set(color=_GREY, linewidth=0.8)


def _triggers(figure, story):
    figure.text(0.03, 0.865, "The trigger", size=15, weight="bold", color=_INK)
    true = figure.add_axes((0.03, 0.66, 0.12, 0.17))
    _show(true, story.true_trigger.to_image(), "the attacker's")
    estimate = figure.add_axes((0.165, 0.66, 0.12, 0.17))
    guard = story.guard
    if guard.target_class_ is None:
        _nothing(estimate, "no estimate")
        _tiles(figure, story)
        return
    trigger = guard.triggers_[guard.target_class_]
    _show(estimate, trigger.to_image(), "our estimate", _TEAL)
    asr = f"{story.figures['asr']:.0%}"
    estimated = f"{story.figures['asr_estimated']:.0%}"
    for axes, rate in ((true, asr), (estimate, estimated)):
        axes.set_xlabel(f"attack success {rate}", size=11, color=_GREY, labelpad=5)
    _tiles(figure, story)


def _tiles(figure, story):
    """Write the guard's three rates large, with their intervals."""
    figure.text(0.03, 0.575, "The guard", size=15, weight="bold", color=_INK)
    rates = (
        ("tpr", "triggers\ndetected", _TEAL),
        ("fpr", "clean images\nrejected", _RED),
        ("sia", "sources named\nrightly", _TEAL),
    )
    for column, (name, text, color) in enumerate(rates):
        row = story.report.loc[name]
        if np.isnan(row["score"]):
            continue
        left = 0.03 + 0.09 * column
        figure.text(
            left, 0.528, f"{row['score']:.1%}", size=20, weight="bold", color=color
        )
        figure.text(left, 0.522, text, size=10.5, color=_INK, va="top")
        figure.text(
            left,
            0.484,
            f"{row['low']:.1%} to {row['high']:.1%}\nn = {row['n']:.0f}",
            size=9.5,
            color=_GREY,
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
        color=_INK,
    )
    target = story.figures["target_class"]
    for column, row in enumerate(_pick(seen, target)):
        left = 0.335 + column * 0.107
        image = seen.loc[row]
        clean = figure.add_axes((left, 0.68, 0.095, 0.136))
        stamped = figure.add_axes((left, 0.5, 0.095, 0.136))
        _show(clean, _pixels(story.clean_images[row]), f"a {image['origin']}")
        _show(stamped, _pixels(story.images[row]), "")
        right = image["label"] == image["origin"]
        stamped.text(
            0.5,
            -0.08,
            f"victim says {image['victim_label']}",
            color=_RED if image["victim_label"] == target else _INK,
            size=11,
            ha="center",
            va="top",
            transform=stamped.transAxes,
        )
        stamped.text(
            0.5,
            -0.23,
            f"guard says {image['label']}",
            color=_TEAL if right else _AMBER,
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


def _pixels(image):
    image = image / 255 if image.dtype == np.uint8 else image
    return image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0]


def _anomalies(axes, story):
    engineer = story.guard.engineer_
    p, alpha = engineer.p_values_, engineer.alpha
    axes.set_title(
        "How improbably small is each class's trigger?",
        loc="left",
        size=15,
        weight="bold",
        color=_INK,
        pad=14,
    )
    if np.isnan(p).all():
        _nothing(axes, "too few classes converged for a verdict")
        return
    heights = -np.log10(np.clip(np.nan_to_num(p, nan=1.0), 1e-12, 1))
    flagged = np.isin(engineer.classes_, engineer.target_classes_)
    places = np.arange(len(heights))
    axes.bar(places, heights, color=np.where(flagged, _RED, _INK), width=0.72)
    line = -np.log10(alpha)
    axes.axhline(line, color=_RED, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.text(
        len(heights) - 0.45,
        line,
        f"flagged\nbelow {alpha:g}",
        size=11,
        color=_RED,
        va="center",
    )
    for place, height, norm, converged in zip(
        places, heights, engineer.norms_, engineer.converged_, strict=True
    ):
        text = f"{norm:.3g}" if converged else "not\nreached"
        axes.text(place, height, text, ha="center", va="bottom", size=10, color=_GREY)
    axes.set_xticks(places, engineer.classes_)
    axes.set_xlim(-0.6, len(heights) - 0.5)
    axes.set_ylim(0, 1.15 * max(heights.max(), 1.3 * line))
    axes.set_xlabel("class (on the bar: the norm of its smallest trigger)", size=11)
    axes.set_ylabel(r"$-\log_{10}$ corrected p-value", size=12)
    _bare(axes)


def _histogram(axes, story):
    axes.set_title(
        f"What the victim calls {story.figures['target_class']}: clean or trigger?",
        loc="left",
        size=15,
        weight="bold",
        color=_INK,
        pad=14,
    )
    target = story.figures["target_class"]
    if target not in story.guard.target_classes_:
        _nothing(axes, f"class {target} is not defended: its labels pass through")
        return
    seen = story.evaluation[story.evaluation["victim_label"] == target]
    clean = seen.loc[seen["origin"] == target, "trigger_score"]
    trigger = seen.loc[seen["origin"] != target, "trigger_score"]
    low, high = np.quantile(seen["trigger_score"], [0.002, 0.998])
    pad = 0.05 * (high - low) + 1e-9
    bins = np.linspace(min(low, 0) - pad, max(high, 0) + pad, 61)
    for scores, color, name in (
        (clean, _TEAL, f"clean images of class {target}"),
        (trigger, _RED, "images with the trigger"),
    ):
        weights = np.full(len(scores), 100 / max(len(scores), 1))
        axes.hist(
            np.clip(scores, bins[0], bins[-1]),
            bins,
            weights=weights,
            color=color,
            alpha=0.75,
            label=f"{name} ({len(scores)})",
        )
    axes.axvline(0, color=_INK, linewidth=1.2)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, 1.3 * top)
    axes.text(0, 1.28 * top, "accepted  ", ha="right", va="top", size=11, color=_TEAL)
    axes.text(0, 1.28 * top, "  rejected", ha="left", va="top", size=11, color=_RED)
    axes.set_xlabel(
        f"trigger score: log-likelihood of the best other class minus class {target}'s",
        size=11,
    )
    axes.set_ylabel("% of the images", size=12)
    axes.legend(frameon=False, fontsize=11, loc="upper right")
    _bare(axes)


def _bare(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)


def _nothing(axes, text):
    axes.set(xticks=[], yticks=[], facecolor=_PALE)
    axes.spines[:].set_visible(False)
    axes.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        size=13,
        color=_GREY,
        transform=axes.transAxes,
    )
