"""``info``: what is installed, and what it runs on."""

import json
import platform
from importlib import metadata
from pathlib import Path

import click

from sklearn_backdoor.cli._outcome import Command, say

_NEEDED = "torch torchvision scikit-learn skorch numpy scipy pandas safetensors pillow"
_EXTRAS = "timm onnx onnxruntime onnxscript"
_DATA = {
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
    "cifar10": "cifar-10-batches-py",
}


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def info(as_json):
    """Show versions, devices, extras and downloaded data: for a report of a bug.

    \b
    Exit status:
      0  always, unless there is an internal error (3)

    \b
    Examples:
      python -m sklearn_backdoor info
      python -m sklearn_backdoor info --json
    """  # noqa: D301
    found = collect()
    if as_json:
        say(json.dumps(found, indent=1))
        return
    for title, values in found.items():
        say(title)
        for name, value in values.items():
            shown = "not installed" if value is None else value
            shown = ("no", "yes")[value] if isinstance(value, bool) else shown
            say(f"  {name:<18}{shown}")


def collect():
    """Return what is installed, as plain values.

    Returns
    -------
    dict of dict
        ``versions``, ``devices``, ``extras`` (None: not installed), ``data``
        (downloaded or not).
    """
    import torch

    import sklearn_backdoor

    versions = {
        "sklearn_backdoor": sklearn_backdoor.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in _NEEDED.split()},
    }
    cuda = torch.cuda.is_available()
    n_devices = torch.cuda.device_count() if cuda else 0
    devices: dict = {"cpu_threads": torch.get_num_threads(), "cuda": cuda} | {
        f"cuda_{number}": torch.cuda.get_device_name(number)
        for number in range(n_devices)
    }

    cache = Path.home() / ".cache" / "sklearn_backdoor"
    return {
        "versions": versions,
        "devices": devices,
        "extras": {name: _version(name) for name in _EXTRAS.split()},
        "data": {"digits": True}
        | {name: (cache / place).is_dir() for name, place in _DATA.items()},
    }


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
