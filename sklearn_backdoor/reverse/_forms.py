"""The forms of a trigger that the fast search can take: patches and additions."""

import torch

from sklearn_backdoor.reverse._search import apply_gradients, as_array
from sklearn_backdoor.reverse._stacked import StackedSearch
from sklearn_backdoor.triggers import AdditiveTrigger, PatchTrigger

_FAINT = 0.1  # first opacity of a mask for one source class


class PatchSearch(StackedSearch):
    """Masks and patterns, moved by Adam in 0...1; the norm is L1 of the mask.

    The mask's cost rises with the success rate's surplus and falls with its deficit.
    """

    optimizer: torch.optim.Adam
    _shape = ("mask", "pattern")
    _lr, _betas, _last_lr = 0.1, (0.5, 0.9), 0.2

    def __init__(self, problem, tasks, generators, **options):
        super().__init__(problem, tasks, generators, **options)
        for name in self._shape:
            self.tensors[name].requires_grad_()
        self.optimizer = torch.optim.Adam(
            list(self._now.values()), lr=self._lr, betas=self._betas
        )
        cost = torch.full_like(
            self.tensors["rate"], 1 / self.tensors["mask"][0].numel()
        )
        if self.price is not None:
            cost = torch.full_like(cost, 2 * self.price)  # two nats for a success
        elif options.get("starts") is not None:
            norms = self._norms(self._now).detach()
            cost = 2 * self.success_rate / norms.clamp_min(1.0)
        self.tensors["cost"] = cost

    def _begin(self, image_shape, generators):
        # for one source class faint masks: the first gradients are those of its images
        opacities = [1.0 if task.source is None else _FAINT for task in self.tasks]
        masks = [
            opacity * torch.rand((1, *image_shape[1:]), generator=g)
            for opacity, g in zip(opacities, generators, strict=True)
        ]
        patterns = [torch.rand(tuple(image_shape), generator=g) for g in generators]
        return {"mask": torch.stack(masks), "pattern": torch.stack(patterns)}

    def _take_up(self, triggers):
        return {
            "mask": torch.stack([torch.tensor(t.mask)[None] for t in triggers]),
            "pattern": torch.stack([torch.tensor(t.pattern) for t in triggers]),
        }

    def _embed(self, images, shape):
        mask = shape["mask"][:, None]
        return (1 - mask) * images + mask * shape["pattern"][:, None]

    def _norms(self, shape):
        return shape["mask"].sum(dim=(1, 2, 3))

    def _scaled(self, shape, factors):
        mask = (shape["mask"] * factors.view(-1, 1, 1, 1)).clamp(0, 1)
        return {"mask": mask, "pattern": shape["pattern"].detach()}

    def _trigger(self, shape, number):
        return PatchTrigger(
            as_array(shape["mask"][number, 0]), as_array(shape["pattern"][number])
        )

    def _penalty(self):
        """Return what is to be small, a value a task."""
        return self.tensors["cost"] * self._norms(self._now)

    def _move(self, losses, hits):
        part = self.numbers["step"] / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * (1 - (1 - self._last_lr) * part)
        loss = (losses.sum(1) + self._penalty()).sum()
        apply_gradients(self.optimizer, list(self._now.values()), loss)
        with torch.no_grad():
            for value in self._now.values():
                value.clamp_(0, 1)
            surplus = self.tensors["rate"] - self._level
            self.tensors["cost"] *= surplus.exp().clamp(0.5, 1.5)


class AdditiveSearch(StackedSearch):
    """Perturbations, grown by normalised gradient steps from 0; the norm is L2.

    While the success rate is reached, the perturbation shrinks. Of each step the
    frequencies below ``min_frequency`` are taken out.
    """

    _shape = ("perturbation",)
    _length, _fine_length = 0.012, 0.02  # of a step, times the root of the values
    _last_length, _shrinkage = 0.2, 0.06

    def __init__(self, problem, tasks, generators, *, min_frequency=0.0, **options):
        super().__init__(problem, tasks, generators, **options)
        self.tensors["perturbation"].requires_grad_()
        self._pass = None
        if min_frequency > 0:
            device = problem.images.device
            self._pass = _HighPass(problem.images.shape[2:], min_frequency, device)
            self._length = self._fine_length

    def _begin(self, image_shape, generators):
        return {"perturbation": torch.zeros((len(generators), *image_shape))}

    def _take_up(self, triggers):
        kept = [torch.tensor(trigger.perturbation) for trigger in triggers]
        return {"perturbation": torch.stack(kept)}

    def _embed(self, images, shape):
        return (images + shape["perturbation"][:, None]).clamp(0, 1)

    def _norms(self, shape):
        return shape["perturbation"].flatten(1).norm(dim=1)

    def _scaled(self, shape, factors):
        moved = shape["perturbation"] * factors.view(-1, 1, 1, 1)
        return {"perturbation": moved.clamp(-1, 1)}

    def _trigger(self, shape, number):
        return AdditiveTrigger(as_array(shape["perturbation"][number]))

    def _move(self, losses, hits):
        moved = self.tensors["perturbation"]
        loss = (losses * ~hits).sum()
        (gradient,) = torch.autograd.grad(loss, [moved])
        if self._pass is not None:
            gradient = self._pass(gradient)
        sizes = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        part = self.numbers["step"] / self.steps
        length = self._length * moved[0].numel() ** 0.5
        length *= 1 - (1 - self._last_length) * max(0.0, 2 * part - 1)
        with torch.no_grad():
            moved -= length * gradient / sizes.view(-1, 1, 1, 1)
            reached = self.tensors["rate"] >= self._level
            moved[reached] *= 1 - self._shrinkage
            moved.clamp_(-1, 1)


class _HighPass:
    """Takes the low spatial frequencies out of images, by their cosine transform."""

    def __init__(self, size, min_frequency, device):
        self.rows, self.columns = (_cosines(n).to(device) for n in size)
        parts = [torch.arange(n, device=device) / n for n in size]
        self.kept = torch.hypot(parts[0][:, None], parts[1][None]) >= min_frequency

    def __call__(self, images):
        spectrum = self.rows @ images @ self.columns.T
        return self.rows.T @ (spectrum * self.kept) @ self.columns


def _cosines(n):
    """Return the orthonormal cosine transform (DCT-II) of n values, as a matrix."""
    numbers = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(torch.pi / n * numbers[:, None] * (numbers + 0.5))
    return (waves / waves.norm(dim=1, keepdim=True)).float()
