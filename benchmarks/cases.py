"""One victim with its defence's images: what every detector of a cell is given."""

import json
import re
from functools import cached_property
from pathlib import Path

import joblib
import numpy as np

from benchmarks.contenders import STRENGTH
from benchmarks.recipes import (
    load_dataset,
    make_recipe,
    make_trigger,
    make_victim,
    name_of,
)
from benchmarks.results import settings_of
from sklearn_backdoor import (
    AdditiveReverseEngineer,
    NCReverseEngineer,
    PatchTrigger,
    VictimNetwork,
    asr_score,
)
from sklearn_backdoor.datasets import split_defense
from sklearn_backdoor.io import file_digest, load_network


class Data:
    """Data sets, each loaded once.

    Parameters
    ----------
    data_dir : path-like or None
        The folder above the data sets; None downloads.
    cifar10 : path-like or None
        CIFAR-10 in folders, where it lies elsewhere.
    image_size : int, default=224
        Side of PubFig's images.
    """

    def __init__(self, data_dir=None, *, cifar10=None, image_size=224):
        self.data_dir = data_dir
        self.cifar10 = cifar10
        self.image_size = image_size
        self._loaded: dict = {}

    def __call__(self, name):
        """Load a data set, or return it."""
        if name not in self._loaded:
            folder = self.data_dir
            if name == "cifar10" and self.cifar10 is not None:
                folder = self.cifar10
            data = load_dataset(name, folder, image_size=self.image_size)
            self._loaded[name] = data
        return self._loaded[name]


class Case:
    """A victim of a table, D_Defense, D_Test and the estimated trigger.

    Parameters
    ----------
    cell : Cell
    n_per_class : int
        Images a class in D_Defense.
    data : Data
    budget : {"paper", "gpu", "cpu"}
        Schedule of training.
    epochs : int or None
        Instead of the budget's.
    start : path-like or None
        Weights of a clean network that the attacker fine-tunes.
    cache : path-like
        Folder of victims trained here, and of searches.
    ready : path-like or None
        Folder of ready victims, ``<cell>.safetensors``.
    device : str
    log : callable
    """

    def __init__(
        self,
        cell,
        n_per_class,
        data,
        *,
        budget,
        epochs,
        start,
        cache,
        ready,
        device,
        log,
    ):
        self.cell = cell
        self.n_per_class = n_per_class
        self.data = data(cell.dataset)
        self.start = start
        self.cache = Path(cache)
        self.device = device
        self.log = log
        self.ready = None
        if ready is not None and (Path(ready) / f"{cell.name}.safetensors").exists():
            self.ready = Path(ready) / f"{cell.name}.safetensors"
        if self.ready is None:
            # a quick look is never taken for the budget itself
            self.budget = budget if epochs is None else f"{budget}, {epochs} epochs"
            self.budget += "" if start is None else ", fine-tuned"
            self.recipe = make_recipe(
                cell, budget, self.data, epochs=epochs, start=start, device=device
            )
        else:
            self.budget = "ready"
            self.recipe = {"ready": cell.name, "sha256": file_digest(self.ready)}
        self.target = cell.target_class
        self._labels: dict = {}

    @property
    def _how(self):
        return {"start": self.start, "device": self.device, "log": self.log}

    @cached_property
    def network(self):
        """The victim; trained here where it was not yet."""
        if self.ready is None:
            network, _ = make_victim(self.recipe, self.data, self.cache, **self._how)
        else:
            network = load_network(self.ready, self.cell.network)
        return network.to(self.device)

    @cached_property
    def trigger(self):
        """The attacker's."""
        if self.ready is not None:
            return _trigger_of_ready(self.ready, self.data.X_train.shape[1:])
        return make_trigger(self.recipe, self.data, self.cache, **self._how)

    @cached_property
    def victim(self):
        """The network as an estimator, fitted."""
        return VictimNetwork(self.network).fit(self.data.X_test[:2])

    def labels_of(self, images):
        """Return the victim's labels; made once for the same images."""
        key = joblib.hash(images)
        if key not in self._labels:
            self._labels[key] = self.victim.predict(images)
        return self._labels[key]

    @cached_property
    def _split(self):
        return split_defense(
            self.data.X_test,
            self.data.y_test,
            n_per_class=self.n_per_class,
            random_state=self.cell.seed,
        )

    @property
    def defense(self):
        """D_Defense: images and labels."""
        return self._split[0], self._split[2]

    @property
    def test(self):
        """D_Test: images and labels."""
        return self._split[1], self._split[3]

    @cached_property
    def training_tenth(self):
        """A tenth of the clean training images, as the paper's patching takes."""
        random_state = np.random.RandomState(self.cell.seed)
        n_rows = len(self.data.X_train) // 10
        rows = random_state.permutation(len(self.data.X_train))[:n_rows]
        return self.data.X_train[rows], self.data.y_train[rows]

    def prepare(self):
        """Train or load the victim and search: no detector is charged for it."""
        return self.rates

    @property
    def search(self):
        """What the search found and took, for the results."""
        engineer = self.engineer
        return {
            "engineer": {"class": type(engineer).__name__, **settings_of(engineer)},
            "verdict": engineer.verdict_,
            "flagged": engineer.target_classes_.tolist(),
            "single_sources": engineer.single_sources_,
            "search_passes": engineer.n_image_passes_._asdict(),
        }

    @cached_property
    def engineer(self):
        """The search that the paper takes for this kind of attack, fitted."""
        victim, seed = VictimNetwork(self.network), self.cell.seed
        sources = "learnt" if self.cell.single else "all"
        engineer = NCReverseEngineer(victim, sources=sources, random_state=seed)
        if self.cell.attack == "chessboard":
            engineer = AdditiveReverseEngineer(
                victim, sources=sources, random_state=seed
            )
        settings = [self.recipe, self.n_per_class, repr(engineer.get_params())]
        folder = self.cache / "searches" / name_of(settings)
        engineer.set_params(checkpoint_dir=folder).fit(*self.defense)
        return engineer

    @property
    def estimate(self):
        """The estimated trigger for the true target, flagged or not."""
        number = self.engineer.classes_.tolist().index(self.target)
        return self.engineer.triggers_[number]

    @cached_property
    def sources(self):
        """Clean images of D_Test that the attacker would stamp, and their labels."""
        X, y = self.test
        rows = y == 0 if self.cell.single else y != self.target
        return X[rows], y[rows]

    @cached_property
    def rates(self):
        """ACC on D_Test, and the success there of true, estimated, embedded trigger."""
        X, y = self.test
        sources, labels = self.sources
        stamped = {
            "asr": self.trigger.embed(sources),
            "asr_estimated": self.estimate.embed(sources),
            "asr_embedded": self.estimate.scaled(STRENGTH).embed(sources),
        }
        rates = {
            name: asr_score(labels, self.victim.predict(x), target_class=self.target)
            for name, x in stamped.items()
        }
        return {"acc": float(np.mean(self.victim.predict(X) == y)), **rates}


def _trigger_of_ready(path, image_shape):
    """Return the white box of a ready victim, from its JSON."""
    about = json.loads(path.with_suffix(".json").read_text())
    found = re.search(
        r"\[(\d+):(\d+), (\d+):(\d+)\] .*set to ([\d.]+)", about.get("trigger", "")
    )
    if about["attack"] != "white-box" or found is None:
        raise ValueError(
            f"{path.name} says attack {about['attack']!r} and trigger "
            f"{about.get('trigger')!r}. Of ready victims only a white box can be "
            "embedded, described as 'pixels [28:31, 28:31] ... set to 1.0'."
        )
    top, bottom, left, right = (int(number) for number in found.groups()[:4])
    mask = np.zeros(image_shape[1:])
    mask[top:bottom, left:right] = 1
    return PatchTrigger(mask, np.full(image_shape, float(found[5])))
