"""What a notebook shows: names and findings, never weights, and nothing that runs."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn import config_context
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from skorch import NeuralNetClassifier
from torch import nn

import sklearn_backdoor as sb
from sklearn_backdoor.networks import ResNet18
from tests.common import LinearNetwork, corner_trigger, image_estimators, linear_images

NAMES = np.array(
    ["<script>alert(1)</script>", "a&b", "cat\x1b[31m", "\u202eevil", "e", "f"]
)
WEIGHTS = ("in_features", "Linear(", "Conv2d")


@pytest.fixture(
    params=[
        *image_estimators(),
        sb.AdditiveReverseEngineer(sb.VictimNetwork(LinearNetwork()), max_steps=2),
        sb.BackdoorTriggerClassifier(),
    ],
    ids=lambda value: type(value).__name__,
)
def estimator(request):
    return clone(request.param)


def fit(estimator, X, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(estimator, sb.BackdoorTriggerClassifier):
            return estimator.fit(X.reshape(len(X), -1), y)
        return estimator.fit(X, y)


def shown(estimator):
    bundle = estimator._repr_mimebundle_()
    assert bundle["text/plain"] == repr(estimator)
    assert bundle["text/html"].count("<div") == bundle["text/html"].count("</div>")
    return bundle["text/plain"], bundle["text/html"]


def test_estimators_show_the_networks_name_and_size_not_its_weights(estimator):
    for _ in range(2):  # unfitted, then fitted
        text, html = shown(estimator)
        assert text.startswith(type(estimator).__name__ + "(") and len(text) < 1000
        for word in WEIGHTS:
            assert word not in text and word not in html
        if hasattr(estimator, "victim") or hasattr(estimator, "net"):
            assert "LinearNetwork (352 weights)" in text
            assert "LinearNetwork (352 weights)" in html
        fit(estimator, *linear_images())


def test_names_of_unknown_origin_are_inert():
    X, y = linear_images()
    victim = sb.VictimNetwork(LinearNetwork(), classes=NAMES)
    guard = sb.BackdoorGuard(victim, corner_trigger(), target_class=NAMES[0])
    engineer = sb.NCReverseEngineer(victim, schedule="exhaustive", max_steps=2)
    for estimator in (victim, guard, engineer):
        _, html = shown(fit(estimator, X, NAMES[y]))
        assert "<script>alert" not in html and "&lt;script&gt;alert" in html
        table = html.split("</table>")[0]
        assert "a&amp;b" in table
        assert "\x1b" not in html and "\\x1b[31m" in table
        assert "\u202e" not in html


def test_only_settings_that_are_no_defaults_are_printed():
    victim = sb.VictimNetwork(nn.Sequential(nn.Linear(3, 2)))
    assert repr(victim) == "VictimNetwork(net=Sequential (8 weights))"
    assert repr(victim.set_params(batch_size=3)) == (
        "VictimNetwork(batch_size=3, net=Sequential (8 weights))"
    )
    with config_context(print_changed_only=False):
        assert "memory=None" in repr(victim)


def test_large_networks_and_skorch_nets_are_one_line():
    assert "net=ResNet18 (11,173,962 weights)" in repr(sb.VictimNetwork(ResNet18()))
    net = NeuralNetClassifier(LinearNetwork, criterion=nn.CrossEntropyLoss)
    text = repr(sb.VictimNetwork(net.initialize()))
    assert (
        text == "VictimNetwork(net=NeuralNetClassifier of LinearNetwork (352 weights))"
    )


def test_what_is_no_network_is_printed_as_it_is():
    for net in (None, "net.pt", LinearNetwork, 3):
        assert f"net={net!r}" in repr(sb.VictimNetwork(net))
        assert shown(sb.VictimNetwork(net))


def test_networks_inside_lists_and_pipelines_are_short():
    victim = sb.VictimNetwork(LinearNetwork())
    engineers = [
        ("nc", sb.NCReverseEngineer(victim)),
        ("more", sb.TABORReverseEngineer(victim)),
    ]
    text, _ = shown(sb.AutoReverseEngineer(victim, engineers=engineers))
    assert text.count("LinearNetwork (352 weights)") == 3 and "Linear(" not in text
    pipeline = make_pipeline(
        sb.TriggerEmbedder(corner_trigger(), target_class=2), victim
    )
    assert "LinearNetwork (352 weights)" in pipeline._repr_html_()


def test_findings_stand_first():
    X, y = linear_images()
    victim = sb.VictimNetwork(LinearNetwork())
    guard = fit(sb.BackdoorGuard(victim, corner_trigger(), target_class=2), X, y)
    table, rest = shown(guard)[1].split("</table>", 1)
    for said in ("backdoored", "verdict", "target class", "0, 1, 2, 3, 4, 5"):
        assert said in table
    assert 'alt="to class 2"' in rest.split("<style")[0]
    engineer = fit(sb.NCReverseEngineer(victim, max_steps=2), X, y)
    assert shown(engineer)[1].count("<img") == 6


def test_triggers_show_their_picture_enlarged():
    trigger = sb.white_box((3, 8, 8), size=2)
    pixels = np.asarray(Image.open(io.BytesIO(trigger._repr_png_())))
    assert pixels.shape == (96, 96, 3)
    expected = np.rint(255 * trigger.to_image()).repeat(12, axis=0).repeat(12, axis=1)
    np.testing.assert_array_equal(pixels, expected)
    html = trigger._repr_html_()
    assert html.count("<img") == 1 and "data:image/png;base64," in html
    assert "PatchTrigger(image_shape=(3, 8, 8)" in html
    grey = np.asarray(Image.open(io.BytesIO(sb.chessboard((1, 5, 7))._repr_png_())))
    assert grey.shape == (100, 140)


def test_triggers_without_an_image_fall_back_to_text():
    for trigger in (sb.PatchTrigger(1.0, 0.5), sb.AdditiveTrigger([[0.0, 0.1]])):
        assert trigger._repr_png_() is None and trigger._repr_html_() is None
        embedder = sb.TriggerEmbedder(trigger, target_class=1)
        assert "<img" not in embedder._repr_html_()


def test_pictures_load_pillow_only_when_they_are_looked_at():
    code = (
        "import sys, sklearn_backdoor as sb; t = sb.white_box((1, 4, 4)); repr(t); "
        "assert 'PIL' not in sys.modules; assert t._repr_png_(); "
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
