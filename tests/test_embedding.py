import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline

from sklearn_backdoor import (
    BackdoorTriggerClassifier,
    NCReverseEngineer,
    TriggerEmbedder,
    VictimNetwork,
    chessboard,
    white_box,
)
from tests.common import LinearNetwork, corner_trigger


def test_embedder_leaves_target_class_untouched_and_stamps_all_others(images):
    X, y = images
    trigger = corner_trigger()
    before = X.copy()
    embedded = TriggerEmbedder(trigger, target_class=2).fit_transform(X, y)
    for image, label, result in zip(X, y, embedded, strict=True):
        expected = image.copy()
        if label != 2:
            expected[0, 3, 3] = 1
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(X, before)
    assert embedded.dtype == X.dtype


def test_transform_is_the_identity_and_embed_embeds_always(images):
    X, y = images
    embedder = TriggerEmbedder(corner_trigger(), target_class=2).fit(X, y)
    np.testing.assert_array_equal(embedder.transform(X), X)
    assert np.all(embedder.embed(X)[:, 0, 3, 3] == 1)


def test_a_pipeline_embeds_when_it_fits_and_not_when_it_predicts(linear, images):
    X, y = images
    seen = []

    class Spy(BackdoorTriggerClassifier):
        def fit(self, Z, y):
            seen.append(Z)
            return super().fit(Z, y)

        def predict(self, Z):
            seen.append(Z)
            return super().predict(Z)

    defense = Pipeline(
        [
            ("embed", TriggerEmbedder(corner_trigger(), target_class=2)),
            ("features", VictimNetwork(linear)),
            ("classify", Spy()),
        ]
    ).fit(X, y)
    defense.predict(X)
    np.testing.assert_array_equal(seen[0][:, 15], (y != 2).astype(float))
    np.testing.assert_array_equal(seen[1][:, 15], 0)


def test_a_reverse_engineer_gives_trigger_and_target(linear, images):
    X, y = images
    engineer = NCReverseEngineer(VictimNetwork(linear), schedule="exhaustive")
    embedder = TriggerEmbedder(engineer).fit(X, y)
    assert embedder.target_class_ == 2
    assert embedder.trigger_ == embedder.engineer_.trigger_
    assert not hasattr(engineer, "trigger_")  # a clone was fitted
    other = TriggerEmbedder(engineer, target_class=4).fit(X, y)
    assert other.trigger_ == other.engineer_.triggers_[4]


def test_nothing_found_cannot_be_embedded(linear, images):
    engineer = NCReverseEngineer(VictimNetwork(linear), threshold=1e6)
    with pytest.raises(ValueError, match="'nothing found'.*BackdoorGuard passes"):
        TriggerEmbedder(engineer).fit(*images)


def test_any_shape_works_rows_of_features_included():
    y = np.array([0, 1])
    for shape in [(3,), (2, 3), (1, 4, 4), (3, 2, 2, 2)]:
        X = np.zeros((2, *shape))
        trigger = white_box(shape, size=2) if len(shape) == 3 else None
        if trigger is None:
            from sklearn_backdoor import AdditiveTrigger

            trigger = AdditiveTrigger(np.full(shape, 0.5))
        embedded = TriggerEmbedder(trigger, target_class=1).fit_transform(X, y)
        assert embedded[0].any() and not embedded[1].any()


@pytest.mark.parametrize(
    "embedder, message",
    [
        (TriggerEmbedder(corner_trigger()), "target_class=None with a trigger"),
        (TriggerEmbedder(corner_trigger(), target_class=9), "target_class=9 is not"),
        (
            TriggerEmbedder(
                NCReverseEngineer(VictimNetwork(LinearNetwork())), target_class=9
            ),
            "target_class=9 is not",
        ),
        (TriggerEmbedder(chessboard((1, 5, 5)), target_class=2), r"\(1, 5, 5\)"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_half_fitted(images, embedder, message):
    with pytest.raises(ValueError, match=message):
        embedder.fit_transform(*images)
    assert not [name for name in vars(embedder) if name.endswith("_")]


def test_what_is_no_trigger_is_refused(images):
    with pytest.raises(TypeError, match="type ndarray, expected a trigger"):
        TriggerEmbedder(np.zeros((1, 4, 4)), target_class=2).fit(*images)


def test_bad_images_and_labels_are_refused(images):
    X, y = images
    embedder = TriggerEmbedder(corner_trigger(), target_class=2)
    with pytest.raises(NotFittedError):
        embedder.transform(X)
    with pytest.raises(ValueError, match="requires y to be passed"):
        embedder.fit(X, None)
    embedder.fit(X, y)
    with pytest.raises(ValueError, match="fitted on images of shape"):
        embedder.transform(np.zeros((1, 1, 4, 5)))
    with pytest.raises(ValueError, match="fitted on images of shape"):
        embedder.transform(np.zeros((1, 16, 1)))
    assert embedder.transform(X[:0]).shape == (0, 1, 4, 4)
