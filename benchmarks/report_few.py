"""How the detectors fare with few images a class."""

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lines import LABELS, RATES, read_tables, title_of
from benchmarks.recipes import cells

FEW = (5, 10, 20, 50, 100)  # images a class


def few_images(table):
    """Return rates by images a class, means over cells and seeds.

    Parameters
    ----------
    table : pandas.DataFrame
        As of `read_tables`.

    Returns
    -------
    str
        Markdown.
    """
    lines = [
        "Means over MNIST and Fashion-MNIST, CB and WB, and over seeds; the picture "
        "has each by itself.",
        "",
        "| detector | a class | TPR | FPR | SIA | TPR at 5 % | AUROC | victims |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, label in LABELS.items():
        for number in FEW:
            rows = _few_rows(table, variant, number)
            if len(rows) == 0:
                continue
            columns = (*RATES, "tpr_at_5pct_fpr", "auroc")
            figures = " | ".join(_mean(rows[column]) for column in columns)
            lines.append(f"| {label} | {number} | {figures} | {len(rows)} |")
    return "\n".join(lines) if len(lines) > 4 else "not run"


def _few_rows(table, variant, number):
    """Return LeNet-5's lines of victims that were run with every number of images."""
    if table.empty:
        return table
    rows = table[(table["network"] == "lenet5") & (table["variant"] == variant)]
    rows = rows[rows["trigger"].isna() | (rows["trigger"] == "estimated")]
    victims = rows.groupby(["cell", "seed"])["n_per_class"]
    whole = victims.transform(lambda numbers: set(FEW) <= set(numbers))
    return rows[(rows["n_per_class"] == number) & whole.astype(bool)]


def _mean(values):
    values = pd.to_numeric(values).dropna()
    return f"{values.mean():.4f}" if len(values) else "-"


def draw_few(results):
    """Draw each detector's rates by images a class.

    Parameters
    ----------
    results : path-like
        Folder of the JSON lines.

    Returns
    -------
    matplotlib.figure.Figure or None
        None if nothing was run with few images.
    """
    table = read_tables(results)
    shown = [cell for cell in cells(4, [0]) if cell.network == "lenet5"]
    if not len(_few_rows(table, "guard, discriminant", FEW[-1])):
        return None
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(3, len(shown), sharex=True, sharey="row")
    for column, cell in enumerate(shown):
        of_cell = table[table["cell"] == cell.name]
        for variant, label in LABELS.items():
            if "training" in variant or variant == "IBD-PSC":
                continue
            for row, rate in enumerate(RATES):
                means = [
                    pd.to_numeric(_few_rows(of_cell, variant, n)[rate]).mean()
                    for n in FEW
                ]
                guard = variant.startswith("guard")
                axes[row, column].plot(
                    FEW,
                    means,
                    marker="o",
                    label=label.strip("*"),
                    linewidth=2.5 if guard else 1.2,
                    linestyle="-" if guard else "--",
                )
        axes[0, column].set_title(title_of(cell.name), fontsize=10)
        axes[-1, column].set_xlabel("clean images a class")
        axes[-1, column].set_xscale("log")
        axes[-1, column].set_xticks(FEW, [str(n) for n in FEW])
        axes[-1, column].minorticks_off()
    for row, rate in enumerate(RATES):
        axes[row, 0].set_ylabel(rate.upper())
    axes[1, 0].set_yscale("symlog", linthresh=0.01)
    axes[1, 0].set_ylim(0, 1)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
