import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import make_scorer, recall_score

from sklearn_backdoor import (
    VictimNetwork,
    asr_score,
    detection_report,
    fpr_score,
    make_trigger_scorer,
    origin_log_loss,
    sia_score,
    tpr_score,
)
from sklearn_backdoor.metrics import wilson_interval
from tests.common import corner_trigger

# origin t=9: four clean, six triggered
ORIGIN = np.array([9, 9, 9, 9, 0, 0, 1, 1, 2, 2])
GUARD_ = np.array([9, 9, 9, 3, 0, 0, 1, 2, 2, 9])
VICTIM = np.array([9, 9, 9, 9, 9, 9, 9, 9, 2, 9])


def test_rates_follow_worked_numbers():
    assert tpr_score(ORIGIN, GUARD_, target_class=9) == 5 / 6
    assert fpr_score(ORIGIN, GUARD_, target_class=9) == 1 / 4
    assert sia_score(ORIGIN, GUARD_, target_class=9) == 4 / 6
    assert asr_score(ORIGIN, VICTIM, target_class=9) == 5 / 6


def test_rates_equal_scikit_learns_recalls():
    origin, found = ORIGIN != 9, GUARD_ != 9
    assert tpr_score(ORIGIN, GUARD_, target_class=9) == recall_score(origin, found)
    assert 1 - fpr_score(ORIGIN, GUARD_, target_class=9) == recall_score(
        origin, found, pos_label=False
    )


def test_strings_work():
    names = np.array(["a", "b", "truck"])
    y, p = names[[0, 1, 2, 2]], names[[0, 2, 2, 1]]
    assert tpr_score(y, p, target_class="truck") == 0.5
    assert fpr_score(y, p, target_class="truck") == 0.5


@pytest.mark.parametrize("metric", [asr_score, tpr_score, sia_score])
def test_a_set_without_triggers_is_refused(metric):
    with pytest.raises(ValueError, match="needs triggered images.*target_class=9"):
        metric([9, 9], [9, 9], target_class=9)


def test_a_set_without_clean_images_is_refused():
    with pytest.raises(ValueError, match="needs clean target images"):
        fpr_score([1, 2], [9, 9], target_class=9)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        fpr_score([1, 2], [9], target_class=9)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        detection_report(
            [9, 1], [9, 1], target_class=9, victim_labels=[9, 9], is_trigger=[True]
        )


def test_the_report_holds_headline_and_unconditional_rates():
    is_trigger = (VICTIM == 9) & (GUARD_ != 9)
    report = detection_report(
        ORIGIN, GUARD_, target_class=9, victim_labels=VICTIM, is_trigger=is_trigger
    )
    expected = {
        "tpr": (4 / 5, 5),  # image 8 was not sent to 9
        "fpr": (1 / 4, 4),
        "sia": (3 / 5, 5),
        "tpr_all": (4 / 6, 6),
        "fpr_all": (1 / 4, 4),
        "sia_all": (4 / 6, 6),
    }
    for name, (score, n) in expected.items():
        assert report.loc[name, "score"] == pytest.approx(score)
        assert report.loc[name, "n"] == n
        assert report.loc[name, "low"] <= score <= report.loc[name, "high"]
    same = detection_report(ORIGIN, GUARD_, target_class=9, victim_labels=VICTIM)
    assert same.equals(report)


def test_wilson_intervals_follow_the_formula_and_the_papers_example():
    low, high = wilson_interval(2, 900)  # paper_tables: .0006 to .008
    assert (round(low, 4), round(high, 3)) == (0.0006, 0.008)
    z, n, p = 1.959963984540054, 25, 0.2
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(wilson_interval(5, 25), [centre - half, centre + half])
    assert np.isnan(wilson_interval(0, 0)).all()


def test_log_loss_takes_labels_in_any_order():
    labels = np.array([9, 0])  # logit order, not sorted
    proba = np.array([[0.8, 0.2], [0.4, 0.6], [0.5, 0.5], [0.1, 0.9]])
    value = origin_log_loss([9, 0, 0, 0], proba, target_class=9, labels=labels)
    assert value == pytest.approx(-np.log([0.8, 0.6, 0.5, 0.9]).mean())


class Recorder(ClassifierMixin, BaseEstimator):
    """Stands for a fitted defence; remembers what it was shown."""

    classes_ = np.arange(6)

    def predict(self, X):
        self.X = X
        return np.where(X[:, 0, 3, 3] == 1, 0, 2)

    def predict_proba(self, X):
        return np.eye(6)[self.predict(X)] * 0.94 + 0.01


def test_the_scorer_embeds_into_all_but_the_target_class(images):
    X, y = images
    defense = Recorder()
    scorer = make_trigger_scorer(tpr_score, corner_trigger(), 2)
    before = X.copy()
    assert scorer(defense, X, y) == 1.0
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(defense.X[y == 2], X[y == 2])
    np.testing.assert_array_equal(defense.X[y != 2], corner_trigger().embed(X[y != 2]))
    fpr = make_trigger_scorer(fpr_score, corner_trigger(), 2, greater_is_better=False)
    assert fpr(defense, X, y) == 0.0
    plain = make_scorer(tpr_score, target_class=2)  # on clean folds: meaningless
    assert plain(defense, X, y) == 0.0


def test_with_a_victim_only_images_sent_to_the_target_count(linear, images):
    X, y = images
    weak = X.copy()
    weak[y == 0] = 0  # the victim calls a black image 0, with the trigger 2
    trigger = corner_trigger()
    victim = VictimNetwork(linear)
    scorer = make_trigger_scorer(sia_score, trigger, 2, victim=victim)
    sent = victim.fit(X).predict(trigger.embed(X)) == 2
    among = sent & (y != 2)
    assert scorer(Recorder(), X, y) == pytest.approx(np.mean(y[among] == 0))
    loss = make_trigger_scorer(
        origin_log_loss,
        trigger,
        2,
        greater_is_better=False,
        response_method="predict_proba",
    )
    # classes 0 and 2 are named rightly (.95), four others wrongly (.01)
    expected = (2 * np.log(0.95) + 4 * np.log(0.01)) / 6
    assert loss(Recorder(), X, y) == pytest.approx(expected)


def test_a_fold_without_the_target_is_refused(images):
    X, y = images
    scorer = make_trigger_scorer(tpr_score, corner_trigger(), 2)
    with pytest.raises(ValueError, match="target_class=2 is not among"):
        scorer(Recorder(), X[y != 2], y[y != 2])
    assert "sia_score" in repr(make_trigger_scorer(sia_score, corner_trigger(), 2))
