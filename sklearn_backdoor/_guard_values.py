"""Fitted steps and triggers as plain values and arrays, and back. Nothing is pickled.

A value becomes what JSON can hold; what it cannot becomes an object with one of the
tags below. Arrays of numbers are put aside under a name, for safetensors.
"""

import math
import re

import numpy as np
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from sklearn_backdoor._likelihood import LikelihoodScorer
from sklearn_backdoor._text import printable
from sklearn_backdoor.classifier import BackdoorTriggerClassifier
from sklearn_backdoor.triggers import AdditiveTrigger, PatchTrigger

_MIXTURE = (
    "n_features_in_ weights_ means_ covariances_ precisions_ precisions_cholesky_ "
    "converged_ n_iter_ lower_bound_"
)
# what each kind of step learns; `fit` is never called on the way back
STEPS = {
    Pipeline: "",
    StandardScaler: "n_features_in_ n_samples_seen_ mean_ var_ scale_",
    MinMaxScaler: (
        "n_features_in_ n_samples_seen_ scale_ min_ data_min_ data_max_ data_range_"
    ),
    PCA: (
        "n_features_in_ n_samples_ n_components_ components_ mean_ noise_variance_ "
        "explained_variance_ explained_variance_ratio_ singular_values_ _fit_svd_solver"
    ),
    LinearDiscriminantAnalysis: (
        "n_features_in_ classes_ priors_ means_ covariance_ xbar_ scalings_ coef_ "
        "intercept_ explained_variance_ratio_ _max_components _n_features_out"
    ),
    LogisticRegression: "n_features_in_ classes_ coef_ intercept_ n_iter_",
    GaussianMixture: _MIXTURE,
    BayesianGaussianMixture: (
        f"{_MIXTURE} weight_concentration_prior_ weight_concentration_ "
        "mean_precision_prior_ mean_precision_ mean_prior_ degrees_of_freedom_prior_ "
        "degrees_of_freedom_ covariance_prior_"
    ),
    BackdoorTriggerClassifier: "n_features_in_ classes_ densities_",
}
_LEFT_OUT = {"lower_bounds_", "_score"}  # history of an EM fit; made from densities
_BY_NAME = {step.__name__: step for step in STEPS}
_TRIGGERS = {kind.__name__: kind for kind in (PatchTrigger, AdditiveTrigger)}
COVERED = ", ".join(_BY_NAME)
_TAGS = {
    "float",
    "scalar",
    "labels",
    "array",
    "list",
    "tuple",
    "dict",
    "trigger",
    "step",
}
_NUMBERS = re.compile(r"[<>|=][biuf][1248]")
_STRINGS = re.compile(r"[<>]U[0-9]{1,9}")
_MOST_CHARACTERS = 2**26  # in an array of strings, which NumPy pads to the longest


def damaged(what):
    """Return the error for files that are not as they were written."""
    return ValueError(f"{what}: the file is damaged or was altered. Save it again.")


class Packer:
    """Turn values into what JSON can hold, and put arrays aside in ``arrays``."""

    def __init__(self):
        self.arrays: dict[str, np.ndarray] = {}

    def __call__(self, value, path):
        """Return the value's plain form; ``path`` names it, in messages and arrays.

        Raises
        ------
        TypeError
            If the value is none that a guard's files can hold.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, np.generic) and value.dtype.kind in "biufU":
            item = self(value.item(), path)
            return {"scalar": item, "dtype": value.dtype.str}
        if isinstance(value, np.ndarray):
            return self._pack_array(value, path)
        if kind in (list, tuple):
            items = [self(item, f"{path}/{i}") for i, item in enumerate(value)]
            return {kind.__name__: items}
        if kind is dict:
            return {"dict": self(list(value.items()), path)["list"]}
        if kind in STEPS:
            return self._pack_step(value, path)
        if kind in _TRIGGERS.values():
            arrays = {name: getattr(value, name) for name in value._fields}
            return {"trigger": kind.__name__, "fields": self._pack_all(arrays, path)}
        raise TypeError(
            f"{path.replace('/', ', ')} is a {kind.__name__}, which a guard's files "
            f"cannot hold. They hold numbers, strings, arrays, {', '.join(_TRIGGERS)} "
            f"and these steps and densities, not their subclasses: {COVERED}."
        )

    def _pack_all(self, values, path):
        return {name: self(value, f"{path}/{name}") for name, value in values.items()}

    def _pack_step(self, step, path):
        name, params = type(step).__name__, step.get_params(deep=False)
        if params.get("memory") is not None:
            raise TypeError(
                f"{name}(memory=...) names a cache, which a guard's files cannot hold: "
                "set_params(memory=None)."
            )
        learnt = {
            key: value
            for key, value in vars(step).items()
            if key not in params and key not in _LEFT_OUT
        }
        unknown = learnt.keys() - STEPS[type(step)].split()
        if unknown:
            raise TypeError(
                f"{name} has {', '.join(sorted(unknown))}, which this version of "
                "sklearn_backdoor cannot save. Fit plain arrays, without set_output."
            )
        return {
            "step": name,
            "params": self._pack_all(params, f"{path}/{name}"),
            "learnt": self._pack_all(learnt, f"{path}/{name}"),
        }

    def _pack_array(self, array, path):
        if array.dtype.kind in "UO":
            return self.labels(array, path)
        if not _NUMBERS.fullmatch(array.dtype.str):
            raise TypeError(
                f"{path.replace('/', ', ')} has dtype {array.dtype}, which a guard's "
                "files cannot hold. Use float64, integers or strings."
            )
        # the layout is kept, since it decides how products are rounded
        flip = tuple(axis for axis, step in enumerate(array.strides) if step < 0)
        array = np.flip(array, flip).copy(order="K")
        fortran = array.ndim > 1 and not array.flags.c_contiguous
        self.arrays[path] = np.array(array.T if fortran else array, order="C")
        return {"array": path, "order": "F" if fortran else "C", "flip": list(flip)}

    def labels(self, array, path):
        """Return labels, or other short arrays, such that they can be read."""
        values = [self(value, path) for value in np.asarray(array).tolist()]
        if any(type(value) not in (bool, int, float, str) for value in values):
            raise TypeError(
                f"{path.replace('/', ', ')} holds {values[0]!r}, which a guard's files "
                "cannot hold. Use labels that are numbers or strings."
            )
        return {"labels": values, "dtype": array.dtype.str}


class Unpacker:
    """The way back: from `Packer`'s plain form to values, every type checked.

    Parameters
    ----------
    arrays : dict from str to ndarray
        What the packer put aside.
    """

    def __init__(self, arrays):
        self.arrays = arrays

    def __call__(self, plain):
        """Return the value.

        Raises
        ------
        ValueError
            If the form is none that `Packer` makes.
        """
        if plain is None or isinstance(plain, bool | int | float | str):
            return plain
        if isinstance(plain, dict):
            for tag in _TAGS & plain.keys():
                return getattr(self, f"_{tag}")(plain)
        raise damaged(f"{printable(plain)} is no saved value")

    def _float(self, plain):
        value = take(plain, "float", str)
        if value not in ("nan", "inf", "-inf"):
            raise damaged(f"{printable(value)} is no number")
        return float(value)

    def _scalar(self, plain):
        return self._of_dtype([self(plain["scalar"])], plain)[0]

    def _labels(self, plain):
        return self._of_dtype([self(one) for one in take(plain, "labels", list)], plain)

    def _of_dtype(self, values, plain):
        """Return values as an array of the dtype that they had."""
        dtype = take(plain, "dtype", str)
        kinds = {"U": (str,), "b": (bool,), "f": (float,), "O": (bool, int, float, str)}
        allowed = kinds.get(dtype.strip("<>|=")[:1], (int,))
        if any(type(value) not in allowed for value in values):
            raise damaged(f"{printable(values)} do not have dtype {printable(dtype)}")
        if _STRINGS.fullmatch(dtype):
            if int(dtype[2:]) * len(values) > _MOST_CHARACTERS:
                raise damaged(f"{len(values)} labels of dtype {dtype}")
        elif not (_NUMBERS.fullmatch(dtype) or dtype == "|O"):
            raise damaged(f"dtype {printable(dtype)} is none of a label's")
        try:
            return np.array(values, dtype=dtype)
        except OverflowError as error:
            raise damaged(f"{printable(values)} ({error})") from None

    def _array(self, plain):
        name = take(plain, "array", str)
        if name not in self.arrays:
            raise damaged(f"the array {printable(name, 100)} does not exist")
        array = np.array(self.arrays[name])  # a copy: two steps may not share one
        array = array.T if take(plain, "order", str) == "F" else array
        return np.flip(array, tuple(take(plain, "flip", list)))

    def _list(self, plain):
        return [self(item) for item in take(plain, "list", list)]

    def _tuple(self, plain):
        return tuple(self(item) for item in take(plain, "tuple", list))

    def _dict(self, plain):
        return dict(self(item) for item in take(plain, "dict", list))

    def _trigger(self, plain):
        kind = _TRIGGERS.get(take(plain, "trigger", str))
        fields = self._all(take(plain, "fields", dict))
        if kind is None or fields.keys() != set(kind._fields):
            raise damaged(f"{printable(plain)} is no trigger")
        return kind(**fields)

    def _step(self, plain):
        name = take(plain, "step", str)
        kind = _BY_NAME.get(name)
        if kind is None:
            raise damaged(f"{printable(name)} is none of {COVERED}")
        params = self._all(take(plain, "params", dict))
        learnt = self._all(take(plain, "learnt", dict))
        unknown = params.keys() - kind._get_param_names()
        unknown |= learnt.keys() - STEPS[kind].split()
        if unknown or params.get("memory") is not None:
            raise ValueError(
                f"the saved {name} has {printable(sorted(unknown) or 'memory', 200)}, "
                "which this version of scikit-learn does not know, or no guard has. "
                "Load it under the versions that guard.json names, or fit again."
            )
        step = kind(**params)
        for key, value in learnt.items():
            setattr(step, key, value)
        if kind is BackdoorTriggerClassifier and learnt:
            step._score = LikelihoodScorer(step.densities_)
        return step

    def _all(self, plain):
        return {name: self(value) for name, value in plain.items()}


def take(mapping, name, *kinds):
    """Return ``mapping[name]`` if its type is one of ``kinds``.

    Raises
    ------
    ValueError
        If it is missing, or of another type.
    """
    if name not in mapping or type(mapping[name]) not in kinds:
        raise damaged(
            f"{name} is missing, or no {' or '.join(kind.__name__ for kind in kinds)}"
        )
    return mapping[name]
