"""The detectors that are compared, each as every benchmark makes it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sklearn.mixture import GaussianMixture
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_backdoor import (
    B3DDetector,
    BackdoorGuard,
    BackdoorTriggerClassifier,
    IBDPSCDetector,
    NCActivationDetector,
    NCPatcher,
    SCALEUPDetector,
    STRIPDetector,
)
from sklearn_backdoor.guard import default_classifier

# the paper names the mixture, not its settings; one full component held up best
PAPER_DENSITY = GaussianMixture(1, covariance_type="full", reg_covar=0.1)
STRENGTH = BackdoorGuard(None).strength
FINE_TUNING_RATES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_PATCHING = {"n_epochs": 1, "batch_size": 32}  # one epoch as published


def pipelines():
    """Return the two classifiers that are compared, by their name in the results."""
    return {
        "discriminant": default_classifier(),
        "paper": make_pipeline(
            StandardScaler(), BackdoorTriggerClassifier(PAPER_DENSITY)
        ),
    }


@dataclass(frozen=True)
class Contender:
    """A detector, and what it is given.

    Parameters
    ----------
    name : str
        In the results.
    build : callable
        From (victim, trigger, target class, seed) to an unfitted estimator.
    trigger : {"estimated", "true", None}
        Which it gets; None needs none.
    pipeline : str or None
        The guard's classifier.
    fit_on : {"defense", "training"}
        D_Defense, or a tenth of the clean training set.
    options : dict
        What else sets it apart.
    """

    name: str
    build: Callable
    trigger: str | None = None
    pipeline: str | None = None
    fit_on: str = "defense"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def strength(self):
        """Multiple of the estimate: the paper's own takes it as it comes."""
        if self.trigger != "estimated":
            return None
        return 1.0 if self.pipeline == "paper" else STRENGTH

    def make(self, case):
        """Return the estimator for a victim, unfitted."""
        trigger = case.trigger if self.trigger == "true" else None
        if self.trigger == "estimated":
            trigger = case.estimate.scaled(self.strength)
        return self.build(
            case.victim, trigger, case.target, case.cell.seed, **self.options
        )

    def describe(self):
        """Return what tells it from the others, as plain values."""
        return {
            "name": self.name,
            "trigger": self.trigger,
            "pipeline": self.pipeline,
            "fit_on": self.fit_on,
            "strength": self.strength,
            **self.options,
        }


def contenders(cell, table, *, few=False):
    """List the detectors of a table's cell.

    Parameters
    ----------
    cell : Cell
    table : {1, 2, 3, 4}
    few : bool, default=False
        Leave out what does not depend on how many images the defender has.

    Returns
    -------
    list of Contender
    """
    if table == 3:
        return [
            _patching(fit_on, lr)
            for fit_on in ("training", "defense")
            for lr in FINE_TUNING_RATES
        ]
    found = [
        Contender(
            f"guard, {pipeline}", _guard, trigger, pipeline, options={"of": pipeline}
        )
        for pipeline in pipelines()
        for trigger in ("estimated", "true")
    ]
    found += [
        Contender("NC activation", _nc_activation, "estimated"),
        Contender("B3D", _b3d, "estimated"),
        Contender("STRIP, average", _strip, options={"blend": "average"}),
        Contender("STRIP, add", _strip, options={"blend": "add"}),
        Contender("SCALE-UP", _scale_up),
        _patching("training", 1e-2),
        _patching("defense", 1e-2),
    ]
    if cell.network == "resnet18":  # the others have no batch-norm
        found.append(Contender("IBD-PSC", _ibd_psc))
    if few:
        found = [c for c in found if c.trigger != "true" and c.fit_on == "defense"]
    return found


def _patching(fit_on, lr):
    name = f"NC patching, {fit_on}, {lr:g}"
    options = {"lr": lr, **_PATCHING}
    if fit_on == "defense":
        options["n_epochs"] = 5  # about as many images as one epoch of the tenth
    return Contender(name, _patcher, "estimated", None, fit_on, options)


def _guard(victim, trigger, target, seed, of):
    classifier = pipelines()["paper"] if of == "paper" else None
    return BackdoorGuard(
        victim, trigger, classifier, target_class=target, random_state=seed
    )


def _nc_activation(victim, trigger, target, seed):
    return NCActivationDetector(victim, trigger, target_class=target, random_state=seed)


def _b3d(victim, trigger, target, seed):
    return B3DDetector(victim, trigger, target_class=target)


def _strip(victim, trigger, target, seed, blend):
    return STRIPDetector(victim, blend=blend, random_state=seed)


def _scale_up(victim, trigger, target, seed):
    return SCALEUPDetector(victim)


def _ibd_psc(victim, trigger, target, seed):
    return IBDPSCDetector(victim)


def _patcher(victim, trigger, target, seed, **options):
    return NCPatcher(victim, trigger, target_class=target, random_state=seed, **options)
