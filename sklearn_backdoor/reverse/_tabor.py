"""TABOR: Neural Cleanse with penalties on what does not look like a trigger."""

import torch
from torch.nn.functional import cross_entropy

from sklearn_backdoor._validation import check_number
from sklearn_backdoor.reverse._anomaly import rank_by_p
from sklearn_backdoor.reverse._fast import FastReverseEngineer
from sklearn_backdoor.reverse._forms import PatchSearch

WEIGHTS = {
    "mask_size": 0.5,
    "pattern_size": 0.05,
    "mask_smoothness": 0.1,
    "pattern_smoothness": 0.01,
    "blocking": 0.05,
    "overlaying": 0.05,
}


class TABORSearch(PatchSearch):
    """Masks and patterns under TABOR's penalties.

    Parameters
    ----------
    problem, tasks, generators, **options
        As in `PatchSearch`.
    weights : dict from str to float
        One for each key of ``WEIGHTS``.
    """

    def __init__(self, problem, tasks, generators, *, weights, **options):
        super().__init__(problem, tasks, generators, **options)
        self.weights = weights
        self._drawn: dict[int, torch.Tensor] = {}  # rows of this step, a task each

    def _draw(self, number):
        self._drawn[number] = super()._draw(number)
        return self._drawn[number]

    def _penalty(self):
        mask, pattern = self.tensors["mask"], self.tensors["pattern"]
        outside = (1 - mask) * pattern
        terms = {
            "mask_size": elastic_net(mask),
            "pattern_size": elastic_net(outside),
            "mask_smoothness": total_variation(mask),
            "pattern_smoothness": total_variation(outside),
        }
        shape = sum(self.weights[name] * term for name, term in terms.items())
        return self.tensors["cost"] * shape + self._of_answers(mask, pattern)

    def _of_answers(self, mask, pattern):
        """Return what blocking (R3) and overlaying (R4) cost, a value a task."""
        images, wanted, weights = [], [], []
        if self.weights["blocking"]:
            rows = torch.stack([self._drawn[n] for n in range(len(self.tasks))])
            images.append(self.problem.images[rows] * (1 - mask[:, None]))
            wanted.append(self.problem.y[rows])
            share = self.weights["blocking"] / rows.shape[1]
            weights += rows.shape[1] * [share]
        if self.weights["overlaying"]:
            images.append((mask * pattern)[:, None])
            wanted.append(self.targets[:, None])
            weights.append(self.weights["overlaying"])
        if not weights:
            return 0.0
        answers = self.problem.logits(torch.cat(images, 1).flatten(0, 1))
        self.numbers["forward"] += len(weights)
        self.numbers["backward"] += len(weights)
        finite = answers.isfinite().view(len(self.tasks), -1)
        self._note_nan(~finite.all(1))
        labels = torch.cat(wanted, 1).flatten()
        losses = cross_entropy(answers, labels, reduction="none")
        return losses.view(len(self.tasks), -1) @ losses.new_tensor(weights)


def elastic_net(values):
    """Return L1 norm plus squared L2 norm, a value a task.

    Parameters
    ----------
    values : Tensor of shape (n_tasks, n_channels, height, width), in 0...1

    Returns
    -------
    Tensor of shape (n_tasks,)
        Summed over pixels, averaged over channels (R1).
    """
    return (values + values.square()).mean(1).sum((1, 2))


def total_variation(values):
    """Return the squared differences between neighbours, a value a task.

    Parameters
    ----------
    values : Tensor of shape (n_tasks, n_channels, height, width)

    Returns
    -------
    Tensor of shape (n_tasks,)
        Summed over pixels along height and along width, averaged over channels (R2).
    """
    down = values.diff(dim=2).square().mean(1).sum((1, 2))
    across = values.diff(dim=3).square().mean(1).sum((1, 2))
    return down + across


class TABORReverseEngineer(FastReverseEngineer):
    """Find the target class and the trigger by TABOR.

    Neural Cleanse with four kinds of penalty, which are to keep the search from
    perturbations that are no trigger: overly large ones, scattered ones, those that
    work by covering the object (blocking), and those that do not work alone
    (overlaying). A class whose mask is abnormally small is a target.

    Parameters
    ----------
    victim : VictimNetwork
        Cloned; the weights are shared and not altered.
    sources : {"all", "learnt", "pairs"}, default="all"
        As in `NCReverseEngineer`.
    weights : dict from str to float, default=None
        Of the penalties; those left out keep their default, 0 leaves one out. In units
        of the cost of a pixel, which follows the success rate: ``mask_size`` (0.5)
        of the mask's elastic net, with which a pixel that is wholly covered costs what
        it does in Neural Cleanse; ``pattern_size`` (0.05) of the elastic net of the
        pattern outside the mask; ``mask_smoothness`` (0.1) and ``pattern_smoothness``
        (0.01) of the squared differences between neighbours. In units of the
        cross-entropy to the target: ``blocking`` (0.05) and ``overlaying`` (0.05).
    success_rate : float in 0...1, default=None
        Fraction of stamped images that must be classified to the candidate; None for
        0.75.
    max_steps : int, default=60
        Mini-batches a class.
    batch_size : int, default=32
        Images a mini-batch.
    alpha : float in 0...1, default=0.05
        Classes with a p-value below are flagged.
    n_jobs, random_state, verbose, checkpoint_dir
        As in `NCReverseEngineer`.

    Attributes
    ----------
    triggers_ : list of PatchTrigger
        The estimate for each class; refined for flagged classes.
    norms_ : ndarray of shape (n_classes,)
        L1 norm of each mask, in pixels, where classes were compared.
    p_values_ : ndarray of shape (n_classes,)
        Probability of a norm as small if no class is a target.
    others
        As in `NCReverseEngineer`.

    Notes
    -----
    Deviations from the source:

    - Classes are compared by the p-value of their mask's L1 norm, see `p_values`, whose
      prior is that of Neural Cleanse's masks. TABOR's own anomaly metric combines the
      mask's size and smoothness with the success rate and more.
    - The search is `NCReverseEngineer`'s fast schedule with its deviations: the terms
      that count pixels share one cost, which follows the success rate.
    - The weights are ours. Terms of size are sums over pixels, means over channels,
      with pixels in 0...1, so that they hold for any image size. Public
      re-implementations disagree on the weights, or take over the same ones to another
      pixel scale, and some leave blocking out.
    - Each step sends the mini-batch through the network once more for blocking, and one
      image more for overlaying, forward and backward. They are counted.

    References
    ----------
    Guo, Wang, Xing, Du, Song: TABOR: A highly accurate approach to inspecting and
    restoring trojan backdoors in AI systems. arXiv:1908.01763, 2019.
    """

    _kind = TABORSearch

    def __init__(
        self,
        victim,
        *,
        sources="all",
        weights=None,
        success_rate=None,
        max_steps=60,
        batch_size=32,
        alpha=0.05,
        n_jobs=None,
        random_state=0,
        verbose=False,
        checkpoint_dir=None,
    ):
        self.victim = victim
        self.sources = sources
        self.weights = weights
        self.success_rate = success_rate
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.alpha = alpha
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose
        self.checkpoint_dir = checkpoint_dir

    def _check_params(self):
        super()._check_params()
        check_number(self.alpha, "alpha", 0, 1)
        if not isinstance(self.weights, dict | None):
            raise TypeError(
                f"weights={self.weights!r}, expected a dict with some of the keys "
                f"{', '.join(WEIGHTS)}, or None."
            )
        for name, weight in (self.weights or {}).items():
            if name not in WEIGHTS:
                raise ValueError(
                    f"weights has the key {name!r}, expected some of "
                    f"{', '.join(WEIGHTS)}."
                )
            check_number(weight, f"weights[{name!r}]", 0)

    def _open_search(self, problem, tasks, generators, stage, **options):
        options["weights"] = WEIGHTS | (self.weights or {})
        return super()._open_search(problem, tasks, generators, stage, **options)

    def _flag(self):
        return rank_by_p(self.p_values_, self.alpha)
