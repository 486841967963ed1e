"""A report on a network and its guard: one offline HTML file to show to others."""

import os
import unicodedata
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor._report_guard import check_images_by, judge_defence
from sklearn_backdoor._report_pictures import (
    N_POINTS,
    defence_charts,
    flagged_images,
    search_chart,
    trigger_cards,
)
from sklearn_backdoor._report_provenance import provenance_groups
from sklearn_backdoor._report_search import class_rows, doubts
from sklearn_backdoor._text import printable
from sklearn_backdoor._validation import check_images, check_labels
from sklearn_backdoor.guard import BackdoorGuard
from sklearn_backdoor.reverse import SearchRecord
from sklearn_backdoor.reverse._anomaly import MIN_INFORMATIVE
from sklearn_backdoor.reverse._rule import rule_of

_N_CARDS, _N_TARGETS, _N_FLAGGED = 24, 3, 28  # shown at most
_PILE = 3  # accents on one letter


def write_report(
    path,
    guard,
    X,
    y,
    *,
    X_check=None,
    check_names=None,
    y_check=None,
    provenance=None,
):
    """Write what `render_report` makes, whole or not at all.

    Parameters
    ----------
    path : path-like
        The HTML file; replaced if there is one.
    guard, X, y, X_check, check_names, y_check, provenance
        As in `render_report`.

    Raises
    ------
    OSError
        If the file cannot be written.
    TypeError, ValueError
        As in `render_report`.
    """
    text = render_report(
        guard,
        X,
        y,
        X_check=X_check,
        check_names=check_names,
        y_check=y_check,
        provenance=provenance,
    )
    path = Path(path)
    part = path.with_name(f".{path.name[:80]}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OSError(
            f"the report could not be written to {path} ({error}). Name a file in a "
            "folder that exists and that you may write to."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def render_report(
    guard, X, y, *, X_check=None, check_names=None, y_check=None, provenance=None
):
    """Return a report on a network, its triggers and its guard as HTML.

    It needs no other file and no network, holds no script and forbids any, and shows
    names from anywhere (classes, files, provenance) as text that nothing obeys.

    Parameters
    ----------
    guard : BackdoorGuard
        Fitted or loaded.
    X : array-like of shape (n_samples, n_channels, height, width)
        D_Defense: the clean images that the guard was fitted on, ``uint8`` in 0...255
        or floating point in 0...1.
    y : array-like of shape (n_samples,)
        Their labels, every class of the victim.
    X_check : array-like of shape (n_check, n_channels, height, width), default=None
        Images to check.
    check_names : list of str, default=None
        Names of their files; None numbers them.
    y_check : array-like of shape (n_check,), default=None
        Their classes of origin, where known: adds rates on what was checked.
    provenance : dict, default=None
        Names and values for the last section, on top of ``guard.provenance_``:
        ``weights_file``, ``weights_sha256``, ``architecture``, ``data_source``,
        ``seed``, ``seconds``, or any other.

    Returns
    -------
    str

    Raises
    ------
    NotFittedError
        If the guard is not fitted.
    TypeError, ValueError
        If guard, images, labels, names and provenance do not fit each other.
    """
    X, y = _check_guard(guard, X, y)
    checked = _check_checked(guard, X_check, check_names, y_check)
    context = {
        **_about_network(guard, X, y, _merge(guard, provenance)),
        **_about_search(guard, X, y),
        **_about_guard(guard, X, y, *checked),
    }
    return _environment().get_template("report.html").render(context)


def _about_network(guard, X, y, provenance):
    accuracy = float(np.mean(guard.victim_.predict(X) == y))
    counts = [int(np.sum(y == label)) for label in guard.classes_]
    return {
        "kind": _kind(guard),
        "made": datetime.now(UTC),
        "accuracy": accuracy,
        "n_images": len(X),
        "n_pixels": X.shape[2] * X.shape[3],
        "classes": guard.classes_.tolist(),
        "counts": counts,
        "provenance": provenance_groups(guard, X, counts, accuracy, provenance),
    }


def _about_search(guard, X, y):
    if guard.engineer_ is None:
        cards = trigger_cards(guard, [], X, y)
        return {"search": None, "rule": None, "rows": [], "cards": cards}
    search = SearchRecord.from_engineer(guard.engineer_)
    rows = class_rows(search, guard.target_classes_.tolist())
    table = search.report_
    return {
        "search": search,
        "rule": rule_of(search),
        "rows": rows,
        "searches": [] if table is None else table.to_dict("records"),
        "doubts": doubts(search),
        "cards": trigger_cards(guard, rows[:_N_CARDS], X, y),
        "search_chart": search_chart(search),
        "few": MIN_INFORMATIVE,
    }


def _about_guard(guard, X, y, X_check, names, y_check):
    targets = guard.target_classes_.tolist()
    check = None
    if X_check is not None:
        check = check_images_by(guard, X_check, names, y_check)
    defences = [judge_defence(guard, one, X, y) for one in targets[:_N_TARGETS]]
    return {
        "targets": targets,
        "n_points": N_POINTS,
        "check": check,
        "n_sent": 0 if check is None else sum(len(check.rows_sent(t)) for t in targets),
        "defences": [
            (defence, defence_charts(guard, defence, check, X_check))
            for defence in defences
        ],
        "flagged": flagged_images(check, X_check, _N_FLAGGED),
    }


def _check_guard(guard, X, y):
    if not isinstance(guard, BackdoorGuard):
        raise TypeError(
            f"guard is a {type(guard).__name__}, expected a BackdoorGuard: fit one, "
            "or load one with BackdoorGuard.load."
        )
    check_is_fitted(guard)
    X = check_images(X, image_shape=guard.victim_.image_shape_, ndim=4)
    return X, check_labels(y, guard.classes_, len(X), all_present=True)


def _check_checked(guard, X, names, y):
    if X is None:
        for name, value in (("check_names", names), ("y_check", y)):
            if value is not None:
                raise ValueError(f"{name} without X_check: give the images as well.")
        return None, [], None
    shape = guard.victim_.image_shape_
    X = check_images(X, image_shape=shape, ndim=4, allow_empty=True, name="X_check")
    if names is None:
        names = [f"image {number + 1}" for number in range(len(X))]
    if len(names) != len(X):
        raise ValueError(
            f"check_names has {len(names)} names for {len(X)} images, expected one an "
            "image."
        )
    if y is not None:
        y = check_labels(y, guard.classes_, len(X))
    return X, [str(name) for name in names], y


def _merge(guard, provenance):
    if provenance is not None and not isinstance(provenance, dict):
        raise TypeError(
            f"provenance is a {type(provenance).__name__}, expected a dict of names "
            "and values."
        )
    return {**getattr(guard, "provenance_", {}), **(provenance or {})}


def _kind(guard):
    """Return the verdict, and who reached it: the search or the user."""
    if guard.engineer_ is None:
        return "trigger given"
    flagged = guard.engineer_.target_classes_.tolist()
    if guard.verdict_ == "backdoored" and guard.target_class_ not in flagged:
        return "target given"
    return guard.verdict_


def _environment():
    environment = Environment(
        loader=PackageLoader("sklearn_backdoor"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        name=_name,
        plain=_plain,
        long=_long,
        number=_number,
        rounded=_rounded,
        p=_p,
        pct=_pct,
    )
    environment.globals.update(inf=np.inf)
    return environment


def _plain(text):
    """Make untrusted text printable; Jinja escapes it."""
    return _calm(printable(text, 120))


def _calm(text):
    """Escape piles of accents, which would paint over the lines above and below."""
    calm, pile = "", 0
    for char in text:
        pile = pile + 1 if unicodedata.category(char)[0] == "M" else 0
        calm += char if pile <= _PILE else char.encode("unicode_escape").decode()
    return calm


def _long(text):
    """Return a whole value of the provenance."""
    return _calm(printable(text, None))


def _name(text):
    """Set untrusted text apart, so that its direction of writing stays inside."""
    return Markup('<bdi class="name">{}</bdi>').format(escape(_plain(text)))


def _number(value):
    if not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rounded(value):
    """Return a large number to two digits: the rest would be false precision."""
    return f"{float(f'{value:.2g}'):,.0f}"


def _p(value):
    return f"{value:.2g}" if np.isfinite(value) else "–"


def _pct(value, digits=0):
    return f"{value:.{digits}%}" if np.isfinite(value) else "–"
