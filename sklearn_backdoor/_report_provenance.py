"""Where a report comes from: network, images, search, guard, software."""

import platform
from datetime import UTC, datetime

import numpy as np
import sklearn
import torch
from sklearn.frozen import FrozenEstimator

import sklearn_backdoor
from sklearn_backdoor.reverse import SearchRecord
from sklearn_backdoor.reverse._base import BaseReverseEngineer

_NAMES = {
    "weights_file": "weights file",
    "weights_sha256": "SHA-256 of the weights file",
    "architecture": "architecture",
    "data_source": "clean images from",
    "seconds": "seconds",
    "seed": "seed",
}
_OF_NETWORK = ("weights_file", "weights_sha256", "architecture")
_LONGEST = 300


def provenance_groups(guard, X, counts, accuracy, provenance):
    """Return all that a reader needs to do the same again.

    Parameters
    ----------
    guard : BackdoorGuard
        Fitted.
    X : ndarray of shape (n_samples, n_channels, height, width)
        D_Defense.
    counts : list of int
        Of its images a class.
    accuracy : float in 0...1
        Of the victim on it.
    provenance : dict
        Given by the user, whatever it holds.

    Returns
    -------
    list of (str, list of (str, object))
        Groups of names and values.
    """
    rest = {str(name): _brief(value) for name, value in provenance.items()}

    def given(*names):
        return [(_NAMES[name], rest.pop(name)) for name in names if name in rest]

    victim = guard.victim_
    each = f"{min(counts)}" + f" to {max(counts)}" * (min(counts) < max(counts))
    groups = [
        (
            "Network",
            [
                *given(*_OF_NETWORK),
                ("torch class", type(victim.network_).__name__),
                ("image shape", " × ".join(map(str, victim.image_shape_))),
                ("classes", len(guard.classes_)),
                ("feature layer", victim.feature_layer_),
            ],
        ),
        (
            "Clean images",
            [
                *given("data_source"),
                ("images", f"{len(X)}, {each} a class, {X.dtype}"),
                ("network right on", f"{accuracy:.1%}"),
            ],
        ),
        ("Search", [*_search(guard.engineer_), *given("seed", "seconds")]),
        ("Guard", _guard(guard)),
        ("Software", _versions()),
    ]
    if rest:
        groups.append(("Further, as given", list(rest.items())))
    return groups


def _search(engineer):
    if engineer is None:
        return [("method", "none: the trigger was given")]
    search = SearchRecord.from_engineer(engineer)
    facts = [
        ("method", search.method),
        ("images forward", f"{search.n_image_passes_.forward:,}"),
        ("images backward", f"{search.n_image_passes_.backward:,}"),
    ]
    while isinstance(engineer, FrozenEstimator):
        engineer = engineer.estimator
    if isinstance(engineer, BaseReverseEngineer):  # a record has no settings
        facts += _settings(engineer, "victim", "verbose", "n_jobs", "checkpoint_dir")
    return facts


def _guard(guard):
    classifiers = list(guard.classifiers_.values())
    facts = _settings(guard, "victim", "trigger", "classifier")
    facts.append(("classifier", _brief(classifiers[0] if classifiers else "none")))
    if hasattr(guard, "n_images_"):
        facts.append(("fitted on", f"{guard.n_images_} images"))
    return facts


def _settings(estimator, *left_out):
    return [
        (name.replace("_", " "), _brief(value))
        for name, value in estimator.get_params(deep=False).items()
        if name not in left_out and value is not None
    ]


def _brief(value):
    """Return one line of text, so that no object speaks for itself in HTML."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _versions():
    return [
        ("sklearn_backdoor", sklearn_backdoor.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("scikit-learn", sklearn.__version__),
        ("NumPy", np.__version__),
        ("made on", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
    ]
