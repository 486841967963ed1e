"""Log-likelihoods of many mixtures at once."""

import numpy as np
from sklearn.mixture import GaussianMixture


class LikelihoodScorer:
    """Score rows under one fitted density a class.

    Gaussian mixtures with diagonal or spherical covariances are fused into one matrix
    product over all classes and components; all other densities are asked in turn.

    Parameters
    ----------
    densities : list of fitted estimators with ``score_samples``
        One a class.
    """

    def __init__(self, densities):
        self.densities = densities
        self.fused = all(
            type(density) is GaussianMixture
            and density.covariance_type in ("diag", "spherical")
            and density.n_components == densities[0].n_components
            for density in densities
        )
        if self.fused:
            self._fuse()

    def _fuse(self):
        # log N = const - 1/2 (x^2 . p - 2 x . (mu p) + mu^2 . p), p the precisions
        means = np.concatenate([density.means_ for density in self.densities])
        roots = np.concatenate([d.precisions_cholesky_ for d in self.densities])
        roots = np.broadcast_to(roots.reshape(len(means), -1), means.shape)
        weights = np.concatenate([density.weights_ for density in self.densities])
        precisions = roots**2
        self._of_squares = (-0.5 * precisions).T.copy()
        self._of_values = (means * precisions).T.copy()
        self._constant = (
            np.log(weights)
            + np.log(roots).sum(axis=1)
            - 0.5
            * (means.shape[1] * np.log(2 * np.pi) + (means**2 * precisions).sum(1))
        )

    def __call__(self, Z):
        """Return log-likelihoods.

        Parameters
        ----------
        Z : ndarray of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
        """
        if not self.fused:
            scores = [density.score_samples(Z) for density in self.densities]
            return np.column_stack(scores)
        joint = (Z**2) @ self._of_squares
        joint += Z @ self._of_values
        joint += self._constant
        joint = joint.reshape(len(Z), len(self.densities), -1)
        peak = joint.max(axis=2)
        joint -= peak[:, :, None]
        return peak + np.log(np.exp(joint, out=joint).sum(axis=2))
