"""The lines of the tables, and the names under which they are shown."""

import numpy as np
import pandas as pd

from benchmarks.recipes import SHORT
from benchmarks.results import read

RATES = ("tpr", "fpr", "sia")
NAMES = {
    "cifar10": "CIFAR-10",
    "fashion-mnist": "Fashion-MNIST",
    "mnist": "MNIST",
    "pubfig": "PubFig",
}
LABELS = {
    "guard, discriminant": "**BackdoorGuard**",
    "guard, paper": "the paper's pipeline, our run",
    "guard, paper, 1.2": "the same, trigger at 1.2",
    "NC activation": "NCActivationDetector",
    "B3D": "B3DDetector",
    "STRIP, average": "STRIPDetector, average",
    "STRIP, add": "STRIPDetector, add",
    "SCALE-UP": "SCALEUPDetector",
    "SCALE-UP, 0.5": "SCALEUPDetector, published 0.5",
    "IBD-PSC": "IBDPSCDetector",
    "NC patching, training, 0.01": "NCPatcher, 10 % of the training set",
    "NC patching, defense, 0.01": "NCPatcher, D_Defense",
}


_ORDER = {
    "paper": 0,
    "paper, fine-tuned": 1,
    "gpu": 2,
    "gpu, fine-tuned": 3,
    "ready": 4,
    "cpu": 5,
    "cpu, fine-tuned": 6,
}


def read_tables(results):
    """Return the lines of the tables, the newest of each, of one budget a cell.

    The paper's schedule goes before the gpu's, this before a ready victim, this before
    the cpu's schedule, and training from scratch before fine-tuning.

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
    one = ["cell", "variant", "trigger", "n_per_class", "seed", "budget"]
    table = table.drop_duplicates(one, keep="last")
    order = table["budget"].map(_ORDER)  # others are a quick look
    return table[order == order.groupby(table["cell"]).transform("min")]


def title_of(name):
    """Return a cell's name as a heading: data, attack, single- or multi-class.

    Parameters
    ----------
    name : str
        Such as "mnist-lenet5-white-box-multi".

    Returns
    -------
    str
    """
    for network in ("lenet5", "resnet18", "vgg16"):
        dataset, found, rest = name.partition(f"-{network}-")
        if found:
            break
    attack, _, kind = rest.rpartition("-")
    return f"{NAMES[dataset]}, {SHORT[attack]}, {kind}-class"
