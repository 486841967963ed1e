"""The victim and the search in a guard's files: what is kept, and how it is checked."""

import dataclasses

import numpy as np
import pandas as pd
from sklearn.base import clone

from sklearn_backdoor._fingerprint import weights_digest
from sklearn_backdoor._forward import module_of
from sklearn_backdoor._guard_values import Packer, damaged, take
from sklearn_backdoor._text import printable
from sklearn_backdoor.reverse import SearchRecord
from sklearn_backdoor.reverse._search import ImagePasses
from sklearn_backdoor.triggers import Trigger
from sklearn_backdoor.victim import VictimNetwork

VERDICTS = ("backdoored", "nothing found", "inconclusive")
_MOST_PIXELS = 2**26  # of an image
_A_CLASS = (  # arrays of the record with an entry a class
    "classes_",
    "norms_",
    "success_rates_",
    "converged_",
    "anomaly_indices_",
    "p_values_",
)


def describe_victim(victim):
    """Return what tells a victim from another, in plain values.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted.

    Returns
    -------
    dict

    Raises
    ------
    TypeError
        If it is no VictimNetwork, or a label cannot be saved.
    """
    if not isinstance(victim, VictimNetwork):
        raise TypeError(
            f"victim has type {type(victim).__name__}, expected a VictimNetwork: only "
            "its weights can be told from others."
        )
    return {
        "weights_sha256": weights_digest(victim.network_),
        "classes": Packer().labels(victim.classes_, "classes"),
        "image_shape": list(victim.image_shape_),
        "feature_layer": victim.feature_layer,
        "feature_layer_found": victim.feature_layer_,
        "n_features": int(victim._n_features_out),
    }


def open_victim(victim, fields, unpack):
    """Return a fitted clone of the victim, if it is the one described.

    Parameters
    ----------
    victim : VictimNetwork
    fields : dict
        From `describe_victim`.
    unpack : Unpacker

    Returns
    -------
    VictimNetwork

    Raises
    ------
    ValueError
        If weights, labels or feature layer are others.
    """
    saved = take(fields, "weights_sha256", str)
    found = weights_digest(module_of(victim.net))
    if found != saved:
        raise ValueError(
            f"the victim is not the one that the guard was fitted on: its weights have "
            f"SHA-256 {found[:12]}…, expected {printable(saved[:12])}…. Give "
            "VictimNetwork the network with those weights and with the normalisation "
            "(--mean, --std) of then, or fit a guard on this one."
        )
    twin = clone(victim)
    _settle(twin, "classes", unpack(take(fields, "classes", dict)))
    _settle(twin, "feature_layer", take(fields, "feature_layer", str, type(None)))
    shape = take(fields, "image_shape", list)
    if [type(side) for side in shape] != [int] * 3 or min(shape) < 1:
        raise damaged(f"images of shape {printable(shape)}")
    if np.prod(shape, dtype=float) > _MOST_PIXELS:
        raise damaged(f"images of shape {printable(shape)}, at most {_MOST_PIXELS}")
    # any images will do to find logits and features again
    twin.fit(np.random.default_rng(0).random((2, *shape), dtype=np.float32))
    layer = take(fields, "feature_layer_found", str)
    n_features = take(fields, "n_features", int)
    if (twin.feature_layer_, twin._n_features_out) != (layer, n_features):
        raise ValueError(
            f"the network has {twin._n_features_out} features at "
            f"{twin.feature_layer_!r}, but the guard was fitted on {n_features} at "
            f"{printable(layer)!r}: the architecture's code has changed. Go back to "
            "that code, or fit the guard again."
        )
    return twin


def _settle(victim, name, saved):
    """Set a parameter that is None; refuse one that differs from what was saved."""
    given = getattr(victim, name)
    if given is None:
        victim.set_params(**{name: saved})
    elif _typed(given) != _typed(saved):
        shown = printable(np.asarray(saved).tolist(), 200)
        raise ValueError(
            f"the victim has {name}={printable(given, 200)}, but the guard was fitted "
            f"with {shown}. Give VictimNetwork the same, or leave {name} out."
        )


def _typed(values):
    return [(type(one), one) for one in np.atleast_1d(np.asarray(values)).tolist()]


def pack_record(engineer, packer):
    """Return a fitted search's record in plain values.

    Parameters
    ----------
    engineer : reverse engineer, SearchRecord or None
    packer : Packer

    Returns
    -------
    dict or None
    """
    if engineer is None:
        return None
    record = SearchRecord.from_engineer(engineer)
    names = [field.name for field in dataclasses.fields(record)]
    values = {name: getattr(record, name) for name in names}
    values["n_image_passes_"] = tuple(record.n_image_passes_)
    if record.report_ is not None:
        values["report_"] = {
            name: column.to_numpy() if column.dtype.kind in "biuf" else column.tolist()
            for name, column in record.report_.items()
        }
    return {name: packer(value, f"search/{name}") for name, value in values.items()}


def unpack_record(plain, victim, unpack):
    """Return the record of a search on this victim.

    Parameters
    ----------
    plain : dict or None
        From `pack_record`.
    victim : VictimNetwork
        Fitted.
    unpack : Unpacker

    Returns
    -------
    SearchRecord or None

    Raises
    ------
    TypeError, ValueError
        If its parts do not fit each other or the victim.
    """
    if plain is None:
        return None
    values = {name: unpack(value) for name, value in plain.items()}
    values["n_image_passes_"] = ImagePasses(*values["n_image_passes_"])
    if values["report_"] is not None:
        values["report_"] = pd.DataFrame(values["report_"])
    record = SearchRecord(**values)
    n_classes = len(victim.classes_)
    shapes = {getattr(record, name).shape for name in _A_CLASS}
    lengths = {len(record.triggers_), len(record.reasons_), n_classes}
    if record.classes_.tolist() != victim.classes_.tolist():
        raise damaged("the search has other classes than the victim")
    if shapes != {(n_classes,)} or lengths != {n_classes}:
        raise damaged(f"the search has not one entry for each of {n_classes} classes")
    for trigger in record.triggers_:
        check_trigger(trigger, victim)
    return record


def check_trigger(trigger, victim):
    """Refuse what is no trigger, or none for the victim's images.

    Raises
    ------
    ValueError
        If it is not.
    """
    if not isinstance(trigger, Trigger):
        raise damaged(f"{printable(trigger)} is no trigger")
    trigger._check_fits(victim.image_shape_)
