"""Every table of the paper: each detector on each victim, a line each, resumable."""

import hashlib
import json
import time

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.cases import Case
from benchmarks.contenders import contenders
from benchmarks.overhead import medians
from benchmarks.recipes import cells
from benchmarks.results import append, read
from sklearn_backdoor import detection_report
from sklearn_backdoor._torch import to_tensor

VERSION = 1  # raise it when a change of the code makes old lines obsolete
_FPR = 0.05  # at which the paper compares rivals
_NO_CLASS = -1  # a trigger, whatever it was
_MANY_PASSES = 10  # detectors above are measured on fewer images
_MOST = {"lenet5": 10_000, "resnet18": 2000, "vgg16": 2000}  # triggered images
_FEWER = {"lenet5": 2000, "resnet18": 500, "vgg16": 500}  # of each kind
_N_TIMED = 1024  # images on which the bare network is timed


class Bench:
    """What all cells share: data, folders, and lines that are not made twice.

    Parameters
    ----------
    data : Data
    results, cache : path-like
        Folders.
    ready : path-like or None
        Folder of ready victims.
    budget : {"paper", "cpu"}
    device : str
    epochs : int, default=None
        Instead of the budget's.
    log : callable
    """

    def __init__(
        self, data, results, cache, *, ready, budget, device, epochs=None, log=print
    ):
        self.data = data
        self.results = results
        self.cache = cache
        self.ready = ready
        self.budget = budget
        self.device = device
        self.epochs = epochs
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
        Parts of the names of cells; none selects all.
    n_per_class : sequence of int or None
        Images a class in D_Defense; None for the paper's: 100, of PubFig 5.
    """
    for cell in cells(table, seeds):
        if select and not any(part in cell.name for part in select):
            continue
        for number in n_per_class:
            if number is None:
                number = 5 if cell.dataset == "pubfig" else 100
            run_case(bench.case(cell, number), bench, table)


def run_case(case, bench, table):
    """Run the detectors of one victim."""
    few = case.n_per_class < 100 and case.cell.dataset != "pubfig"
    for contender in contenders(case.cell, table, few=few):
        key = _key(case, contender)
        if bench.is_done(key):
            continue
        start = time.perf_counter()
        record = _measure(case, contender)
        record["seconds"] = time.perf_counter() - start
        bench.append(key, record)
        bench.log(
            f"{case.cell.name}, seed {case.cell.seed}, {case.n_per_class} a class, "
            f"{contender.name}: TPR {record['tpr']}, FPR {record['fpr']}, "
            f"SIA {record['sia']}"
        )


def _key(case, contender):
    config = [VERSION, case.recipe, case.cell.name, case.cell.seed, case.n_per_class]
    text = json.dumps([*config, contender.describe()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _measure(case, contender):
    """Fit a detector, judge D_Test, and return a line of ``inflight.jsonl``."""
    detector = contender.make(case)
    images_of = {"defense": case.defense, "training": None}
    start = time.perf_counter()
    diverged = False
    try:
        detector.fit(*(images_of[contender.fit_on] or case.training_tenth))
    except ValueError as error:
        if "diverged" not in str(error):
            raise
        diverged = True
    fit_seconds = time.perf_counter() - start
    engineer = case.engineer
    record = {
        "seed": case.cell.seed,
        "config": {
            "recipe": case.recipe,
            "contender": contender.describe(),
            "settings": _settings_of(detector),
            "classifier": _classifier_of(detector),
            "engineer": _settings_of(engineer),
            "verdict": engineer.verdict_,
            "flagged": engineer.target_classes_.tolist(),
            "search_passes": engineer.n_image_passes_._asdict(),
            "fit_seconds": fit_seconds,
            "diverged": diverged,
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
    }
    return {**record, **_rates(case, contender, detector, diverged)}


def _rates(case, contender, detector, diverged):
    """Return TPR, FPR and SIA, by the defence's own decision and the paper's way."""
    n_passes = getattr(detector, "n_passes_per_image_", 1)
    origins, images = _evaluation_set(case, n_passes)
    target = case.target
    victim_labels = case.labels_of(images)
    names = ("tpr", "fpr", "sia")
    if diverged:
        unknown = [*names, *(name + "_all" for name in names), "auroc"]
        return dict.fromkeys([*unknown, "tpr_at_1pct_fpr", "n_trigger", "n_clean"]) | {
            "image_passes_per_image": n_passes,
            "seconds_ratio": None,
        }
    start = time.perf_counter()
    labels, is_trigger, score = _judge(detector, images, victim_labels, target)
    seconds = (time.perf_counter() - start) / len(images)
    timed = images[:_N_TIMED]
    (bare,) = medians(lambda: _bare(case, timed), n_repeats=2)
    sent = victim_labels == target
    table = detection_report(
        origins,
        np.where(is_trigger & sent, _NO_CLASS, target) if labels is None else labels,
        target_class=target,
        victim_labels=victim_labels,
        is_trigger=is_trigger,
    )
    rates: dict = {name: float(row["score"]) for name, row in table.iterrows()}
    if labels is None:
        rates.update(sia=None, sia_all=None)
    positive, score = origins[sent] != target, score[sent]
    fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
    allowed = fpr <= _FPR
    return {
        **rates,
        "auroc": float(roc_auc_score(positive, score)),
        "tpr_at_1pct_fpr": float(tpr[fpr <= 0.01].max()),
        "tpr_at_5pct_fpr": float(tpr[allowed].max()),
        "n_trigger": int(table.loc["tpr", "n"]),
        "n_clean": int(table.loc["fpr", "n"]),
        "image_passes_per_image": n_passes,
        "seconds_ratio": seconds / (bare / len(timed)),
    }


def _evaluation_set(case, n_passes):
    """Return classes of origin and images: triggered sources, clean target images."""
    X, y = case.test
    sources, labels = case.sources
    clean = X[y == case.target]
    many = n_passes > _MANY_PASSES
    most = (_FEWER if many else _MOST)[case.cell.network]
    rows = np.random.RandomState(case.cell.seed).permutation(len(sources))[:most]
    sources, labels = sources[rows], labels[rows]
    if many:
        clean = clean[:most]
    images = np.concatenate([case.trigger.embed(sources), clean])
    return np.append(labels, np.full(len(clean), case.target)), images


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
    proba = detector.predict_proba(images)  # the patched network
    labels = detector.classes_[proba.argmax(axis=1)]
    of_target = detector.classes_ == target
    score = proba[:, ~of_target].max(axis=1) - proba[:, of_target][:, 0]
    labels = np.where(victim_labels == target, labels, victim_labels)
    return labels, labels != victim_labels, score


def _bare(case, images):
    """Run the network by itself over the images."""
    with torch.inference_mode():
        for start in range(0, len(images), case.victim.batch_size):
            batch = images[start : start + case.victim.batch_size]
            case.network(to_tensor(batch, case.device))


def _classifier_of(detector):
    """Return what the guard fitted to the features, in words; None for rivals."""
    fitted = list(getattr(detector, "classifiers_", {}).values())
    return " ".join(repr(fitted[0]).split()) if fitted else None


def _settings_of(estimator):
    """Return every setting, defaults included, but networks, triggers and folders."""
    hidden = ("victim", "steps", "trigger", "checkpoint_dir")
    return {
        name: str(value)
        for name, value in estimator.get_params().items()
        if not name.startswith(hidden)
    }
