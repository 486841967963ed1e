"""Several searches at once, their verdicts on one scale."""

import os

import numpy as np
import pandas as pd
from sklearn.base import clone

from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._additive import AdditiveReverseEngineer
from sklearn_backdoor.reverse._anomaly import bonferroni_factors, rank_by_p
from sklearn_backdoor.reverse._base import BaseReverseEngineer
from sklearn_backdoor.reverse._batch_norm import (
    BatchNormReverseEngineer,
    can_be_compared,
)
from sklearn_backdoor.reverse._fast import ALONE, MUCH_SMALLER
from sklearn_backdoor.reverse._neural_cleanse import NCReverseEngineer
from sklearn_backdoor.reverse._neurons import NeuronReverseEngineer, hidden_layers
from sklearn_backdoor.reverse._run import Run
from sklearn_backdoor.reverse._search import ImagePasses
from sklearn_backdoor.reverse._traces import TraceReverseEngineer
from sklearn_backdoor.reverse._unused import weight_layers
from sklearn_backdoor.reverse._weights import WeightReverseEngineer

_PAIRS, _LEARNT = "patch, pairs", "patch, learnt sources"
_NEURONS, _FINE = "neurons, pairs", "additive, high frequencies"
_STATISTICS, _WEIGHTS = "batch-norm", "weights"
_IMAGES = (NCReverseEngineer, AdditiveReverseEngineer)
_NOT_BY_SIZE = (NeuronReverseEngineer, TraceReverseEngineer)
_N_PAIRED = 16  # with more classes there are too many pairs
_MUCH_WEAKER = 0.1  # of the success rate: a trigger that misses more is passed over


class AutoReverseEngineer(BaseReverseEngineer):
    """Find target classes and triggers without knowing the trigger's type.

    Runs searches for patches, for all source classes and for pairs, for additive
    perturbations, and for shifts of the network's channels; asks the statistics of
    batch-norm, or where there are none the weights, for traces of the triggers found;
    and compares their p-values, corrected for the number of searches.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    engineers : list of (str, reverse engineer), default=None
        Searches to run; cloned. None takes four: "patch" and "patch, pairs" by
        `NCReverseEngineer`, "additive" by `AdditiveReverseEngineer`, and "neurons,
        pairs" by `NeuronReverseEngineer`, all at their fast schedule. With more than 16
        classes there are too many pairs, and "patch, learnt sources" and "additive,
        high frequencies" stand for them; the latter also where the network has no
        hidden layer. With three layers of batch-norm or more, "batch-norm" by
        `BatchNormReverseEngineer` is the fifth, else with up to 16 classes "weights" by
        `WeightReverseEngineer`: they take the patches and perturbations of those before
        them.
    alpha : float in 0...1, default=0.05
        Classes with a corrected p-value below are flagged.
    n_jobs : int, default=None
        Groups of classes that are searched at once, through joblib.
    random_state : int, RandomState instance or None, default=0
        Of the default searches.
    verbose : bool, default=False
        Show a progress bar with class, success rate and norm.
    checkpoint_dir : path-like, default=None
        Where the searches are kept while they run, a folder each.

    Attributes
    ----------
    report_ : pandas.DataFrame
        A row a search and class: ``method``, ``class``, ``norm``, ``success_rate``,
        ``converged``, ``reason``, ``anomaly_index``, ``p_value``, ``p_corrected``,
        ``flagged``.
    engineers_ : dict from str to reverse engineer
        Fitted.
    methods_ : list of str
        For each class, the search that its entry in the arrays below is from.
    classes_, triggers_, norms_, success_rates_, converged_, reasons_, anomaly_indices_
        As in `NCReverseEngineer`: norms are L1 or L2, as the search has it.
    single_sources_ : dict from label to label
        As in `NCReverseEngineer`, of the searches whose triggers were kept.
    p_values_ : ndarray of shape (n_classes,)
        Corrected: the smallest of a class, each times what `report_` shows.
    target_classes_, target_class_, trigger_, verdict_, n_image_passes_
        As in `NCReverseEngineer`. With a search inconclusive and nothing flagged by the
        others, the verdict is inconclusive.

    Notes
    -----
    - Of a flagged class the trigger is kept that has the smallest p-value, among those
      for all source classes if one of these was flagged: a trigger for a few sources
      would leave the others undefended; and among those whose success rate is not below
      another's by more than 0.1. In pairs, triggers are for all unless one
      source needs less than 0.4 of the median of the target's others. Where one source
      class alone needs a far smaller trigger, see ``single_sources_``, that trigger
      goes before, if it is smaller by as much than every flagged one of its kind for
      all; one found in pairs only where no trigger for all source classes was flagged.
      Where a search flags a class by the size of its trigger, that goes before those of
      neurons, whose evidence is no image, and of traces, which are of any kind.
    - The correction is Bonferroni's with weights; it holds however the searches depend
      on each other. Sizes of triggers and traces in the network are two kinds of
      evidence, and get half of ``alpha`` each: of five searches, p-values of the one
      for traces are doubled, those of the other four taken eight times.
    """

    def __init__(
        self,
        victim,
        *,
        engineers=None,
        alpha=0.05,
        n_jobs=None,
        random_state=0,
        verbose=False,
        checkpoint_dir=None,
    ):
        self.victim = victim
        self.engineers = engineers
        self.alpha = alpha
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir

    def fit(self, X, y):
        """Run all searches and reach a verdict.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_channels, height, width)
            D_Defense: clean images, ``uint8`` in 0...255 or floating point in 0...1.
        y : array-like of shape (n_samples,)
            Their labels; every class of the victim, two images each at least.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            As in `NCReverseEngineer`.
        """
        self._check_running()
        self._check_params()
        engineers = self._open_engineers()
        for engineer in engineers.values():
            engineer._check_params()
        first = next(iter(engineers.values()))
        prepared = {_key(first): first._prepare(X, y)}
        passes = ImagePasses(0, 0)
        if self.engineers is None:
            ready = prepared[_key(first)]
            victim, one = ready.victim, ready.X[:1]
            many = len(victim.classes_) > _N_PAIRED
            of_pairs = not many and len(hidden_layers(victim, one)) > 0
            compared = can_be_compared(victim, one)
            passes += ImagePasses(1 if many else 2, 0)
            del engineers[_PAIRS if many else _LEARNT]
            del engineers[_FINE if of_pairs else _NEURONS]
            if not compared:
                del engineers[_STATISTICS]
            if many or compared or not weight_layers(victim, ready.X):
                del engineers[_WEIGHTS]
            passes += ImagePasses(0 if many or compared else 2, 0)
        found: list = []  # searches whose triggers may have left traces
        factors = bonferroni_factors(map(_is_of_traces, engineers.values()))
        for factor, engineer in zip(factors, engineers.values(), strict=True):
            key = _key(engineer)
            ready = prepared.get(key) or engineer._prepare(X, y)
            prepared[key] = ready._replace(passes=ImagePasses(0, 0))
            run = Run(engineer, ready)
            if _is_of_traces(engineer) and found:
                results = engineer._ask(run, found)
            else:
                results = engineer._search(run)
            engineer._conclude(run, results)
            if isinstance(engineer, _IMAGES):
                found.append((engineer, run, results))
            corrected = np.minimum(1, engineer.p_values_ * factor)
            engineer._set_verdict(rank_by_p(corrected, self.alpha))
            engineer._finish(run, results)
            engineer.n_image_passes_ = run.passes
            passes += run.passes
        self.engineers_ = engineers
        self.n_image_passes_ = passes
        self._combine()
        return self

    def _check_params(self):
        check_number(self.alpha, "alpha", 0, 1)

    def _open_engineers(self):
        if self.engineers is None:
            made = default_engineers(self.victim)
            made = [
                (name, engineer.set_params(random_state=self.random_state))
                for name, engineer in made
            ]
        else:
            made = [(name, clone(engineer)) for name, engineer in self._pairs()]
        opened = dict(made)
        if not made or len(opened) < len(made):
            raise ValueError(
                f"engineers has the names {[name for name, _ in made]}, expected at "
                "least one, all different."
            )
        for name, engineer in made:
            engineer.set_params(n_jobs=self.n_jobs, verbose=self.verbose)
            if self.checkpoint_dir is not None:
                number = list(opened).index(name)
                letters = "".join(c if c.isalnum() else "-" for c in name)
                part = f"{number}-{letters}"
                folder = os.path.join(os.fspath(self.checkpoint_dir), part)
                engineer.set_params(checkpoint_dir=folder)
        return opened

    def _pairs(self):
        try:
            pairs = [(name, engineer) for name, engineer in self.engineers]
        except (TypeError, ValueError):
            raise TypeError(
                f"engineers={self.engineers!r}, expected a list of pairs (name, "
                "reverse engineer)."
            ) from None
        for name, engineer in pairs:
            if (
                not isinstance(name, str)
                or not isinstance(engineer, BaseReverseEngineer)
                or isinstance(engineer, AutoReverseEngineer)
            ):
                raise TypeError(
                    f"engineers holds a {type(engineer).__name__} as {name!r}, "
                    "expected names of reverse engineers such as "
                    "NCReverseEngineer(victim)."
                )
        return pairs

    def _combine(self):
        engineers = list(self.engineers_.values())
        names = list(self.engineers_)
        first = engineers[0]
        self.classes_, self.victim_ = first.classes_, first.victim_
        self.image_shape_ = first.image_shape_
        factors = bonferroni_factors(map(_is_of_traces, engineers))[:, None]
        raw = np.array([engineer.p_values_ for engineer in engineers])
        p = np.minimum(1, raw * factors)
        filled = np.nan_to_num(p, nan=1.0)
        flagged = filled < self.alpha
        for_all = np.array([_is_for_all(engineer) for engineer in engineers])
        for_one = np.array([self._is_for_one(engineer) for engineer in engineers])
        of_pairs = [_sources(engineer) == "pairs" for engineer in engineers]
        for_one[of_pairs] &= ~(flagged & for_all).any(axis=0)
        for number, target in np.argwhere(for_one):
            rivals = [
                engineers[k].triggers_[target]
                for k in np.flatnonzero((flagged & for_all)[:, target])
            ]
            narrow = engineers[number].triggers_[target]
            for_one[number, target] = all(_is_far_smaller(narrow, r) for r in rivals)
        preferred = flagged & np.where(for_one.any(axis=0), for_one, for_all)
        of_images = np.array(
            [not isinstance(engineer, _NOT_BY_SIZE) for engineer in engineers]
        )
        seen = preferred & of_images[:, None]
        preferred = np.where(seen.any(axis=0), seen, preferred)
        success = np.array([engineer.success_rates_ for engineer in engineers])
        best = np.where(preferred, success, 0).max(axis=0)
        preferred &= success >= best - _MUCH_WEAKER
        converged = np.array([engineer.converged_ for engineer in engineers])
        # in this order: preferred, converged, the smallest p-value
        ranked = np.nan_to_num(raw, nan=1.0) * factors / factors.max()
        ranked += 2.0 * ~converged + 4.0 * (preferred.any(axis=0) & ~preferred)
        chosen = ranked.argmin(axis=0)
        self.methods_ = [names[number] for number in chosen]
        self.single_sources_ = {
            label: engineers[k].single_sources_[label]
            for label, k, narrow in zip(
                self.classes_.tolist(), chosen, for_one.T, strict=True
            )
            if narrow[k]
        }
        for name in ("triggers_", "reasons_"):
            parts = [getattr(engineer, name) for engineer in engineers]
            setattr(self, name, [parts[k][t] for t, k in enumerate(chosen)])
        for name in ("norms_", "success_rates_", "converged_", "anomaly_indices_"):
            stacked = np.array([getattr(engineer, name) for engineer in engineers])
            setattr(self, name, stacked[chosen, np.arange(len(chosen))])
        self.p_values_ = np.where(np.isnan(p).all(axis=0), np.nan, filled.min(axis=0))
        self._set_verdict(rank_by_p(self.p_values_, self.alpha))
        inconclusive = [one.verdict_ == "inconclusive" for one in engineers]
        if not len(self.target_classes_) and any(inconclusive):
            self.verdict_ = "inconclusive"
        self.report_ = self._tabulate(p, flagged)

    def _is_for_one(self, engineer):
        """Tell for each class whether its trigger was narrowed to one source."""
        sources = getattr(engineer, "single_sources_", {})
        return [label in sources for label in self.classes_.tolist()]

    def _tabulate(self, p, flagged):
        tables = []
        for number, (name, engineer) in enumerate(self.engineers_.items()):
            tables.append(
                pd.DataFrame(
                    {
                        "method": name,
                        "class": self.classes_,
                        "norm": engineer.norms_,
                        "success_rate": engineer.success_rates_,
                        "converged": engineer.converged_,
                        "reason": engineer.reasons_,
                        "anomaly_index": engineer.anomaly_indices_,
                        "p_value": engineer.p_values_,
                        "p_corrected": p[number],
                        "flagged": flagged[number],
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def _open_search(self, problem, tasks, generators, stage, **options):
        raise NotImplementedError("the searches are those of the engineers")

    def _flag(self):
        raise NotImplementedError("the searches are those of the engineers")


def _is_of_traces(engineer):
    return isinstance(engineer, TraceReverseEngineer)


def _is_for_all(engineer):
    """Tell for each class whether its trigger is meant for all source classes.

    Of pairs it is where it was refined for all.
    """
    sources = _sources(engineer)
    if sources != "pairs":
        return np.full(len(engineer.classes_), sources == "all")
    return engineer.source_weights_.max(axis=1) < ALONE


def _sources(engineer):
    """Return what kind of sources a search's triggers are for."""
    if _is_of_traces(engineer):
        return "pairs"  # for one or for all, as they were found
    return getattr(engineer, "sources", "all")


def _is_far_smaller(narrow, wide):
    """Tell whether one source alone needs far less of the same kind of trigger."""
    if type(narrow) is not type(wide):
        return True  # norms of different kinds: no evidence against
    return _norm(narrow) < MUCH_SMALLER * _norm(wide)


def _norm(trigger):
    return trigger.mask_norm if hasattr(trigger, "mask") else trigger.l2_norm


def _key(engineer):
    """Return what engineers have in common that share what was prepared."""
    return engineer._shares(), id(getattr(engineer.victim, "net", engineer))


def default_engineers(victim):
    """Make the searches that `AutoReverseEngineer` runs unless told otherwise.

    Parameters
    ----------
    victim : VictimNetwork

    Returns
    -------
    list of (str, reverse engineer)
        Unfitted; a place to start from. Of "patch, pairs" and "patch, learnt sources",
        and of "neurons, pairs" and "additive, high frequencies", only the first is run
        with up to 16 classes, only the second with more; "batch-norm" where the network
        has three layers of it or more, else with up to 16 classes "weights".
    """
    return [
        ("patch", NCReverseEngineer(victim)),
        (_LEARNT, NCReverseEngineer(victim, sources="learnt")),
        (_PAIRS, NCReverseEngineer(victim, sources="pairs", batch_size=16)),
        ("additive", AdditiveReverseEngineer(victim, sources="all")),
        (_FINE, AdditiveReverseEngineer(victim, sources="all", min_frequency=0.75)),
        (_NEURONS, NeuronReverseEngineer(victim)),
        (_STATISTICS, BatchNormReverseEngineer(victim)),
        (_WEIGHTS, WeightReverseEngineer(victim)),
    ]
