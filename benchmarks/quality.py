"""The defence on real images: guard and paper's pipeline on the same victims."""

import time

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from benchmarks.contenders import pipelines
from benchmarks.report import PAPER
from benchmarks.results import append, settings_of
from benchmarks.victims import LOADERS, white_box_lenet5
from sklearn_backdoor import (
    BackdoorGuard,
    NCReverseEngineer,
    VictimNetwork,
    asr_score,
    detection_report,
    make_trigger_scorer,
    origin_log_loss,
)
from sklearn_backdoor.datasets import split_defense
from sklearn_backdoor.guard import default_classifier

N_PER_CLASS = 100
GRID = {
    "covariance_type": ["full", "tied", "diag", "spherical"],
    "n_components": [1, 2, 3],
    "reg_covar": [0.1, 0.3, 1.0, 3.0, 10.0],
}
START = ("diag", 2, 1.0)
N_FOLDS = 5


def prepare(dataset, data_dir, seed, victims, **training):
    """Load data, train or load the victim, and estimate its trigger.

    Returns
    -------
    dict
        What `quality` and `settings` go on from.
    """
    data = LOADERS[dataset](data_dir)
    network, trigger, recipe = white_box_lenet5(
        dataset, data, seed=seed, victims=victims, **training
    )
    X_defense, X_test, y_defense, y_test = split_defense(
        data.X_test, data.y_test, n_per_class=N_PER_CLASS, random_state=seed
    )
    start = time.perf_counter()
    engineer = NCReverseEngineer(
        VictimNetwork(network), schedule="exhaustive", random_state=seed
    )
    engineer.fit(X_defense, y_defense)
    return {
        "data": data,
        "network": network,
        "trigger": trigger,
        "recipe": recipe,
        "defense": (X_defense, y_defense),
        "test": (X_test, y_test),
        "engineer": engineer,
        "search_seconds": time.perf_counter() - start,
    }


def quality(dataset, data_dir, n_seeds, victims, results, **training):
    """Print TPR, FPR and SIA of both pipelines, and append them to the results.

    Parameters
    ----------
    dataset : {"fashion-mnist", "mnist"}
    data_dir : path-like or None
        Where the data lie; None downloads.
    n_seeds : int
        Seeds 0...n_seeds-1.
    victims, results : path-like
        Folders.
    **training
        ``epochs`` and ``lr`` of the victims.
    """
    rows = []
    for seed in range(n_seeds):
        case = prepare(dataset, data_dir, seed, victims, **training)
        engineer, target = case["engineer"], case["recipe"]["target_class"]
        print(
            f"{dataset}, seed {seed}: verdict {engineer.verdict_}, target classes "
            f"{engineer.target_classes_.tolist()}, norms {engineer.norms_.round(1)}, "
            f"{case['search_seconds']:.0f} s, {engineer.n_image_passes_}",
            flush=True,
        )
        # the estimate for the true target, also where the search did not flag it
        estimate = engineer.triggers_[target]
        for name, classifier in pipelines().items():
            for kind, trigger in (("estimated", estimate), ("true", case["trigger"])):
                start = time.perf_counter()
                guard = BackdoorGuard(
                    VictimNetwork(case["network"]),
                    trigger,
                    classifier,
                    target_class=target,
                    random_state=seed,
                ).fit(*case["defense"])
                measured = measure(guard, case["trigger"], target, *case["test"])
                images = case["test"][0][case["test"][1] != target]
                sent = guard.victim_.predict(estimate.embed(images)) == target
                record = {
                    "seed": seed,
                    "config": {
                        "recipe": case["recipe"],
                        "classifier": settings_of(classifier),
                        "engineer": settings_of(engineer),
                        "flagged": engineer.target_classes_.tolist(),
                        "search_seconds": case["search_seconds"],
                        "search_passes": engineer.n_image_passes_._asdict(),
                    },
                    "data_source": case["data"].data_source,
                    "seconds": time.perf_counter() - start,
                    "dataset": dataset,
                    "network": "lenet5",
                    "attack": "white-box",
                    "sources": "all",
                    "target_class": target,
                    "detector": "BackdoorGuard",
                    "pipeline": name,
                    "n_per_class": N_PER_CLASS,
                    "trigger": kind,
                    "budget": "cpu",
                    **measured[0],
                    "asr_estimated": float(sent.mean()),
                    "image_passes_per_image": 1,
                }
                for figures in measured:
                    append("inflight", {**record, **figures}, results=results)
                rows.append(record)
    table = pd.DataFrame(rows)
    columns = ["acc", "asr", "asr_estimated", "tpr", "fpr", "sia", "auroc"]
    print(f"\n{dataset}, LeNet-5, white box, multi-class, seeds 0-{n_seeds - 1}:")
    print(table[["seed", "pipeline", "trigger", *columns]].to_string(index=False))
    print("\nmean over seeds:")
    print(table.groupby(["pipeline", "trigger"])[columns].mean().round(4).to_string())
    print("the paper: TPR {} FPR {} SIA {}".format(*PAPER[dataset]))


def measure(guard, trigger, target, X, y):
    """Measure a guard on triggered source images and clean target images.

    Returns
    -------
    conditional, unconditional : dict
        The fields of ``inflight.jsonl``; headline rates first.
    """
    acc = float(np.mean(guard.victim_.predict(X) == y))
    sources = y != target
    images = X.copy()
    images[sources] = trigger.embed(X[sources])
    table = guard.inspect(images)
    labels = table["victim_label"].to_numpy()
    report = detection_report(
        y,
        table["label"],
        target_class=target,
        victim_labels=labels,
        is_trigger=table["is_trigger"],
    )
    sent = labels == target
    score = table["trigger_score"].to_numpy()[sent]
    fpr, tpr, _ = roc_curve(sources[sent], score)
    common = {
        "acc": acc,
        "asr": asr_score(y, labels, target_class=target),
        "auroc": float(roc_auc_score(sources[sent], score)),
        "tpr_at_1pct_fpr": float(tpr[fpr <= 0.01].max()),
    }
    parts = []
    for suffix, conditional in (("", True), ("_all", False)):
        rates = {name: report.loc[name + suffix] for name in ("tpr", "fpr", "sia")}
        part = {name: float(row["score"]) for name, row in rates.items()}
        part["n_trigger"] = int(rates["tpr"]["n"])
        part["n_clean"] = int(rates["fpr"]["n"])
        parts.append({**common, **part, "conditional": conditional})
        if not conditional:
            parts[-1].update(auroc=None, tpr_at_1pct_fpr=None)
    return tuple(parts)


def settings(dataset, data_dir, n_seeds, victims, memory, **training):
    """Rank the guard's settings by cross-validated log-loss on D_Defense alone.

    Parameters
    ----------
    dataset : {"fashion-mnist", "mnist"}
    data_dir : path-like or None
        Where the data lie; None downloads.
    n_seeds : int
        Seeds 0...n_seeds-1.
    victims, memory : path-like
        Folders for victims and for the victim's forward passes.
    **training
        ``epochs`` and ``lr`` of the victims.
    """
    prefix = "classifier__backdoortriggerclassifier__density__"
    classifier = default_classifier()
    classifier.set_params(backdoortriggerclassifier__density=GaussianMixture())
    tables = []
    for seed in range(n_seeds):
        case = prepare(dataset, data_dir, seed, victims, **training)
        target = case["recipe"]["target_class"]
        trigger = case["engineer"].triggers_[target]
        victim = VictimNetwork(case["network"], memory=memory)
        search = GridSearchCV(
            BackdoorGuard(victim, trigger, classifier, target_class=target),
            {prefix + key: values for key, values in GRID.items()},
            scoring=make_trigger_scorer(
                origin_log_loss,
                trigger,
                target,
                victim=victim,
                greater_is_better=False,
                response_method="predict_proba",
            ),
            cv=StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed),
            refit=False,
            n_jobs=2,
        ).fit(*case["defense"])
        table = pd.DataFrame(search.cv_results_["params"])
        table.columns = [column.removeprefix(prefix) for column in table]
        for fold in range(N_FOLDS):
            scores = search.cv_results_[f"split{fold}_test_score"]
            tables.append(table.assign(fold=f"{seed}-{fold}", log_loss=-scores))
        print(f"{dataset}, seed {seed}: {search.best_params_}", flush=True)
    folds = pd.concat(tables).pivot_table("log_loss", "fold", list(GRID))
    ranking = pd.DataFrame({"log_loss": folds.mean()})
    paired = folds.sub(folds[START], axis=0)  # the same folds: a paired difference
    ranking["minus_start"] = paired.mean()
    ranking["standard_error"] = paired.sem()
    print(
        f"{dataset}: cross-validated log-loss on D_Defense, seeds 0-{n_seeds - 1}; "
        f"the start is {START}"
    )
    print(ranking.sort_values("log_loss").round(4).to_string())
