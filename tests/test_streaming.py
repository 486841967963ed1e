"""Images in parts: one pass an image, the same answers, flat memory."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from benchmarks.__main__ import main
from sklearn_backdoor import BackdoorGuard, VictimNetwork, _stream
from sklearn_backdoor._stream import gather, parts
from tests.common import (
    CountingNetwork,
    LinearNetwork,
    corner_trigger,
    count_passes,
    linear_images,
)

GUARDED = "predict is_trigger trigger_score predict_proba inspect".split()
VICTIMS = "predict predict_proba decision_function transform".split()


def make_guard(network=None, batch_size=7, memory=None):
    victim = VictimNetwork(
        network or LinearNetwork().eval(), batch_size=batch_size, memory=memory
    )
    guard = BackdoorGuard(victim, corner_trigger(), target_class=2)
    return guard.fit(*linear_images())


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(_stream, "_IMAGES", 30)


def test_parts_are_whole_batches_and_hold_few_features():
    assert list(parts(10, 4, 1)) == [slice(0, 10)]
    assert list(parts(5000, 256, 8)) == [
        slice(0, 2048),
        slice(2048, 4096),
        slice(4096, 5000),
    ]
    wide = list(parts(1000, 100, 2**22 // 250))
    assert wide[0] == slice(0, 200) and wide[-1] == slice(800, 1000)
    assert list(parts(3, 2, 2**23)) == [slice(0, 2), slice(2, 3)]  # a batch at least
    assert list(parts(0, 7, 3)) == [slice(0, 0)]
    assert list(parts(5000, 4096, 8)) == [slice(0, 4096), slice(4096, 5000)]


def test_answers_are_joined_in_their_rows_and_dtypes():
    answers = [
        (slice(0, 2), (np.array(["a", "b"]), np.ones((2, 3)))),
        (slice(2, 3), (np.array(["c"]), np.zeros((1, 3)))),
    ]
    names, numbers = gather(3, answers)
    assert names.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(numbers, [[1] * 3, [1] * 3, [0] * 3])
    (empty,) = gather(0, [(slice(0, 0), (np.empty((0, 4), dtype=bool),))])
    assert empty.shape == (0, 4) and empty.dtype == bool


@pytest.mark.parametrize("n", [28, 56, 96, 0])
def test_parts_change_no_answer(n, monkeypatch):
    X = np.concatenate([linear_images()[0], corner_trigger().embed(linear_images()[0])])
    X = X[:n]
    guard = make_guard()
    whole = [getattr(guard, name)(X) for name in GUARDED]
    whole += [getattr(guard.victim_, name)(X) for name in VICTIMS]
    whole += guard.victim_.predict_and_transform(X)
    monkeypatch.setattr(_stream, "_IMAGES", 30)
    cut = [getattr(guard, name)(X) for name in GUARDED]
    cut += [getattr(guard.victim_, name)(X) for name in VICTIMS]
    cut += guard.victim_.predict_and_transform(X)
    for one, other in zip(whole, cut, strict=True):
        if isinstance(one, pd.DataFrame):
            pd.testing.assert_frame_equal(one, other, rtol=1e-12)
            continue
        assert one.dtype == other.dtype
        if one.dtype.kind == "f":  # densities round by the rows that they get at once
            np.testing.assert_allclose(one, other, rtol=1e-12)
        else:
            np.testing.assert_array_equal(one, other)


def test_the_networks_answers_do_not_change_by_a_bit(monkeypatch):
    X = torch.rand(300, 1, 4, 4, generator=torch.Generator().manual_seed(0)).numpy()
    victim = VictimNetwork(LinearNetwork(), batch_size=7).fit(X)
    logits, Z = victim.decision_function(X), victim.transform(X)
    monkeypatch.setattr(_stream, "_IMAGES", 30)
    np.testing.assert_array_equal(victim.decision_function(X), logits)
    np.testing.assert_array_equal(victim.transform(X), Z)


@pytest.mark.parametrize("name", GUARDED)
def test_parts_take_exactly_one_pass_an_image(name, tmp_path, small_parts):
    log = tmp_path / "passes"
    guard = make_guard(CountingNetwork(log))
    X = corner_trigger().embed(linear_images()[0])
    count_passes(log)
    getattr(guard, name)(X)
    assert count_passes(log) == len(X)


def test_memory_remembers_the_pass_of_all_images(tmp_path, small_parts):
    log = tmp_path / "passes"
    guard = make_guard(CountingNetwork(log), memory=tmp_path / "memory")
    X = corner_trigger().embed(linear_images()[0])
    count_passes(log)
    answers = guard.predict(X)
    assert count_passes(log) == len(X)
    assert len(list(guard.victim_.stream(X))) == 1
    np.testing.assert_array_equal(guard.predict(X), answers)
    assert count_passes(log) == 0


def test_bad_pixels_and_answers_are_found_in_the_last_part(small_parts):
    guard = make_guard()
    X = linear_images()[0].copy()
    X[-1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        guard.predict(X)

    class NaNIfDark(LinearNetwork):
        def forward(self, images):
            logits = super().forward(images)
            return logits.where(images.flatten(1).sum(1, keepdim=True) > 0, torch.nan)

    victim = VictimNetwork(NaNIfDark(), batch_size=7, feature_layer="hidden")
    victim.fit(linear_images()[0])
    X = linear_images()[0].copy()
    X[-1] = 0
    with pytest.raises(ValueError, match="for 1 of 20 images, first for image 47"):
        victim.predict(X)


CHILD = """
import json, sys
import numpy as np
from benchmarks.streaming import BATCH_SIZE, IMAGE_SHAPE, make_guard, measure_peak

path, dtype, n_few, n_many = *sys.argv[1:3], *map(int, sys.argv[3:])
guard = make_guard(n_per_class=5)
X = np.lib.format.open_memmap(path, "w+", dtype, (n_many, *IMAGE_SHAPE))
guard.predict(X[:n_few])
peaks = []
for _ in range(3):  # a peak that happens to be higher is no growth: the lowest count
    peaks.append([measure_peak(guard.predict, X[:n])["peak"] for n in (n_few, n_many)])
    few, many = np.min(peaks, axis=0).tolist()
    if many - few < 0.3 * X[n_few:].nbytes:
        break
held = measure_peak(lambda X: np.ones(8_000_000).sum(), X)  # 64 MB
print(json.dumps([many - few, X[n_few:].nbytes, held]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "dtype, n_few, n_many", [("uint8", 2000, 20_000), ("float32", 2000, 8000)]
)
def test_memory_is_flat_over_a_memory_map(tmp_path, dtype, n_few, n_many):
    arguments = [tmp_path / "images.npy", dtype, str(n_few), str(n_many)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown, n_bytes, held = json.loads(done.stdout)
    # 55 MB of images that came (as uint8), and 74 (as float32), do not stay
    assert grown < 0.3 * n_bytes
    assert held["peak"] - held["before"] > 60e6  # the watch sees what there is to see


def test_the_benchmark_appends_a_line_that_the_report_reads(tmp_path):
    options = ["streaming", "--images", "3000", "--results", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        done = CliRunner().invoke(main, options)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    (line,) = (tmp_path / "overhead.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["network"] == "lenet5" and 0.9 < record["ratio"] < 1.1
    assert record["config"]["map_bytes"] == 3000 * 3072
