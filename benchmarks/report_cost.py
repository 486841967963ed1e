"""Fast against exhaustive Neural Cleanse: what it saves, and what it changes."""

import numpy as np
import pandas as pd

from benchmarks.scan_lines import ALPHA, STRONG, judged, rate, total_passes
from sklearn_backdoor.reverse._anomaly import p_values, rank_by_p

_EARLIER = "those of seeds 6 to 9; some chose settings"


def compare_schedules(records, repeated, scanned):
    """Compare fast and exhaustive searches of the same victims.

    Parameters
    ----------
    records : list of dict
        Lines of both schedules.
    repeated : list of dict
        Lines of the same searches with other random numbers: how far a search agrees
        with itself bounds how far two can agree.
    scanned : list of dict
        Lines of the automatic search on the population; its victims are compared by
        themselves, as no setting was chosen by them.

    Returns
    -------
    str
        Markdown; empty without lines of both.
    """
    pairs, again = _paired(records), _paired(repeated)
    automatic = {str(record["config"]["recipe"]): record for record in scanned}
    columns = {
        name: _compared(chosen, again, automatic)
        for name, is_fresh in (("the population's", True), (_EARLIER, False))
        if (chosen := {v: p for v, p in pairs.items() if (v in automatic) is is_fresh})
    }
    if not columns:
        return ""
    header = ["Neural Cleanse, fast / exhaustive, same victims, same run", *columns]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for what in next(iter(columns.values())):
        cells = [what, *(column.get(what, "-") for column in columns.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _paired(records):
    """Return the lines of both schedules by victim."""
    pairs: dict = {}
    for record in records:
        pair = pairs.setdefault(str(record["config"]["recipe"]), {})
        pair[record["schedule"]] = record
    return {victim: pair for victim, pair in pairs.items() if len(pair) == 2}


def _compared(pairs, again, automatic):
    """Return the rows of the table for some victims, a text for each title."""
    fast = [pair["fast"] for pair in pairs.values()]
    exhaustive = [pair["exhaustive"] for pair in pairs.values()]
    found = [_flagged(record) for record in fast]
    found_too = [_flagged(record) for record in exhaustive]
    n = len(pairs)
    to_judge = [i for i, r in enumerate(fast) if not r["attack"] or r["asr"] >= STRONG]
    kept, missed = (
        [i for i in to_judge if _is_right(exhaustive[i], found_too[i]) is is_right]
        for is_right in (True, False)
    )
    text = {
        "victims": str(n),
        "image passes: ratio of sums, largest": _ratios(
            *([total_passes(record) for record in some] for some in (fast, exhaustive))
        ),
        "seconds: ratio of sums, largest": _ratios(
            *([record["seconds"] for record in some] for some in (fast, exhaustive))
        ),
        "same verdict (backdoored or not), published rule for exhaustive": _same(
            found, [record["flagged"] for record in exhaustive]
        ),
        f"same verdict, both by p < {ALPHA}": _same(found, found_too),
        "right verdict and target where exhaustive has them": rate(
            sum(_is_right(fast[i], found[i]) for i in kept), len(kept)
        ),
        f"the same where it has not (clean or ASR of {STRONG} or more)": rate(
            sum(_is_right(fast[i], found[i]) for i in missed), len(missed)
        ),
    }
    if all(victim in automatic for victim in pairs):
        verdicts = [
            [
                _as_patch_search(pair[name], automatic[victim])
                for victim, pair in pairs.items()
            ]
            for name in ("fast", "exhaustive")
        ]
        text["same verdict of AutoReverseEngineer, with either's norms in it"] = _same(
            *verdicts
        )
    both = [(pair, again[victim]) for victim, pair in pairs.items() if victim in again]
    for title, first, second in (
        ("both with other random numbers", (1, "fast"), (1, "exhaustive")),
        ("fast and itself with others", (0, "fast"), (1, "fast")),
        ("exhaustive and itself with others", (0, "exhaustive"), (1, "exhaustive")),
    ):
        text[f"same verdict, {title}"] = _same(
            *([_flagged(runs[i][name]) for runs in both] for i, name in (first, second))
        )
    asr = pd.DataFrame(
        {
            "true": [record["asr"] for record in fast],
            "fast": [record["asr_estimated"] for record in fast],
            "exhaustive": [record["asr_estimated"] for record in exhaustive],
            "itself with others": [
                again[v]["exhaustive"]["asr_estimated"] if v in again else None
                for v in pairs
            ],
        },
        dtype=float,
    ).dropna(subset=["true", "fast", "exhaustive"])
    for first, second in (
        ("fast", "exhaustive"),
        ("fast", "true"),
        ("exhaustive", "true"),
        ("exhaustive", "itself with others"),
    ):
        gap = (asr[first] - asr[second]).dropna()
        if len(gap):
            text[f"ASR of triggers on unseen images, {first} less {second}"] = (
                f"{gap.median():.3f}, {gap.min():.3f} to {gap.max():.3f}, within 0.02: "
                f"{(gap.abs() <= 0.02).sum()}/{len(gap)}"
            )
    return text


def _flagged(record):
    seen = record["config"]
    return rank_by_p(p_values(seen["norms"], seen["converged"]), ALPHA).tolist()


def _is_right(record, flagged):
    """Tell whether a clean victim is left in peace, or the target comes first."""
    if not record["attack"]:
        return not flagged
    return bool(flagged) and flagged[0] == record["target_class"]


def _as_patch_search(record, scanned):
    """Return what the automatic search flags with a line's norms as its patches."""
    seen = scanned["config"]
    kept = {name: record["config"][name] for name in ("norms", "converged")}
    methods = {**seen["methods"], "patch": {**seen["methods"]["patch"], **kept}}
    return judged({**scanned, "config": {**seen, "methods": methods}})["flagged"]


def _same(some, others):
    pairs = zip(some, others, strict=True)
    return rate(sum(bool(one) is bool(other) for one, other in pairs), len(some))


def _ratios(some, others):
    ratios = np.divide(some, others)
    return f"{np.sum(some) / np.sum(others):.3f}, {ratios.max():.3f}"
