"""The perturbation that would do to batch-norm's statistics what the training did."""

import numpy as np
import torch
from scipy.linalg import cholesky, solve_triangular

from sklearn_backdoor._torch import to_tensor
from sklearn_backdoor.reverse._hooks import hooked
from sklearn_backdoor.reverse._search import ImagePasses, as_array
from sklearn_backdoor.reverse._statistics import means_over_places

_STEPS, _BATCH_SIZE, _LEARNING_RATE = 60, 64, 0.02
_RADIUS = 1 / 7  # root mean square of the perturbation, at most
_START = 0.01


def invert(run, comparison, share_sd):
    """Search a perturbation for the clearest trace, whatever class it leads to.

    Parameters
    ----------
    run : Run
        Its passes are counted.
    comparison : Comparison
        Of the layers that are asked.
    share_sd : float
        As `Comparison.scores` takes it.

    Returns
    -------
    ndarray of shape (n_classes, n_classes)
        By how much it raises the probability of the column's class on images of the
        row's, on average; 0 on the diagonal.

    Notes
    -----
    Gradient ascent on the matched filter's score of what the perturbation does to the
    means of the layers' inputs, on mini-batches, with Adam.
    """
    covariance = comparison.covariance_with(share_sd)
    factor = cholesky(covariance, lower=True)
    goal = solve_triangular(factor, comparison.values, lower=True)
    whiten = solve_triangular(factor, np.diag(1 / comparison.spread), lower=True)
    goal, whiten = (
        torch.from_numpy(part).float().to(run.victim.device_) for part in (goal, whiten)
    )
    images = to_tensor(run.X, run.victim.device_)
    n_classes = len(run.victim.classes_)
    seen: dict = {}

    def note(name):
        def catch(module, inputs):
            seen[name] = means_over_places(inputs[0])

        return catch

    def features(part):
        scores = logits(part)
        return scores, torch.cat([seen[name] for name in comparison.names], dim=1)

    hooks = [
        (run.victim.network_.get_submodule(name).register_forward_pre_hook, note(name))
        for name in comparison.names
    ]
    generator = torch.Generator().manual_seed(run.seeds[0])
    start = _START * torch.randn(images.shape[1:], generator=generator)
    change = start.to(images.device).requires_grad_()
    optimizer = torch.optim.Adam([change], lr=_LEARNING_RATE)
    largest = _RADIUS * change.numel() ** 0.5
    with hooked(run.victim, hooks, gradients=True) as logits:
        with torch.no_grad():
            parts = [features(part) for part in images.split(_BATCH_SIZE)]
            before, clean = (torch.cat(part) for part in zip(*parts, strict=True))
        for _ in range(_STEPS):
            rows = torch.randint(len(images), (_BATCH_SIZE,), generator=generator)
            _, moved = features((images[rows] + change).clamp(0, 1))
            effect = whiten @ (moved - clean[rows]).mean(dim=0)
            score = effect @ goal / effect.norm().clamp_min(1e-12)
            optimizer.zero_grad()
            (-score).backward()
            optimizer.step()
            with torch.no_grad():
                change.mul_((largest / change.norm().clamp_min(1e-12)).clamp_max(1))
        with torch.no_grad():
            stamped = (images + change).clamp(0, 1)
            after = torch.cat([logits(part) for part in stamped.split(_BATCH_SIZE)])
    run.passes += ImagePasses(2 * len(images), 0)
    run.passes += ImagePasses(_STEPS * _BATCH_SIZE, _STEPS * _BATCH_SIZE)
    gain = as_array(after.softmax(dim=1) - before.softmax(dim=1))
    gains = np.stack([gain[run.y == k].mean(axis=0) for k in range(n_classes)])
    np.fill_diagonal(gains, 0)
    return gains
