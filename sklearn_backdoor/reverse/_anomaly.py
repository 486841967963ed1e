"""The anomaly statistics, which ask whether a class's trigger is too small."""

from functools import partial
from itertools import pairwise

import numpy as np
from scipy import stats

MIN_INFORMATIVE = 5
MIN_SPREAD = 0.05
_SOURCE_SHARE = 0.5  # of the source's median: the rest may be the attack itself
_MIN_MARGIN = 0.05  # of the median: classes that are confused have none
_TIE = 1e-9
_TO_NORMAL = 1.4826  # a normal distribution's standard deviation per MAD
# Usual standard deviation of log-norms within a clean victim, for all sources and for a
# few, and how many classes' worth of evidence that is. Those for all are the smallest
# in steps of 0.05 by which a search, by itself, flags none of 90 clean victims at 0.01
# (`python -m benchmarks scan --part calibration`); those for a few are from older ones,
# and that of neurons for all was not measured.
NEURON_SD = 0.4
PATCH_SD, PATCH_FEW_SD = 0.4, 0.6
ADDITIVE_SD, ADDITIVE_FEW_SD, ADDITIVE_FINE_SD = 0.2, 0.3, 0.25
PRIOR_DF = 16.0
# The same for pairs of classes: of what is left of a pair's log-norm without the parts
# of its source and the network's margin, and of targets by the median over their
# sources, each at half of that. Powers of the margin: of 0.3, 0.5 and 0.7 that by which
# most attacks were found in older victims. Additions were searched in high frequencies
# ("beside" in the lines); in all, their null flags none of 11 clean victims.
PATCH_PAIR_SD, PATCH_COLUMN_SD, PATCH_POWER = 0.4, 0.3, 0.5
ADDITIVE_PAIR_SD, ADDITIVE_COLUMN_SD, ADDITIVE_POWER = 0.25, 0.2, 0.3
NEURON_PAIR_SD, NEURON_COLUMN_SD, NEURON_POWER = 0.35, 0.25, 0.5
PAIR_DF = 144.0
NULLS = ("log-normal", "gamma")


def is_informative(norms, converged):
    """Tell whether enough classes converged for any statistic.

    Parameters
    ----------
    norms : array-like of shape (n_norms,)
    converged : array-like of bool, shape (n_norms,)

    Returns
    -------
    bool
        False with fewer than five converged norms, or half of them or fewer.
    """
    n_converged = int((np.asarray(converged, bool) & np.isfinite(norms)).sum())
    return n_converged >= MIN_INFORMATIVE and n_converged > len(norms) / 2


def anomaly_indices(norms, converged):
    """Return Neural Cleanse's anomaly index of every class.

    Parameters
    ----------
    norms : array-like of shape (n_classes,)
        L1 norm of each class's mask.
    converged : array-like of bool, shape (n_classes,)
        Whether the search reached its success rate.

    Returns
    -------
    indices : ndarray of shape (n_classes,)
        |norm - median| / (1.4826 MAD); NaN where the statistic says nothing.
    below : ndarray of bool, shape (n_classes,)
        Whether a class converged, with a norm below the median.

    Notes
    -----
    - A class that did not converge is censored: its norm is at least as large as the
      largest that converged, which is all that the median needs. Leaving it out would
      bias the median. Its deviation is not known and does not enter the MAD.
    - The statistic says nothing with fewer than five converged classes, or half of the
      classes or fewer, since then the median is no norm that was seen.
    - The MAD is taken as 5 % of the median at least: norms that hardly differ, as on
      a network with symmetric classes, are no evidence.

    References
    ----------
    Wang et al.: Neural Cleanse: Identifying and mitigating backdoor attacks in neural
    networks. IEEE S&P 2019, §IV.
    """
    norms = np.array(norms, dtype=np.float64)
    converged = np.asarray(converged, dtype=bool) & np.isfinite(norms)
    if not is_informative(norms, converged):
        return np.full(len(norms), np.nan), np.zeros(len(norms), dtype=bool)
    norms[~converged] = norms[converged].max()
    median = np.median(norms)  # of an even number: the mean of the middle two
    mad = np.median(np.abs(norms[converged] - median))
    spread = _TO_NORMAL * max(mad, MIN_SPREAD * median, np.finfo(float).tiny)
    return np.abs(norms - median) / spread, converged & (norms < median)


def p_values(
    norms,
    converged,
    *,
    null="log-normal",
    prior_sd=PATCH_SD,
    prior_df=PRIOR_DF,
    n_candidates=None,
    reference=None,
):
    """Return for every norm how probable one as small is if no class is a target.

    Parameters
    ----------
    norms : array-like of shape (n_norms,)
        Positive; of masks or perturbations, one a class or a pair of classes.
    converged : array-like of bool, shape (n_norms,)
        Whether the search reached its success rate. Others are censored: at least as
        large as the largest that converged.
    null : {"log-normal", "gamma"}, default="log-normal"
        Distribution of the norms of classes that are no targets. "gamma" is the
        published one, of 1 / norm.
    prior_sd : float, default=0.4
        Usual standard deviation of log-norms within a clean victim, for "log-normal".
    prior_df : float, default=16
        How many norms' worth of evidence that is.
    n_candidates : int, default=None
        Norms that were searched for their smallest; None for all that are given.
    reference : array-like of bool, shape (n_norms,), default=None
        Norms that the null may be fitted to; None for all.

    Returns
    -------
    ndarray of shape (n_norms,) in 0...1
        The order-statistic p-value of the smallest norm; of the second, with the
        smallest left out, and so on up to a quarter of the norms, so that several
        targets do not hide each other (Rosner's generalised test). A norm gets the
        smallest of its own and its larger neighbours' p-values; norms that did not
        converge get 1. All NaN where too few converged.

    Notes
    -----
    - "gamma" with its parameters fitted to nine values and then taken for known rejects
      a quarter to a half of clean victims with ten classes at 0.05. "log-normal" is a
      t-test, which allows for the fit.
    - Its variance is moderated: pooled with that of clean victims elsewhere, so that
      nine norms that happen to lie close together are no proof.

    References
    ----------
    Xiang, Miller, Kesidis: Detection of backdoors in trained classifiers without access
    to the training set. IEEE TNNLS 2020 (gamma, the largest left out).
    Rosner: Percentage points for a generalized ESD many-outlier procedure. 1983.
    Smyth: Linear models and empirical Bayes methods. 2004 (moderated t).
    """
    norms = np.array(norms, dtype=np.float64)
    converged = np.asarray(converged, dtype=bool) & np.isfinite(norms)
    n_candidates = n_candidates or len(norms)
    reference = np.ones(len(norms), bool) if reference is None else reference
    seen = converged[reference].sum()  # the candidate may be one of them
    if not is_informative(norms, converged) or seen < MIN_INFORMATIVE:
        return np.full(len(norms), np.nan)
    norms[~converged] = norms[converged].max()
    order = np.argsort(norms, kind="stable")
    fit = (
        _gamma_tail
        if null == "gamma"
        else partial(_log_normal_tail, prior_sd, prior_df)
    )
    p = np.ones(len(norms))
    for rank in range(max(1, len(norms) // 4)):
        candidate, larger = order[rank], order[rank + 1 :]
        larger = larger[reference[larger]]
        if not converged[candidate] or converged[larger].sum() < MIN_INFORMATIVE - 1:
            break
        one = fit(norms[candidate], norms[larger], converged[larger])
        p[candidate] = -np.expm1((n_candidates - rank) * np.log1p(-min(one, 1 - 1e-16)))
    for larger, smaller in pairwise(order[::-1]):
        if p[larger] < 1:  # a little less, so that the smallest norm comes first
            p[smaller] = min(p[smaller], p[larger] * (1 - _TIE))
    p[~converged] = 1
    return p


def pair_p_values(norms, converged, *, pair_sd, column_sd, margins=None, power=0.0):
    """Return for every pair of classes how probable its norm is if it is no attack's.

    What is natural to a pair, since the network hardly tells the two classes apart, and
    to a source, which is easily led anywhere, is taken out first: by the margins, and
    half of the source's median. What is a target's stays in, since an attack from one
    class often helps others there too; one from all classes also shows as a column, by
    its median norm as it is.

    Parameters
    ----------
    norms : array-like of shape (n_classes, n_classes)
        Of masks, from the row's class to the column's; the diagonal counts for nothing.
    converged : array-like of bool, shape (n_classes, n_classes)
    pair_sd, column_sd : float
        Usual standard deviation, within a clean victim, of what is left of a log-norm,
        and of a column's median log-norm.
    margins : array-like of shape (n_classes, n_classes), default=None
        By how much the row's logit exceeds the column's on clean images of the row's
        class, on average. None takes all for equal; what is not finite is taken for
        the median.
    power : float, default=0
        To which power of the margin a norm rises in clean victims.

    Returns
    -------
    pairs : ndarray of shape (n_classes, n_classes) in 0...1
        Of a norm as small as the smallest of all pairs, by what is left of it, its
        median and its MAD, moderated as in `p_values`; 1 on the diagonal and where the
        search did not converge. All NaN with fewer than five classes, or too few
        converged.
    targets : ndarray of shape (n_classes,) in 0...1
        As of `p_values`, of a column's median.
    """
    norms = np.array(norms, dtype=np.float64)
    n_classes = len(norms)
    off = ~np.eye(n_classes, dtype=bool)
    converged = np.asarray(converged, bool) & np.isfinite(norms) & off
    if n_classes < MIN_INFORMATIVE or not is_informative(norms[off], converged[off]):
        return np.full(norms.shape, np.nan), np.full(n_classes, np.nan)
    norms[off & ~converged] = norms[converged].max()
    norms[~off] = np.nan
    logs = np.log(np.maximum(norms, 1e-12))
    left = logs.copy()
    if margins is not None:
        known = np.array(margins, dtype=np.float64)[off]
        known = known[np.isfinite(known)]
        usual = max(np.median(known), 1e-12) if len(known) else 1.0
        seen = np.where(np.isfinite(margins), margins, usual)
        left -= power * np.log(np.maximum(seen, _MIN_MARGIN * usual))
    left -= _SOURCE_SHARE * np.nanmedian(left, axis=1, keepdims=True)
    left -= np.nanmedian(left)
    n_pairs = n_classes * (n_classes - 1)
    spread = _TO_NORMAL * np.nanmedian(np.abs(left))  # an attack does not move it much
    df = PAIR_DF + n_pairs
    moderated = (PAIR_DF * pair_sd**2 + n_pairs * spread**2) / df
    one = stats.t.cdf(left / np.sqrt(moderated), df)
    pairs = -np.expm1(n_pairs * np.log1p(-np.minimum(one, 1 - 1e-16)))
    pairs[~converged] = 1
    targets = p_values(
        np.exp(np.nanmedian(logs, axis=0)),
        converged.sum(axis=0) > (n_classes - 1) / 2,
        prior_sd=column_sd,
    )
    return pairs, targets


def p_values_of_pairs(pairs, targets):
    """Return a p-value a target class from what `pair_p_values` says."""
    if np.isnan(targets).all():  # the published null knows pairs only
        return pairs.min(axis=0)
    return np.minimum(1, 2 * np.fmin(pairs.min(axis=0), targets))


def _log_normal_tail(prior_sd, prior_df, norm, others, converged):
    """Return P(log-norm <= log norm), by a moderated t-test on the others."""
    logs = np.log(np.maximum(others, 1e-12))
    data = stats.CensoredData(logs[converged], right=logs[~converged])
    n_seen = int(converged.sum())
    mean, sd = stats.norm.fit(data) if (~converged).any() else (logs.mean(), logs.std())
    variance = sd**2 * n_seen / (n_seen - 1)
    df = n_seen - 1
    moderated = (prior_df * prior_sd**2 + df * variance) / (prior_df + df)
    t = (np.log(max(norm, 1e-12)) - mean) / np.sqrt(moderated * (1 + 1 / n_seen))
    return stats.t.cdf(t, prior_df + df)


def _gamma_tail(norm, others, converged):
    """Return P(1 / norm' >= 1 / norm) under a Gamma fitted to the others."""
    inverse = 1 / np.maximum(others, 1e-12)
    if np.ptp(np.log(inverse[converged])) < 1e-6:  # nothing to fit
        return _log_normal_tail(PATCH_SD, PRIOR_DF, norm, others, converged)
    data = inverse
    if (~converged).any():
        data = stats.CensoredData(inverse[converged], left=inverse[~converged])
    shape, _, scale = stats.gamma.fit(data, floc=0)
    return stats.gamma.sf(1 / max(norm, 1e-12), shape, scale=scale)


def rank_by_p(p, alpha):
    """Return the positions with p < alpha, the most significant first."""
    flagged = np.flatnonzero(np.nan_to_num(p, nan=1.0) < alpha)
    return flagged[np.argsort(p[flagged], kind="stable")]


def bonferroni_factors(kinds):
    """Return what p-values of several tests are multiplied by.

    Each kind of evidence gets the same share of the level, each test of a kind the same
    share of that: tests of one kind depend on each other, and more of them should not
    take from another kind. With one kind it is the number of tests.

    Parameters
    ----------
    kinds : iterable
        One a test.

    Returns
    -------
    ndarray of shape (n_tests,)
        The inverses sum to 1.
    """
    _, kind, counts = np.unique(list(kinds), return_inverse=True, return_counts=True)
    return len(counts) * counts[kind]
