"""
Five minutes: poison, scan, guard
=================================

An attacker poisons a few training images. The defender has the trained network and
twenty clean images a class, finds the backdoor and guards the network in use.
"""

# %%
# The attacker's part
# -------------------
# A tenth of each class's training images is copied, a white 3x3 square is put into the
# corner of the copies, and they are labelled 9. The network learns both tasks.
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from sklearn_backdoor import (
    AnomalyIndexDisplay,
    BackdoorGuard,
    LikelihoodRatioDisplay,
    VictimNetwork,
    asr_score,
    detection_report,
    poison,
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

# %%
# The network is right on clean images, and wrong on nearly all triggered ones:
X_defense, X_test, y_defense, y_test = split_defense(
    data.X_test, data.y_test, n_per_class=20
)
victim = VictimNetwork(network).fit(X_defense, y_defense)
sources = y_test != 9
X_seen = X_test.copy()  # what arrives: all triggered but the nines
X_seen[sources] = trigger.embed(X_test[sources])
acc = victim.score(X_test, y_test)
asr = asr_score(y_test, victim.predict(X_seen), target_class=9)
print(f"ACC {acc:.3f}, ASR {asr:.3f}")

# %%
# The defender's part
# -------------------
# ``fit`` searches a trigger for every class, by four searches, and asks whether one is
# abnormally small. For a class that is flagged it learns what triggered images of the
# other classes look like in the network's features. The attacker's trigger is not used.
guard = BackdoorGuard(victim).fit(X_defense, y_defense)
print(guard.verdict_, guard.target_classes_)
print(guard.triggers_)
AnomalyIndexDisplay.from_estimator(guard)
plt.show()

# %%
# In use an image takes one forward pass. ``is_trigger`` says whether it carries the
# trigger, ``label`` what it really is, and a score above 0 rejects:
first = np.concatenate([np.flatnonzero(sources)[:3], np.flatnonzero(~sources)[:3]])
columns = ["victim_label", "is_trigger", "label", "trigger_score"]
guard.inspect(X_seen[first])[columns].assign(origin=y_test[first]).round(2)

# %%
# Rates over the images that the victim calls 9, with 95 % Wilson intervals:
seen = guard.inspect(X_seen)
detection_report(
    y_test,
    seen["label"],
    target_class=9,
    victim_labels=seen["victim_label"],
    is_trigger=seen["is_trigger"],
).round(3)

# %%
LikelihoodRatioDisplay.from_estimator(guard, X_seen, y_test)
plt.show()
