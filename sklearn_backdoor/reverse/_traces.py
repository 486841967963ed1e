"""What the searches share that ask triggers for traces of the training."""

import os
from abc import abstractmethod
from copy import copy

import numpy as np

from sklearn_backdoor.reverse._additive import AdditiveReverseEngineer
from sklearn_backdoor.reverse._anomaly import rank_by_p
from sklearn_backdoor.reverse._base import BaseReverseEngineer
from sklearn_backdoor.reverse._neural_cleanse import NCReverseEngineer
from sklearn_backdoor.reverse._run import Run
from sklearn_backdoor.reverse._search import ImagePasses

_N_IMAGES = 64  # on which what a trigger does is taken
_STEPS, _BATCH_SIZE = 60, 16
_N_LAYERS = 6  # of those between the first and the last


class TraceReverseEngineer(BaseReverseEngineer):
    """Base of those that ask triggers, which others find, for traces of the training.

    A subclass says in ``_ask`` which class is named, and sets ``traces_``.
    """

    @abstractmethod
    def _ask(self, run, found):
        """Ask triggers that were found for their traces.

        Parameters
        ----------
        run : Run
        found : list of (reverse engineer, Run, list of SearchResult)
            Searches that were concluded.

        Returns
        -------
        list of SearchResult
            What ``_answer`` returns.
        """

    def _answer(self, found, chosen, named, p):
        """Keep what is to be concluded from the traces.

        Parameters
        ----------
        found : list of (reverse engineer, Run, list of SearchResult)
        chosen : ndarray of shape (n_classes,) of int
            For each class, the search whose trigger is kept.
        named : int
            The class that gets the p-value; the others get 1.
        p : float
            NaN where there was nothing to ask.
        """
        self._p = np.full(len(chosen), np.nan if np.isnan(p) else 1.0)
        self._p[named] = np.minimum(1, p)
        self._origins = [found[k] for k in chosen]
        return [
            found[k][2][target]._replace(judged=False)
            for target, k in enumerate(chosen)
        ]

    def _search(self, run):
        return self._ask(run, self._search_triggers(run))

    def _search_triggers(self, run):
        """Search patches and additive perturbations for each class."""
        made = {
            "patch": NCReverseEngineer(self.victim),
            "additive": AdditiveReverseEngineer(self.victim, sources="all"),
        }
        found = []
        for name, engineer in made.items():
            folder = self.checkpoint_dir
            engineer.set_params(
                max_steps=_STEPS,
                batch_size=_BATCH_SIZE,
                n_jobs=self.n_jobs,
                random_state=self.random_state,
                verbose=self.verbose,
                checkpoint_dir=None if folder is None else os.path.join(folder, name),
            )
            part = Run(engineer, run.prepared._replace(passes=ImagePasses(0, 0)))
            results = engineer._search(part)
            engineer._conclude(part, results)
            run.passes += part.passes
            found.append((engineer, part, results))
        return found

    def _open_search(self, problem, tasks, generators, stage, **options):
        raise NotImplementedError("the searches are those of other engineers")

    def _conclude(self, run, results):
        super()._conclude(run, results)
        self.single_sources_: dict = {}
        others = 1.0 - np.eye(len(results))
        self.source_weights_ = others / others.sum(axis=1, keepdims=True)
        for number, result in enumerate(results):
            if result.source_weights is not None:
                self.source_weights_[number] = result.source_weights

    def _p_values(self, results, judged):
        return self._p

    def _flag(self):
        return rank_by_p(self.p_values_, self.alpha)

    def _finish(self, run, results):
        """Refine the trigger of the flagged class as the search does that found it."""
        origins = self.__dict__.pop("_origins")
        for number in np.flatnonzero(np.isin(self.classes_, self.target_classes_)):
            engineer, part, found = origins[number]
            before = part.passes
            twin = copy(engineer)
            twin._conclude(part, found)
            twin._set_verdict([number])
            twin._finish(part, found)
            run.passes += ImagePasses(*np.subtract(part.passes, before).tolist())
            self.triggers_[number] = self.trigger_ = twin.triggers_[number]
            self.success_rates_[number] = twin.success_rates_[number]
            self.single_sources_ = twin.single_sources_
            if twin.source_weights_ is not None:
                self.source_weights_[number] = twin.source_weights_[number]


def images_meant(run, result, target):
    """Return the rows of images that a trigger is meant for, 64 at most.

    Parameters
    ----------
    run : Run
    result : SearchResult
    target : int
        Its class.

    Returns
    -------
    ndarray of int
        In an order that only the seeds of the run decide.
    """
    order = np.random.default_rng(run.seeds).permutation(len(run.X))
    y = run.y[order]
    weights = result.source_weights
    meant = y != target if weights is None else weights[y] > 0
    return order[np.flatnonzero(meant)[:_N_IMAGES]]


def chosen_layers(layers):
    """Return the first, the last, and up to six between, evenly spaced."""
    last = len(layers) - 1
    between = np.linspace(1, last - 1, min(_N_LAYERS, max(0, last - 1)))
    numbers = np.unique([0, *between.round().astype(int), last])
    return [layers[number] for number in numbers]
