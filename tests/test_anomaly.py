from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from sklearn_backdoor.reverse._anomaly import (
    PATCH_COLUMN_SD,
    PATCH_PAIR_SD,
    PATCH_SD,
    PRIOR_DF,
    bonferroni_factors,
    p_values,
    p_values_of_pairs,
    pair_p_values,
    rank_by_p,
)

ALL = [True] * 10
NORMS = [3.0, 30, 35, 40, 41, 45, 50, 55, 60, 70]


def test_the_smallest_norm_gets_a_moderated_t_test_on_log_norms():
    p = p_values(NORMS, ALL, prior_sd=0.4)
    rest = np.log(NORMS[1:])
    variance = (16 * 0.16 + 8 * rest.var(ddof=1)) / 24
    t = (np.log(3.0) - rest.mean()) / np.sqrt(variance * (1 + 1 / 9))
    one = stats.t.cdf(t, 24)
    assert PRIOR_DF == 16
    assert p[0] == pytest.approx(1 - (1 - one) ** 10)
    assert (p[1:] > 0.1).all()


def test_the_published_gamma_null_leaves_the_largest_out():
    p = p_values(NORMS, ALL, null="gamma")
    shape, _, scale = stats.gamma.fit(1 / np.array(NORMS[1:]), floc=0)
    tail = stats.gamma.sf(1 / 3.0, shape, scale=scale)
    assert p[0] == pytest.approx(1 - (1 - tail) ** 10)


def test_p_values_do_not_depend_on_the_unit_or_the_order():
    p = p_values(NORMS, ALL)
    np.testing.assert_allclose(p_values(np.array(NORMS) * 7, ALL), p)
    order = np.random.RandomState(0).permutation(10)
    np.testing.assert_allclose(p_values(np.array(NORMS)[order], ALL), p[order])


@pytest.mark.parametrize("sd", [0.2, PATCH_SD])
def test_false_alarms_keep_to_alpha_on_log_normal_norms(sd):
    rng = np.random.RandomState(0)
    smallest = [
        p_values(np.exp(sd * rng.normal(size=10)), ALL, prior_sd=sd).min()
        for _ in range(600)
    ]
    rate = np.mean(np.array(smallest) < 0.05)
    assert stats.binomtest(int(rate * 600), 600, 0.05).pvalue > 0.001


def test_the_gamma_null_flags_clean_victims_far_too_often():
    rng = np.random.RandomState(0)
    smallest = [
        p_values(1 / rng.gamma(10, size=10), ALL, null="gamma").min()
        for _ in range(200)
    ]
    assert np.mean(np.array(smallest) < 0.05) > 0.15


def test_two_targets_do_not_hide_each_other():
    norms = [2.0, 2.2, *NORMS[1:]]
    p = p_values(norms, [True] * 11)
    assert (p[:2] < 0.01).all() and (p[2:] > 0.05).all()


def test_norms_that_happen_to_lie_close_together_are_no_proof():
    norms = [36.0, 39.9, 39.95, 40, 40, 40, 40.05, 40.1, 40.2, 40.3]
    assert p_values(norms, ALL).min() > 0.5
    assert p_values(norms, ALL, prior_sd=1e-3).min() < 0.01  # but for the prior


def test_a_search_that_did_not_converge_is_never_significant():
    p = p_values([0.001, *NORMS[1:]], [False] + [True] * 9)
    assert p[0] == 1
    assert np.isnan(p_values(NORMS, [True] * 5 + [False] * 5)).all()
    assert np.isnan(p_values(NORMS[:4], [True] * 4)).all()


def test_censored_norms_widen_the_null_and_keep_the_attack():
    converged = [True] * 7 + [False] * 3
    p = p_values(NORMS, converged)
    left_out = p_values(NORMS[:7], [True] * 7, n_candidates=10)
    assert p[0] < 0.01 and p[0] != left_out[0]


def test_candidates_are_compared_with_the_reference_alone():
    norms = [3.0, 5.0, 6.0, *NORMS[1:]]
    reference = np.array([False] * 3 + [True] * 9)
    p = p_values(norms, [True] * 12, n_candidates=300, reference=reference)
    rest = np.log(NORMS[1:])
    variance = (16 * PATCH_SD**2 + 8 * rest.var(ddof=1)) / 24
    one = stats.t.cdf(
        (np.log([3.0, 5.0, 6.0]) - rest.mean()) / np.sqrt(variance * (1 + 1 / 9)), 24
    )
    raw = 1 - (1 - one) ** [300, 299, 298]
    np.testing.assert_allclose(p[:3], np.minimum.accumulate(raw[::-1])[::-1])


def test_flagged_classes_come_most_significant_first():
    p = np.array([0.2, 0.04, np.nan, 0.001, 0.05])
    assert rank_by_p(p, 0.05).tolist() == [3, 1]


PAIRED = ~np.eye(10, dtype=bool)
PAIRS = list(permutations(range(10), 2))


def natural_pairs(seed, sd=0.3):
    """Draw norms of which each is its source's times its target's times noise."""
    rng = np.random.RandomState(seed)
    logs = 3 + 0.3 * rng.normal(size=(10, 1)) + 0.3 * rng.normal(size=(1, 10))
    return np.exp(logs + sd * rng.normal(size=(10, 10)))


def judge(norms, converged=PAIRED, **options):
    return pair_p_values(
        norms,
        converged,
        pair_sd=PATCH_PAIR_SD,
        column_sd=PATCH_COLUMN_SD,
        **options,
    )


def test_a_pair_is_judged_by_what_its_source_does_not_explain():
    norms = natural_pairs(0)
    norms[3] *= 0.3  # easily led anywhere: no attack
    p, targets = judge(norms)
    assert (p[PAIRED] > 0.05).all() and (targets > 0.05).all()
    norms[5, 8] *= 0.12
    p, targets = judge(norms)
    assert np.unravel_index(p.argmin(), p.shape) == (5, 8)
    assert p[5, 8] < 0.005 and (np.sort(p.ravel())[1:] > 0.05).all()
    assert (targets > 0.05).all()
    norms[PAIRED[:, 8], 8] *= 0.6  # the attack helps other sources too
    norms[5, 8] /= 0.6
    assert judge(norms)[0][5, 8] < 0.005


def test_pairs_are_judged_as_by_a_loop():
    norms, margins = natural_pairs(2), np.exp(natural_pairs(3, 0.2) / 20)
    freed = {(s, t): np.log(norms[s, t] / margins[s, t] ** 0.7) for s, t in PAIRS}
    left = {
        (s, t): freed[s, t] - np.median([freed[s, k] for k in range(10) if k != s]) / 2
        for s, t in PAIRS
    }
    centre = np.median(list(left.values()))
    mad = 1.4826 * np.median([abs(value - centre) for value in left.values()])
    sd = np.sqrt((144 * PATCH_PAIR_SD**2 + 90 * mad**2) / (144 + 90))
    p, targets = judge(norms, margins=margins, power=0.7)
    for pair, value in left.items():
        one = stats.t(144 + 90).cdf((value - centre) / sd)
        assert p[pair] == pytest.approx(1 - (1 - one) ** 90, rel=1e-6)
    columns = [np.median([norms[s, t] for s in range(10) if s != t]) for t in range(10)]
    np.testing.assert_allclose(
        targets, p_values(columns, [True] * 10, prior_sd=PATCH_COLUMN_SD), rtol=1e-6
    )


def test_a_pair_that_the_network_hardly_tells_apart_is_no_attack():
    norms, margins = natural_pairs(0), np.full((10, 10), 8.0)
    norms[5, 8], margins[5, 8] = 0.12 * norms[5, 8], 0.4
    assert judge(norms)[0][5, 8] < 0.005
    p, targets = judge(norms, margins=margins, power=0.7)
    assert (p > 0.05).all() and (targets > 0.05).all()
    margins[5, 8] = 8  # told apart as well as any other: it is one
    assert judge(norms, margins=margins, power=0.7)[0][5, 8] < 0.005
    explained = judge(norms, margins=margins, power=0.7)
    for p, raw in zip(explained, judge(norms), strict=True):
        np.testing.assert_allclose(p, raw)  # by equal margins, nothing is
    margins[3, 1] = -2  # confused: at the floor
    p, _ = judge(norms, margins=margins, power=0.7)
    assert np.isfinite(p).all() and p[3, 1] > 0.05
    margins[2, 6], margins[7, 1] = np.nan, np.inf  # as of log-probabilities
    np.testing.assert_array_equal(judge(norms, margins=margins, power=0.7)[0], p)
    for unknown in (np.nan, -1.0):
        p, _ = judge(norms, margins=np.full((10, 10), unknown), power=0.7)
        np.testing.assert_allclose(p, judge(norms)[0])


def test_a_target_of_all_classes_shows_as_a_column():
    norms = natural_pairs(1)
    norms[:, 4] *= 0.1
    p, targets = judge(norms)
    assert targets.argmin() == 4 and targets[4] < 0.005
    assert (np.delete(p, 4, axis=1) > 0.05).all()


def test_false_alarms_of_pairs_keep_to_alpha():
    judged = [p_values_of_pairs(*judge(natural_pairs(seed))) for seed in range(200)]
    assert np.mean([p.min() < 0.05 for p in judged]) < 0.1


def test_pairs_that_did_not_converge_and_few_classes_say_nothing():
    norms, converged = natural_pairs(0), PAIRED.copy()
    norms[5, 8], converged[5, 8] = 0.001, False
    assert judge(norms, converged)[0][5, 8] == 1
    converged[:, :6] = False
    for p in (*judge(norms, converged), *judge(norms[:4, :4], PAIRED[:4, :4])):
        assert np.isnan(p).all()


def test_of_two_flagged_norms_the_smaller_comes_first():
    norms = [2.2, 2.0, *NORMS[1:]]
    p = p_values(norms, [True] * 11)
    assert rank_by_p(p, 0.05).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("sssst", [8, 8, 8, 8, 2]),
        ("tsts", [4, 4, 4, 4]),
        ("sss", [3, 3, 3]),
        ("s", [1]),
        ("rst", [3, 3, 3]),
    ],
)
def test_kinds_of_evidence_share_the_level(kinds, expected):
    factors = bonferroni_factors(kinds)
    assert factors.tolist() == expected
    assert np.sum(1 / factors) == pytest.approx(1)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_the_level_is_kept_however_tests_depend_on_each_other(share):
    rng = np.random.RandomState(0)
    common, own = rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, 5))
    p = stats.norm.sf(np.sqrt(share) * common + np.sqrt(1 - share) * own)
    flagged = (p * bonferroni_factors("sssst") < 0.05).any(axis=1)
    assert flagged.mean() < 0.055  # three standard errors above
