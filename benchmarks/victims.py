"""Poisoned networks to measure on, trained once and kept by a hash of their recipe."""

import hashlib
import json
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from sklearn_backdoor import datasets, poison, white_box
from sklearn_backdoor.networks import LeNet5
from sklearn_backdoor.training import train_network

VICTIMS = Path(__file__).parents[1] / ".victims"
LOADERS = {
    "fashion-mnist": datasets.load_fashion_mnist,
    "mnist": datasets.load_mnist,
}


def white_box_lenet5(dataset, data, *, seed, victims=VICTIMS, epochs=10, lr=1e-3):
    """Train LeNet-5 on multi-class white box poison, or load it (§5.1).

    Parameters
    ----------
    dataset : str
        A key of ``LOADERS``.
    data : Bunch
        What the loader returned.
    seed : int
        Which images are poisoned, the initial weights and the order of training.
    epochs, lr : int, float
        Length of the training, and peak of its rate.
    victims : path-like
        Folder of ``<hash>.safetensors`` and ``<hash>.json``.

    Returns
    -------
    network : torch.nn.Module
    trigger : PatchTrigger
        The true one.
    recipe : dict
        All settings.
    """
    recipe = {
        "version": 2,  # raise it when train_network or poison changes what they make
        "dataset": dataset,
        "data_source": data.data_source,
        "network": "lenet5",
        "attack": "white-box",
        "sources": "all",
        "n_per_class": 100,
        "target_class": 9,
        "epochs": epochs,
        "lr": lr,
        "batch_size": 128,
        "optimizer": "Adam, one-cycle rate",
        "seed": seed,
    }
    trigger = white_box((1, 28, 28))
    text = json.dumps(recipe, sort_keys=True)
    path = (
        Path(victims) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    )
    if path.exists():
        network = LeNet5()
        network.load_state_dict(load_file(path))
        return network.eval(), trigger, recipe
    poisoned = poison(
        data.X_train,
        data.y_train,
        trigger,
        target_class=recipe["target_class"],
        n_per_class=recipe["n_per_class"],
        random_state=seed,
    )
    network = train_network(
        partial(LeNet5, n_classes=10),
        poisoned.X,
        poisoned.y,
        epochs=recipe["epochs"],
        lr=recipe["lr"],
        batch_size=recipe["batch_size"],
        random_state=seed,
        on_epoch=lambda epoch, loss: print(f"  epoch {epoch}: {loss:.4f}", flush=True),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), path)
    path.with_suffix(".json").write_text(text)
    return network, trigger, recipe
