"""
Grid search of the density
==========================

The guard is a scikit-learn classifier on raw images, so ``GridSearchCV`` chooses its
settings. Held-out folds are clean: the scorer embeds the trigger into them.
"""

# %%
# A poisoned LeNet-5 on the digits, and its trigger
# -------------------------------------------------
from functools import partial
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV

from sklearn_backdoor import (
    BackdoorGuard,
    NCReverseEngineer,
    VictimNetwork,
    make_trigger_scorer,
    origin_log_loss,
    poison,
    white_box,
)
from sklearn_backdoor.datasets import load_digits, split_defense
from sklearn_backdoor.guard import default_classifier
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
engineer = NCReverseEngineer(VictimNetwork(network)).fit(X_defense, y_defense)
found = engineer.trigger_
print(engineer.verdict_, engineer.target_classes_)

# %%
# The search
# ----------
# With ``memory`` a forward pass is made once a fold, not once a candidate. The score is
# the log-loss of the class of origin. It is smooth, where "no false alarm in twenty
# images" would rank nearly all candidates first.
density = "classifier__backdoortriggerclassifier__density__"
grid = {
    density + "covariance_type": ["full", "tied", "diag", "spherical"],
    density + "n_components": [1, 2, 3],
}
classifier = default_classifier(n_per_class=20)
classifier.set_params(backdoortriggerclassifier__density=GaussianMixture(reg_covar=3.0))
with TemporaryDirectory() as cache:
    victim = VictimNetwork(network, memory=cache)
    search = GridSearchCV(
        BackdoorGuard(victim, found, classifier, target_class=9),
        grid,
        scoring=make_trigger_scorer(
            origin_log_loss,
            found,
            9,
            victim=victim,
            greater_is_better=False,
            response_method="predict_proba",
        ),
        cv=4,
    ).fit(X_defense, y_defense)
print({name.split("__")[-1]: value for name, value in search.best_params_.items()})

# %%
# Differences within the standard error of the folds are no reason to choose:
fig, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
results = search.cv_results_
for kind in grid[density + "covariance_type"]:
    rows = results[f"param_{density}covariance_type"] == kind
    ax.errorbar(
        results[f"param_{density}n_components"][rows].astype(int),
        -results["mean_test_score"][rows],
        yerr=results["std_test_score"][rows] / 2,  # of four folds
        label=kind,
        capsize=3,
    )
ax.set(
    xticks=[1, 2, 3],
    xlabel="components a class",
    ylabel="log-loss of the origin (lower is better)",
)
ax.legend(title="covariance", frameon=False)
plt.show()
