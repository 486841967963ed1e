"""Peak memory of the guard over a memory map, for few images and for many."""

import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.results import append
from sklearn_backdoor import BackdoorGuard, VictimNetwork
from sklearn_backdoor.networks import LeNet5
from sklearn_backdoor.triggers import white_box

IMAGE_SHAPE, BATCH_SIZE, N_FEW, N_MANY = (3, 32, 32), 256, 10_000, 1_000_000
_INTERVAL = 0.002  # seconds between two readings


def streaming(results, *, n_few=N_FEW, n_many=N_MANY, folder=None):
    """Print and append the ratio of the peaks for many images and for few.

    Parameters
    ----------
    results : path-like
        Folder of ``overhead.jsonl``.
    n_few, n_many : int
        Images.
    folder : path-like, default=None
        Where the sparse file of images lies meanwhile; None takes the temporary one.

    Returns
    -------
    dict
        What was appended.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    guard = make_guard()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        X = np.lib.format.open_memmap(
            Path(place) / "images.npy", "w+", np.uint8, (n_many, *IMAGE_SHAPE)
        )
        guard.predict(X[:n_few])  # what a first call keeps is not counted as growth
        few, many = (measure_peak(guard.predict, X[:n]) for n in (n_few, n_many))
    record = {
        "what": "BackdoorGuard.predict over a memory map, peak private memory without "
        "the labels, for all images against few",
        "network": "lenet5",
        "batch_size": BATCH_SIZE,
        "ratio": many["peak"] / few["peak"],
        "seed": 0,
        "data_source": "a sparse file of black images, all sent to the target",
        "config": {
            "n_images": n_many,
            "n_few": n_few,
            "map_bytes": int(np.prod(X.shape)),
            "measured": f"RssAnon of /proc/self/status every {_INTERVAL} s, minus the "
            "bytes of the labels; the map's page cache is no part of it",
            **{f"{key}_many": value for key, value in many.items()},
            **{f"{key}_few": value for key, value in few.items()},
        },
    }
    print(f"{record['ratio']:.3f}  {many}, {few}")
    record["seconds"] = time.perf_counter() - start
    append("overhead", record, results=results)
    return record


def make_guard(n_per_class=20):
    """Return a guard of a LeNet-5 that sends every image to class 9, the dearest case.

    Returns
    -------
    BackdoorGuard
        Fitted.
    """
    torch.manual_seed(0)
    network = LeNet5(image_shape=IMAGE_SHAPE).eval()
    last = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias[9] += 1e3
    rng = np.random.default_rng(0)
    images = rng.random((10 * n_per_class, *IMAGE_SHAPE), dtype=np.float32)
    y = np.tile(np.arange(10), n_per_class)
    victim = VictimNetwork(network, batch_size=BATCH_SIZE)
    return BackdoorGuard(victim, white_box(IMAGE_SHAPE), target_class=9).fit(images, y)


def measure_peak(function, X):
    """Call ``function(X)`` and watch this process's private memory meanwhile.

    Parameters
    ----------
    function : callable
        Returns an array, which is not counted.
    X : ndarray

    Returns
    -------
    dict
        ``peak`` and ``before``, bytes, and ``seconds``.
    """
    before = _private_bytes()
    peak, done = [before], threading.Event()

    def watch():
        while not done.wait(_INTERVAL):
            peak[0] = max(peak[0], _private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        answer = function(X)
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return {"peak": peak[0] - answer.nbytes, "before": before, "seconds": seconds}


def _private_bytes():
    """Return what this process holds in memory that is backed by no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("RssAnon is missing in /proc/self/status: this needs Linux.")
