import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.utils.estimator_checks import check_estimator

from sklearn_backdoor import BackdoorTriggerClassifier
from sklearn_backdoor._likelihood import LikelihoodScorer
from sklearn_backdoor.classifier import log_ratio, seeded_clone
from sklearn_backdoor.guard import default_classifier


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    y = np.repeat([3, 5, 9], 60)
    return rng.normal(size=(180, 4)) + y[:, None] * [0.3, 0.0, -0.2, 0.1], y


def naive_log_likelihood(Z, density):
    """Evaluate a mixture by scipy's normal density, one component at a time."""
    total = np.zeros(len(Z))
    for k, weight in enumerate(density.weights_):
        covariance = {
            "diag": lambda k=k: np.diag(density.covariances_[k]),
            "spherical": lambda k=k: density.covariances_[k] * np.eye(Z.shape[1]),
            "full": lambda k=k: density.covariances_[k],
            "tied": lambda: density.covariances_,
        }[density.covariance_type]()
        total += weight * multivariate_normal(density.means_[k], covariance).pdf(Z)
    return np.log(total)


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "full", "tied"])
@pytest.mark.parametrize("n_components", [1, 3])
def test_log_likelihoods_equal_scipys(features, covariance_type, n_components):
    Z, y = features
    density = GaussianMixture(n_components, covariance_type=covariance_type)
    clf = BackdoorTriggerClassifier(density).fit(Z, y)
    scores = clf.log_likelihood(Z)
    assert scores.shape == (180, 3)
    for column, fitted in enumerate(clf.densities_):
        naive = naive_log_likelihood(Z, fitted)
        np.testing.assert_allclose(scores[:, column], naive, rtol=1e-9)
        np.testing.assert_allclose(
            scores[:, column], fitted.score_samples(Z), rtol=1e-9
        )


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_fused_scoring_equals_scikit_learn_at_512_features(covariance_type):
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(300, 512)) * rng.uniform(0, 5, 512) + 3
    densities = [
        GaussianMixture(3, covariance_type=covariance_type, random_state=0).fit(
            Z[rows : rows + 100]
        )
        for rows in (0, 100, 200)
    ]
    scorer = LikelihoodScorer(densities)
    assert scorer.fused
    loop = np.column_stack([density.score_samples(Z) for density in densities])
    np.testing.assert_allclose(scorer(Z), loop, rtol=1e-6)


def test_densities_with_other_numbers_of_components_are_not_fused():
    Z = np.random.default_rng(0).normal(size=(30, 2))
    densities = [GaussianMixture(k, covariance_type="diag").fit(Z) for k in (1, 2)]
    scorer = LikelihoodScorer(densities)
    assert not scorer.fused
    np.testing.assert_array_equal(scorer(Z)[:, 1], densities[1].score_samples(Z))


def test_predict_is_the_argmax_and_the_score_the_ratio(features):
    Z, y = features
    clf = BackdoorTriggerClassifier(GaussianMixture(2), target_class=5).fit(Z, y)
    scores = clf.log_likelihood(Z)
    for row, label, ratio, trigger in zip(
        scores, clf.predict(Z), clf.trigger_score(Z), clf.is_trigger(Z), strict=True
    ):
        assert label == [3, 5, 9][int(np.argmax(row))]
        assert ratio == max(row[0], row[2]) - row[1]
        assert trigger == (label != 5)


def test_probabilities_are_the_posterior_under_equal_priors():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [90, 10])  # unequal numbers do not matter
    Z = rng.normal(size=(100, 2)) + y[:, None]
    clf = BackdoorTriggerClassifier().fit(Z, y)
    likelihood = np.exp(clf.log_likelihood(Z))
    np.testing.assert_allclose(
        clf.predict_proba(Z), likelihood / likelihood.sum(axis=1, keepdims=True)
    )


def test_decision_function_follows_scikit_learns_convention(features):
    Z, y = features
    clf = BackdoorTriggerClassifier().fit(Z, y)
    np.testing.assert_array_equal(clf.decision_function(Z), clf.log_likelihood(Z))
    two = y != 9
    clf = BackdoorTriggerClassifier().fit(Z[two], y[two])
    scores = clf.log_likelihood(Z)
    np.testing.assert_array_equal(clf.decision_function(Z), scores[:, 1] - scores[:, 0])


def test_any_density_with_score_samples_will_do(features):
    Z, y = features
    clf = BackdoorTriggerClassifier(KernelDensity(bandwidth=0.5)).fit(Z, y)
    np.testing.assert_array_equal(
        clf.log_likelihood(Z)[:, 1],
        KernelDensity(bandwidth=0.5).fit(Z[y == 5]).score_samples(Z),
    )


def test_zero_variance_and_few_samples_in_many_dimensions_hold_up():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(10), 5)
    Z = rng.normal(size=(50, 512)) + 2 * y[:, None]
    Z[:, ::2] = 0  # dead ReLUs
    clf = BackdoorTriggerClassifier(target_class=9).fit(Z.astype(np.float32), y)
    assert np.isfinite(clf.trigger_score(1e6 * Z)).all()
    assert clf.score(Z, y) == 1


def test_refits_are_bit_identical_and_leave_the_global_state_alone(features):
    Z, y = features
    state = np.random.get_state()[1].copy()
    clf = BackdoorTriggerClassifier(GaussianMixture(3))
    first = clf.fit(Z, y).log_likelihood(Z)
    np.testing.assert_array_equal(clf.fit(Z, y).log_likelihood(Z), first)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_the_random_state_goes_to_nested_estimators_without_one():
    pipeline = default_classifier()
    pipeline.set_params(
        backdoortriggerclassifier__density=GaussianMixture(random_state=7),
        backdoortriggerclassifier__random_state=None,
    )
    twin = seeded_clone(pipeline, 3)
    assert twin[-1].random_state == 3
    assert twin[-1].density.random_state == 7
    assert pipeline[-1].random_state is None


def test_log_ratio_of_worked_numbers():
    scores = np.array([[1.0, 4.0, 2.0], [9.0, 4.0, 2.0]])
    np.testing.assert_array_equal(log_ratio(scores, np.array([0, 1, 2]), 1), [-2, 5])


@pytest.mark.parametrize(
    "clf, message",
    [
        (
            BackdoorTriggerClassifier(GaussianMixture(61)),
            "class 3 has n_samples=60, fewer than the density's n_components=61",
        ),
        (
            BackdoorTriggerClassifier(target_class=4),
            r"target_class=4 is not.*\[3, 5, 9\]",
        ),
        (
            BackdoorTriggerClassifier(GaussianMixture(covariance_type="round")),
            "density of class 3 could not be fitted",
        ),
    ],
)
def test_bad_settings_are_named_and_nothing_is_half_fitted(features, clf, message):
    with pytest.raises(ValueError, match=message):
        clf.fit(*features)
    assert not [name for name in vars(clf) if name.endswith("_")]


def test_a_refit_that_fails_leaves_the_fitted_one_usable(features):
    Z, y = features
    clf = BackdoorTriggerClassifier(GaussianMixture(5)).fit(Z, y)
    expected = clf.predict(Z)
    with pytest.raises(ValueError, match="fewer than"):
        clf.fit(Z[:4, :2], [3, 3, 9, 9])
    np.testing.assert_array_equal(clf.predict(Z), expected)


def test_densities_that_give_minus_infinity_keep_scores_finite(features):
    Z, y = features
    density = KernelDensity(kernel="tophat", bandwidth=0.5)
    clf = BackdoorTriggerClassifier(density, target_class=3).fit(Z, y)
    far = np.concatenate([Z, Z + 100])
    assert np.isfinite(clf.trigger_score(far)).all()
    np.testing.assert_array_equal(clf.is_trigger(far), clf.predict(far) != 3)


def test_scores_without_a_target_say_what_to_do(features):
    clf = BackdoorTriggerClassifier().fit(*features)
    for method in (clf.trigger_score, clf.is_trigger):
        with pytest.raises(ValueError, match="need target_class"):
            method(features[0])


def test_scikit_learns_checks(capsys):
    results = check_estimator(BackdoorTriggerClassifier(), on_skip=None)
    ran = [result["check_name"] for result in results if result["status"] == "passed"]
    with capsys.disabled():
        print(f"\nBackdoorTriggerClassifier: {len(ran)} scikit-learn checks passed")
    assert len(ran) >= 50
    assert {result["status"] for result in results} <= {"passed", "skipped"}
