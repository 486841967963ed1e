import pickle

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from sklearn_backdoor import (
    BackdoorGuard,
    BackdoorTriggerClassifier,
    NCReverseEngineer,
    PatchTrigger,
    TriggerEmbedder,
    VictimNetwork,
    detection_report,
)
from sklearn_backdoor._fingerprint import fingerprint
from sklearn_backdoor.guard import default_classifier
from tests.common import CountingNetwork, LinearNetwork, corner_trigger, count_passes


@pytest.fixture
def guard(linear, images):
    victim = VictimNetwork(linear)
    return BackdoorGuard(victim, corner_trigger(), target_class=2).fit(*images)


@pytest.fixture(scope="module")
def digits_guard(digits):
    victim = VictimNetwork(digits.network)
    engineer = NCReverseEngineer(victim, schedule="exhaustive")
    return BackdoorGuard(victim, engineer).fit(digits.X_defense, digits.y_defense)


def test_triggers_are_caught_and_their_source_is_named(guard, images):
    X, y = images
    stamped = corner_trigger().embed(X)
    np.testing.assert_array_equal(guard.victim_.predict(stamped), 2)
    np.testing.assert_array_equal(guard.predict(stamped[y != 2]), y[y != 2])
    assert guard.is_trigger(stamped[y != 2]).all()
    np.testing.assert_array_equal(guard.predict(X), y)
    assert not guard.is_trigger(X).any()


def test_the_guard_equals_the_paper_written_out(digits, digits_guard):
    """§4.2 step by step with scikit-learn and scipy-free loops."""
    target, victim = 9, digits_guard.victim_
    trigger = digits_guard.triggers_[target]
    images = [
        image if label == target else trigger.embed(image[None])[0]
        for image, label in zip(digits.X_defense, digits.y_defense, strict=True)
    ]
    Z = victim.transform(np.stack(images))
    scaler = StandardScaler().fit(Z)
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
    P = lda.fit(scaler.transform(Z), digits.y_defense).transform(scaler.transform(Z))
    densities = [
        GaussianMixture(3, covariance_type="full", reg_covar=3.0, random_state=0).fit(
            P[digits.y_defense == label]
        )
        for label in range(10)
    ]
    X, _ = digits.evaluation_set()
    seen = digits_guard.inspect(X)
    for row in range(0, len(X), 5):
        label = victim.predict(X[row : row + 1])[0]
        features = victim.transform(X[row : row + 1])
        projected = lda.transform(scaler.transform(features))
        scores = [density.score_samples(projected)[0] for density in densities]
        origin = int(np.argmax(scores)) if label == target else label
        assert seen.loc[row, "victim_label"] == label
        assert seen.loc[row, "label"] == origin
        ratio = max(s for c, s in enumerate(scores) if c != target) - scores[target]
        assert seen.loc[row, "trigger_score"] == pytest.approx(
            ratio, rel=1e-3, abs=1e-2
        )


def test_the_paper_on_one_screen_equals_the_guard(digits, digits_guard):
    trigger = digits_guard.triggers_[9]
    victim = VictimNetwork(digits.network)
    classifier = make_pipeline(
        StandardScaler(), BackdoorTriggerClassifier(GaussianMixture(reg_covar=0.1))
    )
    pipeline = make_pipeline(
        TriggerEmbedder(trigger, target_class=9), victim, classifier
    ).fit(digits.X_defense, digits.y_defense)
    guard = BackdoorGuard(victim, trigger, classifier, target_class=9)
    guard.fit(digits.X_defense, digits.y_defense)
    X, _ = digits.evaluation_set()
    sent = guard.victim_.predict(X) == 9
    np.testing.assert_array_equal(pipeline.predict(X)[sent], guard.predict(X)[sent])


def test_real_digits_are_defended_from_clean_images_alone(digits, digits_guard):
    assert digits_guard.verdict_ == "backdoored"
    assert digits_guard.target_class_ == 9
    X, y = digits.evaluation_set()
    labels = digits_guard.victim_.predict(X)
    report = detection_report(
        y,
        digits_guard.predict(X),
        target_class=9,
        victim_labels=labels,
        is_trigger=digits_guard.is_trigger(X),
    )["score"]
    assert np.mean(labels[y != 9] == 9) > 0.9  # the attack works
    assert report["tpr"] > 0.98 and report["fpr"] < 0.06 and report["sia"] > 0.85


def test_predict_makes_exactly_one_pass_an_image(tmp_path, images):
    X, y = images
    log = tmp_path / "passes"
    victim = VictimNetwork(CountingNetwork(log), batch_size=7)
    guard = BackdoorGuard(victim, corner_trigger(), target_class=2).fit(X, y)
    for method in (
        "predict",
        "is_trigger",
        "trigger_score",
        "predict_proba",
        "inspect",
    ):
        for batch in (X, corner_trigger().embed(X), X[:1]):
            count_passes(log)
            getattr(guard, method)(batch)
            assert count_passes(log) == len(batch)


def test_all_answers_agree_with_each_other(guard, images):
    X = np.concatenate([images[0], corner_trigger().embed(images[0])])
    table = guard.inspect(X)
    sent = table["victim_label"] == 2
    np.testing.assert_array_equal(table["label"], guard.predict(X))
    np.testing.assert_array_equal(table["is_trigger"], guard.is_trigger(X))
    np.testing.assert_array_equal(table["trigger_score"], guard.trigger_score(X))
    np.testing.assert_array_equal(
        table["is_trigger"], sent & (table["label"] != table["victim_label"])
    )
    assert np.isfinite(table["trigger_score"]).all()
    likelihoods = table.filter(like="log_likelihood_")
    assert list(likelihoods)[0] == "log_likelihood_0" and likelihoods.shape[1] == 6
    assert likelihoods[~sent].isna().all(axis=None)
    best = likelihoods[sent].to_numpy().argmax(axis=1)
    np.testing.assert_array_equal(best, table["label"][sent])
    proba = guard.predict_proba(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    np.testing.assert_array_equal(proba.argmax(axis=1), table["label"])


def test_strings_in_logit_order_are_not_mixed_up(linear, images):
    X, y = images
    names = np.array(["zebra", "ant", "fox", "bee", "cow", "dog"])
    victim = VictimNetwork(linear, classes=names)
    guard = BackdoorGuard(victim, corner_trigger(), target_class="fox")
    guard.fit(X, names[y])
    stamped = corner_trigger().embed(X[y != 2])
    np.testing.assert_array_equal(guard.predict(stamped), names[y[y != 2]])
    proba = guard.predict_proba(stamped)
    np.testing.assert_array_equal(names[proba.argmax(axis=1)], names[y[y != 2]])
    table = guard.inspect(stamped)
    best = table.filter(like="log_likelihood_").idxmax(axis=1)
    expected = [f"log_likelihood_{name}" for name in names[y[y != 2]]]
    assert best.tolist() == expected


def test_nothing_found_passes_every_label_through_and_says_so(linear, images):
    X, y = images
    victim = VictimNetwork(linear)
    guard = BackdoorGuard(victim, NCReverseEngineer(victim, threshold=1e6)).fit(X, y)
    assert guard.verdict_ == "nothing found"
    assert guard.target_class_ is None and len(guard.target_classes_) == 0
    stamped = corner_trigger().embed(X)
    np.testing.assert_array_equal(
        guard.predict(stamped), guard.victim_.predict(stamped)
    )
    assert not guard.is_trigger(stamped).any()
    np.testing.assert_array_equal(guard.trigger_score(stamped), 0)
    assert guard.inspect(stamped)["is_trigger"].sum() == 0
    np.testing.assert_array_equal(guard.predict_proba(X).argmax(axis=1), y)


class TwoBackdoors(LinearNetwork):
    """Pixel 14 is a second backdoor, to class 4."""

    def __init__(self):
        super().__init__(n_classes=12)
        self.last.weight.data[4, 14] = 30


def test_every_flagged_class_is_defended():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(12), 8)
    X = rng.uniform(0, 0.05, size=(96, 16)).astype(np.float32)
    X[:, 14:] = 0
    X[np.arange(96), y] = rng.uniform(0.95, 1, size=96)
    X = X.reshape(-1, 1, 4, 4)
    victim = VictimNetwork(TwoBackdoors())
    engineer = NCReverseEngineer(victim, schedule="exhaustive")
    guard = BackdoorGuard(victim, engineer).fit(X, y)
    assert set(guard.target_classes_.tolist()) == {2, 4}
    for pixel, target in ((15, 2), (14, 4)):
        stamped = X.reshape(96, 16).copy()
        stamped[:, pixel] = 1
        stamped = stamped.reshape(X.shape)[y != target]
        assert np.mean(guard.victim_.predict(stamped) == target) == 1
        assert np.mean(guard.predict(stamped) == y[y != target]) > 0.95
    np.testing.assert_array_equal(guard.predict(X), y)


def test_a_class_can_be_named_whatever_the_search_flags(linear, images):
    victim = VictimNetwork(linear)
    engineer = NCReverseEngineer(victim, schedule="exhaustive", max_steps=40)
    guard = BackdoorGuard(victim, engineer, target_class=4).fit(*images)
    assert guard.target_class_ == 4
    assert guard.triggers_ == {4: guard.engineer_.triggers_[4].scaled(1.2)}


def test_estimates_are_embedded_stronger_and_given_triggers_as_they_are(linear, images):
    victim = VictimNetwork(linear)
    engineer = NCReverseEngineer(victim, schedule="exhaustive", max_steps=40)
    as_found = BackdoorGuard(victim, engineer, target_class=4, strength=1)
    as_found.fit(*images)
    estimate = as_found.engineer_.triggers_[4]
    assert as_found.triggers_[4] == estimate
    stronger = BackdoorGuard(victim, engineer, target_class=4, strength=2).fit(*images)
    np.testing.assert_allclose(
        stronger.triggers_[4].mask, np.minimum(2 * estimate.mask, 1)
    )
    given = BackdoorGuard(victim, estimate, target_class=4, strength=2).fit(*images)
    assert given.triggers_[4] == estimate
    with pytest.raises(ValueError, match="strength=-1"):
        BackdoorGuard(victim, engineer, target_class=4, strength=-1).fit(*images)


def test_densities_are_wider_where_images_are_few():
    widths = [default_classifier(n)[-1].density.reg_covar for n in (19, 20, 99, 100)]
    assert widths == [10.0, 3.0, 3.0, 1.0]


def test_discriminative_classifiers_take_the_densitys_place(linear, images):
    X, y = images
    guard = BackdoorGuard(
        VictimNetwork(linear),
        corner_trigger(),
        make_pipeline(StandardScaler(), LogisticRegression()),
        target_class=2,
    ).fit(X, y)
    stamped = corner_trigger().embed(X[y != 2])
    np.testing.assert_array_equal(guard.predict(stamped), y[y != 2])
    assert np.isfinite(guard.trigger_score(stamped)).all()


def test_refits_and_pickles_are_bit_identical(digits, digits_guard):
    X, _ = digits.evaluation_set()
    victim = VictimNetwork(digits.network)
    before = fingerprint(digits.network)
    engineer = NCReverseEngineer(victim, schedule="exhaustive")
    again = BackdoorGuard(victim, engineer)
    again.fit(digits.X_defense, digits.y_defense)
    assert again.triggers_ == digits_guard.triggers_
    for other in (again, pickle.loads(pickle.dumps(digits_guard))):
        np.testing.assert_array_equal(
            other.trigger_score(X), digits_guard.trigger_score(X)
        )
        np.testing.assert_array_equal(other.predict(X), digits_guard.predict(X))
    assert fingerprint(digits.network) == before


def test_empty_batches_give_empty_answers(guard, images):
    empty = images[0][:0]
    assert guard.predict(empty).shape == (0,)
    assert guard.is_trigger(empty).dtype == bool
    assert guard.predict_proba(empty).shape == (0, 6)
    assert len(guard.inspect(empty)) == 0


def make_guard(classifier=None, trigger=None, target_class=2):
    victim = VictimNetwork(LinearNetwork().eval())
    trigger = corner_trigger() if trigger is None else trigger
    return BackdoorGuard(victim, trigger, classifier, target_class=target_class)


def every_nth(X, y, n):
    """Keep n images a class."""
    keep = np.concatenate([np.flatnonzero(y == label)[:n] for label in np.unique(y)])
    return X[keep], y[keep]


@pytest.mark.parametrize(
    "guard, change, message",
    [
        (make_guard(), lambda X, y: (X[y != 4], y[y != 4]), "too few of 4: 0"),
        (make_guard(), lambda X, y: (X[y != 2], y[y != 2]), "too few of 2: 0"),
        (make_guard(), lambda X, y: every_nth(X, y, 1), "at least 3 clean"),
        (make_guard(), lambda X, y: every_nth(X, y, 2), "at least 3 clean"),
        (
            make_guard(default_classifier()),
            lambda X, y: every_nth(X, y, 2),
            "at least three different",
        ),
        (
            make_guard(),
            lambda X, y: (np.eye(16)[y].reshape(-1, 1, 4, 4), y),
            "three different",
        ),
        (
            make_guard(BackdoorTriggerClassifier(GaussianMixture(9))),
            lambda X, y: (X, y),
            "n_samples=8, fewer than the density's n_components=9",
        ),
        (make_guard(target_class=None), lambda X, y: (X, y), "target_class=None with"),
        (make_guard(target_class=77), lambda X, y: (X, y), "target_class=77 is not"),
        (make_guard(), lambda X, y: (X, y + 1), r"labels \[6\] that the victim"),
        (make_guard(), lambda X, y: (X[:0], y[:0]), "no image"),
        (make_guard(), lambda X, y: (X, y[:-1]), "one label an image"),
        (make_guard(), lambda X, y: (X * 255, y), "Divide 0...255 images"),
        (make_guard(), lambda X, y: (np.zeros((48, 8, 8, 3)), y), "channels last"),
        (make_guard(), lambda X, y: (np.where(X > 0.9, np.nan, X), y), "NaN"),
    ],
)
def test_bad_input_is_named_and_nothing_is_half_fitted(guard, change, message, images):
    with pytest.raises(ValueError, match=message):
        guard.fit(*change(*images))
    assert not [name for name in vars(guard) if name.endswith("_")]


def test_a_trigger_that_covers_everything_is_refused(images):
    trigger = PatchTrigger(1.0, 0.5)
    with pytest.raises(ValueError, match="class 0 have identical features"):
        make_guard(trigger=trigger).fit(*images)


@pytest.mark.parametrize(
    "guard, message",
    [
        (BackdoorGuard(LinearNetwork()), "Wrap your network: VictimNetwork"),
        (make_guard(trigger=np.zeros((1, 4, 4))), "type ndarray, expected a trigger"),
        (make_guard(LinearSVC()), "ends in LinearSVC, expected one with"),
    ],
)
def test_parts_of_the_wrong_kind_are_named(guard, message, images):
    with pytest.raises(TypeError, match=message):
        guard.fit(*images)
    assert not [name for name in vars(guard) if name.endswith("_")]


def test_float64_images_of_full_brightness_are_guarded(linear, images):
    X, y = images[0].astype(np.float64), images[1]
    X[X > 0.9] = 1
    victim = VictimNetwork(linear)
    guard = BackdoorGuard(
        victim, NCReverseEngineer(victim, schedule="exhaustive"), target_class=2
    )
    stamped = guard.fit(X, y).engineer_.triggers_[2].embed(X[y != 2])
    np.testing.assert_array_equal(guard.predict(stamped), y[y != 2])


def test_three_images_a_class_are_enough_for_the_default_classifier(images):
    X, y = every_nth(*images, 3)
    make_guard(default_classifier()).fit(X, y)
