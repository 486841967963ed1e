"""One fit's searches: in processes, with progress and checkpoints if asked."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from joblib import hash as joblib_hash
from sklearn.utils import check_random_state
from tqdm import tqdm

import sklearn_backdoor
from sklearn_backdoor._fingerprint import fingerprint
from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor.reverse._checkpoint import CheckpointFolder
from sklearn_backdoor.reverse._search import ImagePasses, Problem, SearchResult


class Prepared(NamedTuple):
    """Victim, images and class indices that fit each other, and what that took."""

    victim: Any
    X: np.ndarray
    y: np.ndarray
    bfloat16: bool
    passes: ImagePasses


class Run:
    """One fit: runs groups of tasks, in processes and with checkpoints if asked.

    Parameters
    ----------
    engineer : reverse engineer
    prepared : Prepared
    """

    def __init__(self, engineer, prepared):
        self.engineer, self.prepared = engineer, prepared
        self.victim, self.X, self.y, self.bfloat16, self.passes = prepared
        victim = self.victim
        n_classes = len(victim.classes_)
        random_state = check_random_state(engineer.random_state)
        self.seeds = random_state.randint(2**31 - 1, size=n_classes).tolist()
        self.folder = None
        if engineer.checkpoint_dir is not None:
            self.folder = CheckpointFolder(engineer.checkpoint_dir, self._identity())

    def _identity(self):
        skipped = ("victim", "n_jobs", "verbose", "checkpoint_dir", "random_state")
        settings = {
            name: getattr(value, "__qualname__", value)  # a function has an address
            for name, value in self.engineer.get_params(deep=False).items()
            if name not in skipped
        }
        net = getattr(self.victim, "network_", self.victim)
        is_module = isinstance(net, torch.nn.Module)
        victim = fingerprint(net) if is_module else joblib_hash(net)
        return {
            "engineer": type(self.engineer).__name__,
            **settings,
            "seeds": self.seeds,
            "victim": victim,
            "classes": [str(label) for label in self.victim.classes_],
            "images": joblib_hash(np.ascontiguousarray(self.X)),
            "labels": joblib_hash(self.y),
            "bfloat16": self.bfloat16,
            "device": str(getattr(self.victim, "device_", "cpu")),
            "torch": torch.__version__,
            "sklearn_backdoor": sklearn_backdoor.__version__,
        }

    def __call__(self, groups, stage="search", **options):
        """Search all groups; return the results in the order of the tasks.

        ``options`` go to ``_open_search``; those that are dicts by task, for the tasks
        of the group only.
        """
        engineer = self.engineer
        workers = effective_n_jobs(engineer.n_jobs)
        name = type(engineer).__name__
        found: list[SearchResult] = []
        with tqdm(
            total=sum(map(len, groups)), disable=None if engineer.verbose else True
        ) as bar:
            bar.set_description(f"{name}, {stage}")
            shown = workers == 1 and not bar.disable
            report = partial(_report, bar) if shown else None
            jobs = (
                delayed(_run_group)(
                    engineer,
                    self.victim,
                    self.X,
                    self.y,
                    self.bfloat16,
                    group,
                    [self._seed(task) for task in group],
                    stage,
                    {
                        key: [value[task] for task in group]
                        if isinstance(value, dict)
                        else value
                        for key, value in options.items()
                    },
                    self.folder,
                    report,
                )
                for group in groups
            )
            # not every backend of joblib yields results as they come
            parallel = Parallel(n_jobs=engineer.n_jobs)
            if getattr(parallel._backend, "supports_return_generator", False):
                parallel = Parallel(n_jobs=engineer.n_jobs, return_as="generator")
            for group, results in zip(groups, parallel(jobs), strict=True):
                for task, result in zip(group, results, strict=True):
                    found.append(result)
                    self.passes += result.passes
                    label = self.victim.classes_[task.target]
                    bar.set_description(f"{name}, {stage}, class {label}")
                    bar.set_postfix(success=result.success_rate, norm=result.norm)
                    bar.update()
        return found

    def _seed(self, task):
        source = -1 if task.source is None else task.source
        return np.random.SeedSequence((self.seeds[task.target], source + 1))


def _report(bar, search):
    success, norm = search.progress()
    bar.set_postfix(step=search.numbers["step"], success=success, norm=norm)


def _run_group(
    engineer, victim, X, y, bfloat16, tasks, seeds, stage, options, folder, report
):
    """Search one group of tasks, from its checkpoint where there is one."""
    sources = ["" if task.source is None else f"{task.source}to" for task in tasks]
    names = [
        f"{source}{task.target}" for source, task in zip(sources, tasks, strict=True)
    ]
    name = f"{stage}-{names[0]}-{names[-1]}"
    generators = [
        torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        for seed in seeds
    ]
    with engineer._oracle(victim, bfloat16) as scores:
        device = getattr(victim, "device_", "cpu")
        problem = Problem(
            scores,
            to_tensor(X, device),
            torch.from_numpy(y).to(device),
            len(victim.classes_),
        )
        search = engineer._open_search(problem, tasks, generators, stage, **options)
        kept = folder.load(name) if folder else None
        if kept is not None:
            search.unpack(*kept)
        resumed = kept is not None and search.done
        while not search.done:
            search.step()
            if folder:
                folder.save(name, search)
            if report:
                report(search)
        if folder and not resumed:
            folder.save(name, search, now=True)
        return search.results()
