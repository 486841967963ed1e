"""The fast schedule: screen, search at equal budget, judge, refine what is flagged."""

from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._anomaly import (
    PATCH_COLUMN_SD,
    PATCH_FEW_SD,
    PATCH_PAIR_SD,
    PATCH_POWER,
    PATCH_SD,
    p_values,
    p_values_of_pairs,
    pair_p_values,
)
from sklearn_backdoor.reverse._base import BaseReverseEngineer
from sklearn_backdoor.reverse._search import ImagePasses, Task

SOURCES = ("all", "learnt", "pairs")
_STEPS, _SCREEN_STEPS = 60, 20
_RATE = 0.75  # below the ASR of weak attacks
_OVERWHELMING = 0.001  # p-value at which a search need not go further
_N_CONTENDERS = _N_REFERENCE = 16
_FACTOR = 3  # the best third is screened further
REFINE_BATCH = 32  # images a mini-batch, at least
_WORTH = 4.0  # of a success while refining, in what it costs the other classes
_N_REFINED = 3  # more targets than that are flagged, but not refined
_STANDS_OUT = 0.2  # of the easiest source's success above the other sources' median
MUCH_SMALLER = 0.4  # of the norm that all sources need
ALONE = 0.9  # of the learnt weights: the search was for one source already


class FastReverseEngineer(BaseReverseEngineer):
    """Search all classes at the same small budget, refine only those flagged.

    With more classes than 32, a screening chooses 16 contenders by successive halving
    (of each round the best third goes on, as in scikit-learn's HalvingGridSearchCV);
    they are compared with a random sample of 16 classes, at the same budget.

    A subclass names its kind of `StackedSearch` in ``_kind``.
    """

    pair_norms_: Any
    pair_converged_: Any
    pair_margins_: Any
    _kind: type
    _pair_null = {
        "pair_sd": PATCH_PAIR_SD,
        "column_sd": PATCH_COLUMN_SD,
        "power": PATCH_POWER,
    }

    def _check_params(self):
        if self.sources not in SOURCES:
            raise ValueError(
                f"sources={self.sources!r}, expected one of {', '.join(SOURCES)}."
            )
        if self.success_rate is not None:
            check_number(self.success_rate, "success_rate", 0, 1)
        check_number(self._steps(), "max_steps", 1, integer=True)
        check_number(self.batch_size, "batch_size", 1, integer=True)

    def _steps(self):
        return _STEPS if self.max_steps is None else self.max_steps

    @property
    def _rate(self):
        """Success at which norms are compared."""
        return _RATE

    @property
    def _prior_sd(self):
        return PATCH_SD if self.sources == "all" else PATCH_FEW_SD

    def _open_search(self, problem, tasks, generators, stage, **options):
        steps, batch_size = self._steps(), self.batch_size
        if stage.startswith("screen"):
            steps = min(_SCREEN_STEPS, steps)
        if stage == "refine":
            batch_size = max(REFINE_BATCH, batch_size)
        rate = self._rate if self.success_rate is None else self.success_rate
        return self._kind(
            problem,
            tasks,
            generators,
            steps=steps,
            batch_size=batch_size,
            learn_sources=self.sources == "learnt",
            success_rate=rate,
            **options,
        )

    def _search(self, run):
        n_classes = len(run.victim.classes_)
        if self.sources == "pairs":
            return self._search_pairs(run, n_classes)
        tasks = [Task(target) for target in range(n_classes)]
        if n_classes <= _N_CONTENDERS + _N_REFERENCE:
            return self._search_until_clear(run, tasks)
        results = run(self._grouped(tasks), "screen1")
        best = self._halve(run, results)
        random_state = check_random_state(run.seeds[0])
        reference = random_state.choice(n_classes, _N_REFERENCE, replace=False)
        chosen = [tasks[number] for number in np.union1d(best, reference)]
        starts = {task: results[task.target] for task in chosen}
        results = [
            result._replace(
                converged=False, judged=False, reason="not among the smallest at first"
            )
            for result in results
        ]
        found = self._search_until_clear(
            run, chosen, starts=starts, reference=reference
        )
        for task, result in zip(chosen, found, strict=True):
            results[task.target] = result
        return results

    def _search_until_clear(self, run, tasks, *, starts=None, reference=None):
        """Search for all steps; go on for as many unless a norm stands out at once.

        The second look takes no correction, since the first asks for so much more
        (Haybittle and Peto's rule).
        """

        def search(stage, starts):
            return [
                result._replace(reference=reference is None or task.target in reference)
                for task, result in zip(
                    tasks, run(self._grouped(tasks), stage, starts=starts), strict=True
                )
            ]

        found = search("search", starts)
        if self.max_steps is not None or self.sources != "all":
            return found
        p = self._compare(found, n_candidates=len(run.victim.classes_))
        if (np.nan_to_num(p, nan=1.0) < _OVERWHELMING).any():
            return found
        further = search("further", dict(zip(tasks, found, strict=True)))
        return [
            min(pair, key=lambda result: (not result.converged, result.norm))
            for pair in zip(found, further, strict=True)
        ]

    def _halve(self, run, results):
        """Search the best third further until few are left; return their numbers."""
        found, level = dict(enumerate(results)), 2
        while True:
            n_kept = max(_N_CONTENDERS, len(found) // _FACTOR)
            kept = sorted(sorted(found, key=lambda number: found[number].norm)[:n_kept])
            if n_kept == _N_CONTENDERS:
                return kept
            starts = {Task(number): found[number] for number in kept}
            further = run(self._grouped(list(starts)), f"screen{level}", starts=starts)
            found = dict(zip(kept, further, strict=True))
            level += 1

    def _search_pairs(self, run, n_classes):
        """Search every pair; return each target's result from its oddest source."""
        groups = [
            [Task(target, source) for source in range(n_classes) if source != target]
            for target in range(n_classes)
        ]
        results = iter(run(groups))
        self.pair_norms_ = np.full((n_classes, n_classes), np.nan)
        self.pair_converged_ = np.zeros((n_classes, n_classes), dtype=bool)
        found: dict = {}
        for task in sum(groups, []):
            result = next(results)
            weights = np.eye(n_classes)[task.source]
            found[task] = result._replace(source_weights=weights)
            self.pair_norms_[task.source, task.target] = result.norm
            self.pair_converged_[task.source, task.target] = result.converged
        self.pair_margins_ = _margins(run, n_classes)
        p = np.nan_to_num(self._judge_pairs()[0], nan=1.0)
        best = [
            min(
                group,
                key=lambda task: (
                    not found[task].converged,
                    p[task.source, task.target],
                    found[task].norm,
                ),
            )
            for group in groups
        ]
        return [found[task] for task in best]

    def _judge_pairs(self):
        """Return p-values of pairs, and of targets as such."""
        if self._null == "gamma":  # the published statistic knows pairs only
            off = ~np.eye(len(self.pair_norms_), dtype=bool)
            p = np.ones(off.shape)
            norms, converged = self.pair_norms_[off], self.pair_converged_[off]
            p[off] = p_values(norms, converged, null=self._null)
            return p, np.full(len(p), np.nan)
        return pair_p_values(
            self.pair_norms_,
            self.pair_converged_,
            margins=self.pair_margins_,
            **self._pair_null,
        )

    def _conclude(self, run, results):
        if self.sources != "pairs":
            self.pair_norms_ = self.pair_converged_ = self.pair_margins_ = None
        self.single_sources_: dict = {}
        weights = [result.source_weights for result in results]
        self.source_weights_: Any = None if weights[0] is None else np.stack(weights)
        super()._conclude(run, results)

    def _p_values(self, results, judged):
        if self.sources != "pairs":
            return super()._p_values(results, judged)
        return p_values_of_pairs(*self._judge_pairs())

    def _finish(self, run, results):
        """Refine the triggers of flagged classes: the strongest worth their norm."""
        flagged = [
            int(np.flatnonzero(self.classes_ == target)[0])
            for target in self.target_classes_[:_N_REFINED]
        ]
        if not flagged:
            return
        unflagged = ~np.isin(self.classes_, self.target_classes_)
        others = np.flatnonzero(self.converged_ & unflagged)
        if not len(others):
            return  # there is no price to go by
        rate = np.median(self.success_rates_[others])
        norm = max(np.median(self._trigger_norms(others)), 1e-12)
        price = float(rate / norm / _WORTH)
        tasks = [Task(number, self._only_source(number)) for number in flagged]
        refined = run(
            self._grouped(tasks),
            "refine",
            starts=dict(zip(tasks, [results[n] for n in flagged], strict=True)),
            price=price,
        )
        labels = self.classes_.tolist()
        for task, result in zip(tasks, refined, strict=True):
            number, source = task
            if source is not None:
                self.single_sources_[labels[number]] = labels[source]
            if not result.converged:
                continue  # what the search found is better
            self.triggers_[number] = result.trigger
            self.success_rates_[number] = result.success_rate
            if self.sources == "pairs" and source is None:
                sources = np.arange(len(labels)) != number
                self.source_weights_[number] = sources / sources.sum()
        if self.sources == "learnt":
            wide = {
                number: result if result.converged else results[number]
                for number, result in zip(flagged, refined, strict=True)
            }
            self._narrow(run, results, wide, price)
        self.trigger_ = self.triggers_[flagged[0]]

    def _trigger_norms(self, numbers):
        """Return the norms of some classes' triggers."""
        return self.norms_[numbers]

    def _only_source(self, target):
        """Return the one source class that a flagged target's trigger is for, or None.

        Of pairs that is where it is far smaller than most of the target's others.
        """
        if self.sources != "pairs":
            return None
        source = int(self.source_weights_[target].argmax())
        norms = np.delete(self.pair_norms_[:, target], target)
        is_alone = self.pair_norms_[source, target] < MUCH_SMALLER * np.median(norms)
        return source if is_alone else None

    def _narrow(self, run, results, wide, price):
        """Take a trigger for one source class where it is far smaller than for all.

        ``wide`` are the results for the sources learnt, by target.
        """
        starts = {}
        for target in wide:
            rates = _source_rates(run, target, results[target].trigger)
            source = int(np.nanargmax(rates))
            others = np.delete(rates, [source, target])
            if len(others) and rates[source] - np.median(others) > _STANDS_OUT:
                alone = np.eye(len(rates))[source]
                start = results[target]._replace(source_weights=alone)
                starts[Task(target, source)] = start
        if not starts:
            return
        narrowed = run(
            self._grouped(list(starts)), "refine", starts=starts, price=price
        )
        labels = self.classes_.tolist()
        for (target, origin), result in zip(starts, narrowed, strict=True):
            was_alone = self.source_weights_[target, origin] > ALONE
            is_smaller = result.norm < MUCH_SMALLER * wide[target].norm
            if result.converged and (was_alone or is_smaller):
                self.triggers_[target] = result.trigger
                self.success_rates_[target] = result.success_rate
                self.source_weights_[target] = result.source_weights
                self.single_sources_[labels[target]] = labels[origin]


def _margins(run, n_classes):
    """Return the mean of the source's logit minus the target's, a row a source."""
    logits = run.victim.decision_function(run.X)
    run.passes += ImagePasses(len(run.X), 0)
    margins = np.full((n_classes, n_classes), np.nan)
    for source in range(n_classes):
        own = logits[run.y == source]
        margins[source] = (own[:, [source]] - own).mean(axis=0)
    return margins


def _source_rates(run, target, trigger):
    """Return a trigger's success on each source class; NaN for the target itself."""
    rates = np.full(len(run.victim.classes_), np.nan)
    sources = run.y != target
    labels = run.victim.predict(trigger.embed(run.X[sources]))
    run.passes += ImagePasses(int(sources.sum()), 0)
    hits = labels == run.victim.classes_[target]
    for source in np.unique(run.y[sources]):
        rates[source] = hits[run.y[sources] == source].mean()
    return rates
