"""The whole story in one run: poison, train, find, guard, judge."""

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click
import numpy as np
import pandas as pd
from tqdm import tqdm

from sklearn_backdoor import datasets, triggers, trojan
from sklearn_backdoor.attacks import poison
from sklearn_backdoor.guard import BackdoorGuard
from sklearn_backdoor.metrics import asr_score, detection_report
from sklearn_backdoor.networks import LeNet5, ResNet18
from sklearn_backdoor.reverse import AutoReverseEngineer
from sklearn_backdoor.training import train_network
from sklearn_backdoor.victim import VictimNetwork

TARGET_CLASS = 9  # §5.1
ATTACKS = (
    "white-box",
    "single-pixel",
    "chessboard",
    "blended",
    "trojan-square",
    "trojan-watermark",
)
_LENET = {"epochs": 10, "lr": 1e-3, "batch_size": 128}
# dataset: loader, network, training, images a class for the defence, poisoned a class
DATASETS: dict[str, tuple] = {
    "digits": (
        lambda data_dir, seed: datasets.load_digits(image_size=28, random_state=seed),
        LeNet5,
        {"epochs": 60, "lr": 5e-3, "batch_size": 32},
        20,
        0.1,
    ),
    "mnist": (lambda d, _: datasets.load_mnist(d), LeNet5, _LENET, 100, None),
    "fashion-mnist": (
        lambda d, _: datasets.load_fashion_mnist(d),
        LeNet5,
        _LENET,
        100,
        None,
    ),
    "cifar10": (
        lambda d, _: datasets.load_cifar10(d),
        ResNet18,
        {"epochs": 10, "lr": 2e-3, "batch_size": 128},
        100,
        None,
    ),
}


@dataclass
class Story:
    """What the demo saw, for the screen, the picture and the JSON file."""

    dataset: str
    attack: str
    source_classes: list
    true_trigger: triggers.Trigger
    guard: BackdoorGuard
    evaluation: pd.DataFrame
    images: np.ndarray
    clean_images: np.ndarray
    report: pd.DataFrame
    figures: dict[str, Any] = field(default_factory=dict)


def run_demo(dataset, attack, source_classes, data_dir, seed, epochs=None):
    """Poison a data set, train a victim on it, and defend it.

    Parameters
    ----------
    dataset : str
        A key of ``DATASETS``.
    attack : str
        One of ``ATTACKS``.
    source_classes : "all" or list of int
        Where triggered images come from.
    data_dir : path-like or None
        Where the data lie; None downloads (digits need none).
    seed : int
        Of everything.
    epochs : int or None
        Of the victim's training; None takes the data set's own.

    Returns
    -------
    Story
    """
    start = time.perf_counter()
    load, network, training, n_defense, n_poisoned = DATASETS[dataset]
    training = {**training, "random_state": seed}
    if epochs is not None:
        training["epochs"] = epochs
    _say(1, f"load {dataset}")
    data = load(data_dir, seed)
    image_shape = data.X_train.shape[1:]
    if network is LeNet5:
        network = partial(LeNet5, image_shape=image_shape)

    _say(2, f"the attacker: poison with {attack}, train {training['epochs']} epochs")
    trigger = _make_trigger(attack, image_shape, network, data, training, seed)
    poisoned = poison(
        data.X_train,
        data.y_train,
        trigger,
        target_class=TARGET_CLASS,
        source_classes=source_classes,
        n_per_class=n_poisoned,
        random_state=seed,
    )
    victim = VictimNetwork(_train(network, poisoned.X, poisoned.y, training))

    X_defense, X_test, y_defense, y_test = datasets.split_defense(
        data.X_test, data.y_test, n_per_class=n_defense, random_state=seed
    )
    _say(3, f"the defender: search a trigger for each class ({len(X_defense)} images)")
    engineer = AutoReverseEngineer(victim, random_state=seed, verbose=True)
    guard = BackdoorGuard(victim, engineer, random_state=seed).fit(X_defense, y_defense)

    _say(4, f"judge {len(X_test)} unseen images")
    if source_classes == "all":
        source_classes = [c for c in np.unique(y_test).tolist() if c != TARGET_CLASS]
    story = _judge(guard, trigger, source_classes, X_test, y_test)
    story.dataset, story.attack = dataset, attack
    story.figures["acc"] = float(np.mean(guard.victim_.predict(X_test) == y_test))
    story.figures["seconds"] = time.perf_counter() - start
    story.figures.update(
        dataset=dataset,
        attack=attack,
        source_classes=source_classes,
        seed=seed,
        epochs=training["epochs"],
        data_source=data.data_source,
        n_poisoned=len(poisoned.added),
        image_passes=guard.engineer_.n_image_passes_._asdict(),
    )
    return story


def _say(step, text):
    click.echo(f"[{step}/4] {text} ...", err=True)


def _train(network, X, y, training):
    with tqdm(total=training["epochs"], unit="epoch", disable=None) as bar:

        def on_epoch(epoch, loss):
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()

        return train_network(network, X, y, on_epoch=on_epoch, **training)


def _make_trigger(attack, image_shape, network, data, training, seed):
    if attack == "chessboard":
        # 3/255 is the paper's on colour images; LeNet-5 does not learn it on grey ones
        return triggers.chessboard(
            image_shape, 3 / 255 if image_shape[0] == 3 else 0.15
        )
    if attack == "blended":
        noise = np.random.RandomState(seed).uniform(size=image_shape)
        return triggers.blended(noise, alpha=0.2)
    if attack.startswith("trojan"):
        click.echo(
            "      first a clean network, whose neurons shape the trigger", err=True
        )
        other = _train(network, data.X_train, data.y_train, training)
        make = {"trojan-square": trojan.trojan_square}.get(
            attack, trojan.trojan_watermark
        )
        return make(other, image_shape, random_state=seed)
    return {"white-box": triggers.white_box, "single-pixel": triggers.single_pixel}[
        attack
    ](image_shape)


def _judge(guard, trigger, source_classes, X, y):
    """Judge triggered images of the source classes and clean ones of the target."""
    rows = np.isin(y, [*source_classes, TARGET_CLASS])
    clean, origin = X[rows], y[rows]
    sources = origin != TARGET_CLASS
    images = clean.copy()
    images[sources] = trigger.embed(clean[sources])
    seen = guard.inspect(images)
    seen["origin"] = origin
    report = detection_report(
        origin,
        seen["label"],
        target_class=TARGET_CLASS,
        victim_labels=seen["victim_label"],
        is_trigger=seen["is_trigger"],
    )
    found = guard.target_class_
    asr_estimated = None
    if found is not None:
        # of all classes, if the only source was flagged itself
        others = np.isin(y, source_classes) & (y != found)
        others = others if others.any() else y != found
        stamped = guard.triggers_[found].embed(X[others])
        labels = guard.victim_.predict(stamped)
        asr_estimated = asr_score(y[others], labels, target_class=found)
    figures = {
        "target_class": TARGET_CLASS,
        "found": None if found is None else int(found),
        "flagged": guard.target_classes_.tolist(),
        "verdict": guard.verdict_,
        "asr": asr_score(origin, seen["victim_label"], target_class=TARGET_CLASS),
        "asr_estimated": asr_estimated,
        "n_trigger": int(report.loc["tpr", "n"]),
        "n_clean": int(report.loc["fpr", "n"]),
        **{
            name: None if np.isnan(score) else float(score)
            for name, score in report["score"].items()
        },
    }
    return Story(
        dataset="",
        attack="",
        source_classes=source_classes,
        true_trigger=trigger,
        guard=guard,
        evaluation=seen,
        images=images,
        clean_images=clean,
        report=report,
        figures=figures,
    )


def screen(story):
    """Return the outcome as one screen of text.

    Parameters
    ----------
    story : Story

    Returns
    -------
    str
    """
    figures, engineer = story.figures, story.guard.engineer_
    found = figures["found"]
    right = found == TARGET_CLASS
    if found is None:
        verdict = f"{figures['verdict']}: no class was flagged (truth: {TARGET_CLASS})"
    else:
        number = engineer.classes_.tolist().index(found)
        verdict = (
            f"backdoored, target class {found} "
            f"({'right' if right else f'WRONG, the truth is {TARGET_CLASS}'}), "
            f"p {engineer.p_values_[number]:.2g}\n               "
            f"by the search {engineer.methods_[number]!r} (flagged below "
            f"{engineer.alpha:g}, corrected for {len(engineer.engineers_)} searches)"
        )
        if len(figures["flagged"]) > 1:
            verdict += f"\n               also flagged: {figures['flagged'][1:]}"
    estimated = figures["asr_estimated"]
    lines = [
        "",
        f"  VERDICT      {verdict}",
        "",
        f"  the victim   ACC {figures['acc']:.3f} on clean images",
        f"               ASR {figures['asr']:.3f} with the true trigger, "
        + ("-" if estimated is None else f"{estimated:.3f}")
        + " with the estimated one",
        "",
        f"  the guard    on images that the victim calls {TARGET_CLASS}"
        "            on all images",
    ]
    meaning = {
        "tpr": "triggers detected",
        "fpr": "clean images rejected",
        "sia": "source class inferred",
    }
    for name, text in meaning.items():
        head, tail = story.report.loc[name], story.report.loc[f"{name}_all"]
        lines.append(
            f"    {name.upper()} {head['score']:.3f}  [{head['low']:.3f}, "
            f"{head['high']:.3f}]  n={head['n']:<5.0f} {text:<22} "
            f"{tail['score']:.3f}  n={tail['n']:.0f}"
        )
    lines += [
        "",
        f"  {figures['seconds']:.0f} s, seed {figures['seed']}, "
        f"{figures['data_source']}; [95 % Wilson intervals]",
        "",
    ]
    return "\n".join(lines)
