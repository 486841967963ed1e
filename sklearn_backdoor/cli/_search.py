"""The search that ``scan`` and ``guard fit`` share, and what is made of it."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from sklearn_backdoor.cli._files import check_folder, check_writable, folder_of
from sklearn_backdoor.cli._inputs import load_clean, load_suspect
from sklearn_backdoor.cli._outcome import name_of, resumable, say

_FEWEST = 3  # clean images a class, for a guard
_OUTPUTS = ("out", "json_file", "report")


def check_outputs(options, *files):
    """Find out before the search that its outcome can be written.

    Parameters
    ----------
    options : dict
        Of a command with `search_options` and `report_option`.
    *files : path-like or None
        Further outputs.

    Raises
    ------
    OSError, ValueError
    """
    check_writable(*files, options["report"], inputs=[options["weights"]])
    if options["checkpoint_dir"]:
        check_folder(options["checkpoint_dir"])


def search(options, guarded=False):
    """Load what the options name, and search a trigger for each class.

    Parameters
    ----------
    options : dict
        Of `network_options`, `image_options`, `search_options` and `report_option`.
    guarded : bool, default=False
        Whether a guard will be fitted, as for a report.

    Returns
    -------
    Scan

    Raises
    ------
    ImportError, OSError, TypeError, ValueError
        If something cannot be read, or does not fit.
    """
    from sklearn_backdoor.scan import run_scan

    clean = load_clean(options)
    if guarded or options["report"]:
        _check_enough(clean)
    network, digest = load_suspect(options, clean.X.shape[1:])
    say(f"search a trigger for each of {len(clean.classes)} classes", err=True)
    with resumable(options["checkpoint_dir"]):
        found = run_scan(
            network,
            clean.X,
            clean.y,
            clean.classes,
            method=options["method"],
            seed=options["seed"],
            jobs=options["jobs"],
            checkpoint_dir=options["checkpoint_dir"],
            verbose=True,
        )
    found.notes = clean.notes + found.notes
    found.settings = {
        **{name: value for name, value in options.items() if name not in _OUTPUTS},
        "data_source": clean.source,
        "weights_sha256": digest,
    }
    return found


def make_guard(found):
    """Fit a guard by a search that is done; nothing is searched again.

    Parameters
    ----------
    found : Scan

    Returns
    -------
    BackdoorGuard
    """
    from sklearn.frozen import FrozenEstimator

    from sklearn_backdoor.guard import BackdoorGuard

    say("fit the guard", err=True)
    guard = BackdoorGuard(found.engineer.victim, FrozenEstimator(found.engineer))
    return guard.fit(found.X, found.y)


def provenance_of(found):
    """Return where a verdict is from, as plain values.

    Parameters
    ----------
    found : Scan

    Returns
    -------
    dict from str to str, number or None
    """
    settings = found.settings
    kept = ("architecture", "weights_sha256", "data_source", "seed", "method")
    given = {name: settings[name] for name in ("n_classes", "mean", "std")}
    return {
        "weights_file": Path(settings["weights"]).name,
        **{name: settings[name] for name in kept},
        **{name: str(value) for name, value in given.items() if value is not None},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(found.seconds, 1),
    }


def report_search(options, found, guard):
    """Write the report of a search and its guard.

    Parameters
    ----------
    options : dict
        Of `report_option`.
    found : Scan
    guard : BackdoorGuard
    """
    from sklearn_backdoor.report import write_report

    path = Path(options["report"])
    with folder_of(path):
        write_report(path, guard, found.X, found.y, provenance=provenance_of(found))
    say(f"  report    {name_of(path)}")


def _check_enough(clean):
    counts = Counter(clean.y.tolist())
    rare = [str(name) for name in clean.classes if counts[name] < _FEWEST]
    if rare:
        raise ValueError(
            f"there are fewer than {_FEWEST} clean images of {len(rare)} classes, such "
            f"as {rare[0]!r}: a guard and its report need {_FEWEST} a class at least. "
            "Add images, or scan without --report."
        )
