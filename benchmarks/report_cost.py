"""Fast against exhaustive Neural Cleanse: what it saves, and what it changes."""

import numpy as np
import pandas as pd

from benchmarks.scan_lines import ALPHA, STRONG, judged, rate, total_passes
from sklearn_backdoor.reverse._anomaly import p_values, rank_by_p

_SCHEDULES = "fast", "exhaustive"
_EARLIER = "those of seeds 6 to 9; some chose settings"


def compare_schedules(records, repeated, scanned):
    """Compare fast and exhaustive searches of the same victims.

    Parameters
    ----------
    records : list of dict
        Lines of both schedules.
    repeated : list of dict
        Lines of the same searches, and of the automatic one, with other random numbers:
        how far a search agrees with itself is what two are to be measured by.
    scanned : list of dict
        Lines of the automatic search on the population; its victims are compared by
        themselves, as no setting was chosen by them.

    Returns
    -------
    str
        Markdown; empty without lines of both.
    """
    first, second = _by_victim([*records, *scanned]), _by_victim(repeated)
    runs = [
        (lines, second.get(victim, {}))
        for victim, lines in first.items()
        if lines.keys() >= set(_SCHEDULES)
    ]
    columns = {
        name: _compared(chosen)
        for name, is_fresh in (("the population's", True), (_EARLIER, False))
        if (chosen := [run for run in runs if ("auto" in run[0]) is is_fresh])
    }
    if not columns:
        return ""
    header = ["Neural Cleanse, fast / exhaustive, same victims, same run", *columns]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for what in next(iter(columns.values())):
        cells = [what, *(column.get(what, "-") for column in columns.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_victim(records):
    """Return each victim's lines: "fast" and "exhaustive", and the automatic "auto"."""
    found: dict = {}
    for record in records:
        is_auto = record["method"] == "AutoReverseEngineer"
        name = "auto" if is_auto else record["schedule"]
        found.setdefault(str(record["config"]["recipe"]), {})[name] = record
    return found


def _compared(runs):
    """Return the rows of the table for some victims, a text for each title.

    ``runs`` has a pair a victim: the lines, and those with other random numbers.
    """
    fast, exhaustive = ([lines[name] for lines, _ in runs] for name in _SCHEDULES)
    found, found_too = ([_flagged(r) for r in some] for some in (fast, exhaustive))
    to_judge = [i for i, r in enumerate(fast) if not r["attack"] or r["asr"] >= STRONG]
    kept, missed = (
        [i for i in to_judge if _is_right(exhaustive[i], found_too[i]) is is_right]
        for is_right in (True, False)
    )
    text = {
        "victims": str(len(runs)),
        "image passes: ratio of sums, largest": _ratios(
            *([total_passes(record) for record in some] for some in (fast, exhaustive))
        ),
        "seconds: ratio of sums, largest": _ratios(
            *([record["seconds"] for record in some] for some in (fast, exhaustive))
        ),
        "same verdict (backdoored or not), published rule for exhaustive": _same(
            [bool(flagged) for flagged in found],
            [bool(record["flagged"]) for record in exhaustive],
        ),
    }
    for title, one, other in (
        (f"both by p < {ALPHA}", (0, "fast"), (0, "exhaustive")),
        ("both with other random numbers", (1, "fast"), (1, "exhaustive")),
        ("fast and itself with others", (0, "fast"), (1, "fast")),
        ("exhaustive and itself with others", (0, "exhaustive"), (1, "exhaustive")),
        (
            "AutoReverseEngineer with either's norms",
            (0, "auto", "fast"),
            (0, "auto", "exhaustive"),
        ),
        (
            "AutoReverseEngineer with either's, other random numbers",
            (1, "auto", "fast"),
            (1, "auto", "exhaustive"),
        ),
        ("AutoReverseEngineer and itself with others", (0, "auto"), (1, "auto")),
    ):
        text[f"same verdict, {title}"] = _same(
            *(
                [_verdict(run[i], *search) for run in runs]
                for i, *search in (one, other)
            )
        )
    text["right verdict and target where exhaustive has them"] = rate(
        sum(_is_right(fast[i], found[i]) for i in kept), len(kept)
    )
    text[f"the same where it has not (clean or ASR of {STRONG} or more)"] = rate(
        sum(_is_right(fast[i], found[i]) for i in missed), len(missed)
    )
    asr = pd.DataFrame(
        {
            "true": [record["asr"] for record in fast],
            "fast": [record["asr_estimated"] for record in fast],
            "exhaustive": [record["asr_estimated"] for record in exhaustive],
            "itself with others": [
                again["exhaustive"]["asr_estimated"] if "exhaustive" in again else None
                for _, again in runs
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


def _verdict(lines, search, patch=None):
    """Tell whether a search calls a victim backdoored; None without its line.

    ``patch`` names the schedule whose norms the automatic search is given.
    """
    if search not in lines or (patch or search) not in lines:
        return None
    if search != "auto":
        return bool(_flagged(lines[search]))
    if patch is None:
        return bool(judged(lines["auto"])["flagged"])
    return bool(_as_patch_search(lines[patch], lines["auto"]))


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
    """Say how many verdicts are the same, of those that there are."""
    pairs = [p for p in zip(some, others, strict=True) if None not in p]
    return rate(sum(one is other for one, other in pairs), len(pairs))


def _ratios(some, others):
    ratios = np.divide(some, others)
    return f"{np.sum(some) / np.sum(others):.3f}, {ratios.max():.3f}"
