"""Neural Cleanse's published schedule, one class at a time."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sklearn_backdoor.reverse._search import (
    ImagePasses,
    Search,
    SearchResult,
    apply_gradients,
    as_array,
    count_hits,
)
from sklearn_backdoor.triggers import PatchTrigger

_LR, _BETAS = 0.1, (0.5, 0.9)
_INITIAL_COST, _COST_UP = 1e-3, 1.5
_PATIENCE = 5  # good (bad) steps in a row before the cost rises (falls)
_STOP_PATIENCE = 25
_N_KEPT = 100  # each is smaller than the ones before


class ExhaustiveSearch(Search):
    """The published schedule, for one task.

    Parameters
    ----------
    problem, tasks, generators
        As in `Search`; one task.
    steps, batch_size : int
        Passes over the images at most, and images a mini-batch.
    success_rate : float
        That a mask must reach to be kept.
    """

    def __init__(self, problem, tasks, generators, *, steps, batch_size, success_rate):
        super().__init__(problem, tasks, generators)
        (task,) = tasks
        self.steps = steps
        self.batch_size = batch_size
        self.success_rate = success_rate
        self.target = task.target
        self.images = problem.images[problem.sources(task)]
        theta = _initial_theta(self.images.shape[1:], self.images.device, generators[0])
        self.tensors["mask"], self.tensors["pattern"] = theta
        self.optimizer = torch.optim.Adam(theta, lr=_LR, betas=_BETAS)
        self.cost = CostSchedule(_PATIENCE)
        mask, pattern = _squash(theta)
        self.tensors["last_mask"] = mask.detach()
        self.tensors["last_pattern"] = pattern.detach()
        self.tensors["kept_norms"] = torch.zeros(0, dtype=torch.float64)
        self.tensors["kept_masks"] = mask.detach()[None][:0]
        self.tensors["kept_patterns"] = pattern.detach()[None][:0]
        self.numbers.update(
            smallest=None, stalled=0, success=0.0, nan=False, cost=self.cost.state
        )

    @property
    def _theta(self):
        return [self.tensors["mask"], self.tensors["pattern"]]

    @property
    def done(self):
        """Whether the steps are used up, or nothing improves, or NaN was met."""
        numbers = self.numbers
        return (
            numbers["step"] >= self.steps
            or numbers["nan"]
            or (self.cost.moved_both_ways and numbers["stalled"] >= _STOP_PATIENCE)
        )

    def progress(self):
        """Return the success rate of the last step, and the mask's norm."""
        return self.numbers["success"], float(_squash(self._theta)[0].detach().sum())

    def unpack(self, tensors, numbers):
        """Take up the state that ``pack`` returned."""
        super().unpack(tensors, numbers)
        self.cost.state = self.numbers["cost"]

    def step(self):
        """Go once over the images; keep the mask if it is smaller and succeeds."""
        numbers = self.numbers
        success = self._pass()
        numbers["step"] += 1
        numbers["success"] = success
        reached = success >= self.success_rate
        self.cost.update(reached)
        numbers["cost"] = self.cost.state
        mask, pattern = (part.detach() for part in _squash(self._theta))
        norm = float(mask.sum(dtype=torch.float64))
        if not np.isfinite(norm):
            numbers["nan"] = True
            return
        self.tensors["last_mask"], self.tensors["last_pattern"] = mask, pattern
        smallest = np.inf if numbers["smallest"] is None else numbers["smallest"]
        numbers["stalled"] += 1
        if reached and norm < 0.99 * smallest:
            numbers["stalled"] = 0
        if reached and norm < smallest:
            numbers["smallest"] = norm
            self._keep(norm, mask, pattern)

    def _pass(self):
        """Go once over the images; return the success rate on the way."""
        theta, target = self._theta, self.target
        hits = 0
        order = torch.randperm(len(self.images), generator=self.generators[0])
        for rows in order.to(self.images.device).split(self.batch_size):
            mask, pattern = _squash(theta)
            scores = self.problem.logits(_stamp(self.images[rows], mask, pattern))
            wanted = torch.full((len(rows),), target, device=scores.device)
            loss = cross_entropy(scores, wanted) + self.cost.value * mask.sum()
            apply_gradients(self.optimizer, theta, loss)
            hits += count_hits(scores, target)
        self.numbers["forward"] += len(self.images)
        self.numbers["backward"] += len(self.images)
        return hits / len(self.images)

    def _keep(self, norm, mask, pattern):
        for name, value in (
            ("norms", torch.tensor(norm, dtype=torch.float64)),
            ("masks", mask),
            ("patterns", pattern),
        ):
            kept = torch.cat([self.tensors[f"kept_{name}"], value[None]])
            self.tensors[f"kept_{name}"] = kept[-_N_KEPT:]

    def results(self):
        """Take the smallest mask whose success on all images is high enough."""
        kept = [
            (float(norm), mask, pattern)
            for norm, mask, pattern in zip(
                *(
                    self.tensors[f"kept_{name}"]
                    for name in ("norms", "masks", "patterns")
                ),
                strict=True,
            )
        ]
        # if none will do, what the search ended with
        kept.append((np.inf, self.tensors["last_mask"], self.tensors["last_pattern"]))
        n_forward, best = 0, (-1.0, *kept[-1][1:])
        for _, mask, pattern in sorted(kept, key=lambda found: found[0]):
            hits = 0
            with torch.no_grad():
                for batch in self.images.split(256):
                    scores = self.problem.logits(_stamp(batch, mask, pattern))
                    hits += count_hits(scores, self.target)
            n_forward += len(self.images)
            rate = hits / len(self.images)
            if rate > best[0]:
                best = rate, mask, pattern
            if rate >= self.success_rate:
                break
        rate, mask, pattern = best
        trigger = PatchTrigger(as_array(mask), as_array(pattern))
        passes = self.passes + ImagePasses(n_forward, 0)
        reason = ""
        if self.numbers["nan"]:
            reason = (
                f"the network returned NaN or infinity at step {self.numbers['step']}"
            )
        elif rate < self.success_rate:
            reason = (
                f"success rate {rate:.2f} after {self.numbers['step']} steps, "
                f"{self.success_rate:.2f} wanted"
            )
        return [
            SearchResult(trigger, trigger.mask_norm, rate, not reason, passes, reason)
        ]


class CostSchedule:
    """The weight of the mask's norm, raised while the search succeeds.

    It starts at 0, becomes 1e-3 after ``patience`` good steps in a row, then rises by
    1.5 after as many good ones and falls by 1.5 ** 1.5 after as many bad ones.

    Parameters
    ----------
    patience : int
        Steps in a row.
    """

    def __init__(self, patience):
        self.patience = patience
        self.value = 0.0
        self._good = self._bad = 0
        self._rose = self._fell = False

    @property
    def state(self):
        """All that changes, as plain values."""
        return [self.value, self._good, self._bad, self._rose, self._fell]

    @state.setter
    def state(self, state):
        self.value, self._good, self._bad, self._rose, self._fell = state

    @property
    def moved_both_ways(self):
        """Whether the cost has risen and fallen since it was set."""
        return self._rose and self._fell

    def update(self, reached):
        """Take note of a step that reached the success rate, or did not."""
        self._good = self._good + 1 if reached else 0
        self._bad = 0 if reached else self._bad + 1
        if self._good >= self.patience:
            self._good = 0
            self._rose = self.value > 0
            self.value = self.value * _COST_UP if self._rose else _INITIAL_COST
        elif self._bad >= self.patience and self.value > 0:
            self._bad = 0
            self._fell = True
            self.value /= _COST_UP**1.5


def _initial_theta(image_shape, device, generator):
    """Draw mask and pattern uniformly from 0...1, and undo the squashing."""
    theta = []
    for shape in (image_shape[1:], image_shape):
        start = torch.rand(shape, generator=generator).clamp(1e-4, 1 - 1e-4)
        theta.append(torch.atanh(2 * start - 1).to(device).requires_grad_())
    return theta


def _squash(theta):
    """Return mask and pattern in 0...1."""
    mask, pattern = ((torch.tanh(part) + 1) / 2 for part in theta)
    return mask, pattern


def _stamp(images, mask, pattern):
    return (1 - mask) * images + mask * pattern
