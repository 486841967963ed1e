import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, QuantileTransformer, StandardScaler

from sklearn_backdoor import (
    AdditiveTrigger,
    AutoReverseEngineer,
    BackdoorGuard,
    BackdoorTriggerClassifier,
    NCReverseEngineer,
    PatchTrigger,
    VictimNetwork,
    white_box,
)
from sklearn_backdoor import _guard_disk as disk
from sklearn_backdoor._fingerprint import weights_digest
from sklearn_backdoor.networks import LeNet5
from sklearn_backdoor.reverse import SearchRecord
from tests.common import LinearNetwork, corner_trigger, linear_images

FILES = ("guard.json", "guard.safetensors")
ODD = ["zebra", "", "fox\n\ud800\u202e", "bee'\"\\", "<script>", "\x1b[31m\U0001f600"]


def densities(density, *before):
    return make_pipeline(*before, BackdoorTriggerClassifier(density))


def mixture(kind=GaussianMixture, covariance="full", n=2):
    return kind(
        n_components=n, covariance_type=covariance, reg_covar=0.1, max_iter=5, tol=1e9
    )


def covered():
    """Return a classifier for every step and density that can be saved."""
    scaler = StandardScaler()
    return {
        "default": None,
        "density alone": BackdoorTriggerClassifier(mixture(), target_class=2),
        **{
            f"{kind.__name__} {name}": densities(mixture(kind, name), StandardScaler())
            for kind in (GaussianMixture, BayesianGaussianMixture)
            for name in ("full", "tied", "diag", "spherical")
        },
        "finite prior": densities(
            BayesianGaussianMixture(
                n_components=2,
                reg_covar=0.1,
                max_iter=5,
                tol=1e9,
                weight_concentration_prior_type="dirichlet_distribution",
            )
        ),
        "min-max": densities(mixture(), MinMaxScaler((0.1, 3), clip=True)),
        "mean alone": densities(mixture(), StandardScaler(with_std=False)),
        "scale alone": densities(mixture(), StandardScaler(with_mean=False)),
        "pca": densities(mixture(), scaler, PCA(4, whiten=True)),
        "pca, share": densities(mixture(), PCA(0.9)),
        "pca, arpack": densities(mixture(), PCA(4, svd_solver="arpack")),
        "pca, randomized": densities(mixture(), PCA(4, svd_solver="randomized")),
        "lda, svd": densities(mixture(), LinearDiscriminantAnalysis(n_components=3)),
        "lda, priors": densities(
            mixture(),
            LinearDiscriminantAnalysis(
                solver="eigen", shrinkage=0.2, priors=np.full(6, 1 / 6)
            ),
        ),
        "lda as classifier": make_pipeline(
            scaler, LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        ),
        "logistic": make_pipeline(scaler, "passthrough", LogisticRegression()),
        "logistic alone": LogisticRegression(class_weight={2: 1.5}),
        "nested": densities(mixture(), make_pipeline(scaler, PCA(5))),
    }


def centred(network, X):
    """Shift the last bias, so that an untrained network says many classes."""
    *_, last = (part for part in network.modules() if hasattr(part, "bias"))
    with torch.no_grad():
        mean = network.eval()(torch.from_numpy(X)).mean(0)
        last.bias -= (mean * 100).round() / 100  # the same in every process
    return network


def random_network():
    torch.manual_seed(0)
    hidden, last = torch.nn.Linear(64, 30), torch.nn.Linear(30, 6)
    network = torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.ReLU(), last)
    return centred(network, random_images()[0])


def random_images(n_per_class=10):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(6), n_per_class)
    X = rng.random((6, 1, 8, 8))[y] + rng.normal(scale=0.2, size=(len(y), 1, 8, 8))
    return np.clip(X, 0, 1).astype(np.float32), y


@cache
def random_guard(name):
    X, y = random_images()
    victim = VictimNetwork(random_network()).fit(X)
    target = int(np.bincount(victim.predict(X)).argmax())
    classifier = covered()[name]
    if name == "logistic alone":
        classifier.set_params(class_weight={target: 1.5})
    guard = BackdoorGuard(victim, white_box((1, 8, 8)), classifier, target_class=target)
    return guard.fit(X, y)


def random_check_images():
    X, _ = random_images(5)
    return np.concatenate([X, white_box((1, 8, 8)).embed(X)])


@cache
def guard_of(classes=None, classifier=None):
    X, y = linear_images()
    classes = np.arange(6) if classes is None else np.array(classes, dtype=object)
    classes = np.array(classes.tolist())
    victim = VictimNetwork(LinearNetwork().eval(), classes=classes)
    guard = BackdoorGuard(victim, corner_trigger(), classifier, target_class=classes[2])
    return guard.fit(X, classes[y])


def check_images():
    X, _ = linear_images()
    return np.concatenate([X, corner_trigger().embed(X)])


@cache
def searched():
    """Return a guard whose search flagged two classes, by a record made up so."""
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork().eval())
    engineers = [
        ("exhaustive", NCReverseEngineer(victim, schedule="exhaustive", max_steps=8)),
        ("fast", NCReverseEngineer(victim, max_steps=2)),
    ]
    engineer = AutoReverseEngineer(victim, engineers=engineers).fit(X, y)
    record = dataclasses.replace(
        SearchRecord.from_engineer(engineer),
        verdict_="backdoored",
        target_classes_=np.array([4, 2]),
    )
    return BackdoorGuard(victim, record, strength=1.5).fit(X, y)


@pytest.fixture
def saved(tmp_path):
    guard_of().save(tmp_path / "guard")
    return tmp_path / "guard"


def victim():
    return VictimNetwork(LinearNetwork().eval())


def load(directory):
    return BackdoorGuard.load(directory, victim())


def assert_same_answers(guard, other, X):
    for method in ("predict", "predict_proba", "trigger_score", "is_trigger"):
        np.testing.assert_array_equal(
            getattr(guard, method)(X), getattr(other, method)(X), strict=True
        )
    pd.testing.assert_frame_equal(guard.inspect(X), other.inspect(X), check_exact=True)


@pytest.mark.parametrize("name", covered())
def test_answers_are_bit_identical_after_loading(name, tmp_path):
    guard = random_guard(name)
    guard.save(tmp_path / "guard")
    loaded = BackdoorGuard.load(tmp_path / "guard", VictimNetwork(random_network()))
    assert_same_answers(guard, loaded, random_check_images())
    assert loaded.trigger == guard.trigger and loaded.engineer_ is None
    assert loaded.n_images_ == 60 and loaded.verdict_ == "backdoored"


def test_answers_are_bit_identical_in_a_fresh_process(tmp_path):
    names = list(covered())
    for number, name in enumerate(names):
        random_guard(name).save(tmp_path / str(number))
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(2)\n"
        "import pickle, joblib\n"
        "def refuse(*args, **kwargs): raise AssertionError('unpickled')\n"
        "pickle.load = pickle.loads = joblib.load = torch.load = refuse\n"
        "from sklearn_backdoor import BackdoorGuard, VictimNetwork\n"
        "from tests.test_guard_files import random_network, random_check_images\n"
        "X = random_check_images()\n"
        f"for n in range({len(names)}):\n"
        "    folder = f'{sys.argv[1]}/{n}'\n"
        "    guard = BackdoorGuard.load(folder, VictimNetwork(random_network()))\n"
        "    table = guard.inspect(X).iloc[:, 3:].to_numpy()\n"
        "    np.save(folder + '.npy', np.column_stack([guard.predict(X),\n"
        "            guard.is_trigger(X), guard.predict_proba(X), table]))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    X = random_check_images()
    for number, name in enumerate(names):
        guard = random_guard(name)
        expected = np.column_stack(
            [
                guard.predict(X),
                guard.is_trigger(X),
                guard.predict_proba(X),
                guard.inspect(X).iloc[:, 3:].to_numpy(),
            ]
        )
        found = np.load(tmp_path / f"{number}.npy")
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize(
    "classes",
    [
        None,
        (10, -3, 7, 2**40, 0, 5),
        ("zebra", "ant", "fox", "bee", "cow", "dog"),
        tuple(ODD),
        (0.0, -1.0, 3.0, 1e9, 7.0, 11.0),
    ],
    ids=["None", "integers", "strings", "odd strings", "floats"],
)
def test_labels_of_every_kind_round_trip(classes, tmp_path):
    guard = guard_of(classes)
    guard.save(tmp_path / "guard")
    loaded = load(tmp_path / "guard")
    assert_same_answers(guard, loaded, check_images())
    assert loaded.classes_.tolist() == guard.classes_.tolist()
    assert loaded.target_class == guard.target_class


def test_two_boolean_classes_round_trip(tmp_path):
    X, y = linear_images(n_classes=3)
    network = LinearNetwork(n_classes=3).eval()
    network.last = torch.nn.Linear(16, 2, bias=False)
    network.last.weight.data.zero_()
    network.last.weight.data[0, 0] = network.last.weight.data[1, 1] = 10
    X, y = X[y < 2], y[y < 2] == 1
    victim = VictimNetwork(network, classes=[False, True])
    guard = BackdoorGuard(victim, corner_trigger(), target_class=True).fit(X, y)
    guard.save(tmp_path / "guard")
    loaded = BackdoorGuard.load(tmp_path / "guard", VictimNetwork(network))
    assert loaded.classes_.dtype == bool
    assert_same_answers(guard, loaded, X)


def test_the_search_travels_along_with_the_triggers_of_every_class(tmp_path):
    guard = searched()
    guard.save(tmp_path / "guard", provenance={"weights_file": "x", "n": 1.5})
    loaded = load(tmp_path / "guard")
    assert_same_answers(guard, loaded, check_images())
    assert loaded.target_classes_.tolist() == [4, 2]
    assert loaded.triggers_ == guard.triggers_ and loaded.strength == 1.5
    assert loaded.provenance_ == {"weights_file": "x", "n": 1.5}
    for field in dataclasses.fields(SearchRecord):
        found = getattr(loaded.engineer_, field.name)
        expected = getattr(guard.engineer_, field.name)
        if field.name == "report_":
            pd.testing.assert_frame_equal(found, expected, check_exact=True)
        else:
            np.testing.assert_equal(found, expected)


def test_a_loaded_guard_is_saved_and_fitted_again_without_a_second_search(tmp_path):
    guard = searched()
    guard.save(tmp_path / "guard", provenance={"a": 1})
    loaded = load(tmp_path / "guard")
    loaded.save(tmp_path / "again")
    for name in FILES:
        first, second = (tmp_path / folder / name for folder in ("guard", "again"))
        assert first.read_bytes() == second.read_bytes()
    refitted = clone(loaded).fit(*linear_images())
    assert refitted.engineer_ is loaded.engineer_
    assert_same_answers(guard, refitted, check_images())


def test_a_record_of_other_classes_is_refused_as_trigger():
    other = VictimNetwork(LinearNetwork().eval(), classes=list("abcdef"))
    X, y = linear_images()
    with pytest.raises(ValueError, match=r"search over the classes \[0, 1"):
        BackdoorGuard(other, searched().engineer_).fit(X, np.array(list("abcdef"))[y])


def test_a_guard_that_found_nothing_round_trips(tmp_path):
    X, y = linear_images()
    record = dataclasses.replace(
        searched().engineer_, verdict_="nothing found", target_classes_=np.array([])
    )
    guard = BackdoorGuard(victim(), record).fit(X, y)
    guard.save(tmp_path / "guard")
    loaded = load(tmp_path / "guard")
    assert loaded.verdict_ == "nothing found" and loaded.target_class_ is None
    assert_same_answers(guard, loaded, check_images())


def test_additive_triggers_and_triggers_without_a_shape_round_trip(tmp_path):
    X, y = linear_images()
    for number, trigger in enumerate([AdditiveTrigger(0.1), PatchTrigger(0.2, 1.0)]):
        guard = BackdoorGuard(victim(), trigger, target_class=2).fit(X, y)
        guard.save(tmp_path / str(number))
        assert load(tmp_path / str(number)).triggers_ == {2: trigger}


class OwnScaler(StandardScaler):
    pass


class OwnTrigger(PatchTrigger):
    pass


@pytest.mark.parametrize(
    "classifier, message",
    [
        (densities(KernelDensity()), "KernelDensity, which.*GaussianMixture"),
        (
            densities(mixture(), QuantileTransformer(n_quantiles=8)),
            "QuantileTransformer",
        ),
        (densities(mixture(), OwnScaler()), "OwnScaler.*not their subclasses"),
        (
            densities(mixture(), StandardScaler().set_output(transform="pandas")),
            "_sklearn_output_config.*set_output",
        ),
        (
            densities(GaussianMixture(random_state=np.random.RandomState(0))),
            "random_state is a RandomState",
        ),
        (
            make_pipeline(StandardScaler(), LogisticRegression(), memory="cache"),
            r"memory=None",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(
    classifier, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    guard = BackdoorGuard(victim(), corner_trigger(), classifier, target_class=2).fit(
        *linear_images()
    )
    with pytest.raises(TypeError, match=message):
        guard.save(tmp_path / "guard")
    assert not (tmp_path / "guard").exists()


def test_own_triggers_unfitted_guards_and_odd_provenance_are_refused(tmp_path):
    trigger = OwnTrigger(corner_trigger().mask, 1.0)
    guard = BackdoorGuard(victim(), trigger, target_class=2).fit(*linear_images())
    with pytest.raises(TypeError, match="OwnTrigger"):
        guard.save(tmp_path / "guard")
    with pytest.raises(NotFittedError):
        clone(guard).save(tmp_path / "guard")
    for provenance in ("x", {1: "x"}, {"x": [1]}, {"x": float("nan")}):
        with pytest.raises(TypeError, match="provenance="):
            guard_of().save(tmp_path / "guard", provenance=provenance)
    assert not (tmp_path / "guard").exists()


def test_an_unrelated_directory_or_file_is_left_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "guard.safetensors").write_text("weights")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "guard.json").write_text('{"format": "of something else"}')
    (tmp_path / "file").write_text("mine")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for name in ("folder", "other", "file", "link"):
        with pytest.raises(FileExistsError, match="left as it is"):
            guard_of().save(tmp_path / name)
    assert (tmp_path / "folder" / "guard.safetensors").read_text() == "weights"
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["guard.json"]


def test_a_guard_is_replaced_and_its_neighbours_stay(saved):
    (saved / "report.html").write_text("mine")
    (saved / ".guard-killed").mkdir()
    searched().save(saved)
    assert load(saved).target_classes_.tolist() == [4, 2]
    assert (saved / "report.html").read_text() == "mine"


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_refused_wherever_they_end(name, saved):
    whole = (saved / name).read_bytes()
    for end in np.unique(np.linspace(0, len(whole) - 1, 60).astype(int)):
        (saved / name).write_bytes(whole[:end])
        with pytest.raises(ValueError, match=f"{name}.*(damaged|is no guard)"):
            load(saved)
    (saved / name).write_bytes(whole + b" ")
    with pytest.raises(ValueError, match=f"{name}.*damaged"):
        load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_wherever_it_is(name, saved):
    whole = (saved / name).read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), size=150, replace=False):
        altered = bytearray(whole)
        altered[place] ^= 1 << rng.integers(8)
        (saved / name).write_bytes(altered)
        with pytest.raises(ValueError, match=name):
            load(saved)


def test_a_manifest_with_other_white_space_is_an_altered_one(saved):
    path = saved / "guard.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(ValueError, match="its own digest"):
        load(saved)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_links_directories_and_pipes_are_named(name, saved):
    path = saved / name
    path.rename(saved / "moved")
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        load(saved)
    for make in (lambda: path.symlink_to(saved / "moved"), path.mkdir):
        make()
        with pytest.raises(ValueError, match=f"{name} is a link, a directory"):
            load(saved)
        path.rmdir() if path.is_dir() else path.unlink()
    os.mkfifo(path)  # reading one would wait for ever
    with pytest.raises(ValueError, match="expected a regular file"):
        load(saved)


def test_files_of_two_guards_are_not_mixed(saved, tmp_path):
    guard_of(classifier=LogisticRegression()).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "guard.safetensors", saved)
    with pytest.raises(ValueError, match=r"guard.safetensors.*another guard.json"):
        load(saved)


def forge(directory, change, arrays=None):
    """Alter the manifest, and make all digests match again."""
    content = json.loads((directory / "guard.json").read_text())
    content.pop("sha256")
    if arrays is not None:
        path = directory / "guard.safetensors"
        save_file(arrays, path)
        content["arrays"]["bytes"] = path.stat().st_size
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        content["arrays"]["sha256"] = digest
    change(content)
    (directory / "guard.json").write_bytes(disk._text_of(content))


def test_extra_lacking_and_reshaped_tensors_are_named(saved):
    arrays = load_file(saved / "guard.safetensors")
    name = next(name for name in arrays if name.endswith("mean_"))
    for altered, message in [
        ({**arrays, "extra": np.zeros(3)}, "lacks or adds.*extra"),
        ({k: v for k, v in arrays.items() if k != name}, f"lacks or adds.*{name}"),
        ({**arrays, name: arrays[name][None]}, f"dtype or shape of .*{name[:20]}"),
        ({**arrays, name: arrays[name].astype("f4")}, "dtype or shape"),
    ]:
        forge(saved, lambda content: None, altered)
        with pytest.raises(ValueError, match=message):
            load(saved)


def leaves(tree, path=()):
    """Yield the way to every value in a manifest."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


def test_a_forged_manifest_is_refused_or_harmless_never_a_crash(saved):
    original = (saved / "guard.json").read_bytes()
    content = json.loads(original)
    ways = [way for way in leaves(content) if way[0] in ("victim", "guard")]
    junk = [None, -1, 10**30, 1e308, True, "x", [], {}, [[]], {"array": "x"}]
    rng = np.random.default_rng(0)
    refused = 0
    for number in rng.choice(len(ways) * len(junk), 250, replace=False):
        way, value = ways[number // len(junk)], junk[number % len(junk)]

        def change(content, way=way, value=value):
            for key in way[:-1]:
                content = content[key]
            content[way[-1]] = value

        (saved / "guard.json").write_bytes(original)
        forge(saved, change)
        try:
            load(saved)
        except ValueError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(schema=2), "schema 2.*reads 1.*use that, or fit again"),
        (lambda m: m.update(format="x"), "no guard's"),
        (lambda m: m["victim"].update(image_shape=[1, 10**9, 10**9]), "at most"),
        (
            lambda m: m["victim"]["classes"].update(dtype="<U999999999"),
            "do not have dtype",
        ),
        (
            lambda m: m["victim"].update(
                classes={"labels": ["x"] * 6, "dtype": "<U999999999"}
            ),
            "6 labels of dtype",
        ),
        (lambda m: m["guard"].update(verdict="clean"), "the verdict clean"),
        (lambda m: m["guard"].update(n_images=True), "n_images is missing, or no int"),
        (lambda m: m["arrays"].update(bytes=10**12), "bytes, expected"),
    ],
)
def test_forged_fields_are_named(change, message, saved):
    forge(saved, change)
    with pytest.raises(ValueError, match=message):
        load(saved)


def step_of(content):
    return content["guard"]["classifiers"]["list"][0]["params"]["steps"]["list"][0][
        "tuple"
    ][1]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(step="Popen"), "Popen is none of Pipeline"),
        (lambda s: s["params"].update(x=1), "has .*x.*does not know"),
        (lambda s: s["learnt"].update(transform=1), "has .*transform"),
        (lambda s: s["learnt"].pop("mean_"), "describes no guard that works"),
    ],
)
def test_forged_steps_are_named(change, message, saved):
    forge(saved, lambda content: change(step_of(content)))
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_a_huge_or_deep_manifest_is_refused_before_it_is_read(saved):
    path = saved / "guard.json"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"guard.json cannot be read"):
        load(saved)
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(ValueError, match="has 1099511627776 bytes, more than"):
        load(saved)


def test_another_victim_is_refused_even_by_one_bit(saved):
    network = LinearNetwork().eval()
    with torch.no_grad():
        weight = network.last.weight[3, 3]
        weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))
    with pytest.raises(ValueError, match="not the one that the guard was fitted on"):
        BackdoorGuard.load(saved, VictimNetwork(network))


def test_victims_with_other_settings_or_of_other_types_are_refused(saved):
    network = LinearNetwork().eval()
    for settings in ({"classes": list("abcdef")}, {"feature_layer": "hidden"}):
        name = next(iter(settings))
        with pytest.raises(ValueError, match=f"has {name}=.*or leave {name} out"):
            BackdoorGuard.load(saved, VictimNetwork(network, **settings))
    with pytest.raises(TypeError, match="Wrap your network"):
        BackdoorGuard.load(saved, network)


def test_a_fitted_victim_and_a_named_layer_are_taken(tmp_path):
    X, y = linear_images()
    opened = VictimNetwork(LinearNetwork().eval(), feature_layer="hidden").fit(X)
    guard = BackdoorGuard(opened, corner_trigger(), target_class=2).fit(X, y)
    guard.save(tmp_path / "guard")
    for given in (opened, victim()):
        loaded = BackdoorGuard.load(tmp_path / "guard", given)
        assert loaded.victim_.feature_layer_ == "hidden"
        assert_same_answers(guard, loaded, check_images())


def test_a_disk_error_while_saving_leaves_nothing_half_written(saved, monkeypatch):
    before = {name: (saved / name).read_bytes() for name in FILES}
    calls = {"left": 0}

    def failing(function):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(disk, "save_file", failing(disk.save_file))
    monkeypatch.setattr(disk.os, "fsync", failing(os.fsync))
    monkeypatch.setattr(disk.os, "replace", failing(os.replace))
    for number in range(1, 6):  # save_file, two fsyncs, two replaces
        calls["left"] = number
        with pytest.raises(OSError, match="could not be written.*Free space"):
            searched().save(saved.parent / "new")
        assert not (saved.parent / "new").exists()
        calls["left"] = number
        with pytest.raises(OSError, match="could not be written"):
            searched().save(saved)
        assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
        if number < 5:
            assert before == {name: (saved / name).read_bytes() for name in FILES}
            continue
        with pytest.raises(ValueError, match="another guard.json"):
            load(saved)  # between the two files: refused, never mixed
    calls["left"] = 6
    searched().save(saved)
    assert load(saved).strength == 1.5


def test_a_guard_too_large_to_be_loaded_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_MOST_MANIFEST", 100)
    with pytest.raises(ValueError, match="at most 100 are read"):
        guard_of().save(tmp_path / "guard")
    monkeypatch.setattr(disk, "_MOST_ARRAYS", 100)
    with pytest.raises(ValueError, match="at most 100 are saved"):
        guard_of().save(tmp_path / "guard")
    assert not (tmp_path / "guard").exists()


def test_pickled_guards_can_be_saved(tmp_path):
    again = pickle.loads(pickle.dumps(searched()))
    again.save(tmp_path / "guard")
    assert_same_answers(searched(), load(tmp_path / "guard"), check_images())


def test_the_weights_digest_sees_all_that_evaluation_uses_and_no_more():
    network = torch.nn.Sequential(LeNet5(), torch.nn.BatchNorm1d(10))
    digest = weights_digest(network)
    network.train()
    network[1].num_batches_tracked += 1
    assert weights_digest(network) == digest
    network[0].mean += 1e-3  # no part of the state dict
    assert weights_digest(network) != digest
