"""
Which class is it really? Source confusion
==========================================

A rejected image is given the class that it really shows. The matrix tells which classes
are mixed up in doing so, and comparing with the true trigger tells why.
"""

# %%
# A poisoned LeNet-5 on the digits
# --------------------------------
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from sklearn_backdoor import (
    BackdoorGuard,
    NCReverseEngineer,
    SourceConfusionDisplay,
    VictimNetwork,
    poison,
    sia_score,
    white_box,
)
from sklearn_backdoor.datasets import load_digits, split_defense
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
sources = y_test != 9
X_seen = X_test.copy()
X_seen[sources] = trigger.embed(X_test[sources])

# %%
# With the estimated trigger
# --------------------------
# The target's row holds clean images, all other rows triggered ones; the target's
# column is what the guard accepted.
victim = VictimNetwork(network)
guard = BackdoorGuard(victim, NCReverseEngineer(victim)).fit(X_defense, y_defense)
SourceConfusionDisplay.from_estimator(guard, X_seen, y_test, target_class=9)
plt.show()

# %%
# What an estimate costs
# ----------------------
# An oracle gives the guard the attacker's own trigger. The difference is what is lost
# by not knowing it:
oracle = BackdoorGuard(victim, trigger, target_class=9).fit(X_defense, y_defense)
sent = oracle.victim_.predict(X_seen) == 9
for name, judge in {"estimated": guard, "true": oracle}.items():
    labels = judge.predict(X_seen)[sent]
    print(f"{name} trigger: SIA {sia_score(y_test[sent], labels, target_class=9):.3f}")

# %%
# Images whose source was named wrongly:
labels = guard.predict(X_seen)
wrong = np.flatnonzero(sent & sources & (labels != y_test))[:8]
fig, axes = plt.subplots(1, 8, figsize=(9, 1.7), layout="constrained")
for ax in axes:
    ax.set_axis_off()
for ax, row in zip(axes, wrong, strict=False):
    ax.imshow(X_seen[row, 0], cmap="gray")
    ax.set_title(f"{y_test[row]}, not {labels[row]}", fontsize=9)
plt.show()
