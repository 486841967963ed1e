"""What the guard's defaults were chosen by: log-loss on D_Defense."""

import time
from functools import cached_property

import joblib
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

from benchmarks.contenders import STRENGTH, pipelines
from benchmarks.recipes import cells, name_of
from benchmarks.results import append, read
from benchmarks.tables import selected
from sklearn_backdoor import BackdoorTriggerClassifier, VictimNetwork

VERSION = 2  # raise it when a change of the code makes old lines obsolete
STRENGTHS = (1.0, 1.1, 1.2, 1.3, 1.4)  # how strong the attacker's own is, is not known
LAYERS = {"lenet5": {"fc1": "classifier.1"}, "resnet18": {"layer3": "layer3"}}
_N_FOLDS = 5
DEFAULT = f"discriminant; penultimate; estimate, {STRENGTH}"  # at 100 images a class


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
        "discriminant, full, 3, 10.0": mixture(3, "full", 10.0),
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
    """List what is compared.

    Parameters
    ----------
    network : {"lenet5", "resnet18"}

    Returns
    -------
    list of tuple (classifier, features, trigger, strengths)
        Features are "penultimate", the name of the layer before, or "both". The trigger
        is the "estimate", one "optimised further", or "three estimates".
    """
    (before,) = LAYERS[network]
    found: list = [
        (name, "penultimate", "estimate", (STRENGTH,)) for name in classifiers()
    ]
    found += [
        (name, "penultimate", "estimate", strengths)
        for name in pipelines()
        for strengths in ((1.0,), (1.1,), (1.3,), (1.4,), (1.6,), (1.0, 1.2, 1.4))
    ]
    found += [
        (name, features, "estimate", (STRENGTH,))
        for name in ("discriminant", "LDA")
        for features in (before, "both")
    ]
    found += [
        ("discriminant", "penultimate", trigger, (strength,))
        for trigger in ("optimised further", "three estimates")
        for strength in (1.0, STRENGTH)
    ]
    return found


class Features:
    """Features of D_Defense with a trigger at any strength, each made once.

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

    @cached_property
    def triggers(self):
        """Estimates of the true target's trigger, by kind."""
        found = [
            self._estimate(random_state=self.case.cell.seed + shift)
            for shift in (1000, 2000)
        ]
        return {
            "estimate": [self.case.estimate],
            "optimised further": [self._estimate(success_rate=0.99)],
            "three estimates": [self.case.estimate, *found],
        }

    def _estimate(self, **settings):
        engineer = clone(self.case.engineer).set_params(checkpoint_dir=None, **settings)
        engineer.fit(*self.case.defense)
        return engineer.triggers_[engineer.classes_.tolist().index(self.case.target)]

    def __call__(self, features, trigger, strength):
        """Return features (n_samples, n_features) and the victim's labels."""
        names = list(self._victims) if features == "both" else [features]
        parts = [self._look(name, trigger, strength) for name in names]
        return np.hstack([Z for _, Z in parts]), parts[0][0]

    def _look(self, name, trigger, strength):
        key = name, joblib.hash(trigger), strength
        if key not in self._made:
            X, y = self.case.defense
            sources, images = y != self.case.target, X.copy()
            images[sources] = trigger.scaled(strength).embed(X[sources])
            self._made[key] = self._victims[name].predict_and_transform(images)
        return self._made[key]


def cross_validate(features, candidate, classifier, seed):
    """Return the log-loss of the class of origin on held-out images of D_Defense.

    Parameters
    ----------
    features : Features
    candidate : tuple
        As of `candidates`. Target images are there once, however many triggers.
    classifier : estimator
        The one that the candidate names.
    seed : int
        Of the folds.

    Returns
    -------
    dict from float to float
        By the strength at which the estimate is embedded into held-out images.
    """
    y, target = features.case.defense[1], features.case.target
    _, layer, kind, strengths = candidate
    embedded = [
        features(layer, trigger, strength)[0]
        for trigger in features.triggers[kind]
        for strength in strengths
    ]
    (estimate,) = features.triggers["estimate"]
    n_folds = min(_N_FOLDS, np.bincount(y)[np.unique(y)].min())
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    losses: dict = {strength: [] for strength in STRENGTHS}
    for train, held_out in folds.split(y, y):
        rows = [train] + [train[y[train] != target]] * (len(embedded) - 1)
        Z = [part[chosen] for part, chosen in zip(embedded, rows, strict=True)]
        model = clone(classifier).fit(np.vstack(Z), y[np.concatenate(rows)])
        for strength in STRENGTHS:
            Z_all, labels = features(layer, estimate, strength)
            sent = held_out[labels[held_out] == target]
            proba = model.predict_proba(Z_all[sent])
            losses[strength].append(log_loss(y[sent], proba, labels=model.classes_))
    return {strength: float(np.mean(part)) for strength, part in losses.items()}


def levers(bench, *, seeds, select, n_per_class):
    """Print and append the cross-validated log-loss of every candidate.

    Parameters
    ----------
    bench : Bench
    seeds : sequence of int
    select : sequence of str
        Patterns for names of cells.
    n_per_class : sequence of int
        Images a class in D_Defense.
    """
    done = {record["config"]["key"] for record in read("levers", results=bench.results)}
    for cell in selected([*cells(4, seeds), *cells(2, seeds)], select):
        for number in n_per_class:
            case = bench.case(cell, number)
            key = name_of([VERSION, case.recipe, cell.seed, number])
            if key in done:
                continue
            start = time.perf_counter()
            features, known = Features(case), classifiers()
            found = {
                f"{candidate[0]}; {candidate[1]}; {candidate[2]}, "
                + " and ".join(map(str, candidate[3])): cross_validate(
                    features, candidate, known[candidate[0]], cell.seed
                )
                for candidate in candidates(cell.network)
            }
            record = {
                "seed": cell.seed,
                "config": {"key": key, "version": VERSION, "recipe": case.recipe},
                "data_source": case.data.data_source,
                "seconds": time.perf_counter() - start,
                "dataset": cell.dataset,
                "network": cell.network,
                "attack": cell.attack,
                "n_per_class": number,
                "log_loss": found,
            }
            append("levers", record, results=bench.results)
            best = min(found, key=lambda name: np.mean(list(found[name].values())))
            bench.log(f"{cell.name}, seed {cell.seed}, {number} a class: {best}")


def rank(results, network="lenet5"):
    """Return mean log-losses by candidate and images a class.

    Parameters
    ----------
    results : path-like
    network : {"lenet5", "resnet18"}

    Returns
    -------
    pandas.DataFrame
        A row a candidate and number of images a class ``n``: "loss" is the mean over
        strengths of the held-out trigger, "at 1.0" that for the estimate as it is,
        "difference" that of "loss" from `DEFAULT`, paired by victim, "error" its
        standard error, and "victims" their number. Empty if nothing was run.
    """
    rows = [
        {
            "n": record["n_per_class"],
            "victim": record["config"]["key"],
            "candidate": name,
            "loss": np.mean(list(losses.values())),
            "at 1.0": losses["1.0"],
        }
        for record in read("levers", results=results)
        if record["config"].get("version") == VERSION and record["network"] == network
        for name, losses in record["log_loss"].items()
    ]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    own = table[table["candidate"] == DEFAULT].set_index("victim")["loss"]
    table["difference"] = table["loss"] - table["victim"].map(own)
    groups = table.groupby(["candidate", "n"])
    ranked = groups[["loss", "at 1.0", "difference"]].mean()
    ranked["error"] = groups["difference"].sem()
    ranked["victims"] = groups.size()
    return ranked.reset_index().sort_values(["n", "loss"], ascending=[False, True])
