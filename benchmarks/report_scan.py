"""Tables and pictures of the scans, made from the results."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.report_cost import compare_schedules
from benchmarks.results import read
from benchmarks.scan_lines import ALPHA, STRONG, judged, rate, total_passes
from benchmarks.victims import NETWORKS, population
from sklearn_backdoor.reverse._anomaly import anomaly_indices, p_values

_KINDS = [
    (attack, single)
    for attack in ("white-box", "single-pixel", "chessboard", "blended")
    for single in (False, True)
]


def _load(results, part, name="scan"):
    """Return the lines of a part, the latest of each key, as flat records."""
    found: dict = {}
    for record in read(name, results=results):
        if record["config"].get("part") == part:
            key = record["config"]["key"], record.get("conditional")
            found[key] = record
    return list(found.values())


def report_scan(results):
    """Return the tables as Markdown, only those that there are results for.

    Parameters
    ----------
    results : path-like
        Folder of the JSON lines.

    Returns
    -------
    str
    """
    scanned = _load(results, "population")
    parts = [
        _population([judged(r) for r in scanned]),
        _weak([judged(r) for r in _load(results, "weak")]),
        compare_schedules(_load(results, "cost"), _load(results, "repeat"), scanned),
        _classes(_load(results, "classes")),
        _shared(_load(results, "shared")),
        _budget(_load(results, "budget")),
        _inflight(_load(results, "inflight", "inflight")),
    ]
    return "\n\n".join(part for part in parts if part)


def _population(records):
    """Return detection and false alarms by method, then by kind of attack."""
    if not records:
        return ""
    strong = [r for r in records if r["attack"] and r["asr"] >= STRONG]
    clean = [r for r in records if not r["attack"]]
    lines = [
        f"| search | flags by | detected, of {len(strong)} | right target, of these "
        f"| false alarms, of {len(clean)} clean |",
        "|---|---|---|---|---|",
    ]
    names = dict.fromkeys(name for r in records for name in r["config"]["methods"])
    for name in (None, *names):

        def flags(record, name=name):
            if name is None:
                return record["flagged"]
            return record["config"]["methods"][name]["flagged_alone"]

        attacked, spared = (  # not all networks have each
            [r for r in some if name is None or name in r["config"]["methods"]]
            for some in (strong, clean)
        )
        detected = [r for r in attacked if flags(r)]
        right = sum(flags(r)[0] == r["target_class"] for r in detected)
        alarms = sum(bool(flags(r)) for r in spared)
        text = "**AutoReverseEngineer**" if name is None else f"{name}, alone"
        rule = f"p < {ALPHA}" + ", corrected for searches" * (name is None)
        lines.append(
            f"| {text} | {rule} | {rate(len(detected), len(attacked))} | "
            f"{rate(right, len(detected))} | {rate(alarms, len(spared))} |"
        )
    for name, rule, published in (
        ("patch", "index > 2, published", _by_index),
        ("additive", "p < 0.05, Gamma, published", _by_gamma),
    ):
        detected = [r for r in strong if published(r["config"]["methods"][name])]
        right = sum(
            int(np.argmin(_norms(r["config"]["methods"][name]))) == r["target_class"]
            for r in detected
        )
        alarms = sum(published(r["config"]["methods"][name]) for r in clean)
        lines.append(
            f"| {name}, alone | {rule} | {rate(len(detected), len(strong))} | "
            f"{rate(right, len(detected))} | {rate(alarms, len(clean))} |"
        )
    networks = [n for n in NETWORKS if any(r["network"] == n for r in strong)]
    lines += ["", f"| AutoReverseEngineer, by kind | {' | '.join(networks)} |"]
    lines.append("|---" * (1 + len(networks)) + "|")
    for attack, single in _KINDS:
        cells = []
        for network in networks:
            kind = [
                r
                for r in strong
                if r["attack"] == attack
                and (r["sources"] != "all") == single
                and r["network"] == network
            ]
            hits = sum(r["found"] == r["target_class"] for r in kind)
            cells.append(f"{hits}/{len(kind)}")
        text = f"{attack}, {'single' if single else 'multi'}-class"
        lines.append(f"| {text} | {' | '.join(cells)} |")
    cells = []
    for network in networks:
        own = [r for r in clean if r["network"] == network]
        cells.append(f"{sum(bool(r['flagged']) for r in own)}/{len(own)}")
    lines.append(f"| clean: false alarms | {' | '.join(cells)} |")
    n_all = len(population(1))
    part = f", drawn from {n_all}" if len(records) < n_all else ""
    passes = np.median([total_passes(r) for r in records])
    timed = [r["seconds"] for r in records if r["seconds"]]
    seconds = f", {np.median(timed):.0f} s (n = {len(timed)})" if timed else ""
    torches = " and ".join(sorted({r["versions"]["torch"] for r in records}))
    machines = " and ".join(sorted({r["machine"]["processor"] for r in records}))
    lines += [
        "",
        f"{len(records)} small victims{part}, {len(strong)} of them with an ASR of "
        f"{STRONG} or more; in brackets 95 % Wilson intervals; by kind: the right "
        "target found. Judged by the present rule from the norms of the lines; so are "
        "the p-values of Neural Cleanse, fast and exhaustive, below; other tables have "
        "the verdicts of the lines' commits. Searches, nulls and this rule were chosen "
        "by victims of other seeds. "
        f"Median of a scan: {passes / 1000:.0f} thousand image passes (forward + "
        f"backward){seconds}. Trained and scanned with torch {torches} on {machines}, "
        "one thread each.",
    ]
    return "\n".join(lines)


def _weak(records):
    """Return what becomes of attacks that do not always work."""
    if not records:
        return ""
    lines = [
        "| weak white boxes, LeNet-5, class 9 | poisoned images a class | ASR true, "
        "estimated | flagged |",
        "|---|---|---|---|",
    ]
    for r in records:
        estimated = r["asr_estimated"]
        text = "-" if estimated is None else f"{estimated:.3f}"
        lines.append(
            f"| {r['dataset']} | {r['config']['recipe']['n_per_class']} | "
            f"{r['asr']:.3f}, {text} | {r['flagged']} |"
        )
    return "\n".join(lines)


def _norms(seen):
    return np.where(seen["converged"], seen["norms"], np.inf)


def _by_index(seen):
    """Tell whether the published rule of Neural Cleanse flags a class."""
    indices, below = anomaly_indices(seen["norms"], seen["converged"])
    return bool((below & (indices > 2)).any())


def _by_gamma(seen):
    """Tell whether the published null of the additive search flags a class."""
    p = p_values(seen["norms"], seen["converged"], null="gamma")
    return bool((p < 0.05).any())


def _classes(records):
    """Return cost against the number of classes."""
    table = _by_classes(records)
    if not len(table):
        return ""
    lines = [
        "| classes | victims | image passes a class | of linear | seconds | target "
        "flagged, others |",
        "|---|---|---|---|---|---|",
    ]
    usual = table["a_class"].mean().iloc[0]
    for k, rows in table:
        a_class = rows["a_class"]
        lines.append(
            f"| {k} | {len(rows)} | {a_class.mean():,.0f} ({a_class.min():,.0f} to "
            f"{a_class.max():,.0f}) | {a_class.mean() / usual:.2f} | "
            f"{rows['seconds'].median():.0f} | {rows['right'].sum()}, "
            f"{rows['others'].sum()} |"
        )
    return "\n".join(lines)


def _by_classes(records):
    """Return passes, seconds and hits of the synthetic victims, by their classes."""
    rows = [
        {
            "k": r["config"]["n_classes"],
            "a_class": total_passes(r) / r["config"]["n_classes"],
            "seconds": r["seconds"],
            "right": r["target_class"] in r["flagged"],
            "others": len(set(r["flagged"]) - {r["target_class"]}),
        }
        for r in records
    ]
    names = ["k", "a_class", "seconds", "right", "others"]
    return pd.DataFrame(rows, columns=names).groupby("k")


def _shared(records):
    """Return the victims that other code made."""
    if not records:
        return ""
    lines = [
        "| victim made by other code | search | verdict | ASR true, estimated | "
        "forward | backward | seconds, threads |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        asr = "-"
        if r["asr"] is not None:
            estimated = r["asr_estimated"]
            shown = "-" if estimated is None else f"{estimated:.3f}"
            asr = f"{r['asr']:.3f}, {shown}"
        passes, method = r["image_passes"], r["method"]
        if "methods" in r["config"]:
            names = list(r["config"]["methods"])
            method += f", {len(names)} searches, the last: {names[-1]}"
        lines.append(
            f"| {r['config']['victim']} | {method} | {r['config']['verdict']} "
            f"{r['flagged'] or ''} | {asr} | {passes['forward']:,} | "
            f"{passes['backward']:,} | {r['seconds']:.0f}, {r['machine']['threads']} |"
        )
    return "\n".join(lines)


def _budget(records):
    """Return how few steps find the shared white box."""
    if not records:
        return ""
    records = sorted(records, key=lambda r: r["config"]["max_steps"])
    lines = [
        "| steps a class | forward | backward | p of the target | flagged | estimated "
        "ASR |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        passes, target = r["image_passes"], r["target_class"]
        asr = "-" if r["asr_estimated"] is None else f"{r['asr_estimated']:.3f}"
        lines.append(
            f"| {r['config']['max_steps']} | {passes['forward']:,} | "
            f"{passes['backward']:,} | {r['config']['p_values'][target]:.2g} | "
            f"{r['flagged']} | {asr} |"
        )
    return "\n".join(lines)


def _inflight(records):
    """Return the guard's rates with the estimated and the true trigger."""
    records = [r for r in records if r["conditional"]]
    if not records:
        return ""
    lines = [
        "| data | attack | flagged | trigger | ASR of it | TPR | FPR | SIA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        asr = r["asr_estimated"] if r["trigger"] == "estimated" else r["asr"]
        lines.append(
            f"| {r['dataset']} | {r['attack']} | {r['config']['flagged']} (truth "
            f"{r['target_class']}) | {r['trigger']} | {asr:.3f} | {r['tpr']:.3f} | "
            f"{r['fpr']:.3f} | {r['sia']:.3f} |"
        )
    return "\n".join(lines)


def draw_scan_results(results):
    """Draw cost against classes, and the verdict against the budget.

    Parameters
    ----------
    results : path-like

    Returns
    -------
    matplotlib.figure.Figure or None
        None where there are no results.
    """
    a_class = _by_classes(_load(results, "classes"))["a_class"].mean()
    budget = sorted(_load(results, "budget"), key=lambda r: r["config"]["max_steps"])
    if not len(a_class) or not budget:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    k = a_class.index.to_numpy()
    passes = k * a_class.to_numpy()
    left.loglog(k, passes, "o-", label="measured (mean)")
    left.loglog(k, passes[0] * k / k[0], ":", color="grey", label="linear")
    left.set_xlabel("classes")
    left.set_ylabel("image passes (forward + backward)")
    left.set_title("Cost against the number of classes")
    left.legend()
    totals = [total_passes(r) for r in budget]
    p = [max(r["config"]["p_values"][r["target_class"]], 1e-12) for r in budget]
    right.loglog(totals, p, "o-")
    right.axhline(0.05, color="tab:red", linestyle="--", label="flagged below 0.05")
    right.axvline(40_000, color="grey", linestyle=":", label="40 000 passes")
    right.set_xlabel("image passes (forward + backward), ten classes")
    right.set_ylabel("p-value of the true target")
    right.set_title("ResNet-18, CIFAR-10, white box: the budget")
    right.legend()
    return figure
