"""
Rivals on one scale: ROC curves
===============================

Every detector has ``trigger_score``, so scikit-learn's displays compare them. The
curves sweep a threshold that the guard does not have: it decides at 0.
"""

# %%
# A poisoned LeNet-5 on the digits
# --------------------------------
from functools import partial

import matplotlib.pyplot as plt
from sklearn.metrics import RocCurveDisplay

from sklearn_backdoor import (
    B3DDetector,
    BackdoorGuard,
    NCActivationDetector,
    NCReverseEngineer,
    STRIPDetector,
    VictimNetwork,
    fpr_score,
    poison,
    tpr_score,
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
victim = VictimNetwork(network)
engineer = NCReverseEngineer(victim).fit(X_defense, y_defense)
found = engineer.trigger_
print(engineer.verdict_, engineer.target_classes_)

# %%
# Four detectors, the same images
# -------------------------------
# Three of them get the same estimated trigger at 1.2 times its strength, as the guard
# takes an estimate by default. Thresholds of the rivals come from D_Defense, at an aim
# of 5 % false alarms.
strong = found.scaled(1.2)
detectors = {
    "BackdoorGuard": BackdoorGuard(victim, strong, target_class=9),
    "NCActivationDetector": NCActivationDetector(victim, strong, target_class=9),
    "B3DDetector": B3DDetector(victim, strong, target_class=9),
    "STRIPDetector": STRIPDetector(victim, n_blends=50, target_class=9),
}
for detector in detectors.values():
    detector.fit(X_defense, y_defense)

# %%
# Judged are images that the victim calls 9: triggered ones, and clean nines.
sources = y_test != 9
X_seen = X_test.copy()
X_seen[sources] = trigger.embed(X_test[sources])
sent = detectors["BackdoorGuard"].victim_.predict(X_seen) == 9
X_sent, origin = X_seen[sent], y_test[sent]

fig, ax = plt.subplots(figsize=(5.5, 5), layout="constrained")
for name, detector in detectors.items():
    flagged = detector.is_trigger(X_sent)
    decided = [-1 if flag else 9 for flag in flagged]  # -1: some other class
    tpr = tpr_score(origin, decided, target_class=9)
    fpr = fpr_score(origin, decided, target_class=9)
    display = RocCurveDisplay.from_predictions(
        origin != 9, detector.trigger_score(X_sent), name=name, ax=ax
    )
    ax.plot(fpr, tpr, "o", color=display.line_.get_color())
    print(f"{name:<22} TPR {tpr:.3f}, FPR {fpr:.3f} by its own decision")
ax.set(xlabel="FPR (dots: own decision)", ylabel="TPR")
plt.show()
