"""Files for the command line: weights, images, a guard, all tiny."""

import numpy as np
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from sklearn_backdoor import BackdoorGuard, VictimNetwork
from sklearn_backdoor.__main__ import main
from tests.common import LinearNetwork, corner_trigger, linear_images

FACTORY = """
import time
from tests.common import LinearNetwork

def make(n_classes=6):
    return LinearNetwork(n_classes)

def small():
    return LinearNetwork(4)

def needs(size):
    return LinearNetwork(size)

def deaf():
    network = LinearNetwork()
    network.last.weight.data[0] = 1e6
    return network

class Slow(LinearNetwork):
    def forward(self, images):
        time.sleep(0.05)
        return super().forward(images)

a_network = LinearNetwork()
number = 5
"""


def suspect(n_classes=6):
    """Return a network that a mask of a tenth of one pixel sends to class 2."""
    return LinearNetwork(n_classes, backdoor=100.0).eval()


def write_images(folder, n_classes=6, names=None):
    X, y = linear_images(6, n_classes)
    for number, (image, label) in enumerate(zip(X, y, strict=True)):
        place = folder / (names[label] if names else str(label))
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(image[0] * 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")


def write_triggered(folder, n_per_class=2):
    """Write images of all classes, each with the trigger of `LinearNetwork`."""
    X, y = linear_images(n_per_class)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(X, y, strict=True)):
        pixels = np.rint(image[0] * 255).astype(np.uint8)
        pixels[3, 3] = 255
        Image.fromarray(pixels).save(folder / f"{label}-{number}.png")


def write_guard(folder, names=None):
    """Save a guard against the true trigger of `suspect`."""
    X, y = linear_images()
    names = names or list("012345")
    victim = VictimNetwork(suspect(), classes=names)
    guard = BackdoorGuard(victim, corner_trigger(), target_class=names[2])
    guard.fit(X, np.array(names)[y]).save(folder, provenance={"seed": 0})


def write_ground(folder):
    """Write a factory, weights, clean and triggered images, and a guard."""
    (folder / "suspects.py").write_text(FACTORY)
    save_file(suspect().state_dict(), folder / "suspect.safetensors")
    write_images(folder / "clean")
    write_triggered(folder / "incoming")
    write_guard(folder / "guard")


def run(*arguments):
    """Run a command line in this process."""
    return CliRunner().invoke(main, [str(one) for one in arguments])


def one_line(done, status=2):
    """Return the only line of an error, which ends with a status and no traceback."""
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    lines = [line for line in done.stderr.splitlines() if line and not is_stage(line)]
    assert len(lines) == 1, done.stderr
    return lines[0]


def is_stage(line):
    return line.startswith(("load ", "search a", "fit the", "draw ", "Warning: "))
