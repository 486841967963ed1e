"""The lines of the scans: what a fitted reverse engineer saw, and what it cost."""

import time

import numpy as np

from sklearn_backdoor.metrics import wilson_interval
from sklearn_backdoor.reverse import default_engineers
from sklearn_backdoor.reverse._anomaly import (
    bonferroni_factors,
    p_values,
    p_values_of_pairs,
    rank_by_p,
)

ALPHA = 0.05
STRONG = 0.9  # attack success rate from which an attack ought to be found
_TRACES = ("batch-norm", "weights")  # searches for what a trigger leaves behind
_N_UNSEEN = 2000  # images on which an estimated trigger is tried


def scanned(engineer, recipe, trigger, defense, unseen):
    """Fit a reverse engineer, and return a line of ``scan.jsonl``."""
    start = time.perf_counter()
    engineer.fit(*defense)
    seconds = time.perf_counter() - start
    target, found = recipe["target_class"], engineer.target_class_
    asr = asr_estimated = None
    if trigger is not None:
        asr = success_rate(engineer.victim_, trigger, recipe, *unseen)
        if found == target:
            asr_estimated = success_rate(
                engineer.victim_, engineer.trigger_, recipe, *unseen
            )
    settings = {
        name: str(value)
        for name, value in engineer.get_params(deep=False).items()
        if name != "victim"
    }
    return {
        "seed": recipe["seed"],
        "config": {
            "recipe": recipe,
            "engineer": settings,
            "verdict": engineer.verdict_,
            "p_values": engineer.p_values_.tolist(),
            "norms": engineer.norms_.tolist(),
            "converged": engineer.converged_.tolist(),
            "n_per_class": int(np.bincount(defense[1]).min()),
            "trigger_norm": _norm(engineer.trigger_),
        },
        "seconds": seconds,
        **{name: recipe[name] for name in ("dataset", "network", "attack", "sources")},
        "target_class": target,
        "asr": asr,
        "method": type(engineer).__name__,
        "schedule": getattr(engineer, "schedule", "fast"),
        "flagged": engineer.target_classes_.tolist(),
        "found": None if found is None else int(found),
        "asr_estimated": asr_estimated,
        "image_passes": engineer.n_image_passes_._asdict(),
    }


def by_method(engineer):
    """Return what each search of an automatic one saw."""
    return {
        name: {
            "method": type(one).__name__,
            "flagged_alone": one.classes_[one._flag()].tolist(),
            "norms": one.norms_.tolist(),
            "converged": one.converged_.tolist(),
            "p_values": one.p_values_.tolist(),
            "anomaly_indices": one.anomaly_indices_.tolist(),
            "image_passes": one.n_image_passes_._asdict(),
            **_traces(one),
            **_pairs(one),
        }
        for name, one in engineer.engineers_.items()
    }


def judged(record):
    """Return a line with the verdict of the present rule on the norms that it holds.

    What batch-norm and weights tell is no norm: their p-values stay.
    """
    engineers = dict(default_engineers(None))
    p, methods = [], {}
    for name, seen in record["config"]["methods"].items():
        engineer = engineers[name]
        if name in _TRACES:
            p.append(np.array(seen["p_values"]))
        elif engineer.sources == "pairs":
            engineer.pair_norms_ = np.array(seen["pair_norms"])
            engineer.pair_converged_ = np.array(seen["pair_converged"])
            engineer.pair_margins_ = np.array(seen["pair_margins"])
            p.append(p_values_of_pairs(*engineer._judge_pairs()))
        else:
            prior_sd = engineer._prior_sd
            p.append(p_values(seen["norms"], seen["converged"], prior_sd=prior_sd))
        flagged = rank_by_p(p[-1], ALPHA).tolist()
        methods[name] = {**seen, "flagged_alone": flagged}
    factors = bonferroni_factors(name in _TRACES for name in methods)
    smallest = (np.nan_to_num(p, nan=1.0) * factors[:, None]).min(axis=0)
    flagged = rank_by_p(smallest, ALPHA).tolist()
    return {
        **record,
        "config": {**record["config"], "methods": methods},
        "flagged": flagged,
        "found": flagged[0] if flagged else None,
    }


def success_rate(victim, trigger, recipe, X, y):
    """Return the success rate on unseen images of the source classes."""
    sources = y != recipe["target_class"]
    if recipe["sources"] != "all":
        sources = np.isin(y, recipe["sources"])
    rows = np.random.RandomState(0).permutation(np.flatnonzero(sources))[:_N_UNSEEN]
    labels = victim.predict(trigger.embed(X[rows]))
    return float(np.mean(labels == recipe["target_class"]))


def say(record):
    """Print a line in short."""
    sources = record["sources"]
    print(
        f"{record['dataset']}, {record['network']}, {record['attack']}, sources "
        f"{sources}, target {record['target_class']}: {record['method']} "
        f"{record['schedule']}: {record['config']['verdict']} {record['flagged']}, "
        f"ASR {record['asr']} (estimated {record['asr_estimated']}), "
        f"{record['image_passes']}, {record['seconds']:.0f} s",
        flush=True,
    )


def total_passes(record):
    """Return a line's image passes, forward and backward ones."""
    return sum(record["image_passes"].values())


def rate(hits, total):
    """Return a rate as text, with its Wilson interval of 95 %."""
    if not total:
        return "-"
    low, high = wilson_interval(hits, total)
    return f"{hits}/{total} = {hits / total:.2f} [{low:.2f}, {high:.2f}]"


def _norm(trigger):
    if trigger is None:
        return None
    return trigger.mask_norm if hasattr(trigger, "mask") else trigger.l2_norm


def _traces(engineer):
    """Return how clear traces are, where a search asks for them."""
    if not hasattr(engineer, "traces_"):
        return {}
    found = {"traces": np.nan_to_num(engineer.traces_, nan=-9).round(2).tolist()}
    if hasattr(engineer, "responses_"):
        responses = np.nan_to_num(engineer.responses_, nan=-1).round(3).tolist()
        return {**found, "responses": responses}
    return {
        **found,
        "mismatch": round(engineer.mismatch_, 2),
        "share_sd": round(engineer.share_sd_, 2),
    }


def _pairs(engineer):
    """Return what a search saw of pairs of classes, if it was for these."""
    norms = getattr(engineer, "pair_norms_", None)
    if norms is None:
        return {}
    return {
        "pair_norms": np.nan_to_num(norms, nan=-1).round(3).tolist(),
        "pair_converged": engineer.pair_converged_.tolist(),
        "pair_margins": np.nan_to_num(engineer.pair_margins_).round(4).tolist(),
    }
