import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from sklearn_backdoor import VictimNetwork
from sklearn_backdoor.io import (
    UnsafeFileError,
    _build,
    _child,
    _sandbox,
    architecture_names,
    convert,
    file_digest,
    load_network,
)
from sklearn_backdoor.networks import LeNet5, Normalised, ResNet18
from tests import hostile
from tests.common import LinearNetwork, linear_images, needs_shared
from tests.hostile.making import archive, honest, torch_save

ROOT = Path(__file__).parents[1]
FACTORY = "tests.common:LinearNetwork"
ADVICE = (
    *("Get ", "Give ", "Have ", "get weights as", "download the file", "git lfs pull"),
    *("save network.module", "Wait until", "Load it as it is"),
)
VICTIM = "cifar10-resnet18-white-box-multi"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="hostile files need POSIX")


# ---- hostile and broken files


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Make all hostile files, and load them in one process whose memory is measured."""
    paths = {}
    for name, (make, _) in hostile.CASES.items():
        paths[name] = str(make(tmp_path_factory.mktemp("hostile", numbered=True)))
    order = tmp_path_factory.mktemp("order") / "order.json"
    order.write_text(json.dumps(paths))
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", order],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return paths, json.loads(done.stdout)


@pytest.mark.parametrize("name", hostile.CASES)
def test_hostile_file_is_refused_at_once_and_runs_nothing(refusals, name):
    paths, told = refusals
    kinds, message, _, cpu_seconds = told["found"][name]
    assert "ValueError" in kinds or "FileNotFoundError" in kinds, (kinds, message)
    for words in hostile.CASES[name][1]:
        assert any(one in message for one in words.split("|")), message
    assert any(advice in message for advice in ADVICE), message
    assert message.isprintable()
    assert cpu_seconds < 5  # the clock would measure the machine's other work
    path = Path(paths[name])
    folder = path if name == "folder_of_weights" else path.parent
    assert not (folder / "canary").exists()
    assert len(list(folder.iterdir())) <= 2  # nothing was left beside it


def test_over_a_hundred_hostile_files_are_refused_under_a_gigabyte(refusals):
    _, told = refusals
    assert len(told["found"]) >= 130 and len(hostile.IN_CHILD) >= 2
    assert max(told["peaks"]) < 2**30
    seconds = [
        one[-1] for name, one in told["found"].items() if name not in hostile.IN_CHILD
    ]
    assert np.median(seconds) < 0.1


def test_the_payload_would_have_run(tmp_path):
    import pickle

    path = hostile.CASES["pickle_as_pt"][0](tmp_path)
    pickle.loads(path.read_bytes())
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_damage_anywhere_is_refused_or_harmless(tmp_path, monkeypatch, kind):
    network = LinearNetwork()
    path = tmp_path / "weights"
    if kind == "pt":
        torch.save(network.state_dict(), path)
        monkeypatch.setattr(_sandbox, "_run", lambda *given: {"refused": "unread"})
    else:
        save_file(network.state_dict(), path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), size=rng.integers(1, 4)):
            # half of them in what is no weight
            place = place if rng.random() < 0.5 else place % 200 - 100
            changed[place] = rng.integers(256)
        path.write_bytes(changed[: len(changed) - rng.integers(0, 3) // 2])
        try:
            load_network(path, FACTORY)
        except ValueError as error:
            assert str(error).isprintable()


# ---- the child


def test_the_child_has_no_memory_for_what_the_size_does_not_explain(
    tmp_path, monkeypatch
):
    path = torch_save(tmp_path, {"w": torch.zeros(2**24)})
    small = {**_sandbox.limits_of(2**26), "memory": 2**24}
    monkeypatch.setattr(_sandbox, "limits_of", lambda size: small)
    with pytest.raises(UnsafeFileError, match="more memory than its size explains"):
        load_network(path, FACTORY)


def test_the_child_is_stopped_when_its_time_is_over(tmp_path, monkeypatch):
    path = torch_save(tmp_path, LinearNetwork().state_dict())
    limits = _sandbox.limits_of(1000)
    for changed, words in (
        ({"wall_seconds": 0.01}, "0.01 s were over"),
        ({"cpu_seconds": 0}, "could not be read by a process with limits"),
    ):
        monkeypatch.setattr(
            _sandbox, "limits_of", lambda size, changed=changed: {**limits, **changed}
        )
        with pytest.raises(UnsafeFileError, match=words):
            convert(path, tmp_path / "out.safetensors")
        assert os.listdir(tmp_path) == ["weights.pt"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("torch_save_with_a_nested_payload", "ended with status 1"),
        ("one_number_expanded_to_a_terabyte", "claims tensors of 1,099,511,627,776 b"),
    ],
)
def test_the_child_refuses_even_where_the_look_from_outside_is_left_out(
    tmp_path, monkeypatch, name, words
):
    path = hostile.CASES[name][0](tmp_path)
    monkeypatch.setattr(_sandbox, "check_pickle", lambda *given: None)
    with pytest.raises(UnsafeFileError, match=words):
        load_network(path, FACTORY)
    assert not (tmp_path / "canary").exists()


def test_the_child_takes_the_one_state_dict_of_a_checkpoint():
    state, best = LinearNetwork().state_dict(), torch.tensor(0.9)
    optimizer = {"state": {0: {"momentum": torch.ones(3)}}, "param_groups": [{}]}
    found = {"epoch": 3, "net": {**state, "n": 1}, "best": best, "o": optimizer}
    chosen, about = _child._choose(found)
    assert list(chosen) == list(state)
    assert about["wrapper"] == "net" and about["ignored"] == ["n", "epoch", "best", "o"]
    chosen, about = _child._choose({**state, "epoch": 3, "ema": state})
    assert list(chosen) == list(state)
    assert about["wrapper"] is None and about["ignored"] == ["epoch", "ema"]
    for content, words in (
        ({"model": state, "ema": state}, "several state dicts: 'model', 'ema'"),
        ({"epoch": 3, "o": optimizer}, "no tensors"),
        ({"w": best.reshape(1).to_sparse()}, "sparse or quantised"),
        ([best], "holds list"),
    ):
        with pytest.raises(_child._Refused, match=words):
            _child._choose(content)


def test_the_child_inherits_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    found = _sandbox._environment()
    assert not {"SECRET_TOKEN", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "HOME"} & set(found)


def test_a_child_that_cannot_start_is_no_fault_of_the_file(tmp_path, monkeypatch):
    path = torch_save(tmp_path, LinearNetwork().state_dict())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not start.*Convert the file"):
        load_network(path, FACTORY)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_file_that_grows_meanwhile_is_refused(tmp_path, monkeypatch, kind):
    path = tmp_path / "weights"
    save_file(LinearNetwork().state_dict(), path)
    if kind == "pt":
        torch.save(LinearNetwork().state_dict(), path)

    def grow(*given):
        with open(path, "ab") as file:
            file.write(b"more")
        return LinearNetwork()

    monkeypatch.setattr(_sandbox, "_run", grow)
    monkeypatch.setattr(_build, "call_factory", grow)
    with pytest.raises(UnsafeFileError, match="changed while it was read. Wait"):
        load_network(path, FACTORY)


# ---- honest files


def same_weights(loaded, network):
    found, wanted = loaded.state_dict(), network.state_dict()
    assert set(found) == set(wanted)
    return all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_state_dict_of_torch_is_read_whatever_its_name(tmp_path):
    from torchvision import models

    network = models.resnet18(num_classes=7)
    path = tmp_path / "resnet.safetensors"
    torch.save({"epoch": 3, "net": network.state_dict()}, path)
    with pytest.warns(UserWarning, match="under 'net'; .*left out: epoch") as caught:
        loaded = load_network(path, "torchvision:resnet18")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert same_weights(loaded, network) and not loaded.training
    assert os.listdir(tmp_path) == ["resnet.safetensors"]


def test_safetensors_are_read_whatever_their_name(tmp_path):
    path = tmp_path / "weights.pt"
    save_file(LinearNetwork(8).state_dict(), path)
    assert same_weights(load_network(path, FACTORY, n_classes=8), LinearNetwork(8))


def test_other_precisions_are_converted_and_counters_kept(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    network[1].num_batches_tracked += 7
    path = tmp_path / "half.safetensors"
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in network.state_dict().items()
        }
        save_file(state, path)
        loaded = load_network(path, network)
        assert not loaded.training
        found = loaded.state_dict()
        assert all(v.dtype in (torch.float32, torch.int64) for v in found.values())
        assert found["1.num_batches_tracked"] == 7
        np.testing.assert_array_equal(found["0.weight"], state["0.weight"].float())
    del state["1.num_batches_tracked"]  # plays no part in evaluation
    save_file(state, path)
    assert torch.equal(load_network(path, network)[0].bias, state["0.bias"].float())
    state["1.num_batches_tracked"] = torch.tensor(7.0)
    save_file(state, path)
    with pytest.raises(ValueError, match="differs in 1.num_batches_tracked"):
        load_network(path, network)


def make_torchvision(name, **options):
    from torchvision import models

    return models.get_model(name, weights=None, **options)


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"]
)
def test_torchvision_networks_are_built_by_name_with_the_classes_in_the_file(
    tmp_path, name
):
    network = make_torchvision(name, num_classes=5)
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    before = torch.get_rng_state()
    loaded = load_network(path, f"torchvision:{name}")
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(loaded, network)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(images), network.eval()(images))


def test_heads_for_training_may_be_left_out_of_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    network = make_torchvision(
        "googlenet", num_classes=4, aux_logits=False, init_weights=False
    )
    save_file(network.state_dict(), path)
    loaded = load_network(path, "torchvision:googlenet")
    assert same_weights(loaded, network) and not loaded.aux_logits


def test_timm_networks_are_built_by_name(tmp_path):
    timm = pytest.importorskip("timm")
    path = tmp_path / "weights.safetensors"
    network = timm.create_model("test_vit", num_classes=5, in_chans=1, img_size=64)
    save_file(network.state_dict(), path)
    loaded = load_network(path, "timm:test_vit", image_shape=(1, 64, 64))
    images = torch.rand(2, 1, 64, 64)
    assert torch.equal(loaded(images), network.eval()(images))
    with pytest.raises(ValueError, match="differs in .*pos_embed|does not belong"):
        load_network(path, "timm:test_vit")
    assert "timm:test_vit" in architecture_names()


def test_timm_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    find = _build.find_architecture.__globals__["importlib"].util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "timm" else find(name)
    )
    with pytest.raises(ImportError, match=r"sklearn-backdoor\[timm\]"):
        load_network(tmp_path, "timm:resnet18")
    names = architecture_names()
    assert "torchvision:resnet18" in names and "lenet5" in names
    assert not any(name.startswith("timm:") for name in names)


@pytest.mark.parametrize(
    "name, words",
    [
        ("resnet81", "Did you mean resnet18"),
        ("resnet50", "Did you mean torchvision:resnet50"),
        ("torchvision:resnet5", "Did you mean torchvision:resnet50"),
        ("torchvison:resnet50", "Did you mean torchvision:resnet50"),
        ("torchvision:fcn_resnet50", "none of torchvision's classifiers"),
        ("nonsense", "expected package.module:factory, torchvision:NAME, timm:NAME"),
        (":make", "expected package.module:factory"),
        ("bad\x1b[31m", r"'bad\\x1b\[31m'"),
    ],
)
def test_an_unknown_architecture_is_answered_with_the_closest(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        load_network(tmp_path / "absent", name)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_lenets_image_shape_is_told_by_the_file(tmp_path, shape):
    network = LeNet5(7, shape)
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    loaded = load_network(path, "lenet5")
    images = torch.rand(2, *shape)
    assert torch.equal(loaded(images), network.eval()(images))


def test_lenets_image_shape_is_asked_for_where_the_file_does_not_tell(tmp_path):
    path = tmp_path / "weights.safetensors"
    for shape in ((1, 16, 16), (1, 28, 36)):
        network = LeNet5(7, shape)
        save_file(network.state_dict(), path)
        with pytest.raises(ValueError, match="Give image_shape"):
            load_network(path, "lenet5")
        loaded = load_network(path, "lenet5", image_shape=shape)
        assert same_weights(loaded, network)


def test_one_channel_of_resnet18_needs_its_normalisation(tmp_path):
    network = ResNet18(4, n_channels=1, mean=0.2, std=0.4)
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    with pytest.raises(ValueError, match="no mean and std of its own. Give"):
        load_network(path, "resnet18")
    loaded = load_network(path, "resnet18", mean=0.2, std=0.4)
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(loaded(images), network.eval()(images))


def test_another_network_is_put_behind_its_normalisation(tmp_path):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    network = make_torchvision("shufflenet_v2_x0_5", num_classes=4).eval()
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    name = "torchvision:shufflenet_v2_x0_5"
    loaded = load_network(path, name, mean=mean, std=std)
    assert isinstance(loaded, Normalised)
    images = torch.rand(4, 3, 32, 32)
    normalised = torch.stack(
        [(images[:, k] - mean[k]) / std[k] for k in range(3)], dim=1
    )
    np.testing.assert_allclose(
        loaded(images).detach(), network(normalised).detach(), atol=1e-5
    )
    victim = VictimNetwork(loaded).fit(images.numpy())
    assert victim.transform(images.numpy()).shape == (4, 1024)


def test_a_network_that_is_there_is_copied_not_altered(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(LinearNetwork(backdoor=3.0).state_dict(), path)
    own = LinearNetwork(backdoor=7.0).train()
    loaded = load_network(path, own)
    assert same_weights(loaded, LinearNetwork(backdoor=3.0)) and not loaded.training
    assert same_weights(own, LinearNetwork(backdoor=7.0)) and own.training
    wrapped = load_network(path, own, mean=0.5, std=0.5)
    X = torch.from_numpy(linear_images()[0])
    np.testing.assert_allclose(
        wrapped(X).detach(), loaded((X - 0.5) / 0.5).detach(), rtol=1e-6
    )
    with pytest.raises(ValueError, match="has them already"):
        load_network(path, own, n_classes=6)


def test_networks_without_memory_for_weights_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(LinearNetwork().state_dict(), path)
    with pytest.raises(ValueError, match="Sequential is a network whose layers have"):
        load_network(path, nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="Linear is a network on the meta device"):
        load_network(path, nn.Linear(3, 3, device="meta"))
    with pytest.raises(TypeError, match="architecture is int"):
        load_network(path, 5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight


def test_tied_weights_may_be_in_the_file_once(tmp_path):
    weight = torch.arange(16.0).reshape(4, 4)
    path = tmp_path / "weights.safetensors"
    save_file({"last.weight": weight}, path)
    loaded = load_network(path, Tied())
    assert torch.equal(loaded.first.weight, weight)
    assert loaded.first.weight is loaded.last.weight
    save_file({"other.weight": weight}, path)
    with pytest.raises(ValueError, match="lacks first.weight, last.weight"):
        load_network(path, Tied())


def test_a_network_that_does_not_fit_is_never_built(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    # a bias of many classes without its matrix
    save_file({"classifier.6.bias": torch.zeros(10**6)}, path)
    built = []

    def spy(self):
        built.append(next(iter(self.parameters())).device.type)

    from sklearn_backdoor.networks import VGG16

    init = VGG16.__init__
    monkeypatch.setattr(
        VGG16, "__init__", lambda self, n: [init(self, n), spy(self)] and None
    )
    with pytest.raises(ValueError, match=r"\(1000000,\), not floating point \(2,\)"):
        load_network(path, "vgg16")
    assert built and set(built) == {"meta"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n_classes": 0}, "n_classes is 0, expected a positive integer"),
        ({"n_classes": True}, "n_classes is True"),
        ({"n_classes": 11}, r"last.weight \(F32 \(6, 16\), not floating point \(11"),
        ({"image_shape": (1, 28)}, "expected \\(n_channels, height, width"),
        ({"image_shape": 28}, "expected \\(n_channels, height, width"),
        ({"image_shape": (1, None, 3)}, "expected \\(n_channels, height, width"),
        ({"mean": 0.5}, "mean and std go together"),
        ({"mean": 127.0, "std": 1}, "Divide what is meant for pixels in 0...255"),
        ({"mean": 0.5, "std": 0.0}, "std is 0.0"),
        ({"mean": float("nan"), "std": 0.1}, "mean is nan"),
        ({"mean": "grey", "std": 0.1}, "mean is 'grey'"),
        ({"mean": [[0.5]], "std": 0.1}, "mean is"),
        ({"mean": [], "std": []}, "mean is"),
        ({"mean": (0.1, 0.2), "std": (0.1, 0.2, 0.3)}, "2 and 3 numbers"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(tmp_path, options, words):
    path = tmp_path / "weights.safetensors"
    save_file(LinearNetwork().state_dict(), path)
    with pytest.raises(ValueError, match=words):
        load_network(path, FACTORY, **options)


def test_a_factory_that_does_not_take_what_is_given_says_so(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(LinearNetwork().state_dict(), path)
    with pytest.raises(ValueError, match="is called with image_shape, as given"):
        load_network(path, FACTORY, image_shape=(1, 4, 4))


def test_a_ready_victim_keeps_its_accuracy_on_its_stated_classes():
    path = needs_shared("victims", f"{VICTIM}.safetensors")
    loaded = load_network(path, "resnet18")
    assert loaded.fc.weight.shape == (10, 512)
    wanted = load_file(path)
    assert torch.equal(loaded.conv1.weight, wanted["conv1.weight"].float())
    assert wanted["conv1.weight"].dtype == torch.float16


# ---- conversion


def test_conversion_keeps_values_and_says_what_is_odd(tmp_path, monkeypatch):
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "a.weight": shared.t(),  # not contiguous
        "b.weight": shared,
        "half": torch.tensor([0.5, float("nan")], dtype=torch.bfloat16),
        "counter": torch.tensor(7),
        "none": None,
    }
    content = {"epoch": 3, "state_dict": state, "best": torch.tensor(0.9)}
    path = torch_save(tmp_path, content)
    out = tmp_path / "weights.safetensors"
    out.write_bytes(b"old")
    monkeypatch.chdir(tmp_path)
    about = convert(path.name, out.name)
    assert (about["n_tensors"], about["n_parameters"]) == (4, 15)
    assert about["sha256_in"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert about["sha256_out"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert about["sha256_out"] == file_digest(out)
    notes = "; ".join(about["notes"])
    assert "under 'state_dict'" in notes
    assert "left out: none, epoch, best" in notes
    assert "on their own: b.weight" in notes and "infinity is in: half" in notes
    found = load_file(out)
    for name, value in state.items():
        if value is not None:
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name].float(), value.float())
    assert sorted(os.listdir(tmp_path)) == ["weights.pt", "weights.safetensors"]


def test_conversion_refuses_its_own_input_and_safetensors(tmp_path):
    path = torch_save(tmp_path, LinearNetwork().state_dict())
    (tmp_path / "again.pt").symlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / "again.pt", tmp_path):
        with pytest.raises(ValueError, match="is the file itself, or no regular file"):
            convert(path, out)
    with pytest.raises(FileNotFoundError, match="is no folder. Make it first"):
        convert(path, tmp_path / "absent" / "out.safetensors")
    assert path.read_bytes() == before
    path.write_bytes(save(LinearNetwork().state_dict()))
    with pytest.raises(UnsafeFileError, match="safetensors file already"):
        convert(path, tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["again.pt", "weights.pt"]


def test_a_refused_conversion_leaves_the_old_file(tmp_path):
    out = tmp_path / "weights.safetensors"
    out.write_bytes(b"old")
    entries = honest()
    entries["archive/data.pkl"] = entries["archive/data.pkl"].replace(
        b"Float", b"Quint"
    )
    with pytest.raises(UnsafeFileError, match="asks for torch.QuintStorage"):
        convert(archive(tmp_path, entries), out)
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["weights.pt", "weights.safetensors"]
