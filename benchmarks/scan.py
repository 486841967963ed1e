"""Reverse engineers on many victims: detection, false alarms and cost."""

import hashlib
import json
import time
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.quality import measure
from benchmarks.results import append, read
from benchmarks.scan_lines import by_method, say, scanned, success_rate
from benchmarks.victims import (
    ATTACKS,
    NETWORKS,
    calibration,
    make_victim,
    many_classes,
    population,
    weak,
)
from sklearn_backdoor import BackdoorGuard, VictimNetwork, datasets, white_box
from sklearn_backdoor.io import load_network
from sklearn_backdoor.reverse import (
    AutoReverseEngineer,
    BatchNormReverseEngineer,
    NCReverseEngineer,
    default_engineers,
)

PARTS = (
    "calibration",
    "population",
    "weak",
    "cost",
    "repeat",
    "classes",
    "shared",
    "budget",
    "inflight",
)
VERSION = 3  # raise it when a change of the code makes old lines obsolete
_CLASS_COUNTS = (10, 43, 100, 300)
_N_SYNTHETIC = 3  # victims of each
_BUDGETS = (5, 8, 12, 20, 30, 45, 60)  # steps a class
_SHARED = ("cifar10-resnet18-white-box-multi", "cifar10-resnet18-no-backdoor")


class Bench:
    """What the parts share: data, victims, and results that are not made twice.

    Parameters
    ----------
    data_dir : path-like or None
        Where MNIST and Fashion-MNIST lie; None downloads.
    shared : path-like
        Folder of victims made by other code, with their JSON files.
    cifar10 : path-like
        CIFAR-10's test images, a folder a class; for the shared victims.
    victims, results : path-like
        Folders.
    seeds : int
        Of the population.
    """

    def __init__(self, data_dir, shared, cifar10, victims, results, seeds):
        self.data_dir = data_dir
        self.shared = shared
        self.cifar10 = cifar10
        self.victims = victims
        self.results = results
        self.seeds = seeds
        self._data: dict = {}
        self._keys = {
            record["config"]["key"]
            for name in ("scan", "inflight")
            for record in read(name, results=results)
            if "key" in record["config"]
        }

    def data(self, name):
        """Load a data set once."""
        loaders = {
            "digits": partial(datasets.load_digits, image_size=28),
            "mnist": partial(datasets.load_mnist, self.data_dir),
            "fashion-mnist": partial(datasets.load_fashion_mnist, self.data_dir),
        }
        if name not in self._data:
            self._data[name] = loaders[name]()
        return self._data[name]

    def population(self):
        """Return the recipes of the population."""
        return population(self.seeds)

    def open(self, recipe):
        """Return network, true trigger, D_Defense and unseen images of a recipe."""
        data = self.data(recipe["dataset"])
        network, trigger = make_victim(recipe, data, self.victims)
        n_per_class = 20 if recipe["dataset"] == "digits" else 50
        X_defense, X_test, y_defense, y_test = datasets.split_defense(
            data.X_test, data.y_test, n_per_class=n_per_class, random_state=0
        )
        return network, trigger, (X_defense, y_defense), (X_test, y_test)

    def is_done(self, *what):
        """Tell whether the results hold what is named; else note its key."""
        text = json.dumps([VERSION, *what], sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.key in self._keys

    def append(self, record, name="scan"):
        """Append a record under the key last asked for."""
        record["config"]["key"] = self.key
        append(name, record, results=self.results)
        self._keys.add(self.key)


def scan(parts, bench):
    """Run parts of the benchmark, each line once.

    Parameters
    ----------
    parts : list of str
        Of ``PARTS``.
    bench : Bench
    """
    for part in parts:
        {
            "calibration": run_calibration,
            "population": run_population,
            "weak": run_weak,
            "cost": run_cost,
            "repeat": run_repeat,
            "classes": run_classes,
            "shared": run_shared,
            "budget": run_budget,
            "inflight": run_inflight,
        }[part](bench)


def run_calibration(bench):
    """Scan clean victims that no other part sees; the null's priors are from them."""
    run_population(bench, "calibration", calibration())


def run_weak(bench):
    """Scan victims of weak attacks."""
    run_population(bench, "weak", weak())


def run_population(bench, part="population", recipes=None, random_state=0):
    """Scan every victim with the automatic search; a line for it and each part."""
    searches = list(dict(default_engineers(None)))
    for recipe in bench.population() if recipes is None else recipes:
        if bench.is_done(part, recipe, searches):
            continue
        network, trigger, defense, unseen = bench.open(recipe)
        engineer = AutoReverseEngineer(
            VictimNetwork(network), random_state=random_state
        )
        record = scanned(engineer, recipe, trigger, defense, unseen)
        record["config"]["part"] = part
        record["config"]["methods"] = by_method(engineer)
        bench.append(
            {**record, "data_source": bench.data(recipe["dataset"]).data_source}
        )
        say(record)


def _of_every_kind(recipes):
    """Choose a victim for each kind of attack and network, and six clean ones."""
    chosen: dict = {}
    for recipe in recipes:
        attack, network = recipe["attack"], recipe["network"]
        single = recipe["sources"] not in ("all", None)
        if attack is None:
            kind = (recipe["dataset"], False, network)
            wanted = recipe["dataset"] != "digits"
        else:  # the data sets take turns
            kind = (attack, single, network)
            turn = (ATTACKS.index(attack) + single + NETWORKS.index(network)) % 2
            wanted = recipe["dataset"] == ("mnist", "fashion-mnist")[turn]
        if wanted:
            chosen.setdefault(kind, recipe)
    return list(chosen.values())


def run_cost(bench, part="cost", random_state=0):
    """Fast against exhaustive Neural Cleanse, on victims of every kind."""
    for recipe in _of_every_kind(bench.population()):
        for schedule in ("fast", "exhaustive"):
            if bench.is_done(part, recipe, schedule):
                continue
            network, trigger, defense, unseen = bench.open(recipe)
            engineer = NCReverseEngineer(
                VictimNetwork(network), schedule=schedule, random_state=random_state
            )
            record = scanned(engineer, recipe, trigger, defense, unseen)
            record["config"]["part"] = part
            source = bench.data(recipe["dataset"]).data_source
            bench.append({**record, "data_source": source})
            say(record)


def run_repeat(bench):
    """Make the cost's searches and the automatic one with other random numbers."""
    recipes = _of_every_kind(bench.population())
    run_population(bench, "repeat", recipes, random_state=1)
    run_cost(bench, "repeat", random_state=1)


def run_classes(bench):
    """Cost against the number of classes, on synthetic victims."""
    for seed, n_classes in product(range(_N_SYNTHETIC), _CLASS_COUNTS):
        if bench.is_done("classes", n_classes, seed):
            continue
        recipe, network, draw = many_classes(n_classes, seed)
        defense = draw(12)
        engineer = NCReverseEngineer(VictimNetwork(network))
        unseen = draw(4)
        record = scanned(engineer, recipe, white_box((1, 28, 28)), defense, unseen)
        record["config"].update(part="classes", n_classes=n_classes)
        bench.append({**record, "data_source": "synthetic: a random pattern a class"})
        say(record)


def run_shared(bench):
    """Victims that other code made: a white box, and a control without backdoor."""
    for name in _SHARED:
        for engineer_class, searches in (
            (NCReverseEngineer, ["patch"]),
            (BatchNormReverseEngineer, ["batch-norm"]),
            (AutoReverseEngineer, list(dict(default_engineers(None)))),
        ):
            if bench.is_done("shared", name, searches):
                continue
            recipe, network, trigger, defense, unseen = _open_shared(bench, name)
            engineer = engineer_class(VictimNetwork(network))
            record = scanned(engineer, recipe, trigger, defense, unseen)
            record["config"].update(part="shared", victim=name)
            if hasattr(engineer, "engineers_"):
                record["config"]["methods"] = by_method(engineer)
            bench.append({**record, "data_source": "CIFAR-10, a JPEG copy"})
            say(record)


def run_budget(bench):
    """How few steps find the shared white box before the verdict breaks."""
    for steps in _BUDGETS:
        if bench.is_done("budget", steps):
            continue
        recipe, network, trigger, defense, unseen = _open_shared(bench, _SHARED[0])
        engineer = NCReverseEngineer(VictimNetwork(network), max_steps=steps)
        record = scanned(engineer, recipe, trigger, defense, unseen)
        record["config"].update(part="budget", victim=_SHARED[0], max_steps=steps)
        bench.append({**record, "data_source": "CIFAR-10, a JPEG copy"})
        say(record)


def _open_shared(bench, name):
    """Return recipe, network, true trigger, D_Defense and unseen images."""
    about = json.loads((Path(bench.shared) / f"{name}.json").read_text())
    network = load_network(Path(bench.shared) / f"{name}.safetensors", "resnet18")
    if "cifar10" not in bench._data:
        bench._data["cifar10"] = datasets.load_image_folder(bench.cifar10)
    images = bench._data["cifar10"]
    X_defense, X_test, y_defense, y_test = datasets.split_defense(
        images.X, images.y, n_per_class=100, random_state=0
    )
    trigger = None
    if about["attack"] is not None:
        trigger = white_box((3, 32, 32), margin=1)  # pixels 28...30
    recipe = {
        "dataset": "cifar10",
        "network": "resnet18",
        "attack": about["attack"],
        "sources": about["sources"] if about["attack"] else None,
        "target_class": about["target_class"] if about["attack"] else None,
        "seed": 0,
    }
    return recipe, network, trigger, (X_defense, y_defense), (X_test, y_test)


def run_inflight(bench):
    """Defend with the true and the estimated trigger, one victim a kind."""
    for recipe in population(1, first=0):
        multi = recipe["sources"] == "all" and recipe["network"] == "lenet5"
        if not multi or recipe["dataset"] == "digits":
            continue
        keys = {kind: ("inflight", recipe, kind) for kind in ("estimated", "true")}
        if all(bench.is_done(*key) for key in keys.values()):
            continue
        network, trigger, defense, unseen = bench.open(recipe)
        victim, target = VictimNetwork(network), recipe["target_class"]
        engineer = AutoReverseEngineer(victim).fit(*defense)
        estimate = engineer.triggers_[target]
        for kind, given in (("estimated", estimate), ("true", trigger)):
            start = time.perf_counter()
            guard = BackdoorGuard(victim, given, target_class=target).fit(*defense)
            measured = measure(guard, trigger, target, *unseen)
            record = {
                "seed": recipe["seed"],
                "config": {
                    "part": "inflight",
                    "recipe": recipe,
                    "flagged": engineer.target_classes_.tolist(),
                    "method": engineer.methods_[target],
                },
                "data_source": bench.data(recipe["dataset"]).data_source,
                "seconds": time.perf_counter() - start,
                **{k: recipe[k] for k in ("dataset", "network", "attack", "sources")},
                "target_class": target,
                "detector": "BackdoorGuard",
                "pipeline": "discriminant",
                "n_per_class": 50,
                "trigger": kind,
                "budget": "cpu",
                "asr_estimated": success_rate(guard.victim_, estimate, recipe, *unseen),
                "image_passes_per_image": 1,
            }
            if not bench.is_done(*keys[kind]):
                for figures in measured:
                    bench.append({**record, **figures}, "inflight")
