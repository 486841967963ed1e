"""Train a victim by its recipe, so that a stopped training goes on."""

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sklearn_backdoor._torch import borrowed_random_state, to_tensor

_PAD = 4  # pixels by which a crop may shift


def train(network, X, y, recipe, checkpoint, *, device="cpu", log=print):
    """Train a network, leaving a checkpoint after each epoch.

    Parameters
    ----------
    network : callable returning a torch.nn.Module
        A factory: the initial weights come from the recipe's seed.
    X : ndarray of uint8, shape (n_samples, n_channels, height, width)
    y : ndarray of int, shape (n_samples,)
    recipe : dict
        ``seed, epochs, batch_size, lr``, and ``optimizer`` ("adam" or "sgd", the second
        with momentum 0.9 and weight decay 5e-4), ``schedule`` ("one-cycle", or
        "halved every N" epochs), ``augment`` (a list of "crop", "even-crop", "flip")
        and ``bfloat16`` (autocast).
    checkpoint : path-like
        A training that was stopped goes on from here, to the same weights; removed by
        the caller once these are kept.
    device : str, default="cpu"
        Where it trains.
    log : callable, default=print
        Called with a line an epoch.

    Returns
    -------
    torch.nn.Module
        In evaluation mode.

    Notes
    -----
    An even crop shifts by even numbers of pixels and keeps a chessboard's parity.
    """
    checkpoint, seed = Path(checkpoint), recipe["seed"]
    kind = torch.device(device).type
    with borrowed_random_state(seed):
        network = network().to(device)
    if kind == "cuda":
        network.to(memory_format=torch.channels_last)  # what bfloat16 is fast in
    n_steps = -(-len(X) // recipe["batch_size"])
    optimizer, schedule = _optimizer(network, recipe, n_steps)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["epoch"]
    loss_of = nn.CrossEntropyLoss()
    for epoch in range(start, recipe["epochs"]):
        began, total = time.perf_counter(), 0.0
        random_state = np.random.RandomState([seed, epoch])
        with borrowed_random_state(random_state):  # dropout
            network.train()
            order = random_state.permutation(len(X))
            for rows in np.array_split(order, n_steps):
                images = _augment(X[rows], recipe["augment"], random_state)
                with torch.autocast(kind, torch.bfloat16, enabled=recipe["bfloat16"]):
                    logits = network(to_tensor(images, device))
                wanted = torch.as_tensor(y[rows], device=device)
                loss = loss_of(logits.float(), wanted)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(rows)
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch + 1,
        }
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = checkpoint.with_suffix(f".part{os.getpid()}")
        torch.save(state, part)
        part.replace(checkpoint)
        log(
            f"epoch {epoch + 1}/{recipe['epochs']}: loss {total / len(X):.3f}, "
            f"{time.perf_counter() - began:.0f} s"
        )
    optimizer.zero_grad(set_to_none=True)
    return network.to(memory_format=torch.contiguous_format).eval()


def _optimizer(network, recipe, n_steps):
    parameters, lr = network.parameters(), recipe["lr"]
    optimizer: torch.optim.Optimizer
    if recipe["optimizer"] == "adam":
        optimizer = torch.optim.Adam(parameters, lr=lr)
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
    scheduler = torch.optim.lr_scheduler
    if recipe["schedule"] == "one-cycle":
        return optimizer, scheduler.OneCycleLR(
            optimizer, max_lr=lr, total_steps=recipe["epochs"] * n_steps
        )
    every = int(recipe["schedule"].removeprefix("halved every "))
    return optimizer, scheduler.StepLR(optimizer, every * n_steps, gamma=0.5)


def _augment(X, augment, random_state):
    """Shift each image by up to four pixels, over black, and flip every other one."""
    crops = {"crop": 1, "even-crop": 2}
    for kind in augment:
        if kind == "flip":
            flipped = random_state.rand(len(X)) < 0.5
            X = np.where(flipped[:, None, None, None], X[..., ::-1], X)
            continue
        step = crops[kind]
        height, width = X.shape[2:]
        shifts = step * random_state.randint(2 * _PAD // step + 1, size=(len(X), 2))
        sides = ((0, 0), (0, 0), (_PAD, _PAD), (_PAD, _PAD))
        padded = np.pad(X, sides)
        X = np.stack(
            [
                image[:, top : top + height, left : left + width]
                for image, (top, left) in zip(padded, shifts, strict=True)
            ]
        )
    return X
