"""What the guard costs beside the bare network, and the scoring beside a loop."""

import time

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from benchmarks.results import append
from sklearn_backdoor import BackdoorGuard, BackdoorTriggerClassifier, VictimNetwork
from sklearn_backdoor.networks import LeNet5, ResNet18
from sklearn_backdoor.triggers import white_box

N_IMAGES, BATCH_SIZE, N_REPEATS = 2000, 256, 7


def medians(*functions, n_repeats=N_REPEATS):
    """Time functions in turn, so that a drift of the machine hits all alike.

    Returns
    -------
    list of float
        Median seconds of each, after one round that does not count.
    """
    seconds: list = [[] for _ in functions]
    for _ in range(n_repeats + 1):
        for function, measured in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            measured.append(time.perf_counter() - start)
    return [float(np.median(measured[1:])) for measured in seconds]


def overhead(results):
    """Print and append the ratios.

    Parameters
    ----------
    results : path-like
        Folder of ``overhead.jsonl``.
    """
    start = time.perf_counter()
    records = [
        _guard("lenet5", LeNet5(), (1, 28, 28)),
        _guard("resnet18", ResNet18(), (3, 32, 32)),
        *(_scoring(kind) for kind in ("diag", "spherical", "full", "tied")),
    ]
    for record in records:
        print(f"{record['ratio']:.3f}  {record['network']}: {record['what']}")
        common = {
            "seed": 0,
            "data_source": "uniform random images and features",
            "seconds": time.perf_counter() - start,
            "batch_size": BATCH_SIZE,
        }
        append("overhead", {**common, **record}, results=results)


def _guard(name, network, image_shape):
    """Time ``predict`` with every image sent to the target, the dearest case."""
    network.eval()
    rng = np.random.default_rng(0)
    images = rng.random((N_IMAGES, *image_shape), dtype=np.float32)
    tensor = torch.from_numpy(images).clone()  # aligned as torch likes it
    with torch.no_grad():  # an untrained network may send all images to one class
        last = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.bias.zero_()
        target = int(network(tensor[:64]).mean(0).argmax())
        last.bias[target] += 1e3
    y = np.tile(np.arange(10), 20)
    guard = BackdoorGuard(
        VictimNetwork(network, batch_size=BATCH_SIZE),
        white_box(image_shape),
        target_class=target,
    ).fit(images[:200], y)

    def bare():
        with torch.inference_mode():
            for batch in tensor.split(BATCH_SIZE):
                network(batch).argmax(1).numpy()

    ours, reference = medians(lambda: guard.predict(images), bare)
    assert np.all(guard.victim_.predict(images) == target)
    return {
        "what": "BackdoorGuard.predict, all images sent to the target, against the "
        "bare network under inference_mode",
        "network": name,
        "ratio": ours / reference,
        "config": {
            "n_images": N_IMAGES,
            "repeats": N_REPEATS,
            "seconds_ours": ours,
            "seconds_reference": reference,
        },
    }


def _scoring(covariance_type):
    n_classes, n_features, n_components = 10, 512, 3
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(n_classes), 100)
    Z = rng.normal(size=(len(y), n_features)) + y[:, None] / 10
    density = GaussianMixture(
        n_components, covariance_type=covariance_type, reg_covar=1.0
    )
    classifier = BackdoorTriggerClassifier(density).fit(Z, y)
    test = rng.normal(size=(N_IMAGES, n_features))

    def loop():
        scores = [density.score_samples(test) for density in classifier.densities_]
        return np.column_stack(scores)

    fast, slow = classifier.log_likelihood(test), loop()
    error = float(np.max(np.abs(fast - slow) / np.abs(slow)))
    ours, reference = medians(lambda: classifier.log_likelihood(test), loop)
    return {
        "what": f"BackdoorTriggerClassifier.log_likelihood, {covariance_type}, against "
        "a loop over scikit-learn's score_samples",
        "network": "none",
        "ratio": ours / reference,
        "config": {
            "n_rows": N_IMAGES,
            "n_classes": n_classes,
            "n_features": n_features,
            "n_components": n_components,
            "repeats": N_REPEATS,
            "max_relative_error": error,
            "seconds_ours": ours,
            "seconds_reference": reference,
        },
    }
