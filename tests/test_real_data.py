"""The whole defence on parts of real MNIST and Fashion-MNIST."""

import numpy as np
import pytest

from sklearn_backdoor import (
    BackdoorGuard,
    VictimNetwork,
    asr_score,
    detection_report,
    poison,
    white_box,
)
from sklearn_backdoor.datasets import load_fashion_mnist, load_mnist, split_defense
from sklearn_backdoor.networks import LeNet5
from sklearn_backdoor.training import train_network
from tests.common import needs_shared


@pytest.mark.parametrize("load, sia", [(load_mnist, 0.85), (load_fashion_mnist, 0.6)])
def test_a_white_box_is_found_and_guarded(load, sia):
    data = load(needs_shared("data"))
    trigger = white_box((1, 28, 28))
    poisoned = poison(
        data.X_train[:12_000],
        data.y_train[:12_000],
        trigger,
        target_class=9,
        n_per_class=100,
    )
    network = train_network(
        LeNet5, poisoned.X, poisoned.y, epochs=8, lr=5e-3, batch_size=64
    )
    X_defense, X_test, y_defense, y_test = split_defense(
        data.X_test, data.y_test, n_per_class=25
    )
    guard = BackdoorGuard(VictimNetwork(network)).fit(X_defense, y_defense)
    assert guard.target_class_ == 9
    sources = y_test != 9
    X = X_test.copy()
    X[sources] = trigger.embed(X[sources])
    seen = guard.inspect(X)
    assert asr_score(y_test, seen["victim_label"], target_class=9) > 0.9
    report = detection_report(
        y_test,
        seen["label"],
        target_class=9,
        victim_labels=seen["victim_label"],
        is_trigger=seen["is_trigger"],
    )["score"]
    assert report["tpr"] > 0.97 and report["fpr"] < 0.08 and report["sia"] > sia
    np.testing.assert_array_equal(seen["label"], guard.predict(X))
