"""The report's pictures, as data URIs that need no other file."""

import base64
import io
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image

from sklearn_backdoor.displays import (
    AnomalyIndexDisplay,
    FeatureSpaceDisplay,
    LikelihoodRatioDisplay,
    SourceConfusionDisplay,
)
from sklearn_backdoor.displays._style import pixels

_DPI = 150
_SIDE, _SMALL_SIDE = 128, 96  # pixels; larger pictures are shrunk
_N_TRIED = 64  # clean images, to find one that the trigger moves
N_POINTS = 500  # checked images in feature space


class Card(NamedTuple):
    """One class's trigger in pictures; ``row`` is None where it was given."""

    label: Any
    row: Any
    flagged: bool
    guarded: bool
    success_rate: float
    strength: str
    what: str
    alone: str
    clean: str
    was: Any
    stamped: str
    now: Any


class Charts(NamedTuple):
    """The pictures of one guarded class; None for what was not checked or known."""

    scores: str
    scores_check: str | None
    features: str
    sources: str
    sources_check: str | None


class Flagged(NamedTuple):
    """One flagged image."""

    uri: str
    name: str
    victim_label: Any
    label: Any
    origin: Any
    score: float


def trigger_cards(guard, rows, X, y):
    """Picture the triggers of all classes, or the ones that the guard was given.

    Parameters
    ----------
    guard : BackdoorGuard
        Fitted.
    rows : list of ClassRow
        Empty where the trigger was given.
    X : ndarray of shape (n_samples, n_channels, height, width)
        D_Defense.
    y : ndarray of shape (n_samples,)
        Its labels.

    Returns
    -------
    list of Card
    """
    if rows:
        shown = [(row.label, row.trigger, row) for row in rows]
    else:
        shown = [(label, one, None) for label, one in guard.triggers_.items()]
    side = _SIDE if len(shown) <= 12 else _SMALL_SIDE
    return [_card(guard, label, one, row, X, y, side) for label, one, row in shown]


def _card(guard, label, trigger, row, X, y, side):
    others = np.flatnonzero(y != label)
    tried = others[:: -(-len(others) // _N_TRIED)]
    stamped = trigger.embed(X[tried])
    was, now = guard.victim_.predict(X[tried]), guard.victim_.predict(stamped)
    moved = (was == y[tried]).astype(int) + 2 * (now == label)
    best = int(np.argmax(moved))
    strength, what = _strength(trigger, X.shape[1:])
    return Card(
        label,
        row,
        row is not None and row.flagged,
        label in guard.target_classes_,
        float(np.mean(now == label)),
        image_uri(strength, side),
        what,
        image_uri(_alone(trigger, X.shape[1:]), side),
        image_uri(pixels(X[tried[best]]), side),
        was[best],
        image_uri(pixels(stamped[best]), side),
        now[best],
    )


def _strength(trigger, shape):
    """Return how strongly each pixel is changed, in 0...1, and in words."""
    if hasattr(trigger, "mask"):
        image, what = trigger.mask, "where: white is covered in full"
    else:
        image = np.abs(trigger.perturbation)
        most = max(float(image.max()), 1e-12)
        image, what = image / most, f"size of change: white is {most:.2g} of 1"
    return np.broadcast_to(image, shape).mean(axis=0), what


def _alone(trigger, shape):
    """Return the trigger on mid-grey, also where it has no image shape of its own."""
    if trigger.image_shape == shape:
        return trigger.to_image()
    grey = np.full((1, *shape), 0.5, dtype=np.float32)
    return pixels(trigger.embed(grey)[0])


def search_chart(search):
    """Draw the figures that the classes were judged by.

    Parameters
    ----------
    search : SearchRecord

    Returns
    -------
    str
        A data URI.
    """
    return chart_uri(lambda ax: AnomalyIndexDisplay.from_estimator(search, ax=ax))


def defence_charts(guard, defence, check, X_check):
    """Draw scores, features and source classes of one guarded class.

    Parameters
    ----------
    guard : BackdoorGuard
        Fitted.
    defence : Defence
    check : Check or None
    X_check : ndarray of shape (n_check, n_channels, height, width) or None
        What ``check`` judged.

    Returns
    -------
    Charts
    """
    target, sent = defence.target, defence.sent
    labels = guard.classes_

    def features(ax):
        FeatureSpaceDisplay.from_predictions(
            defence.Z, defence.y, target_class=target, ax=ax, **checked
        )

    checked, scores, known = {}, None, None
    if check is not None and len(rows := check.rows_sent(target)):
        seen = check.table.iloc[rows]
        few = _spread(rows, N_POINTS)
        checked["Z_check"] = guard.victim_.transform(X_check[few])
        checked["is_trigger"] = check.table["is_trigger"].to_numpy()[few]
        origins = None if check.origins is None else check.origins[rows]
        found, n_others = seen["trigger_score"].to_numpy(), len(check.table) - len(rows)
        scores = _histogram(found, origins, target, n_others)
        if origins is not None:
            known = _confusion(origins, seen["label"].to_numpy(), target, labels)
    return Charts(
        _histogram(defence.scores[sent], defence.y[sent], target, int(np.sum(~sent))),
        scores,
        chart_uri(features, height=4.6),
        _confusion(defence.y[sent], defence.labels[sent], target, labels),
        known,
    )


def _histogram(scores, origins, target, n_others):
    display = LikelihoodRatioDisplay(
        trigger_score=scores, y_true=origins, target_class=target, n_others=n_others
    )
    return chart_uri(partial(display.plot, title="Clean or triggered?"))


def _confusion(y_true, y_pred, target, labels):
    def draw(ax):
        SourceConfusionDisplay.from_predictions(
            y_true, y_pred, target_class=target, labels=labels, ax=ax
        )

    return chart_uri(draw, height=5.2)


def _spread(rows, most):
    return rows[:: -(-len(rows) // most)]


def flagged_images(check, X_check, most):
    """Picture the flagged images with the highest scores.

    Parameters
    ----------
    check : Check or None
    X_check : ndarray of shape (n_check, n_channels, height, width) or None
        What it judged.
    most : int
        Images at most.

    Returns
    -------
    list of Flagged
    """
    if check is None:
        return []
    table, origins = check.table, check.origins
    return [
        Flagged(
            image_uri(pixels(X_check[row]), _SMALL_SIDE),
            check.names[row],
            table["victim_label"][row],
            table["label"][row],
            None if origins is None else origins[row],
            float(table["trigger_score"][row]),
        )
        for row in check.flagged[:most]
    ]


def image_uri(image, side=_SIDE):
    """Return an image as the URI of a PNG file that holds it.

    Parameters
    ----------
    image : ndarray of shape (height, width) or (height, width, 3), in 0...1
    side : int, default=128
        Larger images are shrunk to this many pixels.

    Returns
    -------
    str
    """
    grey = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(grey))
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BOX)
    content = io.BytesIO()
    picture.save(content, format="png", optimize=True)
    return _uri(content.getvalue())


def chart_uri(draw, width=6.0, height=3.3):
    """Return what a function draws as the URI of a PNG file.

    Parameters
    ----------
    draw : callable
        Takes the axes.
    width, height : float
        In inches.

    Returns
    -------
    str
    """
    with style.context("default"):  # a user's TeX would run the names of classes
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return _uri(content.getvalue())


def _uri(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()
