"""The anomaly statistic, which asks whether a class's trigger is too small."""

import numpy as np

MIN_INFORMATIVE = 5
MIN_SPREAD = 0.05
_TO_NORMAL = 1.4826  # a normal distribution's standard deviation per MAD


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
    n_converged = int(converged.sum())
    if n_converged < MIN_INFORMATIVE or n_converged <= len(norms) / 2:
        return np.full(len(norms), np.nan), np.zeros(len(norms), dtype=bool)
    norms[~converged] = norms[converged].max()
    median = np.median(norms)  # of an even number: the mean of the middle two
    mad = np.median(np.abs(norms[converged] - median))
    spread = _TO_NORMAL * max(mad, MIN_SPREAD * median)
    return np.abs(norms - median) / spread, converged & (norms < median)
