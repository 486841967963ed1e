import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from torch import nn

from sklearn_backdoor import (
    BackdoorGuard,
    PatchTrigger,
    VictimNetwork,
    white_box,
)
from sklearn_backdoor._fingerprint import fingerprint
from sklearn_backdoor.networks import LeNet5, ResNet18
from sklearn_backdoor.reverse import SearchRecord
from tests.common import LinearNetwork, corner_trigger, linear_images
from tests.test_guard_files import (
    centred,
    covered,
    densities,
    mixture,
    random_check_images,
    random_guard,
)

BATCH = ({0: torch.export.Dim("n")},)
NAMES = ["label", "is_trigger", "trigger_score"]


def make_guard(network, shape, n_classes=10, classifier=None, n_per_class=8):
    """Fit a guard for the class that an untrained network says most often."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(n_classes), n_per_class)
    noise = rng.normal(scale=0.2, size=(len(y), *shape))
    X = np.clip(rng.random((n_classes, *shape))[y] + noise, 0, 1).astype(np.float32)
    victim = VictimNetwork(centred(network, X)).fit(X)
    target = int(np.bincount(victim.predict(X)).argmax())
    guard = BackdoorGuard(victim, white_box(shape), classifier, target_class=target)
    return guard.fit(X, y), np.concatenate([X, white_box(shape).embed(X)])


@cache
def linear_guard():
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork().eval(), classes=list("zyxwvu"))
    guard = BackdoorGuard(victim, corner_trigger(), target_class="x")
    return guard.fit(X, np.array(list("zyxwvu"))[y])


def linear_check_images():
    X, _ = linear_images()
    return np.concatenate([X, corner_trigger().embed(X)])


@cache
def lenet_guard():
    torch.manual_seed(0)
    return make_guard(LeNet5(image_shape=(1, 16, 16)), (1, 16, 16))


def assert_agrees(guard, answer, X, tolerance=1e-6):
    label, is_trigger, score = map(np.asarray, answer)
    assert (label.dtype, is_trigger.dtype, score.dtype) == (np.int64, bool, float)
    expected = guard.trigger_score(X)
    np.testing.assert_array_equal(guard.classes_[label], guard.predict(X))
    np.testing.assert_array_equal(is_trigger, guard.is_trigger(X))
    assert np.all(np.abs(score - expected) <= tolerance * (1 + np.abs(expected)))


@pytest.mark.parametrize("name", covered())
def test_the_module_says_what_the_guard_says_for_every_step(name):
    guard, X = random_guard(name), random_check_images()
    module = guard.to_module()
    assert_agrees(guard, module(torch.from_numpy(X)), X, tolerance=1e-9)
    labels = guard.victim_.predict(X)
    assert (labels == guard.target_class_).any()
    assert (labels != guard.target_class_).any()


def test_the_module_equals_the_paper_written_out():
    guard, X = lenet_guard()
    target = guard.target_class_
    scaler, lda, classifier = (step for _, step in guard.classifiers_[target].steps)
    label, is_trigger, score = guard.to_module()(torch.from_numpy(X))
    Z, labels = guard.victim_.transform(X), guard.victim_.predict(X)
    for row in range(0, len(X), 7):
        z = (Z[row] - scaler.mean_) / scaler.scale_ @ lda.scalings_[:, :9]
        log_likelihood = [
            np.log(
                sum(
                    weight * multivariate_normal.pdf(z, mean, covariance)
                    for weight, mean, covariance in zip(
                        density.weights_,
                        density.means_,
                        density.covariances_,
                        strict=True,
                    )
                )
            )
            for density in classifier.densities_
        ]
        others = np.delete(log_likelihood, target)
        assert score[row] == pytest.approx(others.max() - log_likelihood[target])
        said = labels[row]
        origin = np.argmax(log_likelihood) if said == target else said
        assert label[row] == origin and is_trigger[row] == (origin != said)


def test_labels_are_positions_in_the_victims_own_order():
    guard, X = linear_guard(), linear_check_images()
    module = guard.to_module()
    assert module.classes == list("zyxwvu")
    assert_agrees(guard, module(torch.from_numpy(X)), X)


def test_several_target_classes_each_have_their_defender():
    X, y = linear_images(n_classes=8)
    network = LinearNetwork(n_classes=8).eval()
    network.last.weight.data[4, 14] = 30  # a second backdoor
    mask = np.zeros((4, 4))
    mask[3, 2] = 1
    triggers = [corner_trigger()] * 8
    triggers[4] = PatchTrigger(mask, np.ones((1, 4, 4)))
    record = SearchRecord(
        "ByHand", np.arange(8), tuple(triggers), np.ones(8), np.ones(8),
        np.ones(8, bool), ("",) * 8, np.ones(8), np.ones(8), None, np.array([4, 2]),
        "backdoored", (0, 0), None, 0.05, None,
    )  # fmt: skip
    guard = BackdoorGuard(VictimNetwork(network), record).fit(X, y)
    images = [X, *(triggers[t].embed(X[y != t]) for t in (2, 4))]
    images = np.concatenate(images)
    answer = guard.to_module()(torch.from_numpy(images))
    assert set(guard.victim_.predict(images)[answer[1]]) == {2, 4}
    assert_agrees(guard, answer, images)


def test_nothing_found_passes_every_label_through():
    X, y = linear_images()
    record = SearchRecord(
        "ByHand", np.arange(6), (corner_trigger(),) * 6, np.ones(6), np.ones(6),
        np.ones(6, bool), ("",) * 6, np.ones(6), np.ones(6), None, np.array([]),
        "nothing found", (0, 0), None, 0.05, None,
    )  # fmt: skip
    guard = BackdoorGuard(VictimNetwork(LinearNetwork().eval()), record).fit(X, y)
    X = linear_check_images()
    module = guard.to_module()
    assert_agrees(guard, module(torch.from_numpy(X)), X)
    program = torch.export.export(
        module, (torch.from_numpy(X[:2]),), dynamic_shapes=BATCH, strict=False
    )
    assert_agrees(guard, program.module()(torch.from_numpy(X)), X)


@pytest.mark.parametrize("classifier", [LogisticRegression(), None])
def test_two_classes_agree_with_the_guard(classifier):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU())
    network.append(nn.Linear(12, 2))
    if classifier is None:
        classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.5)
    classifier = make_pipeline(StandardScaler(), classifier)
    guard, X = make_guard(network, (1, 8, 8), 2, classifier)
    assert_agrees(guard, guard.to_module()(torch.from_numpy(X)), X)


def test_networks_with_probabilities_or_a_named_layer_are_opened_alike():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    )
    network.extend([nn.Linear(288, 4), nn.Softmax(dim=1)])
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 8)
    X = rng.random((32, 1, 8, 8)).astype(np.float32)
    for layer in (None, "1"):
        victim = VictimNetwork(network.eval(), feature_layer=layer).fit(X)
        target = int(victim.predict(X)[0])
        guard = BackdoorGuard(
            victim, white_box((1, 8, 8)), densities(mixture()), target_class=target
        ).fit(X, y)
        assert_agrees(guard, guard.to_module()(torch.from_numpy(X)), X)


def test_the_module_is_a_frozen_copy_in_evaluation_mode():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4))
    guard, X = make_guard(network, (1, 8, 8), 4, densities(mixture()))
    module, before = guard.to_module(), fingerprint(network)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    module.train()
    images = torch.from_numpy(X)
    assert_agrees(guard, module(images), X)
    assert fingerprint(network) == before and not network.training
    expected = [value.clone() for value in module(images)]
    with torch.no_grad():
        network[2].weight.zero_()
    for found, value in zip(module(images), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0)
    again = copy.deepcopy(module)
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(images), module(images), rtol=0, atol=0)


def test_threads_that_share_a_module_get_what_one_alone_gets():
    guard, X = lenet_guard()
    module, images = guard.to_module(), torch.from_numpy(X)
    parts = [images[i : i + 4] for i in range(0, 64, 4)]
    expected = [module(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(module, parts))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_images_of_another_kind_are_refused_by_name():
    module = linear_guard().to_module()
    X = torch.from_numpy(linear_check_images())
    torch.testing.assert_close(module(X.double()), module(X), rtol=0, atol=0)
    assert module(X[:0])[0].shape == (0,)
    with pytest.raises(TypeError, match="uint8, expected floating.*Divide uint8"):
        module((X * 255).to(torch.uint8))
    for images in (X[:, :, :3], X[0]):
        with pytest.raises(ValueError, match=r"expected \(n, 1, 4, 4\)"):
            module(images)


def test_where_the_guard_raises_the_module_reports_a_trigger_without_a_score():
    module = linear_guard().to_module()
    images = torch.from_numpy(linear_check_images()[:3])
    images[1, 0, 0, 0] = torch.nan
    label, is_trigger, score = module(images)
    assert is_trigger.tolist() == [False, True, False]
    assert score.isnan().tolist() == [False, True, False]


class OwnMixture(GaussianMixture):
    pass


@pytest.mark.parametrize(
    "classifier, message",
    [
        (densities(KernelDensity()), "KernelDensity.*no counterpart.*Gaussian"),
        (densities(mixture(OwnMixture)), "(?s)OwnMixture.*not their subclasses"),
        (densities(mixture(), QuantileTransformer(n_quantiles=8)), "QuantileTrans"),
    ],
)
def test_steps_without_a_counterpart_are_refused_by_name(classifier, message):
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork().eval())
    guard = BackdoorGuard(victim, corner_trigger(), classifier, target_class=2)
    with pytest.raises(TypeError, match=message):
        guard.fit(X, y).to_module()


def export(module, images):
    return torch.export.export(module, (images,), dynamic_shapes=BATCH, strict=False)


def run_onnx(module, images, path):
    """Return a function that ONNX Runtime runs, or skip."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        # torch's exporter uses parts of Python and of itself that are deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(
            module,
            (images,),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=BATCH,
            input_names=["images"],
            output_names=NAMES,
        )
    session = runtime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == NAMES
    return lambda X: session.run(None, {"images": X})


@pytest.mark.parametrize("case", ["linear", "lenet", "clipped", "logistic"])
def test_exported_programs_give_the_same_answers_for_any_batch(case, tmp_path):
    guard, X = {
        "linear": lambda: (linear_guard(), linear_check_images()),
        "lenet": lenet_guard,
        "clipped": lambda: (random_guard("min-max"), random_check_images()),
        "logistic": lambda: (random_guard("logistic"), random_check_images()),
    }[case]()
    module, example = guard.to_module(), torch.from_numpy(X[:2])
    program = export(module, example).module()
    onnx = run_onnx(module, example, tmp_path / "guard.onnx")
    for n in (1, 2, len(X)):
        assert_agrees(guard, program(torch.from_numpy(X[:n])), X[:n])
        assert_agrees(guard, onnx(X[:n]), X[:n], tolerance=1e-4)


def test_an_exported_program_needs_nothing_of_ours():
    guard, X = linear_guard(), linear_check_images()
    program = export(guard.to_module(), torch.from_numpy(X[:2]))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not [target for target in targets if "sklearn" in target]


def test_resnet18_agrees_with_the_guard():
    torch.manual_seed(0)
    guard, X = make_guard(ResNet18(n_classes=4), (3, 32, 32), 4, n_per_class=3)
    assert_agrees(guard, guard.to_module()(torch.from_numpy(X)), X)


@pytest.mark.slow
def test_resnet18_is_exported(tmp_path):
    torch.manual_seed(0)
    guard, X = make_guard(ResNet18(n_classes=4), (3, 32, 32), 4, n_per_class=3)
    module, example = guard.to_module(), torch.from_numpy(X[:2])
    program = export(module, example).module()
    onnx = run_onnx(module, example, tmp_path / "guard.onnx")
    for n in (1, len(X)):
        assert_agrees(guard, program(torch.from_numpy(X[:n])), X[:n])
        assert_agrees(guard, onnx(X[:n]), X[:n], tolerance=1e-4)
