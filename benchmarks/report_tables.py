"""docs/benchmarks.md: every table of the paper, our figures beside its own."""

import numpy as np
import pandas as pd
from scipy.stats import fisher_exact

from benchmarks.paper import TABLE_1, TABLE_3, figures_of, samples_of
from benchmarks.recipes import SHORT, cells
from benchmarks.results import read

_RATES = ("tpr", "fpr", "sia")
_NAMES = {"cifar10": "CIFAR-10", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
_LABELS = {
    "guard, discriminant": "**BackdoorGuard**",
    "guard, paper": "the paper's pipeline, our run",
    "NC activation": "NCActivationDetector",
    "B3D": "B3DDetector",
    "STRIP, average": "STRIPDetector, average",
    "STRIP, add": "STRIPDetector, add",
    "SCALE-UP": "SCALEUPDetector",
    "IBD-PSC": "IBDPSCDetector",
    "NC patching, training, 0.01": "NCPatcher, 10 % of the training set",
    "NC patching, defense, 0.01": "NCPatcher, D_Defense",
}
_RIVALS = {
    "NC activation": "NC",
    "B3D": "B3D",
    "STRIP, average": "STRIP",
}


def read_tables(results):
    """Return the lines of the tables, the newest of each.

    Parameters
    ----------
    results : path-like
        Folder of ``inflight.jsonl``.

    Returns
    -------
    pandas.DataFrame
        With a column ``cell``, the name by which ``--cells`` selects.
    """
    records = [r for r in read("inflight", results=results) if "variant" in r]
    table = pd.DataFrame(records)
    if table.empty:
        return table
    kinds = np.where(table["sources"].map(lambda s: s == "all"), "multi", "single")
    table["cell"] = (
        table["dataset"] + "-" + table["network"] + "-" + table["attack"] + "-" + kinds
    )
    table["key"] = table["config"].map(lambda config: config["key"])
    one = ["cell", "variant", "trigger", "n_per_class", "seed", "budget"]
    return table.drop_duplicates(one, keep="last")


def report_tables(results):
    """Return docs/benchmarks.md.

    Parameters
    ----------
    results : path-like
        Folder of the JSON lines.

    Returns
    -------
    str
    """
    table = read_tables(results)
    parts = [_INTRODUCTION, _sources(table)]
    parts += ["## Table 1: the victims", _table_1(table)]
    parts += ["## Table 2: CIFAR-10, ResNet-18"]
    parts += [_cell(table, cell.name) for cell in cells(2, [0])]
    parts += ["## Table 3: patching, by fine-tuning rate", _table_3(table)]
    parts += ["## Table 4: other data"]
    parts += [_cell(table, cell.name) for cell in cells(4, [0])]
    parts += ["## Few images", _few(table), "![Few images](few_images.png)"]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Benchmarks

Made by `python -m benchmarks report` from `benchmarks/results/inflight.jsonl`; each line
there holds seed, settings, versions, machine and commit. The lines are made by

    python -m benchmarks table4 --data-dir DATA --seeds 0-4
    python -m benchmarks table4 --data-dir DATA --seeds 0-4 --cells lenet5 \\
        --n-per-class 5 --n-per-class 10 --n-per-class 20 --n-per-class 50
    python -m benchmarks table2 --cifar10 CIFAR10 --victims VICTIMS
    python -m benchmarks table3 --data-dir DATA --cifar10 CIFAR10 --victims VICTIMS

**How to read them.** Rates are over images that the victim sends to the target class:
triggered images of the source classes, clean images of the target class. TPR, FPR and SIA
are by each detector's own decision: ours has no threshold, the rivals' comes from
D_Defense at an aim of 5 % false alarms. *TPR at 5 %* is the paper's way of comparing
rivals: the best over all thresholds *on the test images* with an FPR of at most 5 %, which
no defender can do. The estimated trigger comes from the search that the paper takes
(Neural Cleanse for patches, the additive perturbation for the chessboard); detectors that
need one all get the same. STRIP, SCALE-UP and IBD-PSC need none. In return for the search
the guard needs no threshold, one forward pass an image, and says where the image came
from. *Passes* are forward passes an image, *time* is seconds beside the bare network on
the same images in the same run. NCPatcher fine-tunes for one epoch on 10 % of the clean
training set, as published, or for five on D_Defense, at a rate of 0.01 (Table 3 has
others). "not run" is just that."""


def _sources(table):
    if table.empty:
        return "Nothing has been run."
    rows = []
    for (dataset, budget), part in table.groupby(["dataset", "budget"]):
        recipe = part["config"].iloc[-1]["recipe"]
        training = (
            f"{recipe['epochs']} epochs, {recipe['optimizer']}, {recipe['schedule']}, "
            f"peak {recipe['lr']:g}, batch {recipe['batch_size']}"
            if "epochs" in recipe
            else "ready: made by other code"
        )
        seeds = ", ".join(str(seed) for seed in sorted(part["seed"].unique()))
        source = part["data_source"].iloc[-1]
        rows.append(
            f"| {_name(dataset)} | {budget} | {training} | {source} | {seeds} |"
        )
    versions = table["versions"].iloc[-1]
    used = ", ".join(f"{name} {value}" for name, value in versions.items())
    return "\n".join(
        [
            "| data | budget | training | source | seeds |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Versions: {used}; {table['machine'].iloc[-1]['processor']}. The CIFAR-10 "
            "images are a JPEG copy, which costs accuracy. A chessboard has an amplitude "
            "of 0.15 on grey images (3/255 is not learnt there) and of 8/255 in the cpu "
            "budget on CIFAR-10, with crops by even shifts and no flips.",
        ]
    )


def _name(dataset):
    return _NAMES.get(dataset, "PubFig")


def _title(name):
    dataset, _, rest = name.partition("-lenet5-")
    if not rest:
        dataset, _, rest = name.partition("-resnet18-")
    if not rest:
        dataset, _, rest = name.partition("-vgg16-")
    attack, _, kind = rest.rpartition("-")
    return f"{_name(dataset)}, {SHORT[attack]}, {kind}-class"


def _pick(table, cell, variant, trigger=None, n_per_class=None):
    if table.empty:
        return table
    rows = (table["cell"] == cell) & (table["variant"] == variant)
    if trigger is not None:
        rows &= table["trigger"] == trigger
    if n_per_class is None:
        n_per_class = 5 if cell.startswith("pubfig") else 100
    return table[rows & (table["n_per_class"] == n_per_class)]


def _number(values):
    values = pd.to_numeric(values).dropna()
    if len(values) == 0:
        return "-"
    if len(values) == 1:
        return f"{values.iloc[0]:.4f}"
    return f"{values.mean():.4f} ± {values.std():.4f}"


def _table_1(table):
    lines = [
        "| victim | ACC | the paper | ASR | the paper | ASR, estimated | the paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in TABLE_1.items():
        rows = _pick(table, name, "guard, discriminant", "estimated")
        ours = (
            [_number(rows[column]) for column in ("acc", "asr", "asr_estimated")]
            if len(rows)
            else ["not run"] * 3
        )
        both = zip(ours, figures, strict=True)
        cells_ = " | ".join(f"{our} | {theirs:.4f}" for our, theirs in both)
        lines.append(f"| {_title(name)} | {cells_} |")
    return "\n".join(lines)


def _cell(table, name):
    """Return a cell's rows: every detector, and the paper's figures."""
    lines = [
        f"### {_title(name)}",
        "",
        "| detector | trigger | TPR | FPR | SIA | TPR at 5 % | AUROC | passes | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = False
    for variant, label in _LABELS.items():
        for trigger in ("estimated", "true", None):
            rows = _pick(table, name, variant)
            if len(rows) == 0:
                continue
            rows = rows[
                rows["trigger"].isna()
                if trigger is None
                else rows["trigger"] == trigger
            ]
            if len(rows) == 0:
                continue
            found = True
            columns = [*_RATES, "tpr_at_5pct_fpr", "auroc"]
            figures = " | ".join(_number(rows[column]) for column in columns)
            passes = rows["image_passes_per_image"].iloc[-1]
            ratio = pd.to_numeric(rows["seconds_ratio"]).median()
            lines.append(
                f"| {label} | {trigger or '-'} | {figures} | {passes} | {ratio:.1f} |"
            )
    if not found:
        return f"### {_title(name)}\n\nnot run; the paper: " + _theirs(name)
    lines += ["", "The paper: " + _theirs(name)]
    return "\n".join([*lines, "", _compare(table, name), "", _notes(table, name)])


def _theirs(name):
    parts = []
    for method in ("in-flight defence", "NC", "B3D", "STRIP"):
        figures = figures_of(name, method)
        if figures is not None:
            text = " / ".join("-" if f is None else f"{f:.4f}" for f in figures)
            parts.append(f"{method} {text}")
    return "; ".join(parts) + " (TPR / FPR / SIA)."


def _compare(table, name):
    """Say of each rate whether ours is better, worse or not to be told apart."""
    rows = _pick(table, name, "guard, discriminant", "estimated")
    n_trigger, n_clean = samples_of(name)
    words = []
    for rate, theirs in zip(_RATES, figures_of(name), strict=True):
        n = n_clean if rate == "fpr" else n_trigger
        ours = float(pd.to_numeric(rows[rate]).mean())
        n_ours = int(rows["n_clean" if rate == "fpr" else "n_trigger"].mean())
        better = ours <= theirs if rate == "fpr" else ours >= theirs
        p = same_rate_p_value(ours, n_ours, theirs, n)
        verdict = "at or past the paper's" if better else "short of the paper's"
        if not better and p >= 0.05:
            verdict = "not significantly different"
        words.append(
            f"{rate.upper()} {ours:.4f} against {theirs:.4f}: {verdict} (p = {p:.2g})"
        )
    return (
        "The guard with the estimated trigger, mean over seeds at one seed's sample size "
        "(Fisher's exact test): " + "; ".join(words) + "."
    )


def same_rate_p_value(rate, n, other_rate, other_n):
    """Test whether two rates differ, both sample sizes counted.

    Parameters
    ----------
    rate, other_rate : float in 0...1
    n, other_n : int
        Images behind each.

    Returns
    -------
    float
        Two-sided p-value of Fisher's exact test.
    """
    hits, other_hits = round(rate * n), round(other_rate * other_n)
    return float(
        fisher_exact([[hits, n - hits], [other_hits, other_n - other_hits]]).pvalue
    )


def _notes(table, name):
    rows = _pick(table, name, "guard, discriminant", "estimated")
    target = rows["target_class"].iloc[0]
    flagged = [config["flagged"] for config in rows["config"]]
    found = sum(target in classes for classes in flagged)
    alone = sum(classes == [target] for classes in flagged)
    return (
        f"{len(rows)} victim(s): ACC {_number(rows['acc'])}, ASR {_number(rows['asr'])}, "
        f"of the estimated trigger {_number(rows['asr_estimated'])}. The search flagged "
        f"the target on {found}, it alone on {alone}; where it did not, its estimate for "
        f"the target is used all the same. Over about {int(rows['n_trigger'].mean())} "
        f"triggered and {int(rows['n_clean'].mean())} clean images a victim."
    )


def _table_3(table):
    lines = [
        "| data, victim | fine-tuned on | "
        + " | ".join(f"{r:g}" for r in TABLE_3)
        + " |",
        "|---" * (2 + len(TABLE_3)) + "|",
        "| the paper: CIFAR-10, WB, multi-class | 10 % of the training set | "
        + " | ".join(f"{sia:.4f}" for sia in TABLE_3.values())
        + " |",
    ]
    where = {"training": "10 % of the training set", "defense": "D_Defense"}
    for cell in cells(3, [0]):
        for fit_on, text in where.items():
            ours = []
            for rate in TABLE_3:
                rows = _pick(table, cell.name, f"NC patching, {fit_on}, {rate:g}")
                diverged = sum(config["diverged"] for config in rows.get("config", []))
                if len(rows) == 0:
                    ours.append("not run")
                elif diverged:
                    ours.append("diverged")
                else:
                    ours.append(_number(rows["sia"]))
            lines.append(f"| {_title(cell.name)} | {text} | " + " | ".join(ours) + " |")
    return "\n".join(lines)


def _few(table):
    """Return the guard's and the best rivals' rates by images a class."""
    lines = [
        "| data | detector | images a class | TPR | FPR | SIA | AUROC |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells(4, [0]):
        if cell.dataset == "pubfig":
            continue
        for variant, label in _LABELS.items():
            for number in (5, 10, 20, 50, 100):
                trigger = "estimated" if variant.startswith("guard") else None
                rows = _pick(table, cell.name, variant, trigger, number)
                if len(rows) == 0:
                    continue
                figures = " | ".join(_number(rows[c]) for c in (*_RATES, "auroc"))
                lines.append(
                    f"| {_title(cell.name)} | {label} | {number} | {figures} |"
                )
    return "\n".join(lines) if len(lines) > 2 else "not run"
