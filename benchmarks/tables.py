"""Every table of the paper: each detector on each victim, a line each, resumable."""

import time
from fnmatch import fnmatch

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.cases import Case
from benchmarks.contenders import contenders
from benchmarks.overhead import medians
from benchmarks.recipes import cells, name_of
from benchmarks.results import append, read, settings_of
from sklearn_backdoor import NCPatcher, detection_report
from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor.detectors._patcher import DivergedError

VERSION = 2  # raise it when a change of the code makes old lines obsolete
_NO_CLASS = -1  # a trigger, whatever it was
_MANY_PASSES = 10  # detectors above are measured on fewer images
_MOST = {"lenet5": 10_000, "resnet18": 2000, "vgg16": 2000}  # triggered images
_FEWER = {"lenet5": 2000, "resnet18": 500, "vgg16": 500}  # of each kind
_N_TIMED = 512  # images on which a cheap detector is timed
_RATES = (
    *("tpr", "fpr", "sia", "tpr_all", "fpr_all", "sia_all", "auroc"),
    *("tpr_at_1pct_fpr", "tpr_at_5pct_fpr", "n_trigger", "n_clean"),
    *("image_passes_per_image", "seconds_ratio"),
)


class Bench:
    """What all cells share: data, folders, and lines that are not made twice.

    Parameters
    ----------
    data : Data
    results, cache : path-like
        Folders.
    ready : path-like or None
        Folder of ready victims.
    budget : {"paper", "gpu", "cpu"}
    device : str
    epochs : int, default=None
        Instead of the budget's.
    start : path-like, default=None
        Weights of a clean network that the attacker fine-tunes.
    log : callable
    """

    def __init__(
        self,
        data,
        results,
        cache,
        *,
        ready,
        budget,
        device,
        epochs=None,
        start=None,
        log=print,
    ):
        self.data = data
        self.results = results
        self.cache = cache
        self.ready = ready
        self.budget = budget
        self.device = device
        self.epochs = epochs
        self.start = start
        self.log = log
        self._keys = {
            record["config"].get("key") for record in read("inflight", results=results)
        }

    def case(self, cell, n_per_class):
        """Open a victim; nothing is trained or searched yet."""
        return Case(
            cell,
            n_per_class,
            self.data,
            budget=self.budget,
            epochs=self.epochs,
            start=self.start,
            cache=self.cache,
            ready=self.ready,
            device=self.device,
            log=self.log,
        )

    def is_done(self, key):
        """Tell whether the results hold this line already."""
        return key in self._keys

    def append(self, key, record):
        """Append a line under its key."""
        record["config"]["key"] = key
        append("inflight", record, results=self.results)
        self._keys.add(key)


def run_table(table, bench, *, seeds, select=(), n_per_class=(None,)):
    """Run a table's cells; what the results hold already is not made again.

    Parameters
    ----------
    table : {1, 2, 3, 4}
    bench : Bench
    seeds : sequence of int
    select : sequence of str
        Patterns for names of cells, as "mnist-*"; none selects all.
    n_per_class : sequence of int or None
        Images a class in D_Defense; None for the paper's: 100, of PubFig 5.
    """
    for cell in selected(cells(table, seeds), select):
        for number in n_per_class:
            if number is None:
                number = 5 if cell.dataset == "pubfig" else 100
            try:
                case = bench.case(cell, number)
            except FileNotFoundError as error:
                bench.log(f"{cell.name} skipped: {error}")
                continue
            run_case(case, bench, table)


def selected(found, select):
    """Return the cells whose names match one of some patterns.

    Raises
    ------
    ValueError
        If none does.
    """
    kept = [
        cell
        for cell in found
        if not select or any(fnmatch(cell.name, pattern) for pattern in select)
    ]
    if not kept:
        names = ", ".join(sorted({cell.name for cell in found}))
        raise ValueError(f"no cell matches {', '.join(select)}; there are {names}.")
    return kept


def run_case(case, bench, table):
    """Run the detectors of one victim.

    Parameters
    ----------
    case : Case
    bench : Bench
    table : {1, 2, 3, 4}
    """
    for contender in contenders(case.cell, table, case.n_per_class):
        key = _key(case, contender)
        if bench.is_done(key):
            continue
        case.prepare()
        start = time.perf_counter()
        record = _measure(case, contender)
        record["seconds"] = time.perf_counter() - start
        bench.append(key, record)
        bench.log(
            f"{case.cell.name}, seed {case.cell.seed}, {case.n_per_class} a class, "
            f"{contender.name}, {contender.trigger}: TPR {record['tpr']}, "
            f"FPR {record['fpr']}, SIA {record['sia']}"
        )


def _key(case, contender):
    network = case.cell.network
    what = [
        *(VERSION, case.cell.name, case.cell.seed, case.n_per_class, case.recipe),
        *(contender.describe(), _MOST[network], _FEWER[network]),
    ]
    return name_of(what)


def _measure(case, contender):
    """Fit a detector, judge D_Test, and return a line of ``inflight.jsonl``."""
    detector = contender.make(case)
    on_training = contender.fit_on == "training"
    start, diverged = time.perf_counter(), False
    try:
        detector.fit(*(case.training_tenth if on_training else case.defense))
        fit_seconds = time.perf_counter() - start
        rates = _rates(case, detector)
    except DivergedError:
        diverged, fit_seconds = True, None
        rates = dict.fromkeys(_RATES)
    return {
        "seed": case.cell.seed,
        "config": {
            "recipe": case.recipe,
            "contender": contender.describe(),
            "settings": settings_of(detector),
            "classifier": _classifier_of(detector),
            "fit_seconds": fit_seconds,
            "diverged": diverged,
            "device": case.device,
            **case.search,
        },
        "data_source": case.data.data_source,
        "dataset": case.cell.dataset,
        "network": case.cell.network,
        "attack": case.cell.attack,
        "sources": [0] if case.cell.single else "all",
        "target_class": case.target,
        "detector": type(detector).__name__,
        "variant": contender.name,
        "pipeline": contender.pipeline,
        "n_per_class": case.n_per_class,
        "trigger": contender.trigger,
        "budget": case.budget,
        "conditional": True,
        **case.rates,
        **rates,
    }


def _rates(case, detector):
    """Return TPR, FPR and SIA by the defence's own decision, the paper's way, costs."""
    n_passes = 2 if isinstance(detector, NCPatcher) else 1
    n_passes = getattr(detector, "n_passes_per_image_", n_passes)
    origins, images = _evaluation_set(case, n_passes)
    victim_labels = case.labels_of(images)
    labels, is_trigger, score = _judge(detector, images, victim_labels, case.target)
    sent = victim_labels == case.target
    table = detection_report(
        origins,
        np.where(is_trigger & sent, _NO_CLASS, case.target)
        if labels is None
        else labels,
        target_class=case.target,
        victim_labels=victim_labels,
        is_trigger=is_trigger,
    )
    rates = {
        name: None if np.isnan(row["score"]) else float(row["score"])
        for name, row in table.iterrows()
    }
    if labels is None:
        rates.update(sia=None, sia_all=None)
    return {
        **dict.fromkeys(_RATES),
        **rates,
        **_by_threshold(origins[sent] != case.target, score[sent]),
        "n_trigger": int(table.loc["tpr", "n"]),
        "n_clean": int(table.loc["fpr", "n"]),
        "image_passes_per_image": n_passes,
        "seconds_ratio": _cost(case, detector, images, n_passes),
    }


def _by_threshold(positive, score):
    """Return what thresholds over test images give; {} if a kind is missing."""
    if positive.all() or not positive.any():
        return {}
    fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(positive, score)),
        "tpr_at_1pct_fpr": float(tpr[fpr <= 0.01].max()),
        "tpr_at_5pct_fpr": float(tpr[fpr <= 0.05].max()),
    }


def _cost(case, detector, images, n_passes):
    """Return the seconds of a decision beside the bare network, on the same images."""
    rows = np.random.RandomState(0).permutation(len(images))
    timed = images[rows[: _N_TIMED // max(1, n_passes // 4)]]
    decide = detector.is_trigger
    ours, bare = medians(lambda: decide(timed), lambda: _bare(case, timed), n_repeats=3)
    return ours / bare


def _evaluation_set(case, n_passes):
    """Return classes of origin and images: triggered sources, clean target images."""
    X, y = case.test
    sources, labels = case.sources
    clean = X[y == case.target]
    most = (_FEWER if n_passes > _MANY_PASSES else _MOST)[case.cell.network]
    random_state = np.random.RandomState(case.cell.seed)
    rows = random_state.permutation(len(sources))[:most]
    clean = clean[random_state.permutation(len(clean))[:most]]
    images = np.concatenate([case.trigger.embed(sources[rows]), clean])
    return np.append(labels[rows], np.full(len(clean), case.target)), images


def _judge(detector, images, victim_labels, target):
    """Return inferred labels (None for most rivals), decisions and scores."""
    if hasattr(detector, "inspect"):  # the guard: all from one forward pass
        table = detector.inspect(images)
        return (
            table["label"].to_numpy(),
            table["is_trigger"].to_numpy(),
            table["trigger_score"].to_numpy(),
        )
    if hasattr(detector, "threshold_"):
        score = detector.trigger_score(images)
        return None, score >= detector.threshold_, score
    proba = _proba_of(detector, images)
    labels = detector.classes_[proba.argmax(axis=1)]
    of_target = detector.classes_ == target
    score = proba[:, ~of_target].max(axis=1) - proba[:, of_target][:, 0]
    labels = np.where(victim_labels == target, labels, victim_labels)
    return labels, labels != victim_labels, score


def _proba_of(patcher, images):
    """Return the patched network's probabilities, or say that it diverged."""
    try:
        return patcher.predict_proba(images)
    except ValueError as error:
        if "NaN or infinity" in str(error):
            raise DivergedError(str(error)) from error
        raise


def _bare(case, images):
    """Run the network by itself over the images."""
    with torch.inference_mode():
        for start in range(0, len(images), case.victim.batch_size):
            batch = images[start : start + case.victim.batch_size]
            case.network(to_tensor(batch, case.device)).argmax(1).cpu()


def _classifier_of(detector):
    """Return what the guard fitted to the features, in words; None for rivals."""
    fitted = list(getattr(detector, "classifiers_", {}).values())
    return " ".join(repr(fitted[0]).split()) if fitted else None
