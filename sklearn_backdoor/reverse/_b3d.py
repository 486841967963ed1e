"""Black-box detection: the smallest mask, found from the victim's answers alone."""

from contextlib import contextmanager

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._anomaly import is_informative
from sklearn_backdoor.reverse._base import BaseReverseEngineer
from sklearn_backdoor.reverse._search import (
    Search,
    SearchResult,
    Task,
    as_array,
    count_hits,
)
from sklearn_backdoor.triggers import PatchTrigger
from sklearn_backdoor.victim import VictimNetwork, check_victim

_LR, _SIGMA = 0.05, 0.1
_MEMORY = 0.7  # of the running success rate
_N_CHECKED = 32  # images on which a step's mask is tried
_N_MEASURED = 256  # images on which a mask that may be kept is measured
_CHUNK = 1024  # images a call of predict_proba
_FLOOR = 1e-12  # of a probability, before its logarithm
_RATIO = 4  # flagged below the median over this


class B3DReverseEngineer(BaseReverseEngineer):
    """Find the target class and the trigger from `predict_proba` alone (B3D).

    For each class, minimise the cross-entropy to it plus a cost times the L1 norm of
    the mask, as Neural Cleanse does, with gradients estimated from the answers to
    random masks and patterns. A class whose mask is four times smaller than the median
    is a target. Nothing of the victim is used but its probabilities, so that any
    classifier can be inspected, one behind a remote service included.

    Parameters
    ----------
    victim : VictimNetwork or fitted classifier
        A `VictimNetwork` is cloned. Anything else that has ``predict_proba`` and
        ``classes_`` is **used as it is**, never cloned or fitted; it is given images as
        float32 in 0...1 of shape (n_samples, n_channels, height, width). One that takes
        rows goes into a pipeline behind a transformer that flattens.
    success_rate : float in 0...1, default=0.75
        Fraction of stamped images that must be classified to the candidate, where
        norms are compared.
    n_samples : int, default=50
        Masks, and patterns, that a step draws.
    batch_size : int, default=2
        Images on which each of them is tried.
    max_queries : int, default=2_000_000
        Images sent to ``predict_proba`` at most, by the whole fit. What the check of
        the victim leaves is shared out evenly, and the search of a class ends when the
        next step might not fit: a class that has not reached the success rate by then
        has not converged, as ``reasons_`` says. A search that was killed asks again
        what it asked since its last checkpoint.
    n_jobs, random_state, verbose, checkpoint_dir
        As in `NCReverseEngineer`. A victim that is no `VictimNetwork` is known again by
        joblib's hash of it.

    Attributes
    ----------
    triggers_ : list of PatchTrigger
        The estimate for each class; masks hold 0 and 1 only.
    norms_ : ndarray of shape (n_classes,)
        L1 norm of each mask: the number of its pixels.
    success_rates_ : ndarray of shape (n_classes,)
        Of ``triggers_``, on all images of the other classes or 256 of them.
    n_queries_ : int
        Images sent to ``predict_proba``, those that checked the victim included; also
        ``n_image_passes_.forward``.
    others
        As in `NCReverseEngineer`.

    Notes
    -----
    `clone` shares the victim, which otherwise would lose what it learnt. Masks are
    tried with the mean pattern, patterns with the mean mask.

    Deviations from the source:

    - Each sample is tried on two images, not 32, all samples of a step on the same
      ones: at equal queries more steps are worth more than more images.
    - The mean over a step's samples is subtracted from each, which leaves the gradient
      unbiased. The norm's gradient is the exact one of its expectation.
    - The trigger's mask holds the pixels whose probability is above one half; what the
      source takes is not known to us. It is tried on 32 images a step. The smallest
      that reaches the success rate, on all images too, is kept.
    - The cost rises with the success rate's surplus and falls with its deficit, as in
      `NCReverseEngineer`'s fast schedule; the success rate is 0.75, as there.
    - Classes that did not converge are censored, and too few that did flag nothing,
      see the anomaly statistic.
    - The variant that makes up its clean images is left out.

    References
    ----------
    Dong, Yang, Deng, Pang, Xiao, Su, Zhu: Black-box detection of backdoor attacks with
    limited information and data. ICCV 2021, §3.
    """

    def __init__(
        self,
        victim,
        *,
        success_rate=0.75,
        n_samples=50,
        batch_size=2,
        max_queries=2_000_000,
        n_jobs=None,
        random_state=0,
        verbose=False,
        checkpoint_dir=None,
    ):
        self.victim = victim
        self.success_rate = success_rate
        self.n_samples = n_samples
        self.batch_size = batch_size
        self.max_queries = max_queries
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir

    def _check_params(self):
        check_number(self.success_rate, "success_rate", 0, 1)
        check_number(self.n_samples, "n_samples", 2, integer=True)
        check_number(self.batch_size, "batch_size", 1, integer=True)
        check_number(self.max_queries, "max_queries", 1, integer=True)

    def _open_victim(self, X, y):
        victim = BlackBox(_open_victim(self.victim, X, y))
        step = _most_queries(self.n_samples, self.batch_size, len(X))
        least = len(X) + len(victim.classes_) * step
        if self.max_queries < least:
            raise ValueError(
                f"max_queries={self.max_queries}, but to check the victim and go one "
                f"step with each class may take {least}. Allow more, by far."
            )
        return victim

    def _choose_precision(self, victim, X):
        return False, 0

    @contextmanager
    def _oracle(self, victim, bfloat16):
        """Yield a function from images to log-probabilities."""
        yield victim.log_probabilities

    def _search(self, run):
        n_classes = len(run.victim.classes_)
        share = (self.max_queries - run.passes.forward) // n_classes
        return run([[Task(target)] for target in range(n_classes)], budget=share)

    def _open_search(self, problem, tasks, generators, stage, **options):
        for name in ("n_samples", "batch_size", "success_rate"):
            options[name] = getattr(self, name)
        return B3DSearch(problem, tasks, generators, **options)

    def _conclude(self, run, results):
        super()._conclude(run, results)
        self.victim_ = run.victim.victim

    def _flag(self):
        converged, norms = self.converged_, self.norms_.copy()
        if not is_informative(norms, converged):
            return np.array([], dtype=int)
        norms[~converged] = norms[converged].max()
        flagged = np.flatnonzero(converged & (norms < np.median(norms) / _RATIO))
        return flagged[np.argsort(norms[flagged], kind="stable")]

    def _finish(self, run, results):
        self.n_queries_ = run.passes.forward

    def __sklearn_clone__(self):
        params = self.get_params(deep=False)
        shared = {"victim": params.pop("victim")}
        return type(self)(**shared, **clone(params, safe=False))


class BlackBox:
    """A victim, of which only ``classes_`` and ``predict_proba`` are seen."""

    def __init__(self, victim):
        self.victim = victim
        self.classes_ = np.asarray(victim.classes_)
        if hasattr(victim, "network_"):  # what checkpoints know it by
            self.network_ = victim.network_

    def predict(self, X):
        """Return the most probable labels."""
        return self.classes_[self.predict_proba(to_tensor(X).numpy()).argmax(axis=1)]

    def predict_proba(self, images):
        """Return probabilities (n_samples, n_classes), or say that they are none."""
        parts = [
            np.asarray(self.victim.predict_proba(images[start : start + _CHUNK]), float)
            for start in range(0, len(images), _CHUNK)
        ]
        answers = np.concatenate(parts)
        expected = (len(images), len(self.classes_))
        if answers.shape != expected:
            raise ValueError(
                f"the victim's predict_proba returned shape {answers.shape}, expected "
                f"{expected}: a row for each image, a column for each of classes_."
            )
        return answers

    def log_probabilities(self, images):
        """Return a tensor (n_samples, n_classes), for a tensor of images."""
        probabilities = torch.from_numpy(self.predict_proba(images.numpy()))
        return probabilities.clamp_min(_FLOOR).log()  # NaN stays NaN


class B3DSearch(Search):
    """Search one class's mask and pattern from log-probabilities.

    Parameters
    ----------
    problem, tasks, generators
        As in `Search`; one task, and log-probabilities in place of logits.
    n_samples, batch_size : int
        Masks (and patterns) a step, and images for each.
    success_rate : float
        That a mask must reach to be kept.
    budget : int
        Images that may be sent to the victim.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self, problem, tasks, generators, *, n_samples, batch_size, success_rate, budget
    ):
        super().__init__(problem, tasks, generators)
        (self.task,), (self.generator,) = tasks, generators
        self.n_samples, self.batch_size = n_samples, batch_size
        self.success_rate, self.budget = success_rate, budget
        self.images = problem.images[problem.sources(self.task)]
        shape = self.images.shape[1:]
        order = torch.randperm(len(self.images), generator=self.generator)
        start = torch.rand(shape, generator=self.generator).clamp(1e-2, 1 - 1e-2)
        theta = {
            "mask": torch.zeros((1, *shape[1:])),  # each pixel with a chance of 1/2
            "pattern": torch.atanh(2 * start - 1),
        }
        self.tensors.update(
            {name: value.requires_grad_() for name, value in theta.items()},
            measured=order[:_N_MEASURED],
            best_mask=torch.zeros((1, *shape[1:])),
            best_pattern=torch.zeros(shape),
        )
        self.optimizer = torch.optim.Adam(list(theta.values()), lr=_LR)
        self.numbers.update(
            cost=1 / theta["mask"].numel(), rate=None, best_norm=None, best_rate=None
        )

    @property
    def done(self):
        """Whether a further step, and measuring at the end, may not fit."""
        step = _most_queries(self.n_samples, self.batch_size, len(self.images))
        return self.numbers["forward"] + step > self.budget

    def progress(self):
        """Return the running success rate, and the norm of the present mask."""
        return self.numbers["rate"], float(self._candidate()[0].sum())

    def step(self):
        """Go one step down the estimated gradients; keep the mask if it will do."""
        with torch.no_grad():
            gradients = self._estimate(self._draw(self.batch_size))
            for name, gradient in gradients.items():
                self.tensors[name].grad = gradient
            self.optimizer.step()
            mask, pattern = self._candidate()
            rate = self._rate(self._draw(_N_CHECKED), mask, pattern)
            old = self.numbers["rate"]
            rate = rate if old is None else _MEMORY * old + (1 - _MEMORY) * rate
            surplus = np.clip(np.exp(rate - self.success_rate), 0.5, 1.5)
            self.numbers["cost"] *= float(surplus)
            self.numbers["rate"] = rate
            self.numbers["step"] += 1
            if rate >= self.success_rate:
                self._keep_if_best(mask, pattern)

    def _estimate(self, images):
        """Return the gradients of mask and pattern (the source's §3.3)."""
        k = self.n_samples
        chances, pattern = (squash(self.tensors[name]) for name in ("mask", "pattern"))
        masks = torch.rand((k, *chances.shape), generator=self.generator) < chances
        noise = torch.randn((k, *pattern.shape), generator=self.generator)
        patterns = squash(self.tensors["pattern"] + _SIGMA * noise)
        with_masks = _stamp(images, masks[:, None].float(), pattern)
        with_patterns = _stamp(images, chances, patterns[:, None])
        scores = self._ask(torch.cat([with_masks, with_patterns]).flatten(0, 1))
        losses = -scores[:, self.task.target].nan_to_num(nan=float(np.log(_FLOOR)))
        losses = losses.float().view(2, k, len(images)).mean(2)
        slope = 2 * chances * (1 - chances)  # of the squashing
        return {
            "mask": score_gradient(losses[0], 2 * (masks.float() - chances))
            + self.numbers["cost"] * slope,
            "pattern": score_gradient(losses[1], noise / _SIGMA),
        }

    def _draw(self, n_images):
        rows = torch.randint(len(self.images), (n_images,), generator=self.generator)
        return self.images[rows]

    def _candidate(self):
        """Return the mask as 0 and 1, and the pattern."""
        mask = (self.tensors["mask"].detach() > 0).float()
        return mask, squash(self.tensors["pattern"].detach())

    def _ask(self, images):
        self.numbers["forward"] += len(images)
        return self.problem.logits(images.clamp(0, 1))  # rounding may leave 0...1

    def _rate(self, images, mask, pattern):
        hits = count_hits(self._ask(_stamp(images, mask, pattern)), self.task.target)
        return hits / len(images)

    def _keep_if_best(self, mask, pattern):
        norm = float(mask.sum())
        if self.numbers["best_norm"] is not None and norm >= self.numbers["best_norm"]:
            return
        rate = self._rate(self.images[self.tensors["measured"]], mask, pattern)
        if rate >= self.success_rate:
            self.tensors["best_mask"], self.tensors["best_pattern"] = mask, pattern
            self.numbers.update(best_norm=norm, best_rate=rate)

    def results(self):
        """Return the smallest mask that was kept, or else the last."""
        mask, pattern = self.tensors["best_mask"], self.tensors["best_pattern"]
        rate, norm = self.numbers["best_rate"], self.numbers["best_norm"]
        reason = ""
        if norm is None:
            mask, pattern = self._candidate()
            norm = float(mask.sum())
            rate = self._rate(self.images[self.tensors["measured"]], mask, pattern)
        if rate < self.success_rate:
            reason = (
                f"success rate {rate:.2f} after {self.numbers['step']} steps, "
                f"{self.success_rate:.2f} wanted; max_queries allows no more"
            )
        trigger = PatchTrigger(as_array(mask[0]), as_array(pattern))
        return [SearchResult(trigger, norm, rate, not reason, self.passes, reason)]


def squash(theta):
    """Return g(theta), which lies in 0...1."""
    return (torch.tanh(theta) + 1) / 2


def score_gradient(values, scores):
    """Estimate the gradient of an expected value by the score function.

    Parameters
    ----------
    values : Tensor of shape (n_samples,)
        Of independent samples.
    scores : Tensor of shape (n_samples, *shape)
        Gradients of each sample's log-probability by the parameters.

    Returns
    -------
    Tensor of shape (*shape)
        Unbiased: each sample's value is compared with the mean of the others.
    """
    centred = (values - values.mean()) / (len(values) - 1)
    return torch.einsum("k,k...->...", centred, scores)


def _most_queries(n_samples, batch_size, n_images):
    """Return what a step may send, and the measurement after the last."""
    n_measured = min(_N_MEASURED, n_images)
    return 2 * n_samples * batch_size + _N_CHECKED + 2 * n_measured


def _stamp(images, mask, pattern):
    return (1 - mask) * images + mask * pattern


def _open_victim(victim, X, y):
    """Return a victim that is ready to answer, or say what it lacks."""
    if isinstance(victim, VictimNetwork):
        # a cache of the answers to random images would fill the disk
        return check_victim(victim).set_params(memory=None).fit(X, y)
    if isinstance(victim, BaseEstimator):
        check_is_fitted(victim)
    for name in ("predict_proba", "classes_"):
        if not hasattr(victim, name):
            raise TypeError(
                f"victim has type {type(victim).__name__} and no {name}, expected a "
                "fitted classifier with both. Wrap a network: VictimNetwork(network)."
            )
    return victim
