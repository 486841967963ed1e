"""Pickles: bare, by joblib and skorch, and in the ZIP file of torch.save."""

import argparse
import io
import lzma
import pickle
import tarfile
from pathlib import Path

import joblib
import numpy as np
import torch
from skorch import NeuralNetClassifier

from tests.common import LinearNetwork
from tests.hostile.making import (
    Code,
    Payload,
    archive,
    call,
    case,
    code,
    find,
    honest,
    program,
    state,
    tensor,
    torch_save,
    write,
)


@case("is a pickle that asks for posix.mkdir")
def pickle_as_pt(folder):
    return write(folder, pickle.dumps(Payload(folder)))


@case("is a pickle that asks for posix.mkdir")
def pickle_as_safetensors(folder):
    return write(folder, pickle.dumps(Payload(folder)), "weights.safetensors")


@case("is a pickle that asks for posix.mkdir")
def pickle_of_protocol_0(folder):
    return write(folder, pickle.dumps(Payload(folder), protocol=0))


@case("is a pickle that asks for posix.mkdir")
def pickle_nested_in_a_dict(folder):
    content = {"state_dict": {"last.weight": [1.0], "epoch": {"x": Payload(folder)}}}
    return write(folder, pickle.dumps(content), "model.bin")


@case("is a pickle that asks for posix.mkdir")
def pickle_in_a_chain_of_two(folder):
    return write(folder, pickle.dumps(Payload(folder)) + pickle.dumps({"a": 1}))


@case("is a pickle")
def joblib_dump(folder):
    path = Path(folder) / "model.joblib"
    joblib.dump({"w": np.ones(3), "x": Payload(folder)}, path)
    return path


@case("is a zlib stream, as joblib writes")
def joblib_dump_compressed(folder):
    path = Path(folder) / "model.joblib"
    joblib.dump(Payload(folder), path, compress=3)
    return path


@case("is a gzip file")
def joblib_dump_in_gzip(folder):
    path = Path(folder) / "model.pkl.gz"
    joblib.dump(Payload(folder), path, compress=("gzip", 3))
    return path


@case("is an xz file")
def pickle_in_xz(folder):
    return write(folder, lzma.compress(pickle.dumps(Payload(folder))), "weights.xz")


@case("is a pickle that asks for skorch.classifier.NeuralNetClassifier")
def skorch_pickle(folder):
    return write(folder, pickle.dumps(NeuralNetClassifier(LinearNetwork)), "net.pkl")


@case("torch's format from before 1.6")
def legacy_torch_with_a_payload(folder):
    path = Path(folder) / "weights.pt"
    content = {**state(), "x": Payload(folder)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


@case("torch's format from before 1.6")
def legacy_torch_state_dict(folder):
    path = Path(folder) / "weights.pt"
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    return path


@case("is a tar file")
def legacy_tar(folder):
    path = Path(folder) / "weights.pt"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(Payload(folder))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


# ---- pickles in a ZIP file of torch.save, by torch itself


@case("asks for posix.mkdir")
def torch_save_of_a_payload(folder):
    return torch_save(folder, Payload(folder))


@case("asks for posix.mkdir")
def torch_save_with_a_nested_payload(folder):
    return torch_save(folder, {"state_dict": state(), "args": [{"a": Payload(folder)}]})


@case("asks for posix.mkdir")
def torch_save_with_a_payload_in_the_metadata(folder):
    content = state()
    content._metadata["x"] = Payload(folder)
    return torch_save(folder, content)


@case("STACK_GLOBAL|FRAME|instruction")
def torch_save_of_protocol_4(folder):
    content = {**state(), "x": Payload(folder)}
    return torch_save(folder, content, pickle_protocol=4)


@case("asks for tests.common.LinearNetwork")
def whole_network(folder):
    return torch_save(folder, LinearNetwork())


@case("asks for torch.nn.modules.linear.Linear: a whole network")
def whole_layer_in_a_state_dict(folder):
    return torch_save(folder, {**state(), "layer": torch.nn.Linear(2, 2)})


@case("asks for numpy.")
def numpy_in_a_checkpoint(folder):
    return torch_save(folder, {"state_dict": state(), "best": np.float64(0.9)})


@case("asks for argparse.Namespace")
def arguments_in_a_checkpoint(folder):
    return torch_save(folder, {"model": state(), "args": argparse.Namespace(lr=1)})


@case("a lone tensor")
def lone_tensor(folder):
    return torch_save(folder, torch.zeros(3))


@case("as torch.save does not|asks for torch")
def sparse_tensor(folder):
    return torch_save(folder, {"w": torch.eye(3).to_sparse()})


# ---- pickles in a ZIP file, by hand


@case("asks for posix.system")
def global_of_the_system(folder):
    run = call(find("posix", "system"), f"mkdir {folder}/canary")
    return program(folder, {"w": run})


@case("asks for builtins.eval")
def evaluation_as_a_storage_type(folder):
    text = f"__import__('os').mkdir('{folder}/canary')"
    kind = call(find("builtins", "eval"), text)
    storage = code(("storage", kind, "0", "cpu", 1)) + b"Q"
    return program(folder, {"w": Code(storage)}, {"0": bytes(4)})


@case("asks for torch.serialization.load")
def a_second_load_inside(folder):
    inner = write(folder, pickle.dumps(Payload(folder)), "inner.pt")
    again = call(find("torch.serialization", "load"), str(inner), None, None)
    return program(folder, {"w": again})


@case("asks for torch._utils._rebuild_tensor_v2.__globals__")
def attribute_of_an_allowed_function(folder):
    return program(
        folder, {"w": find("torch._utils", "_rebuild_tensor_v2.__globals__")}
    )


@case("instruction INST")
def instruction_of_protocol_0(folder):
    run = Code(b"(" + code(f"{folder}/canary") + b"iposix\nmkdir\n")
    return program(folder, {"w": run})


@case("instruction EXT1")
def instruction_of_the_extension_registry(folder):
    return program(folder, {"w": Code(b"\x82\x01")})


@case("instruction NEWOBJ")
def instruction_that_makes_objects(folder):
    made = code(find("collections", "OrderedDict")) + code(()) + b"\x81"
    return program(folder, {"w": Code(made)})


@case("no dict or list")
def state_set_on_a_function(folder):
    built = code(find("torch._utils", "_rebuild_parameter")) + code({"a": 1}) + b"b"
    return program(folder, {"w": Code(built)})


@case("as torch.save does not")
def call_with_other_arguments(folder):
    return program(folder, {"w": call(find("collections", "OrderedDict"), [("a", 1)])})


@case("keys are no names")
def keys_that_collide(folder):
    keys = {(-1, -2) * 3: 1, (-2, -1) * 3: 2}
    return program(folder, {"w": keys})


@case("its pickle is broken")
def pickle_cut_off(folder):
    entries = honest()
    entries["archive/data.pkl"] = entries["archive/data.pkl"][:-40]
    return archive(folder, entries)


@case("something follows its pickle")
def pickle_with_a_second_one_behind(folder):
    entries = honest()
    entries["archive/data.pkl"] += pickle.dumps(Payload(folder))
    return archive(folder, entries)


@case("instruction POP")
def pickle_of_garbage(folder):
    return archive(folder, {**honest(), "archive/data.pkl": b"\x80\x02" + b"0" * 999})


@case("more than a state dict needs")
def pickle_of_5_megabytes(folder):
    return archive(folder, {**honest(), "archive/data.pkl": b"N" * (5 * 2**20)})


@case("steps")
def pickle_of_a_million_steps(folder):
    return program(folder, {"w": [Code(b"N" * 1_000_000)]})


@case("claims 1000000 numbers")
def storage_shorter_than_it_claims(folder):
    lie = tensor((1000, 1000), (1000, 1), 1_000_000)
    return program(folder, {"last.weight": lie}, {"0": bytes(64)})


@case("claims 16 numbers")
def storage_that_is_not_there(folder):
    return program(folder, {"w": tensor((4, 4), (4, 1), 16, key="../0")})


@case("reaches past its storage")
def tensor_past_its_storage(folder):
    lie = tensor((4, 4), (400, 1), 16, offset=10)
    return program(folder, {"w": lie}, {"0": bytes(64)})


@case("impossible sizes")
def tensor_of_negative_strides(folder):
    return program(folder, {"w": tensor((4,), (-1,), 16)}, {"0": bytes(64)})


@case("impossible sizes")
def tensor_of_a_size_beyond_64_bits(folder):
    return program(folder, {"w": tensor((2**70,), (0,), 16)}, {"0": bytes(64)})


@case("far more numbers in tensors than its size explains")
def one_number_expanded_to_a_terabyte(folder):
    view = tensor((2**38,), (0,), 1)
    return program(folder, {"last.weight": view}, {"0": bytes(4)})


@case("far more numbers in tensors than its size explains")
def a_thousand_views_of_a_megabyte(folder):
    views = {f"w{number}": tensor((2**18,), (1,), 2**18) for number in range(1000)}
    return program(folder, views, {"0": bytes(2**20)})


# ---- what only the child sees


@case("several state dicts", child=True)
def two_networks_in_a_file(folder):
    return torch_save(folder, {"model": state(), "ema": state()})


@case("differs in hidden.weight (I64", child=True)
def whole_numbers_in_torch_save(folder):
    return torch_save(folder, {name: value.long() for name, value in state().items()})
