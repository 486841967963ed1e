"""A search in steps, whose whole state can be packed, kept and taken up again."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch

from sklearn_backdoor.triggers import Trigger


class ImagePasses(NamedTuple):
    """Images that went through the network, forward and backward."""

    forward: int
    backward: int

    def __add__(self, other):
        return ImagePasses(*map(sum, zip(self, other, strict=True)))


class Task(NamedTuple):
    """A candidate target class, and the one source class or None for all others."""

    target: int
    source: int | None = None


class SearchResult(NamedTuple):
    """What the search for one task found.

    ``judged`` results are compared with each other; ``reference`` ones make up the null
    of the comparison. ``reason`` says why a search did not converge.
    """

    trigger: Trigger
    norm: float
    success_rate: float
    converged: bool
    passes: ImagePasses
    reason: str = ""
    source_weights: np.ndarray | None = None
    judged: bool = True
    reference: bool = True


class Problem(NamedTuple):
    """What is searched: the network and the clean images with their class indices."""

    logits: Any
    images: torch.Tensor
    y: torch.Tensor
    n_classes: int

    def sources(self, task):
        """Return the rows of images that the task's trigger is meant for."""
        if task.source is None:
            return torch.nonzero(self.y != task.target)[:, 0]
        return torch.nonzero(self.y == task.source)[:, 0]


class Search(ABC):
    """Search the triggers of some tasks side by side, step by step.

    Everything that changes lies in ``tensors``, ``numbers`` and the optimiser, so that
    a search which was packed and unpacked goes on bit for bit as if it had not been.

    Parameters
    ----------
    problem : Problem
    tasks : list of Task
    generators : list of torch.Generator
        All randomness, one a task.
    """

    def __init__(self, problem, tasks, generators):
        self.problem = problem
        self.tasks = tasks
        self.generators = generators
        self.tensors: dict[str, torch.Tensor] = {}
        self.numbers: dict[str, Any] = {"step": 0, "forward": 0, "backward": 0}
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    @abstractmethod
    def done(self):
        """Whether no further step is needed."""

    @abstractmethod
    def step(self):
        """Go one step, and count the image passes of each task."""

    @abstractmethod
    def results(self):
        """Return a SearchResult for each task."""

    @abstractmethod
    def progress(self):
        """Return (success rate, norm) of the most advanced task, to be shown."""

    @property
    def passes(self):
        """Image passes of one task so far."""
        return ImagePasses(self.numbers["forward"], self.numbers["backward"])

    def pack(self):
        """Return the state as (dict of tensors, dict of numbers)."""
        tensors = {f"t.{name}": value for name, value in self.tensors.items()}
        for number, generator in enumerate(self.generators):
            tensors[f"g.{number}"] = generator.get_state()
        if self.optimizer is not None:
            for number, state in self.optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"o.{number}.{name}"] = value
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in tensors.items()
        }
        return tensors, dict(self.numbers)

    def unpack(self, tensors, numbers):
        """Take up the state that ``pack`` returned."""
        self.numbers = dict(numbers)
        moments: dict[int, dict] = {}
        with torch.no_grad():
            for name, value in tensors.items():
                kind, _, rest = name.partition(".")
                if kind == "g":
                    self.generators[int(rest)].set_state(value)
                elif kind == "o":
                    number, _, what = rest.partition(".")
                    moments.setdefault(int(number), {})[what] = value
                elif rest in self.tensors and self.tensors[rest].requires_grad:
                    self.tensors[rest].copy_(value)  # the optimiser holds this one
                else:
                    self.tensors[rest] = value.to(self.problem.images.device)
        if self.optimizer is not None and moments:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def apply_gradients(optimizer, parameters, loss):
    """Go one step down the loss, without gradients of the network's weights."""
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(loss, parameters), strict=True
    ):
        parameter.grad = gradient
    optimizer.step()


def count_hits(scores, target):
    """Count images classified to the target; NaN, which argmax prefers, is no hit."""
    return int(((scores.argmax(1) == target) & ~scores.isnan().any(1)).sum())


def as_array(tensor):
    """Return a tensor as a NumPy array of its own."""
    return tensor.detach().cpu().numpy().copy()
