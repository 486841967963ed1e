"""A fitted guard as one torch module, to export and deploy."""

import copy

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_backdoor._exclusive import evaluation_mode, exclusive
from sklearn_backdoor.classifier import BackdoorTriggerClassifier


class GuardModuleMixin:
    """Give a guard ``to_module``."""

    def to_module(self):
        """Return victim and defence as one ``torch.nn.Module``, to deploy.

        Returns
        -------
        GuardModule
            From images (n, n_channels, height, width), floating point in 0...1, to

            - ``label``, int64 (n,): position in ``module.classes`` of the label
              accepted, or of the source class inferred;
            - ``is_trigger``, bool (n,);
            - ``trigger_score``, float64 (n,).

            It holds a copy of the network, frozen and in evaluation mode: what becomes
            of the victim does not reach it.

        Raises
        ------
        TypeError
            If a step or density has no counterpart in torch. Those that do are
            ``Pipeline`` of ``StandardScaler``, ``MinMaxScaler``, ``PCA`` and
            ``LinearDiscriminantAnalysis`` (not by ``solver="lsqr"``), then
            `BackdoorTriggerClassifier` of ``GaussianMixture`` or
            ``BayesianGaussianMixture``, ``LinearDiscriminantAnalysis`` or
            ``LogisticRegression``.

        Notes
        -----
        - Labels are the guard's; scores agree with its ``trigger_score`` to 1e-6 times
          ``1 + |score|`` on the same machine and in batches of the same size, since the
          features go through the same float32 network and all after it is float64.
          Other kernels, such as ONNX Runtime's, round the network's float32 otherwise:
          there, to 1e-4 times ``1 + |score|``, and an image within that of 0 may
          change its label. With two classes and a discriminative classifier, scores
          past 20 are rounding alone.
        - ``uint8`` images are refused: divide them by 255. The range is not checked,
          since an exported program cannot raise. Where the network overflows, so that
          the guard raises, ``is_trigger`` is True and the score NaN.

        Examples
        --------
        Two images or more as an example, so that the batch size can vary; names for
        ONNX::

            module, images = guard.to_module(), torch.rand(2, 3, 32, 32)
            batch = ({0: torch.export.Dim("n")},)
            program = torch.export.export(
                module, (images,), dynamic_shapes=batch, strict=False
            )
            torch.onnx.export(
                module, (images,), "guard.onnx", dynamo=True, dynamic_shapes=batch,
                input_names=["images"],
                output_names=["label", "is_trigger", "trigger_score"],
            )
        """
        check_is_fitted(self)
        return _build(self)


class GuardModule(nn.Module):
    """A guard in torch: from images to label, is_trigger and trigger_score.

    Made by `BackdoorGuard.to_module`, which says more. Answers in evaluation mode,
    whatever ``train`` is told, and one thread at a time.

    Parameters
    ----------
    opened : LogitsAndFeatures
        Its own copy of the network.
    classes : list of labels
        In logit order.
    image_shape : tuple (n_channels, height, width)
    heads : list of torch.nn.Module
        One a target class, the most anomalous first.
    """

    def __init__(self, opened, classes, image_shape, heads):
        super().__init__()
        self.opened = opened
        self.classes = classes
        self.image_shape = tuple(image_shape)
        self.heads = nn.ModuleList(heads)

    def forward(self, images):
        """Return label, is_trigger and trigger_score, each of shape (n,).

        Raises
        ------
        TypeError, ValueError
            If images are no floating point, or of another shape than the guard's.
        """
        self._check(images)
        with evaluation_mode(self.opened):
            logits, features = self.opened(images.float())
        logits, Z = logits.float(), features.float().double()
        said = logits.argmax(dim=1)
        label, score = said, torch.zeros_like(said, dtype=torch.float64)
        targets = [head.target for head in self.heads]
        for head in self.heads:
            origin, ratio = head(Z)
            rows = judged = said == head.target
            if head.target == targets[0]:  # as the guard scores all other images
                judged = rows | ~_is_any(said, targets)
            label = torch.where(rows, origin, label)
            score = torch.where(judged, ratio, score)
        overflow = logits.isnan().any(dim=1) | ~Z.isfinite().all(dim=1)
        score = score.masked_fill(overflow, torch.nan)
        return label, (label != said) | overflow, score

    def _check(self, images):
        if not images.is_floating_point():
            raise TypeError(
                f"images have dtype {images.dtype}, expected floating point in 0...1. "
                "Divide uint8 images by 255."
            )
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (n, "
                f"{', '.join(map(str, self.image_shape))}), as the guard was fitted."
            )


def _build(guard):
    victim, classes = guard.victim_, guard.classes_.tolist()
    with exclusive(victim.network_):
        opened = copy.deepcopy(victim._opened)
    heads = [
        _Head(_steps_of(classifier), classifier.classes_.tolist(), target, classes)
        for target, classifier in guard.classifiers_.items()
    ]
    module = GuardModule(opened, classes, victim.image_shape_, heads)
    return module.to(victim.device_).requires_grad_(False).train(False)


class _Head(nn.Module):
    """One target class: from features to the origin and the log-likelihood ratio."""

    order: torch.Tensor
    others: torch.Tensor

    def __init__(self, steps, sorted_classes, target, classes):
        super().__init__()
        self.steps = steps
        self.target = classes.index(target)
        self.column = sorted_classes.index(target)
        order = [classes.index(label) for label in sorted_classes]
        others = [k for k in range(len(classes)) if k != self.column]
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("others", torch.tensor(others))

    def forward(self, Z):
        scores = self.steps(Z)
        ratio = scores[:, self.others].amax(dim=1) - scores[:, self.column]
        return self.order[scores.argmax(dim=1)], ratio


# Constants are float64 buffers: a bare number would be float32 in an ONNX graph.


class _Scale(nn.Module):
    """Subtract, divide and clip each feature."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, shift, scale, low=-np.inf, high=np.inf):
        super().__init__()
        _keep(self, shift=shift, scale=scale, low=low, high=high)

    def forward(self, Z):
        Z = (Z - self.shift) / self.scale
        return torch.minimum(torch.maximum(Z, self.low), self.high)


class _Project(nn.Module):
    """Subtract, multiply by a matrix, add."""

    def __init__(self, shift, matrix, offset):
        super().__init__()
        _keep(self, shift=shift, matrix=matrix, offset=offset)

    def forward(self, Z):
        return (Z - self.shift) @ self.matrix + self.offset


class _LogProbabilities(nn.Module):
    """Logarithms of the softmax; of one logit, those of both classes."""

    tiny: torch.Tensor

    def __init__(self):
        super().__init__()
        _keep(self, tiny=np.finfo(np.float64).tiny)

    def forward(self, decision):
        if decision.shape[1] == 1:  # not log-sigmoid: scikit-learn rounds like this
            of_second = decision.sigmoid()
            proba = torch.cat([1 - of_second, of_second], dim=1)
        else:
            proba = decision.softmax(dim=1)
        return torch.maximum(proba, self.tiny).log()


class _Mixtures(nn.Module):
    """Log-likelihoods under one Gaussian mixture a class, all in one product."""

    def __init__(self, densities):
        super().__init__()
        self.n_classes = len(densities)
        self.n_features = densities[0].means_.shape[1]
        # at a component's mean the quadratic form is 0: what remains is its constant
        constants = [one._estimate_weighted_log_prob(one.means_) for one in densities]
        _keep(self, constant=np.concatenate([c.diagonal() for c in constants]))
        means = np.concatenate([one.means_ for one in densities])
        roots = np.concatenate([_roots(one) for one in densities])
        self.is_diagonal = roots.ndim == 2
        if self.is_diagonal:
            precisions = roots**2
            of_constant = -0.5 * (means**2 * precisions).sum(axis=1)
            _keep(self, squares=-0.5 * precisions.T, values=(means * precisions).T)
            _keep(self, at_zero=of_constant)
        else:
            _keep(self, roots=np.concatenate(list(roots), axis=1))
            _keep(self, centres=np.einsum("kd,kde->ke", means, roots).ravel())

    def forward(self, Z):
        if self.is_diagonal:
            form = Z**2 @ self.squares + Z @ self.values + self.at_zero
        else:
            moved = Z @ self.roots - self.centres
            moved = moved.unflatten(1, (-1, self.n_features))
            form = -0.5 * (moved**2).sum(dim=2)
        joint = (self.constant + form).unflatten(1, (self.n_classes, -1))
        return joint.logsumexp(dim=2)  # finite: the features are float32


def _roots(density):
    """Return roots of the precisions: (n, d) where diagonal, else (n, d, d)."""
    roots, (n_components, n_features) = (
        density.precisions_cholesky_,
        density.means_.shape,
    )
    if density.covariance_type == "tied":
        return np.broadcast_to(roots, (n_components, n_features, n_features))
    if density.covariance_type == "spherical":
        return np.broadcast_to(roots[:, None], (n_components, n_features))
    return roots


def _keep(module, **arrays):
    for name, array in arrays.items():
        value = torch.as_tensor(np.array(array, dtype=np.float64))
        module.register_buffer(name, value)


def _is_any(labels, targets):
    found = labels == targets[0]
    for target in targets[1:]:
        found = found | (labels == target)
    return found


def _steps_of(classifier):
    """Return a classifier as a module from features to scores of its classes."""
    steps = [classifier]
    if type(classifier) is Pipeline:
        steps = [step for _, step in classifier.steps]
    *transformers, last = steps
    return nn.Sequential(*map(_transformer, transformers), *_scores(last))


def _transformer(step):
    kind = type(step)
    if step is None or step == "passthrough":
        return nn.Identity()
    if kind is Pipeline:
        return nn.Sequential(*(_transformer(part) for _, part in step.steps))
    if kind is StandardScaler:
        shift = step.mean_ if step.with_mean else 0.0
        return _Scale(shift, step.scale_ if step.with_std else 1.0)
    if kind is MinMaxScaler:
        limits = step.feature_range if step.clip else ()
        return _Scale(-step.min_ / step.scale_, 1 / step.scale_, *limits)
    if kind is PCA:
        sd = 1.0
        if step.whiten:
            sd = np.maximum(np.sqrt(step.explained_variance_), np.finfo(float).eps)
        return _Project(step.mean_, step.components_.T / sd, 0.0)
    if kind is LinearDiscriminantAnalysis and step.solver != "lsqr":
        shift = step.xbar_ if step.solver == "svd" else 0.0
        return _Project(shift, step.scalings_[:, : step._max_components], 0.0)
    raise _refusal(step)


def _scores(step):
    kind = type(step)
    if kind is BackdoorTriggerClassifier:
        kinds = {type(density) for density in step.densities_}
        for density in step.densities_:
            if len(kinds) > 1 or not kinds <= {
                GaussianMixture,
                BayesianGaussianMixture,
            }:
                raise _refusal(density)
        return [_Mixtures(step.densities_)]
    one_vs_rest = getattr(step, "multi_class", "deprecated") not in (
        "deprecated",
        "auto",
    )
    if (
        kind is LinearDiscriminantAnalysis
        or kind is LogisticRegression
        and not (one_vs_rest or step.solver == "liblinear" and len(step.classes_) > 2)
    ):
        return [_Project(0.0, step.coef_.T, step.intercept_), _LogProbabilities()]
    raise _refusal(step)


def _refusal(step):
    return TypeError(
        f"{step!r} has no counterpart in torch. Those that do: Pipeline of "
        "StandardScaler, MinMaxScaler, PCA, LinearDiscriminantAnalysis (svd, eigen), "
        "and at its end BackdoorTriggerClassifier of GaussianMixture or "
        "BayesianGaussianMixture, LinearDiscriminantAnalysis, or LogisticRegression "
        "(multinomial); not their subclasses."
    )
