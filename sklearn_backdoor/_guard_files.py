"""Saving a fitted guard, and loading it, without a pickle."""

import math
import platform

import numpy as np
import scipy
import sklearn
import torch
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

import sklearn_backdoor
from sklearn_backdoor._guard_disk import MANIFEST, read_files, write_files
from sklearn_backdoor._guard_parts import (
    VERDICTS,
    check_trigger,
    describe_victim,
    open_victim,
    pack_record,
    unpack_record,
)
from sklearn_backdoor._guard_values import Packer, Unpacker, damaged, take
from sklearn_backdoor._text import printable
from sklearn_backdoor.victim import VictimNetwork

_SETTINGS = ("target_class", "strength", "random_state", "classifier")


class GuardFilesMixin:
    """Give a guard ``save`` and ``load``."""

    def save(self, directory, provenance=None):
        """Write the fitted guard to two files, ``guard.json`` and ``.safetensors``.

        Parameters
        ----------
        directory : path-like
            New, empty, or with a guard, which is replaced.
        provenance : dict from str to str, number or None, default=None
            Written along, and read back as ``provenance_``: where the weights are from,
            say. None keeps what a loaded guard has.

        Raises
        ------
        FileExistsError
            If the directory holds something else; it is left as it is.
        OSError
            If the files cannot be written; nothing half-written is left.
        TypeError
            If a step, density, trigger or label cannot be saved. Covered are
            ``Pipeline``, ``StandardScaler``, ``MinMaxScaler``, ``PCA``,
            ``LinearDiscriminantAnalysis``, ``LogisticRegression``,
            ``GaussianMixture``, ``BayesianGaussianMixture`` and
            `BackdoorTriggerClassifier`, but no subclasses of them.
        ValueError
            If the guard is larger than what `load` takes.

        Notes
        -----
        - Neither weights nor images are written. The triggers that the search found for
          every class are, with its figures.
        - The digests (SHA-256 of the victim's weights, of the arrays, and of the
          manifest itself) detect damage and mix-ups. They are no signature: who can
          write to the directory can write another guard.
        - All that a step has learnt is kept, but the history of an EM fit
          (``lower_bounds_``).
        """
        check_is_fitted(self)
        packer = Packer()
        content = _describe(self, packer)
        if provenance is not None:
            content["provenance"] = _check_provenance(provenance)
        write_files(directory, content, packer.arrays)

    @classmethod
    def load(cls, directory, victim):
        """Read a guard that `save` wrote. Nothing is unpickled, nothing is fitted.

        Parameters
        ----------
        directory : path-like
            What was given to `save`.
        victim : VictimNetwork
            Around the network that the guard was fitted on; fitted or not. ``classes``
            and ``feature_layer`` that are None are taken from the guard.

        Returns
        -------
        BackdoorGuard
            Fitted. Its answers are those of the guard that was saved, to the last bit,
            on the same machine, with the same versions and batch size. ``engineer_`` is
            a `sklearn_backdoor.reverse.SearchRecord`, or None where a trigger was
            given; so is the parameter ``trigger``, or the trigger. ``provenance_`` is
            what was given to `save`.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        TypeError
            If ``victim`` is no VictimNetwork.
        ValueError
            If a file was altered, truncated or written by another version, or if the
            victim is another one.
        """
        if not isinstance(victim, VictimNetwork):
            raise TypeError(
                f"victim has type {type(victim).__name__}, expected a VictimNetwork. "
                "Wrap your network: VictimNetwork(network)."
            )
        content, arrays = read_files(directory)
        unpack = Unpacker(arrays)
        opened = open_victim(victim, take(content, "victim", dict), unpack)
        try:
            return _restore(cls, opened, content, unpack)
        except Exception as error:  # whatever parts that do not fit make NumPy raise
            raise ValueError(
                f"{MANIFEST} in {directory} describes no guard that works: "
                f"{printable(error, 400)}"
            ) from error


def _describe(guard, packer):
    """Return the manifest of a fitted guard; arrays go to the packer."""
    settings = {name: packer(getattr(guard, name), name) for name in _SETTINGS}
    return {
        "versions": _versions(),
        "victim": describe_victim(guard.victim_),
        "guard": {
            "verdict": guard.verdict_,
            "n_images": int(guard.n_images_),
            "target_classes": packer.labels(guard.target_classes_, "target_classes"),
            "triggers": packer(list(guard.triggers_.values()), "triggers"),
            "classifiers": packer(list(guard.classifiers_.values()), "classifiers"),
            "search": pack_record(guard.engineer_, packer),
            "settings": settings,
        },
        "provenance": getattr(guard, "provenance_", {}),
    }


def _restore(cls, victim, content, unpack):
    """Return a guard from its manifest."""
    fields = take(content, "guard", dict)
    settings = take(fields, "settings", dict)
    guard = cls(clone(victim), **{name: unpack(settings[name]) for name in _SETTINGS})
    guard.victim_ = victim
    guard.classes_ = victim.classes_
    guard.n_images_ = take(fields, "n_images", int)
    guard.verdict_ = take(fields, "verdict", str)
    guard.engineer_ = unpack_record(fields["search"], victim, unpack)
    targets = unpack(take(fields, "target_classes", dict))
    guard.target_classes_ = targets.astype(victim.classes_.dtype)
    guard.target_class_ = guard.target_classes_[0] if len(targets) else None
    for name in ("triggers", "classifiers"):
        values = unpack(take(fields, name, dict))
        setattr(guard, f"{name}_", dict(zip(targets.tolist(), values, strict=True)))
    guard.trigger = guard.engineer_ or guard.triggers_[guard.target_class]
    guard.provenance_ = _check_provenance(take(content, "provenance", dict))
    _check_parts(guard)
    return guard


def _check_parts(guard):
    """Let the guard judge random features, so that its parts fit each other."""
    if guard.verdict_ not in VERDICTS:
        raise damaged(f"the verdict {printable(guard.verdict_)}")
    if not np.isin(guard.target_classes_, guard.classes_).all():
        raise damaged("target classes that the victim does not have")
    n_features = guard.victim_._n_features_out
    Z = np.random.default_rng(0).standard_normal((2, n_features))
    for target, classifier in guard.classifiers_.items():
        check_trigger(guard.triggers_[target], guard.victim_)
        if classifier.classes_.tolist() != np.sort(guard.classes_).tolist():
            raise damaged(f"the classes of the classifier of {target}")
        labels = np.full(2, target, dtype=guard.classes_.dtype)
        if not np.isfinite(guard._trigger_score(labels, Z)).all():
            raise damaged(f"the classifier of {target}")


def _check_provenance(provenance):
    plain = isinstance(provenance, dict) and all(
        type(name) is str
        and (value is None or type(value) in (bool, int, str) or _is_finite(value))
        for name, value in provenance.items()
    )
    if not plain:
        raise TypeError(
            f"provenance={provenance!r}, expected a dict whose keys are strings, and "
            "whose values are strings or finite numbers."
        )
    return dict(provenance)


def _is_finite(value):
    return type(value) is float and math.isfinite(value)


def _versions():
    return {
        "sklearn_backdoor": sklearn_backdoor.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "torch": torch.__version__,
    }
