"""The fast search: several tasks stacked in one batch, whatever the trigger's form."""

from abc import abstractmethod

import torch
from torch.nn.functional import cross_entropy, one_hot

from sklearn_backdoor.reverse._search import (
    ImagePasses,
    Search,
    SearchResult,
    as_array,
)

_BEST_RATE = 0.99  # refining need not go further
_MEMORY = 0.7  # of the running success rates
_SOFTNESS = 1.5  # of learnt source weights, in units of cross-entropy
_SLACK = 0.2  # of the rates between the one wanted and 1
_N_MEASURED = 64  # images on which a task's success is measured
_N_HALVINGS = 5  # of the factor that brings a trigger to the success rate
_N_SNAPSHOTS = 6  # while refining
_STRETCHES = (1.0, 1.25, 1.6)  # of each snapshot


class StackedSearch(Search):
    """Search triggers of the same kind for several tasks in one batch.

    Parameters
    ----------
    problem, tasks, generators
        As in `Search`.
    steps, batch_size : int
        Steps, and images a task in each.
    success_rate : float
        At which norms are compared.
    learn_sources : bool, default=False
        Weight source classes by how easily they reach the target.
    starts : list of SearchResult or None, default=None
        Triggers (and source weights) to start from.
    price : float or None, default=None
        If given, refine: raise the success rate to 0.99 on the way, and keep the
        trigger with the largest success minus price times norm.
    """

    _shape: tuple = ()  # names of the tensors that make up a trigger

    def __init__(
        self,
        problem,
        tasks,
        generators,
        *,
        steps,
        batch_size,
        success_rate,
        learn_sources=False,
        starts=None,
        price=None,
    ):
        super().__init__(problem, tasks, generators)
        self.steps = steps
        self.batch_size = batch_size
        self.learn_sources = learn_sources
        self.success_rate = success_rate
        self.price = price
        n_tasks, device = len(tasks), problem.images.device
        self.targets = torch.tensor([task.target for task in tasks], device=device)
        self._rows = [problem.sources(task) for task in tasks]
        self._is_source = torch.stack(
            [one_hot(problem.y[rows], problem.n_classes).any(0) for rows in self._rows]
        )
        if starts is None:
            shape = self._begin(problem.images.shape[1:], generators)
        else:
            shape = self._take_up([start.trigger for start in starts])
        shape = {name: value.to(device) for name, value in shape.items()}
        self.tensors.update(shape)
        for name, value in shape.items():
            self.tensors[f"best.{name}"] = value.detach().clone()
        losses = torch.zeros((n_tasks, problem.n_classes), device=device)
        if (
            learn_sources
            and starts is not None
            and starts[0].source_weights is not None
        ):
            weights = torch.stack([torch.tensor(s.source_weights) for s in starts])
            losses = -_SOFTNESS * weights.to(losses).clamp_min(1e-6).log()
        if price is not None:
            for name, value in shape.items():
                self.tensors[f"snapshot.0.{name}"] = value.detach().clone()
        self.tensors.update(
            rate=torch.zeros(n_tasks, device=device),
            class_rates=torch.zeros((n_tasks, problem.n_classes), device=device),
            class_losses=losses,
            best_norm=torch.full((n_tasks,), torch.inf, device=device),
            nan_step=torch.full((n_tasks,), -1, device=device),
        )

    @abstractmethod
    def _begin(self, image_shape, generators):
        """Return the tensors of new triggers."""

    @abstractmethod
    def _take_up(self, triggers):
        """Return the tensors of given triggers."""

    @abstractmethod
    def _embed(self, images, shape):
        """Embed into images (n_tasks, n_images, n_channels, height, width)."""

    @abstractmethod
    def _norms(self, shape):
        """Return a norm a task."""

    @abstractmethod
    def _scaled(self, shape, factors):
        """Return triggers scaled by a factor a task."""

    @abstractmethod
    def _trigger(self, shape, number):
        """Return one task's Trigger."""

    @abstractmethod
    def _move(self, losses, hits):
        """Go one step down the losses (one a task), from images not yet there."""

    @property
    def done(self):
        """Whether all steps are made."""
        return self.numbers["step"] >= self.steps

    @property
    def _now(self):
        return {name: self.tensors[name] for name in self._shape}

    @property
    def _level(self):
        """The success rate to keep at this step."""
        if self.price is None:
            return self.success_rate
        part = min(1.0, self.numbers["step"] / (0.7 * self.steps))
        return self.success_rate + part * (
            max(_BEST_RATE, self.success_rate) - self.success_rate
        )

    def progress(self):
        """Return success rate and norm of the task with the smallest norm."""
        norms = self._norms(self._now).detach()
        number = int(norms.argmin())
        return float(self.tensors["rate"][number]), float(norms[number])

    def step(self):
        """Go one step with all tasks that met no NaN."""
        before = {name: value.detach().clone() for name, value in self._now.items()}
        rows = torch.stack([self._draw(number) for number in range(len(self.tasks))])
        y = self.problem.y[rows]
        scores = self._scores(self.problem.images[rows], self._now)
        wanted = self.targets[:, None].expand_as(y)
        losses = cross_entropy(
            scores.flatten(0, 1), wanted.flatten(), reduction="none"
        ).view_as(wanted)
        hits = (scores.argmax(2) == wanted) & ~scores.isnan().any(2)
        self._note_nan(~losses.isfinite().all(1))
        with torch.no_grad():
            weights = self._weigh(losses, hits, y)
        self._move(weights * losses, hits)
        with torch.no_grad():
            for value in self._now.values():
                self._note_nan(~value.flatten(1).isfinite().all(1))
            failed = self.tensors["nan_step"] >= 0
            for name, value in self._now.items():
                value[failed] = before[name][failed]
            self.numbers["step"] += 1
            self.numbers["forward"] += self.batch_size
            self.numbers["backward"] += self.batch_size
            self._keep_best(before)

    def _draw(self, number):
        rows, generator = self._rows[number], self.generators[number]
        if not self.learn_sources:
            drawn = torch.randint(len(rows), (self.batch_size,), generator=generator)
            return rows[drawn.to(rows.device)]
        # half of the batch evenly, to go on learning; half where the weight lies
        chances = self._row_chances(number)
        chances = 0.5 * chances + 0.5 / len(rows)
        drawn = torch.multinomial(
            chances.cpu(), self.batch_size, replacement=True, generator=generator
        )
        return rows[drawn.to(rows.device)]

    def _row_chances(self, number):
        """Spread a task's source weights over its images."""
        y = self.problem.y[self._rows[number]]
        counts = torch.bincount(y, minlength=self.problem.n_classes).clamp_min(1)
        return (self._source_weights()[number] / counts)[y].double()

    def _source_weights(self):
        """Return weights (n_tasks, n_classes) that add up to 1."""
        losses = self.tensors["class_losses"]
        return torch.softmax(
            torch.where(self._is_source, -losses / _SOFTNESS, -torch.inf), dim=1
        )

    def _scores(self, images, shape):
        flat = self._embed(images, shape).flatten(0, 1)
        return self.problem.logits(flat).view(*images.shape[:2], -1)

    def _note_nan(self, bad):
        first = bad & (self.tensors["nan_step"] < 0)
        self.tensors["nan_step"][first] = self.numbers["step"]

    def _weigh(self, losses, hits, y):
        """Update the running success rates; return a weight an image."""
        first = self.numbers["step"] == 0
        if not self.learn_sources:
            rate = hits.float().mean(1)
            old = self.tensors["rate"]
            self.tensors["rate"] = rate if first else torch.lerp(rate, old, _MEMORY)
            return torch.full_like(losses, 1 / losses.shape[1])
        member = one_hot(y, self.problem.n_classes).float()
        counts = member.sum(1)
        share = torch.where(counts > 0, 1 - _MEMORY, 0.0)
        for name, values in (("class_losses", losses), ("class_rates", hits.float())):
            old = self.tensors[name]
            means = torch.einsum("tb,tbc->tc", values.nan_to_num(), member)
            means = means / counts.clamp_min(1)
            fresh = first & (name == "class_rates" or not old.any())
            self.tensors[name] = means if fresh else torch.lerp(old, means, share)
        weights = self._source_weights()
        self.tensors["rate"] = (weights * self.tensors["class_rates"]).sum(1)
        image_weights = (weights / counts.clamp_min(1)).gather(1, y)
        return image_weights / image_weights.sum(1, keepdim=True).clamp_min(1e-12)

    def _keep_best(self, before):
        """Keep the smallest trigger whose running success rate was high enough."""
        if self.price is not None:
            every = max(1, self.steps // _N_SNAPSHOTS)
            if self.numbers["step"] % every == 0:
                for name, value in self._now.items():
                    snapshot = f"snapshot.{self.numbers['step'] // every}.{name}"
                    self.tensors[snapshot] = value.detach().clone()
            return
        if 3 * self.numbers["step"] < self.steps:
            return  # the running rates are not settled
        norms = self._norms(before)
        # some slack: a mask that is opaque already cannot be scaled up
        slack = _SLACK * (1 - self.success_rate)
        good = self.tensors["rate"] >= self.success_rate + slack
        good &= norms < self.tensors["best_norm"]
        self.tensors["best_norm"] = torch.where(good, norms, self.tensors["best_norm"])
        for name in self._shape:
            self.tensors[f"best.{name}"][good] = before[name][good]

    def results(self):
        """Bring each trigger to the success rate, or choose among the refined."""
        with torch.no_grad():
            if self.price is not None:
                shape, rates, n_forward = self._choose()
            else:
                shape, rates, n_forward = self._bring_to_rate()
            norms = self._norms(shape)
        passes = self.passes + ImagePasses(n_forward, 0)
        weights = self._source_weights() if self.learn_sources else None
        found = []
        for number, (rate, norm) in enumerate(
            zip(rates.tolist(), norms.tolist(), strict=True)
        ):
            nan_step = int(self.tensors["nan_step"][number])
            reason = ""
            if nan_step >= 0:
                reason = f"the network returned NaN or infinity at step {nan_step}"
            elif rate < self.success_rate:
                reason = (
                    f"success rate {rate:.2f} after {self.steps} steps, "
                    f"{self.success_rate:.2f} wanted"
                )
            found.append(
                SearchResult(
                    self._trigger(shape, number),
                    norm,
                    rate,
                    not reason,
                    passes,
                    reason,
                    None if weights is None else as_array(weights[number]),
                )
            )
        return found

    def _rows_to_measure(self, n_images):
        if not self.learn_sources and all(t.source is not None for t in self.tasks):
            n_images = min(n_images, int(torch.bincount(self.problem.y).max()))
        drawn = []
        for number, rows in enumerate(self._rows):
            generator = self.generators[number]
            if self.learn_sources:
                chances = self._row_chances(number).cpu()
                picked = torch.multinomial(
                    chances, n_images, replacement=True, generator=generator
                )
            else:
                picked = torch.randperm(len(rows), generator=generator)
                picked = picked.repeat(-(-n_images // len(rows)))[:n_images]
            drawn.append(rows[picked.to(rows.device)])
        return torch.stack(drawn)

    def _measure(self, rows, shape):
        """Return each task's success rate on its rows."""
        hits = []
        for part in rows.split(64, dim=1):
            scores = self._scores(self.problem.images[part], shape)
            hit = scores.argmax(2) == self.targets[:, None]
            hits.append((hit & ~scores.isnan().any(2)).float())
        return torch.cat(hits, dim=1).mean(1)

    def _bring_to_rate(self):
        """Find the smallest multiple of each trigger that reaches the rate."""
        seen = self.tensors["best_norm"].isfinite()
        shape = {}
        for name, value in self._now.items():
            wide = seen.view(-1, *[1] * (value.dim() - 1))
            shape[name] = torch.where(wide, self.tensors[f"best.{name}"], value)
        rows = self._rows_to_measure(_N_MEASURED)
        low, high = torch.zeros_like(self.tensors["rate"]), None
        high = torch.full_like(low, 2.0)
        rates = self._measure(rows, self._scaled(shape, high))
        for _ in range(_N_HALVINGS):
            middle = (low + high) / 2
            seen_rates = self._measure(rows, self._scaled(shape, middle))
            enough = seen_rates >= self.success_rate
            high = torch.where(enough, middle, high)
            rates = torch.where(enough, seen_rates, rates)
            low = torch.where(enough, low, middle)
        n_forward = (1 + _N_HALVINGS) * rows.shape[1]
        return self._scaled(shape, high), rates, n_forward

    def _choose(self):
        """Take the refined trigger that is worth its norm (§4.1: strong, but small)."""
        rows = self._rows_to_measure(2 * _N_MEASURED)
        prefixes = {name.rpartition(".")[0] for name in self.tensors}
        names = sorted(name for name in prefixes if name.startswith("snapshot"))
        best_value = torch.full_like(self.tensors["rate"], -torch.inf)
        best = {name: value.detach().clone() for name, value in self._now.items()}
        best_rates = torch.zeros_like(best_value)
        n_forward = 0
        for prefix in names:
            snapshot = {name: self.tensors[f"{prefix}.{name}"] for name in self._shape}
            for stretch in _STRETCHES:
                shape = self._scaled(snapshot, torch.full_like(best_value, stretch))
                rates = self._measure(rows, shape)
                n_forward += rows.shape[1]
                value = rates - self.price * self._norms(shape)
                better = value > best_value
                best_value = torch.where(better, value, best_value)
                best_rates = torch.where(better, rates, best_rates)
                for name in self._shape:
                    best[name][better] = shape[name][better]
        return best, best_rates, n_forward
