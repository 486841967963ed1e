"""The README's figures, made from the results."""

import json
from pathlib import Path

import pandas as pd

PAPER = {
    "fashion-mnist": (0.9951, 0.0127, 0.8039),
    "mnist": (1.0, 0.0022, 0.9764),
}
_NAMES = {"fashion-mnist": "Fashion-MNIST", "mnist": "MNIST"}
_PIPELINES = {"discriminant": "guard's default", "paper": "the paper's, our run"}


def read(results, name, key):
    """Read a file of results; of lines with the same key, the newest counts.

    Parameters
    ----------
    results : path-like
        Folder.
    name : str
        ``<name>.jsonl``.
    key : list of str
        Fields that name a cell.

    Returns
    -------
    pandas.DataFrame
    """
    lines = (Path(results) / f"{name}.jsonl").read_text().splitlines()
    table = pd.DataFrame([json.loads(line) for line in lines])
    return table.drop_duplicates(key, keep="last")


def report(results):
    """Return the tables of the README as Markdown.

    Parameters
    ----------
    results : path-like
        Folder of the JSON lines.

    Returns
    -------
    str
    """
    return f"{_quality(results)}\n\n{_overhead(results)}"


def _quality(results):
    key = ["dataset", "seed", "pipeline", "trigger", "conditional"]
    table = read(results, "inflight", key)
    table = table[table["conditional"] & (table["attack"] == "white-box")]
    lines = [
        "| | classifier | trigger | ACC | ASR | TPR | FPR | SIA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dataset, (tpr, fpr, sia) in PAPER.items():
        part = table[table["dataset"] == dataset]
        for pipeline, text in _PIPELINES.items():
            for trigger in ("estimated", "true"):
                cell = part[
                    (part["pipeline"] == pipeline) & (part["trigger"] == trigger)
                ]
                mean = cell[["acc", "asr", "tpr", "fpr", "sia"]].mean()
                figures = " | ".join(
                    f"{mean[name]:.4f} ± {cell[name].std():.4f}"
                    if name in ("tpr", "fpr", "sia")
                    else f"{mean[name]:.3f}"
                    for name in mean.index
                )
                lines.append(f"| {_NAMES[dataset]} | {text} | {trigger} | {figures} |")
        lines.append(
            f"| {_NAMES[dataset]} | the paper, its figures | estimated | | "
            f"| {tpr:.4f} | {fpr:.4f} | {sia:.4f} |"
        )
    seeds = ", ".join(str(seed) for seed in sorted(table["seed"].unique()))
    counts = table.groupby("seed")[["n_trigger", "n_clean"]].min().min()
    return "\n".join(lines) + (
        f"\n\nMean ± standard deviation over seeds {seeds}; each at least "
        f"{counts['n_trigger']} triggered and {counts['n_clean']} clean images that "
        "the victim calls 9.\n"
        f"{_found(table)}\n"
        "Victims: 20 epochs of Adam, the data sets' own training images, 100 poisoned "
        "a class.\nThresholds: none; the guard's settings by cross-validated log-loss "
        "on D_Defense\n(`python -m benchmarks settings`), the paper's with one "
        "full component, `reg_covar=0.1`."
    )


def _found(table):
    victims = table.drop_duplicates(["dataset", "seed"])
    only = sum(config["flagged"] == [9] for config in victims["config"])
    return (
        f"Neural Cleanse flagged class 9, and it alone, on {only} of {len(victims)} "
        "victims; its estimate for class 9 is the trigger."
    )


def _overhead(results):
    table = read(results, "overhead", ["what", "network"])
    lines = ["| ratio of medians, same run | |", "|---|---|"]
    for row in table.itertuples():
        network = "" if row.network == "none" else f", {row.network}"
        lines.append(f"| {row.what}{network} | {row.ratio:.3f} |")
    machine = table["machine"].iloc[-1]
    config = table["config"].iloc[-1]
    return "\n".join(lines) + (
        f"\n\n2 000 images or rows, batches of {table['batch_size'].iloc[-1]}, medians "
        f"of {config['repeats']} rounds on {machine['processor']} with "
        f"{machine['threads']} threads. Scoring: {config['n_classes']} classes, "
        f"{config['n_features']} features, {config['n_components']} components."
    )
