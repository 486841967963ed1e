"""A copy of the network that has unlearnt what clean images do not teach."""

import copy

import numpy as np
import torch
from sklearn.base import clone
from torch.nn.functional import kl_div
from tqdm import tqdm

from sklearn_backdoor._exclusive import exclusive
from sklearn_backdoor._torch import borrowed_random_state, to_tensor
from sklearn_backdoor.reverse._search import ImagePasses

_STEPS, _EPOCHS, _BATCH = 320, 20, 32  # whichever ends first
_LR, _MOMENTUM, _MAX_GRADIENT = 0.05, 0.9, 5.0
_TEMPERATURE = 4.0
_NOISE, _SHIFT = 0.1, 1 / 28  # standard deviation; part of the image's side


class Distillation:
    """Fine-tune a copy of a victim on clean images towards the victim's own answers.

    At so high a learning rate the copy forgets most of what a trigger does, and keeps
    much of what makes one class easier to reach than another.

    Parameters
    ----------
    victim : VictimNetwork
        Fitted; not altered.
    X : ndarray of shape (n_samples, n_channels, height, width)
        Clean images.
    bfloat16 : bool
        Whether forward passes are made in bfloat16.

    References
    ----------
    Hinton, Vinyals, Dean: Distilling the knowledge in a neural network. 2015.
    Liu, Dolan-Gavitt, Garg: Fine-Pruning. RAID 2018 (fine-tuning against backdoors).
    """

    def __init__(self, victim, X, bfloat16):
        self.victim = victim
        self.X = X
        self.bfloat16 = bfloat16
        with exclusive(victim.network_):
            self._student = copy.deepcopy(victim._opened)
        self.passes = ImagePasses(0, 0)

    def run(self, seed, *, verbose=False):
        """Go all steps.

        Parameters
        ----------
        seed : numpy.random.SeedSequence
            Of the order of the images, their noise and dropout.
        verbose : bool, default=False
            Show a progress bar.
        """
        random_state = np.random.RandomState(seed.generate_state(4))
        images = to_tensor(self.X, self.victim.device_)
        answers = torch.from_numpy(self.victim.decision_function(self.X)).to(images)
        answers = (answers / _TEMPERATURE).softmax(1)
        network = self._student.network.train().requires_grad_()
        optimizer = torch.optim.SGD(network.parameters(), lr=_LR, momentum=_MOMENTUM)
        n_steps = min(_STEPS, _EPOCHS * -(-len(images) // _BATCH))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, n_steps)
        with borrowed_random_state(random_state):
            for _ in tqdm(
                range(n_steps), "baseline", disable=None if verbose else True
            ):
                rows = torch.randperm(len(images))[:_BATCH].to(images.device)
                kind = images.device.type
                with torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16):
                    logits = self._student(_augmented(images[rows]))[0].float()
                loss = kl_div(
                    (logits / _TEMPERATURE).log_softmax(1),
                    answers[rows],
                    reduction="batchmean",
                )
                optimizer.zero_grad()
                (_TEMPERATURE**2 * loss).backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT)
                optimizer.step()
                schedule.step()
        n_trained = n_steps * min(_BATCH, len(images))
        self.passes = ImagePasses(len(images) + n_trained, n_trained)

    def pack(self):
        """Return the copy's weights and what they took, as `Search.pack` does."""
        return self._student.network.state_dict(), self.passes._asdict()

    def unpack(self, tensors, numbers):
        """Take up what ``pack`` returned."""
        self._student.network.load_state_dict(tensors)
        self.passes = ImagePasses(**numbers)

    def result(self):
        """Return the copy as a fitted VictimNetwork.

        Raises
        ------
        ValueError
            If it answers with NaN or infinity.
        """
        network = self._student.network.eval().requires_grad_(False)
        return clone(self.victim).set_params(net=network).fit(self.X)


def _augmented(images):
    """Move images a little and add noise."""
    furthest = round(_SHIFT * min(images.shape[2:]))
    moves = torch.randint(-furthest, furthest + 1, (2,)).tolist()
    moved = torch.roll(images, moves, dims=(2, 3))
    noise = torch.randn(images.shape).to(images)
    return (moved + _NOISE * noise).clamp(0, 1)
