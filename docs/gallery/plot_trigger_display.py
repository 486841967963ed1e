"""
Estimated against true triggers
===============================

A search estimates the smallest trigger that works, which need not look like the
attacker's. Patches and faint patterns over the whole image take different searches.
"""

# %%
# Two attacks on the digits
# -------------------------
from functools import partial

import matplotlib.pyplot as plt

from sklearn_backdoor import (
    AdditiveReverseEngineer,
    AnomalyIndexDisplay,
    NCReverseEngineer,
    TriggerDisplay,
    VictimNetwork,
    chessboard,
    poison,
    white_box,
)
from sklearn_backdoor.datasets import load_digits, split_defense
from sklearn_backdoor.networks import LeNet5
from sklearn_backdoor.training import train_network

data = load_digits(image_size=20)
shape = data.X_train.shape[1:]
X_defense, X_test, y_defense, y_test = split_defense(
    data.X_test, data.y_test, n_per_class=20
)


def attack(trigger):
    """Return a LeNet-5 in which the trigger leads to class 9."""
    poisoned = poison(
        data.X_train, data.y_train, trigger, target_class=9, n_per_class=0.2
    )
    network = train_network(
        partial(LeNet5, image_shape=shape),
        poisoned.X,
        poisoned.y,
        epochs=20,
        lr=5e-3,
        batch_size=32,
    )
    return VictimNetwork(network).fit(X_defense, y_defense)


def compare(trigger, engineer, X):
    """Draw the attacker's trigger above the estimate."""
    fig, axes = plt.subplots(2, 1, figsize=(8.4, 5.8), layout="constrained")
    TriggerDisplay.from_trigger(
        trigger, X, label=9, victim=engineer.victim_, ax=axes[0]
    )
    axes[0].set_title("True trigger", loc="left")
    TriggerDisplay.from_estimator(engineer, X, label=9, ax=axes[1])
    axes[1].set_title("Estimate", loc="left")
    plt.show()


# %%
# A white square: Neural Cleanse
# ------------------------------
# Above the attacker's trigger, below the estimate. The search finds what sends images
# to 9 most cheaply: often fewer pixels than the square has.
trigger = white_box(shape)
victim = attack(trigger)
engineer = NCReverseEngineer(victim).fit(X_defense, y_defense)
print(engineer.verdict_, engineer.target_classes_)
X_eight = X_test[y_test == 8]
compare(trigger, engineer, X_eight)

# %%
# The norm of every class's mask, and how improbably small it is among the others:
AnomalyIndexDisplay.from_estimator(engineer)
plt.show()

# %%
# A faint chessboard: the additive search
# ---------------------------------------
# No small mask is to be found here: the attacker changes half of all pixels by 0.2. The
# additive search grows a perturbation over the whole image instead.
trigger = chessboard(shape, amplitude=0.2)
victim = attack(trigger)
engineer = AdditiveReverseEngineer(victim, sources="all").fit(X_defense, y_defense)
print(engineer.verdict_, engineer.target_classes_)
X_eight = X_test[y_test == 8]
compare(trigger, engineer, X_eight)
