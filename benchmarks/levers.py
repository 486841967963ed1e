"""What the guard's defaults were chosen by: log-loss on D_Defense, no test image."""

import hashlib
import json
import time

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.contenders import pipelines
from benchmarks.recipes import cells
from benchmarks.results import append, read
from sklearn_backdoor import BackdoorTriggerClassifier, VictimNetwork

VERSION = 1  # raise it when a change of the code makes old lines obsolete
STRENGTHS = (1.0, 1.1, 1.2, 1.3, 1.4)  # how strong the attacker's own is, is not known
LAYERS = {"lenet5": {"fc1": "classifier.1"}, "resnet18": {"layer3": "layer3"}}
_N_FOLDS = 5


def classifiers():
    """Return what is compared, by name; the guard's default and the paper's first."""

    def mixture(n_components, kind, reg_covar, shrinkage="auto"):
        density = GaussianMixture(
            n_components, covariance_type=kind, reg_covar=reg_covar
        )
        return make_pipeline(
            StandardScaler(),
            LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage),
            BackdoorTriggerClassifier(density),
        )

    return {
        **pipelines(),
        "discriminant, shrinkage 0.1": mixture(3, "full", 1.0, 0.1),
        "discriminant, shrinkage 0.5": mixture(3, "full", 1.0, 0.5),
        "discriminant, full, 1, 1.0": mixture(1, "full", 1.0),
        "discriminant, full, 2, 1.0": mixture(2, "full", 1.0),
        "discriminant, full, 3, 3.0": mixture(3, "full", 3.0),
        "discriminant, full, 1, 0.1": mixture(1, "full", 0.1),
        "discriminant, diag, 2, 1.0": mixture(2, "diag", 1.0),
        "LDA": make_pipeline(
            StandardScaler(),
            LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto"),
        ),
        "logistic regression, C 0.1": make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
        ),
    }


def candidates(network):
    """List what is compared: classifier, features and strengths embedded.

    Parameters
    ----------
    network : {"lenet5", "resnet18"}

    Returns
    -------
    list of tuple (classifier, features, strengths)
        Features are "penultimate", the name of the layer before, or "both".
    """
    (before,) = LAYERS[network]
    found: list = [(name, "penultimate", (1.2,)) for name in classifiers()]
    found += [
        (name, "penultimate", strengths)
        for name in pipelines()
        for strengths in ((1.0,), (1.1,), (1.3,), (1.4,), (1.6,), (1.0, 1.2, 1.4))
    ]
    found += [
        (name, features, (1.2,))
        for name in ("discriminant", "LDA")
        for features in (before, "both")
    ]
    return found


class Features:
    """Features of D_Defense with the trigger at any strength, each made once.

    Parameters
    ----------
    case : Case
    """

    def __init__(self, case):
        self.case = case
        before = LAYERS[case.cell.network]
        self._victims = {
            name: VictimNetwork(case.network, feature_layer=layer).fit(case.defense[0])
            for name, layer in {"penultimate": None, **before}.items()
        }
        self._made: dict = {}

    def __call__(self, features, strength):
        """Return features (n_samples, n_features) and the victim's labels."""
        names = list(self._victims) if features == "both" else [features]
        X, y = self.case.defense
        parts = []
        for name in names:
            if (name, strength) not in self._made:
                sources = y != self.case.target
                images = X.copy()
                trigger = self.case.estimate.scaled(strength)
                images[sources] = trigger.embed(X[sources])
                victim = self._victims[name]
                self._made[name, strength] = victim.predict_and_transform(images)
            parts.append(self._made[name, strength])
        return np.hstack([Z for _, Z in parts]), parts[0][0]


def cross_validate(features, classifier, layer, strengths, seed):
    """Return the log-loss of the class of origin on held-out images of D_Defense.

    The mean over ``STRENGTHS`` of the trigger that is embedded into held-out images:
    how much stronger than the estimate the attacker's own is, the defender cannot know.

    Parameters
    ----------
    features : Features
    classifier : estimator
    layer : str
        "penultimate", the layer before, or "both".
    strengths : tuple of float
        Embedded where the classifier learns; target images are there once.
    seed : int
        Of the folds.

    Returns
    -------
    float
        0 or more; lower is better.
    """
    y, target = features.case.defense[1], features.case.target
    n_folds = min(_N_FOLDS, np.bincount(y)[np.unique(y)].min())
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    losses: dict = {strength: [] for strength in STRENGTHS}
    for train, held_out in folds.split(y, y):
        rows = [train] + [train[y[train] != target]] * (len(strengths) - 1)
        Z = [features(layer, s)[0][r] for s, r in zip(strengths, rows, strict=True)]
        model = clone(classifier).fit(np.vstack(Z), y[np.concatenate(rows)])
        for strength in STRENGTHS:
            Z_all, labels = features(layer, strength)
            sent = held_out[labels[held_out] == target]
            proba = model.predict_proba(Z_all[sent])
            losses[strength].append(log_loss(y[sent], proba, labels=model.classes_))
    return float(np.mean([np.mean(part) for part in losses.values()]))


def levers(bench, *, seeds, select, n_per_class):
    """Print and append the cross-validated log-loss of every candidate.

    Parameters
    ----------
    bench : Bench
    seeds : sequence of int
    select : sequence of str
        Parts of the names of cells.
    n_per_class : sequence of int
        Images a class in D_Defense.
    """
    done = {record["config"]["key"] for record in read("levers", results=bench.results)}
    for cell in [*cells(4, seeds), *cells(2, seeds)]:
        if cell.dataset == "pubfig" or not any(part in cell.name for part in select):
            continue
        for number in n_per_class:
            case = bench.case(cell, number)
            text = json.dumps([VERSION, case.recipe, cell.seed, number])
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            if key in done:
                continue
            start = time.perf_counter()
            found = _compare(case)
            record = {
                "seed": cell.seed,
                "config": {"key": key, "recipe": case.recipe, "strengths": STRENGTHS},
                "data_source": case.data.data_source,
                "seconds": time.perf_counter() - start,
                "dataset": cell.dataset,
                "network": cell.network,
                "attack": cell.attack,
                "n_per_class": number,
                "log_loss": found,
            }
            append("levers", record, results=bench.results)
            best = min(found, key=found.get)
            bench.log(f"{cell.name}, seed {cell.seed}, {number} a class: {best}")


def _compare(case):
    features, known = Features(case), classifiers()
    return {
        f"{name}; {layer}; {', '.join(map(str, strengths))}": cross_validate(
            features, known[name], layer, strengths, case.cell.seed
        )
        for name, layer, strengths in candidates(case.cell.network)
    }


def rank(results):
    """Return mean log-losses by candidate and images a class.

    Parameters
    ----------
    results : path-like

    Returns
    -------
    pandas.DataFrame
        A row a candidate, a column a number of images; the best for the most first.
    """
    rows = [
        {"n_per_class": r["n_per_class"], "candidate": name, "log_loss": value}
        for r in read("levers", results=results)
        for name, value in r["log_loss"].items()
    ]
    table = pd.DataFrame(rows).pivot_table("log_loss", "candidate", "n_per_class")
    return table.sort_values(table.columns[-1])
