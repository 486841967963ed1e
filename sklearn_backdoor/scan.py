"""One suspect network, some clean images: a verdict, its figures, one screen."""

import platform
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import sklearn_backdoor
from sklearn_backdoor import reverse
from sklearn_backdoor._class_order import check_class_order
from sklearn_backdoor._text import printable
from sklearn_backdoor.reverse._rule import rule_of
from sklearn_backdoor.victim import VictimNetwork

METHODS = {
    "auto": "AutoReverseEngineer",
    "patch": "NCReverseEngineer",
    "additive": "AdditiveReverseEngineer",
    "neurons": "NeuronReverseEngineer",
    "batch-norm": "BatchNormReverseEngineer",
    "weights": "WeightReverseEngineer",
    "tabor": "TABORReverseEngineer",
    "b3d": "B3DReverseEngineer",
}
STATUS = {"nothing found": 0, "backdoored": 1, "inconclusive": 4}
_N_ROWS, _NEEDED, _N_SINGLE = 10, 5, 2  # classes shown, converged; sources named


@dataclass(eq=False)
class Scan:
    """What a scan saw, for the screen, the picture and the JSON file.

    Attributes
    ----------
    engineer, method, X, y
        The fitted engineer, its key in ``METHODS``, images and labels.
    table : pandas.DataFrame
        A row a search and class.
    summary : pandas.DataFrame
        A row a class, the most suspicious first: the row of ``table`` that speaks for
        it, its ``position`` in logit order, ``relative`` (norm over the median of its
        search) and ``flagged_by``.
    accuracy : float in 0...1
        Of the network on the clean images.
    """

    engineer: Any
    method: str
    X: np.ndarray
    y: np.ndarray
    table: pd.DataFrame
    summary: pd.DataFrame
    accuracy: float
    image_passes: dict
    seconds: float
    notes: list
    settings: dict

    @property
    def verdict(self):
        """The engineer's verdict."""
        return self.engineer.verdict_

    @property
    def status(self):
        """The exit status of the command."""
        return STATUS[self.verdict]

    @property
    def targets(self):
        """Flagged classes, the most suspicious first."""
        return [str(label) for label in self.engineer.target_classes_]

    @property
    def rule(self):
        """What the search flags by."""
        return rule_of(self.engineer)


def run_scan(
    network,
    X,
    y,
    classes,
    *,
    method="auto",
    seed=0,
    jobs=None,
    checkpoint_dir=None,
    verbose=False,
):
    """Search a trigger for each class of a network, and judge them.

    Parameters
    ----------
    network : torch.nn.Module
        As in `VictimNetwork`.
    X : ndarray of shape (n_samples, n_channels, height, width)
        Clean images, ``uint8`` in 0...255 or floating point in 0...1.
    y : ndarray of shape (n_samples,)
        Their labels, among ``classes``.
    classes : list of str
        In logit order.
    method : str, default="auto"
        A key of ``METHODS``.
    seed, jobs, checkpoint_dir, verbose
        As in `AutoReverseEngineer`.

    Returns
    -------
    Scan

    Raises
    ------
    TypeError, ValueError
        If network, images, classes or settings do not fit each other.
    """
    start = time.perf_counter()
    labels = [printable(name, None) for name in classes]
    if len(set(labels)) < len(labels):
        twice = [name for name, count in Counter(labels).items() if count > 1]
        raise ValueError(f"classes are named twice: {twice[:5]}. Rename them.")
    y = np.array([printable(name, None) for name in y])
    victim = _open_victim(network, X, y, labels)
    make = getattr(reverse, METHODS[method], None)
    if make is None:
        raise ValueError(f"method {method!r} is not in this version. Choose auto.")
    answers = victim.predict(X)
    check_class_order(answers, y, labels)  # before a search of minutes
    options = {"verbose": verbose, "checkpoint_dir": checkpoint_dir}
    engineer = make(victim, random_state=seed, n_jobs=jobs, **options)
    notes = _fit(engineer, X, y)
    passes = dict(engineer.n_image_passes_._asdict())
    passes["forward"] += len(X)
    table = _tabulate(engineer, method)
    return Scan(
        engineer,
        method,
        X,
        y,
        table,
        _summarise(engineer, table, method),
        float(np.mean(answers == y)),
        passes,
        time.perf_counter() - start,
        notes,
        {"method": method, "seed": seed, "jobs": jobs},
    )


def _open_victim(network, X, y, labels):
    try:
        return VictimNetwork(network, classes=labels).fit(X, y)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{error} The options are --image-size, --channels and --classes."
        ) from error


def _fit(engineer, X, y):
    """Fit; return what our own code warned of, pass on other warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            engineer.fit(X, y)
        except (TypeError, ValueError) as error:
            steps = traceback.extract_tb(error.__traceback__)
            if any(step.name == "_search" for step in steps):  # past all checks
                raise RuntimeError(f"the search failed: {error}") from error
            raise
    ours = str(Path(__file__).parent)
    notes: dict[str, None] = {}
    for one in caught:
        if one.category is UserWarning and one.filename.startswith(ours):
            notes[str(one.message)] = None
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return list(notes)


def _tabulate(engineer, method):
    if hasattr(engineer, "report_"):
        return engineer.report_
    classes = engineer.classes_
    return pd.DataFrame(
        {
            "method": method,
            "class": classes,
            "norm": engineer.norms_,
            "success_rate": engineer.success_rates_,
            "converged": engineer.converged_,
            "reason": engineer.reasons_,
            "anomaly_index": engineer.anomaly_indices_,
            "p_value": engineer.p_values_,
            "p_corrected": engineer.p_values_,  # one search: nothing to correct for
            "flagged": np.isin(classes, engineer.target_classes_),
        }
    )


def _summarise(engineer, table, method):
    """Return the row that speaks for each class, the most suspicious class first."""
    limits = table["norm"].where(table["converged"], np.inf)
    medians = limits.groupby(table["method"]).transform("median")
    table = table.assign(relative=limits / medians.where(np.isfinite(medians)))
    table["position"] = table["class"].map(
        {label: number for number, label in enumerate(engineer.classes_)}
    )
    flagging = table[table["flagged"]].groupby("position")["method"].agg(list)
    chosen = getattr(engineer, "methods_", [method] * len(engineer.classes_))
    wanted = list(zip(chosen, engineer.classes_, strict=True))
    summary = table.set_index(["method", "class"], drop=False).loc[wanted]
    summary["flagged_by"] = [flagging.get(one, []) for one in summary["position"]]
    summary["flagged"] = np.isin(summary["class"], engineer.target_classes_)
    return summary.sort_values(
        ["flagged", "p_corrected", "relative"],
        ascending=[False, True, True],
        kind="stable",
    ).reset_index(drop=True)


def explain(scan):
    """Say what the verdict means and what to do next.

    Parameters
    ----------
    scan : Scan

    Returns
    -------
    list of str
        Lines for the screen.
    """
    if scan.verdict == "backdoored":
        return [
            f"By: {scan.rule.words}.",
            *_single_class(scan),
            "Look at the picture: is it a trigger, or a feature of that class? Do not "
            "use the",
            "network bare; BackdoorGuard can guard it in flight.",
        ]
    if scan.verdict == "nothing found":
        return [
            f"No class has this: {scan.rule.words}.",
            "A trigger of another kind can be there all the same. Look at the picture.",
        ]
    n_classes = len(scan.engineer.classes_)
    if n_classes < _NEEDED:
        return [
            f"{n_classes} classes are too few to tell which stands out (it takes "
            f"{_NEEDED} at least).",
            "Look at the picture: a trigger that is small and works is suspect.",
        ]
    lines = []
    for name, rows in scan.table.groupby("method", sort=False):
        n_converged = int(rows["converged"].sum())
        if n_converged < _NEEDED or n_converged <= n_classes / 2:
            reasons = Counter(rows.loc[~rows["converged"], "reason"])
            reason = printable(reasons.most_common(1)[0][0] or "no reason given", 60)
            lines.append(
                f"search {name}: {n_converged} of {n_classes} classes converged "
                f"({reason})."
            )
    lines = lines or ["the searches that converged are too few to compare."]
    return [*lines[:3], "Give more clean images, or try another --method."]


def _single_class(scan):
    """Say which target is reached from one class only."""
    sources = getattr(scan.engineer, "single_sources_", {})
    return [
        f"Single-class: the trigger for {printable(target, 24)} is for images of "
        f"{printable(source, 24)} alone."
        for target, source in list(sources.items())[:_N_SINGLE]
    ]


def screen(scan):
    """Return the outcome as one screen of text.

    Parameters
    ----------
    scan : Scan

    Returns
    -------
    str
    """
    shown = scan.summary.head(_N_ROWS)
    n_more = len(scan.summary) - len(shown)
    meaning = explain(scan)
    if scan.verdict == "inconclusive":
        headline = f"INCONCLUSIVE: {meaning.pop(0)}"
    else:
        headline = _headline(scan)
    lines = ["", f"  {headline}", *(f"    {line}" for line in meaning)]
    lines += ["", f"    {'search':<26}    norm  success   index        p  class"]
    lines += [_row(row) for row in shown.to_dict("records")]
    if n_more:
        lines.append(f"    and {n_more} classes less suspicious, in the JSON file")
    counts = sorted(Counter(scan.y.tolist()).values())
    each = f"{counts[0]}" + f" to {counts[-1]}" * (counts[0] < counts[-1])
    lines += [
        "",
        f"  network   right on {scan.accuracy:.1%} of {len(scan.X)} clean images, "
        f"{each} a class",
        f"  search    {scan.method}, {scan.image_passes['forward']:,} images forward, "
        f"{scan.image_passes['backward']:,} backward, {scan.seconds:.0f} s",
    ]
    lines += [f"  note      {printable(note, 240)}" for note in scan.notes[:3]]
    return "\n".join(lines)


def _row(row):
    norm = row["norm"] if row["converged"] else np.nan
    return (
        f"  {'!' if row['flagged'] else ' '} {row['method']:<26}"
        f"{_number(norm, 8, '.0f' if norm >= 100 else '#.3g')}"
        f"{_number(row['success_rate'], 9, '.1%')}"
        f"{_number(row['anomaly_index'], 8, '.1f')}"
        f"{_number(row['p_corrected'], 9, '.2g')}  {printable(row['class'])}"
    )


def _headline(scan):
    if scan.verdict == "nothing found":
        return "NOTHING FOUND (not proof of being clean)"
    names = ", ".join(printable(name) for name in scan.targets[:3])
    more = f" and {len(scan.targets) - 3} more" * (len(scan.targets) > 3)
    by = " and ".join(f'"{name}"' for name in scan.summary["flagged_by"].iloc[0])
    word = "class" if len(scan.targets) == 1 else "classes"
    return f"BACKDOORED: target {word} {names}{more}, by {by}"


def _number(value, width, form):
    return ("-" if np.isnan(value) else format(value, form)).rjust(width)


def to_json(scan):
    """Return all figures as plain values, for strict JSON.

    Parameters
    ----------
    scan : Scan

    Returns
    -------
    dict
        NaN and infinity are None.
    """
    counts = Counter(scan.y.tolist())
    classes = scan.engineer.classes_.tolist()
    return _plain(
        {
            "format": 1,
            "verdict": scan.verdict,
            "exit_status": scan.status,
            "explanation": explain(scan),
            "target_classes": scan.targets,
            "single_sources": getattr(scan.engineer, "single_sources_", {}),
            "classes": classes,
            "rule": scan.rule.words,
            "table": scan.table.to_dict("records"),
            "accuracy": scan.accuracy,
            "n_images": len(scan.X),
            "n_images_per_class": {label: counts[label] for label in classes},
            "image_shape": list(scan.X.shape[1:]),
            "image_passes": scan.image_passes,
            "seconds": scan.seconds,
            "notes": scan.notes,
            "weights_sha256": scan.settings.get("weights_sha256"),
            "settings": scan.settings,
            "versions": {
                "sklearn_backdoor": sklearn_backdoor.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        }
    )


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
