"""
Why it works: a triggered image stays near its own class
========================================================

The trigger moves an image over the decision boundary, but in the penultimate features
much of what it showed before is still there.
"""

# %%
# A poisoned LeNet-5 on the digits
# --------------------------------
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_backdoor import (
    BackdoorGuard,
    FeatureSpaceDisplay,
    NCReverseEngineer,
    VictimNetwork,
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
X_defense, X_test, y_defense, y_test = split_defense(
    data.X_test, data.y_test, n_per_class=20
)

# %%
# The guard's view
# ----------------
# The guard embeds the *estimated* trigger into the clean images of all classes but the
# target. Drawn are the features of these and of the target's clean images in two
# principal components, and unseen images with the *true* trigger on top.
victim = VictimNetwork(network)
guard = BackdoorGuard(victim, NCReverseEngineer(victim)).fit(X_defense, y_defense)
sources = y_test != 9
X_seen = X_test.copy()
X_seen[sources] = trigger.embed(X_test[sources])
FeatureSpaceDisplay.from_estimator(
    guard, X_defense, y_defense, X_check=X_seen[::5], target_class=9
)
plt.show()

# %%
# Two components are not all
# --------------------------
# Classes that overlap above may be apart in the 84 features. A plain nearest-neighbour
# rule shows how much of the source class is left. It never saw the true trigger.
embedded = X_defense.copy()
embedded[y_defense != 9] = guard.triggers_[9].embed(X_defense[y_defense != 9])
nearest = make_pipeline(StandardScaler(), KNeighborsClassifier())
nearest.fit(guard.victim_.transform(embedded), y_defense)

labels, Z = guard.victim_.predict_and_transform(X_seen)
rows = sources & (labels == 9)
origin = y_test[rows]
print(f"the victim calls {rows.sum()} triggered images 9; the source is named right")
for name, named in {
    "by the nearest neighbours": nearest.predict(Z[rows]),
    "by the guard's densities": guard.predict(X_seen[rows]),
}.items():
    print(f"{name} for {np.mean(named == origin):.3f}")
