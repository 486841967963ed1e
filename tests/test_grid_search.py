"""Grid search on raw images: which passes are made, and that nothing changes."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_backdoor import (
    BackdoorGuard,
    BackdoorTriggerClassifier,
    TriggerEmbedder,
    VictimNetwork,
    fpr_score,
    make_trigger_scorer,
    origin_log_loss,
    sia_score,
    tpr_score,
)
from sklearn_backdoor._fingerprint import fingerprint
from tests.common import CountingNetwork, corner_trigger, count_passes, linear_images

SMALL = {"covariance_type": ["diag"]}
LARGE = {
    "covariance_type": ["diag", "full", "tied"],
    "n_components": [1, 2],
    "reg_covar": [0.1, 1.0],
}


def make_pipeline_of(victim, trigger, target):
    return Pipeline(
        [
            ("embed", TriggerEmbedder(trigger, target_class=target)),
            ("features", victim),
            ("scale", StandardScaler()),
            ("classify", BackdoorTriggerClassifier(GaussianMixture())),
        ]
    )


def make_guard_of(victim, trigger, target):
    classifier = make_pipeline(
        StandardScaler(), BackdoorTriggerClassifier(GaussianMixture())
    )
    return BackdoorGuard(victim, trigger, classifier, target_class=target)


DEFENSES = {
    "pipeline": (make_pipeline_of, "classify__density__"),
    "guard": (make_guard_of, "classifier__backdoortriggerclassifier__density__"),
}


def search(kind, victim, trigger, target, grid, **options):
    make, prefix = DEFENSES[kind]
    return GridSearchCV(
        make(victim, trigger, target),
        {prefix + name: values for name, values in grid.items()},
        scoring=make_trigger_scorer(sia_score, trigger, target, victim=victim),
        cv=3,
        refit=False,
        error_score="raise",
        **options,
    )


@pytest.mark.parametrize("kind", DEFENSES)
def test_passes_do_not_grow_with_the_number_of_candidates(tmp_path, kind):
    X, y = linear_images(n_per_class=9)
    log = tmp_path / "passes"
    network = CountingNetwork(log)
    before = fingerprint(network)

    def run(grid, memory, n_jobs):
        victim = VictimNetwork(network, memory=tmp_path / memory)
        search(kind, victim, corner_trigger(), 2, grid, n_jobs=n_jobs).fit(X, y)
        return count_passes(log)

    alone = run(SMALL, "one", 1)
    assert len(X) < alone < 5 * len(X)  # 3 folds: two thirds to fit, one to score
    assert run(LARGE, "many", 1) == alone  # 12 candidates, cold
    assert run(LARGE, "many", 1) == 0  # warm
    # of both functions, or joblib would redo a pass in a process new to the folder
    assert len(list((tmp_path / "many").rglob("func_code.py"))) == 2
    # two workers may meet at the same pass once; they never repeat it a third time
    assert alone <= run(LARGE, "workers", 2) <= 2 * alone
    assert run(LARGE, "workers", 2) == 0
    assert run(LARGE, "many", 2) == 0  # what one process computed serves another
    assert fingerprint(network) == before


@pytest.mark.parametrize("kind", DEFENSES)
def test_real_digits_are_searched_with_two_workers(tmp_path, digits, kind):
    before = fingerprint(digits.network)
    victim = VictimNetwork(digits.network, memory=tmp_path)
    grid = {"covariance_type": ["full", "diag"], "reg_covar": [1e-3, 1.0]}
    found = search(kind, victim, digits.trigger, 9, grid, n_jobs=2)
    found.fit(digits.X_defense, digits.y_defense)
    scores = found.cv_results_["mean_test_score"]
    assert len(scores) == 4 and np.isfinite(scores).all()
    assert len(np.unique(scores)) > 1 and found.best_score_ > 0.8
    assert fingerprint(digits.network) == before


def test_feature_layers_are_searched_and_the_best_is_kept(digits):
    guard = make_guard_of(VictimNetwork(digits.network), digits.trigger, 9)
    layers = ["features.2", "classifier.1", None]
    found = GridSearchCV(
        guard,
        {"victim__feature_layer": layers},
        scoring=make_trigger_scorer(
            origin_log_loss,
            digits.trigger,
            9,
            greater_is_better=False,
            response_method="predict_proba",
        ),
        cv=3,
        error_score="raise",
    ).fit(digits.X_defense, digits.y_defense)
    scores = found.cv_results_["mean_test_score"]
    assert len(np.unique(scores)) == 3 and (scores < 0).all()
    best = layers[int(np.argmax(scores))]
    assert found.best_estimator_.victim_.feature_layer == best
    X, _ = digits.evaluation_set()
    assert found.best_estimator_.predict(X).shape == (len(X),)


def test_scores_of_the_search_equal_a_loop_over_folds(digits):
    """Embed, fit, and score each fold by hand."""
    from sklearn.model_selection import StratifiedKFold

    X, y, trigger = digits.X_defense, digits.y_defense, digits.trigger
    victim = VictimNetwork(digits.network)
    defense = make_pipeline_of(victim, trigger, 9)
    metrics = {"tpr": tpr_score, "sia": sia_score, "fpr": fpr_score}
    found = cross_validate(
        defense,
        X,
        y,
        scoring={
            name: make_trigger_scorer(metric, trigger, 9)
            for name, metric in metrics.items()
        },
        cv=3,
    )
    for fold, (train, test) in enumerate(StratifiedKFold(3).split(X, y)):
        sources = y != 9
        embedded = X.copy()
        embedded[sources] = trigger.embed(X[sources])
        Z = victim.fit(X).transform(embedded)
        scaler = StandardScaler().fit(Z[train])
        densities = [
            GaussianMixture(random_state=0).fit(
                scaler.transform(Z[train][y[train] == label])
            )
            for label in range(10)
        ]
        scores = np.column_stack(
            [density.score_samples(scaler.transform(Z[test])) for density in densities]
        )
        labels = scores.argmax(axis=1)
        for name, metric in metrics.items():
            expected = metric(y[test], labels, target_class=9)
            assert found[f"test_{name}"][fold] == expected


SCRIPT = """
import sys
import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn_backdoor import *

LOG, MEMORY = sys.argv[1:]

class Network(torch.nn.Module):          # defined in __main__, as in a notebook
    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(16, 6, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(10 * torch.eye(6, 16))
            self.last.weight[2, 15] = 30

    def forward(self, images):
        with open(LOG, "a") as file:
            file.write(f"{len(images)}\\n")
        return helper(self.last(images.flatten(1)))

def helper(logits):
    return logits

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(6), 9)
    X = rng.uniform(0, 0.05, size=(54, 16)).astype(np.float32)
    X[:, 15] = 0
    X[np.arange(54), y] = 0.9 + X[:, 0]
    X = X.reshape(-1, 1, 4, 4)
    trigger = single_pixel((1, 4, 4), position=(3, 3))
    victim = VictimNetwork(Network(), memory=MEMORY)
    guard = BackdoorGuard(
        victim,
        trigger,
        make_pipeline(BackdoorTriggerClassifier(GaussianMixture(reg_covar=0.01))),
        target_class=2,
    )
    search = GridSearchCV(
        guard,
        {"classifier__backdoortriggerclassifier__density__n_components": [1, 2]},
        scoring=make_trigger_scorer(sia_score, trigger, 2, victim=victim),
        cv=3, n_jobs=2, error_score="raise",
    ).fit(X, y)
    print(search.best_score_)
"""


def test_a_network_defined_in_a_script_works_and_a_second_process_is_warm(tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "passes"
    script.write_text(SCRIPT)

    def run():
        done = subprocess.run(
            [sys.executable, script, log, tmp_path / "memory"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout), count_passes(log)

    score, passes = run()
    assert score == 1.0 and passes > 54
    assert run() == (score, 0)
