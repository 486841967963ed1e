"""
Save a guard, load it, deploy it
================================

A fitted guard is two files without a pickle. As one ``torch.nn.Module`` it goes where
torch programs go.
"""

# %%
# A guard for a poisoned LeNet-5
# ------------------------------
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors.torch import save_file

from sklearn_backdoor import (
    BackdoorGuard,
    NCReverseEngineer,
    VictimNetwork,
    poison,
    white_box,
)
from sklearn_backdoor.datasets import load_digits, split_defense
from sklearn_backdoor.io import file_digest, load_network
from sklearn_backdoor.networks import LeNet5
from sklearn_backdoor.training import train_network

data = load_digits(image_size=20)
shape = data.X_train.shape[1:]
trigger = white_box(shape)
poisoned = poison(data.X_train, data.y_train, trigger, target_class=9, n_per_class=0.1)
network = train_network(
    partial(LeNet5, image_shape=shape),
    poisoned.X,
    poisoned.y,
    epochs=20,
    lr=5e-3,
    batch_size=32,
)
X_defense, X_test, y_defense, y_test = split_defense(
    data.X_test, data.y_test, n_per_class=20
)
folder = TemporaryDirectory()
weights = Path(folder.name) / "suspect.safetensors"
save_file(network.state_dict(), weights)

# %%
# Load, guard, save
# -----------------
# The architecture is code that you trust; the weights are read as numbers and compared
# with it before anything is assigned. The guard's folder holds a manifest, triggers and
# densities, and not the network.
loaded = load_network(weights, "lenet5", image_shape=shape)
victim = VictimNetwork(loaded)
guard = BackdoorGuard(victim, NCReverseEngineer(victim)).fit(X_defense, y_defense)
print(guard.verdict_, guard.target_classes_)

saved = Path(folder.name) / "guard"
guard.save(
    saved,
    provenance={"weights_file": weights.name, "weights_sha256": file_digest(weights)},
)
for path in sorted(saved.iterdir()):
    print(f"{path.name:<22} {path.stat().st_size / 1000:.0f} kB")

# %%
# Load the guard
# --------------
# It goes with this network alone: another one is refused. Scores are the same bits.
twin = BackdoorGuard.load(saved, VictimNetwork(loaded))
X_seen = trigger.embed(X_test)
same = np.array_equal(twin.trigger_score(X_seen), guard.trigger_score(X_seen))
print(f"same scores: {same}; from {twin.provenance_['weights_file']}")

try:
    BackdoorGuard.load(saved, VictimNetwork(LeNet5(image_shape=shape).eval()))
except ValueError as error:
    print(f"refused: {error}")

# %%
# One torch module
# ----------------
# From images in 0...1 to label, decision and score. ``label`` counts the logits; the
# names are in ``module.classes``.
module = guard.to_module()
images = torch.from_numpy(X_seen.astype(np.float32) / 255)
label, is_trigger, score = module(images)
print(np.array_equal(np.array(module.classes)[label], guard.predict(X_seen)))
print(f"{is_trigger.sum()} of {len(images)} images carry the trigger")

# %%
# Export
# ------
# ``torch.export`` makes a program that needs neither this package nor scikit-learn. Two
# images or more as an example, so that the size of a batch stays free.
program = torch.export.export(
    module,
    (images[:2],),
    dynamic_shapes=({0: torch.export.Dim("n")},),
    strict=False,
)
exported = program.module()(images)
print(f"labels equal: {torch.equal(exported[0], label)}")
folder.cleanup()

# %%
# The scores of the guard and of the exported program, image by image:
fig, ax = plt.subplots(figsize=(5, 4.5), layout="constrained")
ax.plot(guard.trigger_score(X_seen), exported[2], ".")
ax.axhline(0, color="0.6", linewidth=1)
ax.set(xlabel="trigger score of the guard", ylabel="of the exported program")
plt.show()

# %%
# For ONNX (needs the ``onnx`` extra), the same call with names:
#
# .. code-block:: python
#
#     torch.onnx.export(
#         module, (images[:2],), "guard.onnx", dynamo=True,
#         dynamic_shapes=({0: torch.export.Dim("n")},),
#         input_names=["images"],
#         output_names=["label", "is_trigger", "trigger_score"],
#     )
