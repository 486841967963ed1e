"""Neural Cleanse: the smallest mask that sends every image to one class."""

from collections import deque

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._base import (
    BaseReverseEngineer,
    ImagePasses,
    SearchResult,
)
from sklearn_backdoor.triggers import PatchTrigger

_LR, _BETAS = 0.1, (0.5, 0.9)
_INITIAL_COST, _COST_UP = 1e-3, 1.5
_STOP_PATIENCE = 25
_N_KEPT = 100  # each is smaller than the ones before


class NCReverseEngineer(BaseReverseEngineer):
    """Find the target class and the trigger by Neural Cleanse.

    For each class, minimise the cross-entropy to it plus a cost times the L1 norm of
    the mask, over stamped images of all other classes, and keep the smallest mask that
    reaches the success rate. A class whose mask is abnormally small is a target.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    success_rate : float in 0...1, default=0.99
        Fraction of stamped images that must be classified to the candidate.
    max_steps : int, default=1000
        Steps a class at most; a step is one pass over the images.
    batch_size : int, default=32
        Images a mini-batch.
    patience : int, default=5
        Good (bad) steps in a row before the cost rises (falls).
    threshold : float, default=2.0
        Anomaly index above which a class below the median is flagged.
    random_state : int, RandomState instance or None, default=0
        Initial masks and patterns, and the order of the images.
    verbose : bool, default=False
        Show a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The victim's labels; all arrays below go by them.
    triggers_ : list of PatchTrigger
        The estimate for each class.
    norms_ : ndarray of shape (n_classes,)
        L1 norm of each mask, in pixels.
    success_rates_ : ndarray of shape (n_classes,)
        Of each estimate, on all images of the other classes.
    converged_ : ndarray of bool, shape (n_classes,)
        Whether the success rate was reached. If not, the class is never flagged.
    anomaly_indices_ : ndarray of shape (n_classes,)
        NaN where too few classes converged.
    target_classes_ : ndarray
        Flagged classes, the most anomalous first; may be empty.
    target_class_ : label or None
        The most anomalous class that was flagged.
    trigger_ : PatchTrigger or None
        Its trigger.
    verdict_ : {"backdoored", "nothing found", "inconclusive"}
        *Nothing found* is not the same as clean.
    n_image_passes_ : ImagePasses
        Images that went forward and backward through the network.

    Notes
    -----
    Deviations from the source:

    - A step is one pass over the images in random order, where the published code
      takes 31 mini-batches whatever their number.
    - A mask whose average success over a step is high enough, while it moved, is
      measured once more on all images at the end, and counts by that.
    - The search ends early 25 steps after the last mask that was smaller by 1 %, once
      the cost has moved both ways.
    - Classes that do not converge are censored, and norms that hardly differ flag
      nothing, see the anomaly statistic.
    - The cost rises by a factor of 1.5 (2 in the published example).

    References
    ----------
    Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: Identifying and
    mitigating backdoor attacks in neural networks. IEEE S&P 2019, §IV and appendix.
    """

    def __init__(
        self,
        victim,
        *,
        success_rate=0.99,
        max_steps=1000,
        batch_size=32,
        patience=5,
        threshold=2.0,
        random_state=0,
        verbose=False,
    ):
        self.victim = victim
        self.success_rate = success_rate
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.patience = patience
        self.threshold = threshold
        self.random_state = random_state
        self.verbose = verbose

    def _check_params(self):
        check_number(self.success_rate, "success_rate", 0, 1)
        check_number(self.max_steps, "max_steps", 1, integer=True)
        check_number(self.batch_size, "batch_size", 1, integer=True)
        check_number(self.patience, "patience", 1, integer=True)
        check_number(self.threshold, "threshold", 0)

    def _search_class(self, logits, images, target, generator, bar):
        theta = _initial_theta(images.shape[1:], images.device, generator)
        optimizer = torch.optim.Adam(theta, lr=_LR, betas=_BETAS)
        cost = CostSchedule(self.patience)
        last = _squash(theta)
        kept: deque = deque(maxlen=_N_KEPT)
        smallest, stalled, n_steps = np.inf, 0, 0
        while n_steps < self.max_steps:
            n_steps += 1
            success = self._step(
                logits, images, target, theta, optimizer, cost.value, generator
            )
            mask, pattern = _squash(theta)
            norm = float(mask.sum().detach())
            if not np.isfinite(norm):
                break
            last = mask.detach(), pattern.detach()
            reached = success >= self.success_rate
            stalled = 0 if reached and norm < 0.99 * smallest else stalled + 1
            if reached and norm < smallest:
                smallest = norm
                kept.append((norm, *last))
            cost.update(reached)
            if cost.moved_both_ways and stalled >= _STOP_PATIENCE:
                break
        kept.append((np.inf, *last))  # if none will do, what the search ended with
        return self._choose(logits, images, target, kept, n_steps * len(images))

    def _step(self, logits, images, target, theta, optimizer, cost, generator):
        """Go once over the images; return the success rate on the way."""
        hits = 0
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for rows in order.split(self.batch_size):
            mask, pattern = _squash(theta)
            scores = logits(_stamp(images[rows], mask, pattern))
            wanted = torch.full((len(rows),), target, device=images.device)
            loss = cross_entropy(scores, wanted) + cost * mask.sum()
            for part, gradient in zip(
                theta, torch.autograd.grad(loss, theta), strict=True
            ):
                part.grad = gradient
            optimizer.step()
            hits += _count_hits(scores, target)
        return hits / len(images)

    def _choose(self, logits, images, target, kept, passes):
        """Take the smallest mask whose success on all images is high enough."""
        n_forward, best = passes, (-1.0, *kept[-1][1:])
        for _, mask, pattern in sorted(kept, key=lambda found: found[0]):
            hits = 0
            with torch.no_grad():
                for batch in images.split(256):
                    scores = logits(_stamp(batch, mask, pattern))
                    hits += _count_hits(scores, target)
            n_forward += len(images)
            rate = hits / len(images)
            if rate > best[0]:
                best = rate, mask, pattern
            if rate >= self.success_rate:
                break
        rate, mask, pattern = best
        trigger = PatchTrigger(*_as_arrays(mask, pattern))
        return SearchResult(
            trigger,
            trigger.mask_norm,
            rate,
            rate >= self.success_rate,
            ImagePasses(n_forward, passes),
        )


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


def _count_hits(scores, target):
    """Count images classified to the target; NaN, which argmax prefers, is no hit."""
    return int(((scores.argmax(1) == target) & ~scores.isnan().any(1)).sum())


def _as_arrays(*tensors):
    return [tensor.detach().cpu().numpy() for tensor in tensors]
