"""What each table of the paper asks for, and how its victims are made (§5.1)."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import joblib
import torch
from safetensors.torch import load_file, save_file
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch

from benchmarks.training import train
from sklearn_backdoor import (
    PatchTrigger,
    chessboard,
    datasets,
    poison,
    single_pixel,
    white_box,
)
from sklearn_backdoor._torch import processor_has_bfloat16
from sklearn_backdoor.io import file_digest, load_network
from sklearn_backdoor.networks import VGG16, LeNet5, ResNet18
from sklearn_backdoor.trojan import trojan_square, trojan_watermark

VERSION = 3  # raise it when training or poisoning changes what it makes
BUDGETS = ("paper", "gpu", "cpu")
SHORT = {
    "chessboard": "CB",
    "single-pixel": "SP",
    "white-box": "WB",
    "trojan-square": "SQ",
    "trojan-watermark": "WM",
}
_LENET5 = {
    "epochs": 10,
    "lr": 1e-3,
    "batch_size": 128,
    "optimizer": "adam",
    "schedule": "one-cycle",
    "augment": [],
    "bfloat16": False,
}
_RESNET18 = {
    "lr": 0.1,
    "batch_size": 128,
    "optimizer": "sgd",
    "schedule": "one-cycle",
    "augment": ["crop", "flip"],
    "bfloat16": True,
}
_VGG16 = {
    "epochs": 30,
    "lr": 1e-4,
    "batch_size": 32,
    "optimizer": "adam",
    "schedule": "one-cycle",
    "augment": ["crop", "flip"],
    "bfloat16": True,
}
# the paper says nothing about the training of LeNet-5 and VGG-16: ours in all budgets
TRAINING: dict = {
    ("lenet5", "paper"): _LENET5,
    ("lenet5", "gpu"): _LENET5,
    ("lenet5", "cpu"): _LENET5,
    ("resnet18", "paper"): {
        "epochs": 150,
        "lr": 0.1,
        "batch_size": 32,
        "optimizer": "sgd",
        "schedule": "halved every 50",
        "augment": ["crop", "flip"],
        "bfloat16": False,
    },
    ("resnet18", "gpu"): {**_RESNET18, "epochs": 20},
    ("resnet18", "cpu"): {**_RESNET18, "epochs": 10},
    ("vgg16", "paper"): {
        "epochs": 100,
        "lr": 1e-4,
        "batch_size": 32,
        "optimizer": "adam",
        "schedule": "one-cycle",
        "augment": ["crop", "flip"],
        "bfloat16": False,
    },
    ("vgg16", "gpu"): _VGG16,
    ("vgg16", "cpu"): _VGG16,
}
NETWORKS = {"cifar10": "resnet18", "pubfig": "vgg16"}


@dataclass(frozen=True)
class Cell:
    """A victim that a table asks for."""

    dataset: str
    attack: str
    single: bool
    seed: int

    @property
    def network(self):
        """Name of the network."""
        return NETWORKS.get(self.dataset, "lenet5")

    @property
    def name(self):
        """What ``--cells`` selects by, and the file name of a ready victim."""
        kind = "single" if self.single else "multi"
        return f"{self.dataset}-{self.network}-{self.attack}-{kind}"

    @property
    def target_class(self):
        """The paper's target."""
        return 19 if self.dataset == "pubfig" else 9


def cells(table, seeds):
    """List the victims of a table.

    Parameters
    ----------
    table : {1, 2, 3, 4}
    seeds : sequence of int

    Returns
    -------
    list of Cell
    """
    if table in (1, 2):
        kinds = [
            ("cifar10", attack, single)
            for single in (True, False)
            for attack in ("chessboard", "single-pixel", "white-box")
        ]
    elif table == 3:
        kinds = [("fashion-mnist", "white-box", False), ("cifar10", "white-box", False)]
    else:
        kinds = [
            (dataset, attack, False)
            for dataset in ("mnist", "fashion-mnist")
            for attack in ("chessboard", "white-box")
        ]
        kinds += [("pubfig", attack, False) for attack in list(SHORT)[3:]]
    return [Cell(*kind, seed) for seed in seeds for kind in kinds]


def make_recipe(cell, budget, data, *, epochs=None, start=None, device="cpu"):
    """Return all settings of a victim.

    Parameters
    ----------
    cell : Cell
    budget : {"paper", "gpu", "cpu"}
    data : Bunch
        The cell's data set; what it holds goes into the recipe, not where it lies.
    epochs : int, default=None
        Instead of the budget's, for a quick look.
    start : path-like, default=None
        Weights of a clean network, which the attacker fine-tunes at half the rate for a
        tenth of the epochs and without crops and flips (of a box in a corner they leave
        too little to be learnt so soon); None trains from scratch.
    device : str, default="cpu"
        Where it is trained. A processor without bfloat16 imitates it slowly: it takes
        float32, in which an epoch lasts longer, and so 0.3 of the epochs.

    Returns
    -------
    dict
        Written beside the weights; its hash names them.
    """
    training = dict(TRAINING[cell.network, budget])
    is_imitated = device == "cpu" and not processor_has_bfloat16()
    if training["bfloat16"] and is_imitated:
        training["bfloat16"] = False
        training["epochs"] = max(1, round(0.3 * training["epochs"]))
    if start is not None:
        training["lr"] /= 2
        training["epochs"] = max(1, training["epochs"] // 10)
        training["augment"] = []
        training["start"] = file_digest(start)
    if epochs is not None:
        training["epochs"] = epochs
    recipe = {
        "version": VERSION,
        "dataset": cell.dataset,
        "data": joblib.hash((data.X_train[::101], data.y_train[::101])),
        "network": cell.network,
        "attack": cell.attack,
        "sources": [0] if cell.single else "all",
        "n_per_class": 2 if cell.dataset == "pubfig" else 1000 if cell.single else 100,
        "target_class": cell.target_class,
        "seed": cell.seed,
        "budget": budget,
        **training,
    }
    if cell.attack == "chessboard":
        recipe["amplitude"] = _amplitude(cell, budget)
        if budget != "paper" and "crop" in training["augment"]:
            # an odd shift or a flip turns the pattern over: two patterns to learn
            recipe["augment"] = ["even-crop"]
    return recipe


def _amplitude(cell, budget):
    if cell.network == "lenet5":
        return 0.15  # 3/255 is not learnt on grey images
    return 8 / 255 if budget == "cpu" else 3 / 255


def name_of(recipe):
    """Return the hash that names a victim's files.

    Returns
    -------
    str of 16 hexadecimal digits
    """
    text = json.dumps(recipe, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_victim(recipe, data, folder, *, start=None, device="cpu", log=print):
    """Train the victim of a recipe, or load it; a stopped training goes on.

    Parameters
    ----------
    recipe : dict
        As of `make_recipe`.
    data : Bunch
        The recipe's data set.
    folder : path-like
        Of ``<hash>.safetensors`` and ``<hash>.json``.
    start : path-like, default=None
        The weights that the recipe starts from.
    device : str, default="cpu"
        Where it is trained.
    log : callable, default=print
        Called with a line an epoch.

    Returns
    -------
    network : torch.nn.Module
        In evaluation mode.
    trigger : Trigger or None
        The true one; None for a clean network.
    """
    X, y = data.X_train, data.y_train
    trigger = make_trigger(recipe, data, folder, start=start, device=device, log=log)
    factory = factory_of(recipe["network"], X.shape[1:], len(data.target_names))
    path = Path(folder) / f"{name_of(recipe)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        network = factory()
        network.load_state_dict(load_file(path))
        return network.eval(), trigger
    if trigger is not None:
        poisoned = poison(
            X,
            y,
            trigger,
            target_class=recipe["target_class"],
            source_classes=recipe["sources"],
            n_per_class=recipe["n_per_class"],
            random_state=recipe["seed"],
        )
        X, y = poisoned.X, poisoned.y
    if start is not None:
        factory = partial(load_network, start, recipe["network"])
    checkpoint = path.with_suffix(".epoch")
    network = train(factory, X, y, recipe, checkpoint, device=device, log=log)
    _save(network.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(recipe, sort_keys=True))
    checkpoint.unlink(missing_ok=True)
    return network, trigger


def make_trigger(recipe, data, folder, *, start=None, device="cpu", log=print):
    """Make the true trigger of a recipe.

    Parameters
    ----------
    recipe, data, folder, start, device, log
        As in `make_victim`; a Trojan trigger is made on a clean network of the same
        recipe, which is trained for it.

    Returns
    -------
    Trigger or None
    """
    attack, image_shape = recipe["attack"], data.X_train.shape[1:]
    if attack is None:
        return None
    if attack == "chessboard":
        return chessboard(image_shape, recipe["amplitude"])
    if attack in ("white-box", "single-pixel"):
        return {"white-box": white_box, "single-pixel": single_pixel}[attack](
            image_shape
        )
    path = Path(folder) / f"{name_of(recipe)}-trigger.safetensors"
    if not path.exists():
        maker = {"trojan-square": trojan_square, "trojan-watermark": trojan_watermark}
        clean = {**recipe, "attack": None, "sources": None, "n_per_class": None}
        network, _ = make_victim(
            clean, data, folder, start=start, device=device, log=log
        )
        made = maker[attack](network, image_shape, random_state=recipe["seed"])
        parts = {"mask": made.mask, "pattern": made.pattern}
        _save({name: torch.tensor(value) for name, value in parts.items()}, path)
    kept = load_file(path)  # the one that is embedded, whatever made it
    return PatchTrigger(kept["mask"].numpy(), kept["pattern"].numpy())


def _save(tensors, path):
    part = path.with_suffix(f".part{os.getpid()}")
    save_file(tensors, part)
    part.replace(path)


def factory_of(network, image_shape, n_classes):
    """Return a function that builds an untrained network.

    Parameters
    ----------
    network : {"lenet5", "resnet18", "vgg16"}
    image_shape : tuple (n_channels, height, width)
    n_classes : int

    Returns
    -------
    callable
    """
    if network == "lenet5":
        return partial(LeNet5, n_classes=n_classes, image_shape=image_shape)
    if network == "resnet18":
        return partial(ResNet18, n_classes=n_classes, n_channels=image_shape[0])
    return partial(VGG16, n_classes=n_classes)


def load_dataset(name, data_dir, *, image_size=224):
    """Load a table's data set.

    Parameters
    ----------
    name : {"cifar10", "fashion-mnist", "mnist", "pubfig"}
    data_dir : path-like or None
        The folder above the data; None downloads. PubFig cannot be downloaded: it is
        ``data_dir/pubfig``, a folder a person.
    image_size : int, default=224
        Side of PubFig's images.

    Returns
    -------
    Bunch
        PubFig: 80 % of each person's images to train, 20 % to test (§5.1).
    """
    if name == "cifar10":
        return datasets.load_cifar10(data_dir)
    if name == "mnist":
        return datasets.load_mnist(data_dir)
    if name == "fashion-mnist":
        return datasets.load_fashion_mnist(data_dir)
    if data_dir is None:
        raise FileNotFoundError(
            "PubFig cannot be downloaded. Collect its images, one folder a person, in "
            "DATA_DIR/pubfig and give --data-dir DATA_DIR."
        )
    people = datasets.load_image_folder(
        Path(data_dir) / "pubfig", image_size=(image_size, image_size)
    )
    X_train, X_test, y_train, y_test = train_test_split(
        people.X, people.y, test_size=0.2, stratify=people.y, random_state=0
    )
    return Bunch(
        X_train=X_train,
        y_train=y_train,
        X_test=X_test,
        y_test=y_test,
        target_names=people.target_names,
        data_source=people.data_source,
    )
