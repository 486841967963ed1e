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
_N_TUNED = 5000  # images that patching on D_Defense sees, over all epochs


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
        From (contender, victim, trigger, target class, seed) to an unfitted estimator.
    trigger : {"estimated", "true", None}
        Which it gets; None needs none.
    pipeline : str or None
        The guard's classifier.
    fit_on : {"defense", "training"}
        D_Defense, or a tenth of the clean training set.
    strength : float or None
        Multiple of the estimated trigger; None for the guard's, or the paper's 1.
    options : dict
        Settings that are not the defaults.
    """

    name: str
    build: Callable
    trigger: str | None = None
    pipeline: str | None = None
    fit_on: str = "defense"
    strength: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, case):
        """Return the estimator for a victim, unfitted."""
        trigger = case.trigger if self.trigger == "true" else None
        if self.trigger == "estimated":
            trigger = case.estimate.scaled(self._strength)
        return self.build(self, case.victim, trigger, case.target, case.cell.seed)

    @property
    def _strength(self):
        """Multiple of the estimate: the paper's own takes it as it comes."""
        if self.strength is None:
            return 1.0 if self.pipeline == "paper" else STRENGTH
        return self.strength

    def describe(self):
        """Return what tells it from the others, as plain values."""
        return {
            "name": self.name,
            "trigger": self.trigger,
            "pipeline": self.pipeline,
            "fit_on": self.fit_on,
            "strength": self._strength if self.trigger == "estimated" else None,
            **self.options,
        }


def contenders(cell, table, n_per_class=100):
    """List the detectors of a table's cell.

    Parameters
    ----------
    cell : Cell
    table : {1, 2, 3, 4}
    n_per_class : int, default=100
        Images a class in D_Defense. With fewer than the paper takes, what does not
        depend on their number is left out.

    Returns
    -------
    list of Contender
    """
    n_images = n_per_class * (20 if cell.dataset == "pubfig" else 10)
    if table == 1:
        return [Contender("guard, discriminant", _guard, "estimated", "discriminant")]
    if table == 3:
        return [
            _patching(fit_on, lr, n_images)
            for fit_on in ("training", "defense")
            for lr in FINE_TUNING_RATES
        ]
    found = [
        Contender(f"guard, {pipeline}", _guard, trigger, pipeline)
        for pipeline in pipelines()
        for trigger in ("estimated", "true")
    ]
    found += [
        Contender("guard, paper, 1.2", _guard, "estimated", "paper", strength=STRENGTH),
        Contender("NC activation", _nc_activation, "estimated"),
        Contender("B3D", _b3d, "estimated"),
        Contender("STRIP, average", _strip, options={"blend": "average"}),
        Contender("STRIP, add", _strip, options={"blend": "add"}),
        Contender("SCALE-UP", _scale_up),
        Contender("SCALE-UP, 0.5", _scale_up, options={"threshold": 0.5}),
        _patching("training", 1e-2, n_images),
        _patching("defense", 1e-2, n_images),
    ]
    if cell.network == "resnet18":  # the others have no batch-norm
        found.append(Contender("IBD-PSC", _ibd_psc))
    if n_per_class < 100 and cell.dataset != "pubfig":
        found = [c for c in found if c.trigger != "true" and c.fit_on == "defense"]
    return found


def _patching(fit_on, lr, n_images):
    options = {"lr": lr, "n_epochs": 1, "batch_size": 32}  # one epoch as published
    if fit_on == "defense":  # about as many images as one epoch of the tenth
        options["n_epochs"] = max(1, round(_N_TUNED / n_images))
    name = f"NC patching, {fit_on}, {lr:g}"
    return Contender(name, _patcher, "estimated", None, fit_on, options=options)


def _guard(contender, victim, trigger, target, seed):
    classifier = pipelines()["paper"] if contender.pipeline == "paper" else None
    return BackdoorGuard(
        victim, trigger, classifier, target_class=target, random_state=seed
    )


def _nc_activation(contender, victim, trigger, target, seed):
    return NCActivationDetector(victim, trigger, target_class=target, random_state=seed)


def _b3d(contender, victim, trigger, target, seed):
    return B3DDetector(victim, trigger, target_class=target)


# the next three are judged on images sent to the target: their threshold is from those
def _strip(contender, victim, trigger, target, seed):
    return STRIPDetector(
        victim, target_class=target, random_state=seed, **contender.options
    )


def _scale_up(contender, victim, trigger, target, seed):
    return SCALEUPDetector(victim, target_class=target, **contender.options)


def _ibd_psc(contender, victim, trigger, target, seed):
    return IBDPSCDetector(victim, target_class=target)


def _patcher(contender, victim, trigger, target, seed):
    return NCPatcher(
        victim,
        trigger,
        target_class=target,
        random_state=seed,
        **contender.options,
    )
