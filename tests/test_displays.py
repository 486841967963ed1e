import copy
import itertools
import sys
import unicodedata

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator

from sklearn_backdoor import (
    AnomalyIndexDisplay,
    BackdoorGuard,
    FeatureSpaceDisplay,
    LikelihoodRatioDisplay,
    NCReverseEngineer,
    SourceConfusionDisplay,
    TriggerDisplay,
    TriggerEmbedder,
    VictimNetwork,
    chessboard,
    fpr_score,
    sia_score,
    tpr_score,
)
from sklearn_backdoor.displays._lettering import legible, width, wrapped
from sklearn_backdoor.reverse import SearchRecord
from sklearn_backdoor.reverse._search import ImagePasses
from tests.common import LinearNetwork, corner_trigger, linear_images

matplotlib.use("Agg")
HOSTILE = [
    "<script>alert(1)</script>",
    "\x1b[31mred\x1b[0m",
    "$x^2$",
    "\u202egnp.exe",
    "a" * 150,
    r"\frac{$",
    "\u4e2d\u6587",
    "e\u0301",
    "",
    "{\n}",
]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def guard():
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork().eval())
    return BackdoorGuard(victim, corner_trigger(), target_class=2).fit(X, y)


@pytest.fixture(scope="module")
def searched():
    """Return a guard that searched for its trigger itself."""
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork(backdoor=100.0).eval())
    return BackdoorGuard(victim, NCReverseEngineer(victim, max_steps=15)).fit(X, y)


@pytest.fixture(scope="module")
def idle():
    """Return a guard that found nothing to defend."""
    X, y = linear_images()
    victim = VictimNetwork(LinearNetwork(backdoor=0.0).eval())
    return BackdoorGuard(victim, NCReverseEngineer(victim, max_steps=5)).fit(X, y)


@pytest.fixture
def evaluation():
    """Return triggered images of all other classes, clean ones of the target."""
    X, y = linear_images(6, seed=1)
    X[y != 2] = corner_trigger().embed(X[y != 2])
    X[:3] = linear_images(3, seed=2)[0][:3]  # of class 0, without: not sent to 2
    return X, y


def record(norms, *, p=None, flagged=(), converged=None, **changes):
    """Return the record of a search with given norms."""
    n_classes = len(norms)
    p = np.linspace(0.001, 1, n_classes) if p is None else p
    values = {
        "method": "AdditiveReverseEngineer",
        "classes_": np.arange(n_classes),
        "triggers_": (corner_trigger(),) * n_classes,
        "norms_": np.array(norms, dtype=float),
        "success_rates_": np.ones(n_classes),
        "converged_": np.ones(n_classes, bool) if converged is None else converged,
        "reasons_": ("",) * n_classes,
        "anomaly_indices_": np.linspace(3, 0, n_classes),
        "p_values_": np.array(p, dtype=float),
        "methods_": None,
        "target_classes_": np.array(flagged, dtype=int),
        "verdict_": "backdoored" if len(flagged) else "nothing found",
        "n_image_passes_": ImagePasses(0, 0),
        "report_": None,
        "alpha": 0.05,
        "threshold": None,
    }
    return SearchRecord(**{**values, **changes})


def sheet(size=(7, 4)):
    """Return the axes of a figure that pyplot knows nothing of."""
    return Figure(figsize=size).subplots()


def words(ax):
    """Return all that is written in a figure."""
    return " ".join(text.get_text() for text in ax.figure.findobj(Text))


def check_lettering(ax):
    """Check that no text is cut, and that no two level ones overlap."""
    FigureCanvasAgg(ax.figure).draw()
    level = []
    for text in lettering(ax):
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= ax.figure.bbox.x1 + 1, text
        assert box.y0 >= -1 and box.y1 <= ax.figure.bbox.y1 + 1, text
        if text.get_rotation() in (0, 90):
            level.append((box, text))
    for (one, text), (other, second) in itertools.combinations(level, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        along = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(across, along) <= 1.5, f"{text} lies over {second}"


def lettering(ax):
    """Return the texts that are drawn: ticks outside the limits are not."""
    hidden = set()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                hidden |= {id(tick.label1), id(tick.label2)}
    return [
        text
        for text in ax.figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]


# ---- AnomalyIndexDisplay


def test_a_bar_is_as_high_as_minus_the_logarithm_of_the_p_value():
    p = [1e-3, 0.5, 1.0, 0.0, 0.2]
    search = record([1, 2, 3, 0.1, 5], p=p, flagged=[3, 0])
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    expected = [3, -np.log10(0.5), 0, 16, -np.log10(0.2)]
    np.testing.assert_allclose(display.heights_, expected)
    np.testing.assert_allclose([bar.get_height() for bar in display.bars_], expected)
    assert display.line_.get_ydata()[0] == pytest.approx(-np.log10(0.05))
    assert "below 0.05" in words(display.ax_)
    colors = [bar.get_facecolor() for bar in display.bars_]
    assert colors[0] == colors[3] != colors[1] == colors[2]


def test_where_the_anomaly_index_flags_it_is_drawn_of_small_norms():
    norms = np.array([1.0, 8, 9, 10, 11, 30])
    indices = np.array([6.0, 1.2, 0.4, 0.3, 1, 15])
    search = record(norms, anomaly_indices_=indices, alpha=None, threshold=2.5)
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    expected = [
        index if norm < np.median(norms) else 0
        for norm, index in zip(norms, indices, strict=True)
    ]
    np.testing.assert_allclose(display.heights_, expected)
    assert display.threshold == 2.5 and "above 2.5" in words(display.ax_)


def test_a_fitted_engineer_is_judged_by_what_it_flags_by(searched):
    engineer = searched.engineer_
    display = AnomalyIndexDisplay.from_estimator(searched, ax=sheet())
    assert display.statistic == "p-value"
    np.testing.assert_array_equal(display.figures, engineer.p_values_)
    assert display.target_classes.tolist() == [2]
    published = copy.copy(engineer).set_params(schedule="exhaustive")
    frozen = FrozenEstimator(published)
    display = AnomalyIndexDisplay.from_estimator(frozen, ax=sheet())
    assert display.statistic == "anomaly index" and display.threshold == 2
    np.testing.assert_array_equal(np.abs(display.figures), engineer.anomaly_indices_)
    assert np.argmax(display.heights_) == 2


def test_b3d_is_judged_by_how_far_below_the_median_a_norm_is():
    converged = np.array([1, 1, 1, 1, 1, 0], dtype=bool)
    search = record(
        [2, 10, 12, 14, 16, 3],
        converged=converged,
        method="B3DReverseEngineer",
        alpha=None,
        flagged=[0],
    )
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    median = 13  # the class that did not converge counts as 16
    expected = [median / norm for norm in (2, 10, 12, 14, 16, 16)]
    np.testing.assert_allclose(display.heights_, expected)
    assert display.threshold == 4


def test_norms_stand_over_the_bars_and_classes_not_converged_are_hatched():
    converged = np.array([True, True, False, True, True, True])
    search = record([1.25, 8, 99, 117.6, 9, 9], converged=converged, flagged=[0])
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    text = words(display.ax_)
    assert "1.2" in text and "118" in text and "99" not in text
    assert "search did not converge (1)" in text.replace("\n", " ")
    assert [patch for patch in display.ax_.patches if patch.get_hatch()]
    check_lettering(display.ax_)


def test_norms_of_masks_and_of_perturbations_are_not_set_side_by_side():
    mixed = (*[corner_trigger()] * 4, chessboard((1, 4, 4), 0.1))
    search = record([117.6, 8, 9, 9, 1], triggers_=mixed, flagged=[4])
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    assert display.norms is None
    assert "norm" not in words(display.ax_) and "118" not in words(display.ax_)
    alike = AnomalyIndexDisplay.from_estimator(search, classes=[0, 1], ax=sheet())
    assert "118" in words(alike.ax_)


@pytest.mark.parametrize("last, compare", [("additive", True), ("neurons", False)])
def test_norms_of_shifts_and_of_perturbations_are_not_either(last, compare):
    search = record(
        [8, 9, 9, 9, 1],
        triggers_=(chessboard((1, 4, 4), 0.1),) * 5,
        methods_=(*["additive"] * 4, last),
        flagged=[4],
    )
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    assert (display.norms is not None) == compare


@pytest.mark.parametrize("n_converged", [0, 1])
def test_too_few_classes_are_said_to_be_too_few(n_converged):
    converged = np.arange(6) < n_converged
    search = record(np.ones(6), p=[np.nan] * 6, converged=converged)
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    text = words(display.ax_).replace("\n", " ")
    assert f"{n_converged} of 6 classes converged" in text
    assert display.bars_ is None
    check_lettering(display.ax_)


def test_classes_that_were_not_judged_are_pale():
    p = [0.01, 0.5, 0.6, 0.7, np.nan, np.nan]
    search = record(np.arange(1, 7), p=p, flagged=[0])
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    assert "not among the contenders (2)" in words(display.ax_).replace("\n", " ")


@pytest.mark.parametrize(
    "n_classes, size", [(43, (4, 3)), (100, (7, 4)), (300, (4, 3))]
)
def test_of_many_classes_the_most_suspicious_are_named(n_classes, size):
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 1, n_classes)
    p[[7, n_classes - 1]] = 1e-9, 1e-3
    names = np.array([f"a class with a long name {k}" for k in range(n_classes)])
    search = record(
        rng.uniform(1, 9, n_classes),
        p=p,
        classes_=names,
        target_classes_=names[[7, n_classes - 1]],
    )
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet(size))
    ticks = display.ax_.get_xticks().tolist()
    assert {7, n_classes - 1} <= set(ticks) and len(ticks) < n_classes
    assert len(display.bars_) == n_classes
    check_lettering(display.ax_)


def test_bars_of_no_height_are_drawn_all_the_same():
    search = record(np.ones(6), p=np.ones(6), alpha=1.0)
    display = AnomalyIndexDisplay.from_estimator(search, ax=sheet())
    np.testing.assert_array_equal(display.heights_, 0)
    check_lettering(display.ax_)


def test_some_classes_can_be_drawn_in_a_given_order():
    search = record([1, 2, 3, 4, 5], flagged=[0])
    display = AnomalyIndexDisplay.from_estimator(search, classes=[3, 0], ax=sheet())
    expected = -np.log10(search.p_values_[[3, 0]])
    np.testing.assert_allclose(display.heights_, expected)
    assert display.ax_.get_xticklabels()[0].get_text() == "3"
    with pytest.raises(ValueError, match="not among the classes"):
        AnomalyIndexDisplay.from_estimator(search, classes=[9])


def test_a_statistic_that_is_not_known_is_refused():
    options = {"classes": [0], "figures": [1], "norms": [1], "converged": [True]}
    with pytest.raises(ValueError, match="statistic='z', expected one of 'p-value'"):
        AnomalyIndexDisplay(**options, statistic="z").plot(sheet())


# ---- LikelihoodRatioDisplay


def test_bars_hold_the_scores_between_their_edges_and_none_straddles_0():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(-20, 5, 40), rng.normal(40, 10, 90)])
    y = np.repeat(["ship", "car"], [40, 90])
    display = LikelihoodRatioDisplay.from_predictions(
        scores, y, target_class="ship", ax=sheet()
    )
    edges = display.bins_
    assert 0 in edges and display.n_clipped_ == 0
    for counts, label in zip(display.counts_, ("ship", "car"), strict=True):
        for place, count in enumerate(counts):
            low, high = edges[place : place + 2]
            found = [s for s in scores[y == label] if low <= s < high]
            assert len(found) == count
    heights = [bar.get_height() for bar in display.ax_.containers[0]]
    np.testing.assert_allclose(heights, display.counts_[0] * 100 / 40)
    text = words(display.ax_)
    assert "clean images of ship (40)" in text and "trigger (90)" in text
    check_lettering(display.ax_)


def test_scores_far_out_are_drawn_at_the_edge_and_counted_in_words():
    scores = [*np.linspace(-12, -8, 30), *np.linspace(8, 12, 30), -1e6, 1e7]
    y = [0] * 30 + [1] * 30 + [0, 1]
    display = LikelihoodRatioDisplay.from_predictions(
        scores, y, target_class=0, ax=sheet()
    )
    assert display.n_clipped_ == 2 and np.abs(display.bins_).max() < 100
    assert sum(counts.sum() for counts in display.counts_) == 62
    assert "2 far out" in words(display.ax_).replace("\n", " ")


@pytest.mark.parametrize("scores", [[-3.0], [5e9], [0.0], [2.0, 2.0, 2.0]])
@pytest.mark.parametrize("size", [(4, 3), (7, 4)])
def test_single_images_of_unknown_origin_are_accepted_or_rejected(scores, size):
    display = LikelihoodRatioDisplay.from_predictions(
        scores, target_class="a" * 150, ax=sheet(size)
    )
    rejected = sum(score > 0 for score in scores)
    assert [counts.sum() for counts in display.counts_] == [
        len(scores) - rejected,
        rejected,
    ]
    assert f"rejected: trigger ({rejected})" in words(display.ax_)
    check_lettering(display.ax_)


def test_a_guards_scores_are_those_of_images_sent_to_the_target(guard, evaluation):
    X, y = evaluation
    display = LikelihoodRatioDisplay.from_estimator(guard, X, y, ax=sheet())
    seen = guard.inspect(X)
    sent = seen["victim_label"] == 2
    np.testing.assert_array_equal(display.trigger_score, seen["trigger_score"][sent])
    np.testing.assert_array_equal(display.y_true, y[sent])
    assert display.n_others == 3
    assert "3 images with other labels" in words(display.ax_).replace("\n", " ")
    only = LikelihoodRatioDisplay.from_estimator(guard, X[:3], ax=sheet())
    text = words(only.ax_).replace("\n", " ")
    assert "None of 3 images is called 2" in text


def test_scores_that_are_not_finite_or_of_another_length_are_refused():
    draw = LikelihoodRatioDisplay.from_predictions
    with pytest.raises(ValueError, match="trigger_score contains NaN"):
        draw([1.0, np.nan], target_class=0)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        draw([1.0, 2.0], [0], target_class=0)


# ---- FeatureSpaceDisplay


def test_points_are_the_first_two_principal_components_of_standardised_features():
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(40, 6)) * [1, 5, 2, 9, 1, 1]
    y = np.repeat([0, 1, 2, 3], 10)
    Z_check = rng.normal(size=(4, 6))
    display = FeatureSpaceDisplay.from_predictions(
        Z, y, Z_check=Z_check, is_trigger=[1, 0, 0, 1], target_class=1, ax=sheet()
    )
    mean, sd = Z.mean(axis=0), Z.std(axis=0)
    _, singular, axes = np.linalg.svd((Z - mean) / sd, full_matrices=False)
    for given, drawn in ((Z, display.points), (Z_check, display.points_check)):
        expected = (given - mean) / sd @ axes[:2].T
        signs = np.sign(np.sum(expected[:1] * drawn[:1], axis=0))
        np.testing.assert_allclose(drawn, expected * signs, atol=1e-8)
    shares = singular**2 / np.sum(singular**2)
    np.testing.assert_allclose(display.explained, shares[:2])
    text = words(display.ax_)
    assert f"first component ({shares[0]:.0%} of variance)" in text
    for entry in ("1, clean", "accepted (2)", "flagged (2)"):
        assert entry in text
    check_lettering(display.ax_)


def test_a_guards_points_are_clean_for_the_target_and_triggered_for_others(guard):
    X, y = linear_images()
    X_check, _ = linear_images(2, seed=5)
    display = FeatureSpaceDisplay.from_estimator(
        guard, X, y, X_check=corner_trigger().embed(X_check), ax=sheet()
    )
    Z = X.reshape(len(X), 16).copy()
    Z[y != 2, 15] = 1  # the features are the pixels
    expected = FeatureSpaceDisplay.from_predictions(Z, y, target_class=2, ax=sheet())
    np.testing.assert_allclose(display.points, expected.points, atol=1e-4)
    assert len(display.points_check) == 12 and display.n_others == 0
    assert display.flagged.sum() >= 10
    clean = FeatureSpaceDisplay.from_estimator(guard, X, y, X_check=X_check, ax=sheet())
    assert len(clean.points_check) == 2 and clean.n_others == 10
    assert "10 checked with other labels" in words(clean.ax_).replace("\n", " ")
    other = X_check[:2]  # of class 0
    none = FeatureSpaceDisplay.from_estimator(guard, X, y, X_check=other, ax=sheet())
    assert none.points_check is None and none.n_others == 2


@pytest.mark.parametrize("n_classes, n_entries", [(10, 10), (21, 21), (43, 2)])
def test_many_source_classes_share_one_colour(n_classes, n_entries):
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(3 * n_classes, 5))
    y = np.repeat(np.arange(n_classes), 3)
    ax = sheet((4, 3))
    FeatureSpaceDisplay.from_predictions(Z, y, target_class=4, ax=ax)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == n_entries and texts[0] == "4, clean"
    looks = {
        (tuple(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes())
        for points in ax.collections
    }
    assert len(looks) == n_entries
    check_lettering(ax)


def test_one_feature_or_two_images_make_a_line():
    display = FeatureSpaceDisplay.from_predictions(
        [[0.0], [1.0]], [0, 1], Z_check=[[2.0]], target_class=1, ax=sheet()
    )
    np.testing.assert_allclose(display.points, [[-1, 0], [1, 0]])
    assert "checked (1)" in words(display.ax_)


def test_features_that_say_nothing_are_refused():
    draw = FeatureSpaceDisplay.from_predictions
    with pytest.raises(ValueError, match="all 3 rows of features are the same"):
        draw(np.ones((3, 4)), [0, 1, 1], target_class=0)
    with pytest.raises(ValueError, match="Z contains NaN"):
        draw([[np.nan], [1.0]], [0, 1], target_class=0)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        draw([[0.0], [1.0]], [0], target_class=0)


# ---- SourceConfusionDisplay


def test_cells_count_images_by_true_and_inferred_origin():
    rng = np.random.default_rng(0)
    y_true = rng.choice(["b", "a", "t"], 60)
    y_pred = rng.choice(["a", "t", "b", "c"], 60)
    display = SourceConfusionDisplay.from_predictions(
        y_true, y_pred, target_class="t", labels=["t", "c", "b", "a", "z"], ax=sheet()
    )
    assert display.labels == ["t", "c", "b", "a"]
    for row, column in np.ndindex(4, 4):
        count = 0
        for truth, found in zip(y_true, y_pred, strict=True):
            count += truth == display.labels[row] and found == display.labels[column]
        assert display.confusion[row, column] == count
    assert [int(text.get_text()) for text in display.text_] == (
        display.confusion.ravel().tolist()
    )
    shares = np.asarray(display.im_.get_array())
    np.testing.assert_allclose(shares.sum(axis=1), [1, 0, 1, 1])
    title = display.ax_.get_title(loc="left")
    for name, score in (("TPR", tpr_score), ("FPR", fpr_score), ("SIA", sia_score)):
        assert f"{name} {score(y_true, y_pred, target_class='t'):.1%}" in title
    check_lettering(display.ax_)


def test_only_images_that_the_victim_sends_to_the_target_are_counted(guard, evaluation):
    X, y = evaluation
    display = SourceConfusionDisplay.from_estimator(guard, X, y, ax=sheet())
    assert display.confusion.sum() == len(X) - 3 and display.n_others == 3
    sent = guard.victim_.predict(X) == 2
    expected = sia_score(y[sent], guard.predict(X)[sent], target_class=2)
    assert display.rates["SIA"] == expected
    clean = SourceConfusionDisplay.from_estimator(
        guard, X[y == 2], y[y == 2], ax=sheet()
    )
    assert "TPR -" in clean.ax_.get_title(loc="left")
    nothing = SourceConfusionDisplay.from_estimator(guard, X[:3], y[:3], ax=sheet())
    assert nothing.im_ is None and "None of 3 images" in words(nothing.ax_)


@pytest.mark.parametrize(
    "n_classes, size",
    [
        (1, (4, 3)),
        (2, (6, 5)),
        (12, (4, 3)),
        (20, (6, 5)),
        (21, (6, 5)),
        (300, (4, 3)),
    ],
)
def test_matrices_of_any_size_can_be_read(n_classes, size):
    y = np.repeat(np.arange(n_classes), 2) + 1
    display = SourceConfusionDisplay.from_predictions(
        y, y, target_class=1, ax=sheet(size)
    )
    assert len(display.text_) in ((0,) if n_classes > 20 else (0, n_classes**2))
    assert "1" in [label.get_text() for label in display.ax_.get_yticklabels()]
    check_lettering(display.ax_)


def test_origins_that_are_not_among_the_labels_are_refused():
    with pytest.raises(ValueError, match="labels .*7"):
        SourceConfusionDisplay.from_predictions(
            [0, 7], [0, 1], target_class=0, labels=[0, 1]
        )


# ---- TriggerDisplay


def test_panels_show_the_mask_the_trigger_and_an_image_without_and_with_it(guard):
    X, _ = linear_images()
    X = np.roll(X, 8, axis=0)
    display = TriggerDisplay.from_estimator(guard, X[8 * 2 :], ax=sheet())
    assert len(display.axes_) == 4 and display.label == 2
    mask, alone, clean, stamped = (
        np.asarray(panel.images[0].get_array()) for panel in display.axes_
    )
    expected = np.zeros((4, 4))
    expected[3, 3] = 1
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(alone, 0.5 + 0.5 * expected)
    np.testing.assert_array_equal(clean, display.clean[0])
    np.testing.assert_allclose(stamped, np.where(expected, 1, clean))
    assert display.clean_label != 2 and display.stamped_label == 2
    text = words(display.ax_)
    assert "Trigger to class 2" in text and "with it: called 2" in text
    check_lettering(display.ax_)


def test_an_image_that_the_trigger_moves_is_preferred(guard):
    X, y = linear_images()
    X = np.concatenate([X[y == 2], X[y == 4]])
    display = TriggerDisplay.from_estimator(guard, X, ax=sheet())
    assert display.clean_label == 4


def test_a_guard_shows_its_trigger_as_strong_as_it_embeds_it(searched):
    display = TriggerDisplay.from_estimator(searched, ax=sheet())
    target = searched.target_class_
    assert display.trigger == searched.triggers_[target]
    assert display.trigger != searched.engineer_.trigger_
    other = TriggerDisplay.from_estimator(searched, label=4, ax=sheet())
    assert other.trigger == searched.engineer_.triggers_[4] and other.label == 4
    own = TriggerDisplay.from_estimator(searched.engineer_, ax=sheet())
    assert own.trigger == searched.engineer_.trigger_
    assert len(own.axes_) == 2


def test_embedders_records_and_triggers_can_be_drawn(guard):
    X, y = linear_images()
    embedder = TriggerEmbedder(corner_trigger(), target_class=2).fit(X, y)
    assert TriggerDisplay.from_estimator(embedder, ax=sheet()).label == 2
    search = record(np.ones(6), flagged=[3])
    display = TriggerDisplay.from_estimator(search, X, ax=sheet())
    assert display.label == 3 and display.clean_label is None
    X = (X * 255).astype(np.uint8)
    display = TriggerDisplay.from_trigger(
        corner_trigger(), X, label=2, victim=guard.victim_, ax=sheet()
    )
    assert display.stamped_label == 2
    board = chessboard((3, 8, 8))
    display = TriggerDisplay.from_trigger(board, ax=sheet())
    assert "size of change, 0 to 0.012" in words(display.ax_)
    np.testing.assert_allclose(
        np.asarray(display.axes_[0].images[0].get_array()), board.perturbation[0]
    )


@pytest.mark.parametrize("size", [(4, 3), (9, 3), (3, 6), (2, 2)])
def test_panels_share_any_axes(size, guard):
    X, _ = linear_images()
    ax = sheet(size)
    display = TriggerDisplay.from_estimator(guard, X, ax=ax)
    assert ax.child_axes == display.axes_
    check_lettering(ax)


# ---- all of them


def drawings(guard, ax=None):
    """Return calls that draw each display, from an estimator and from arrays."""
    X, y = linear_images()
    search = record([1, 2, 3, 4, 5, 6], flagged=[2])
    scores = LikelihoodRatioDisplay.from_predictions
    origins = SourceConfusionDisplay.from_predictions
    features = FeatureSpaceDisplay.from_predictions
    Z = X.reshape(len(X), -1)
    return [
        lambda: AnomalyIndexDisplay.from_estimator(search, ax=ax),
        lambda: LikelihoodRatioDisplay.from_estimator(guard, X, y, ax=ax),
        lambda: FeatureSpaceDisplay.from_estimator(guard, X, y, ax=ax),
        lambda: SourceConfusionDisplay.from_estimator(guard, X, y, ax=ax),
        lambda: TriggerDisplay.from_estimator(guard, X, ax=ax),
        lambda: scores(X[:, 0, 0, 0], y, target_class=2, ax=ax),
        lambda: features(Z, y, target_class=2, ax=ax),
        lambda: origins(y, y, target_class=2, ax=ax),
        lambda: TriggerDisplay.from_trigger(corner_trigger(), X, ax=ax),
    ]


def test_without_axes_one_figure_is_opened_and_with_axes_none(guard):
    for draw in drawings(guard):
        display = draw()
        assert plt.get_fignums() == [display.figure_.number]
        assert display.ax_.figure is display.figure_
        assert display.plot() is display
        plt.close("all")
    for number in range(9):
        ax = sheet()
        display = drawings(guard, ax)[number]()
        assert display.ax_ is ax and display.figure_ is ax.figure
        assert display.plot(sheet(), title="").ax_.get_title(loc="left") == ""
    assert plt.get_fignums() == []


def test_without_matplotlib_all_say_what_to_install(guard, monkeypatch):
    calls = drawings(guard)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in calls:
        with pytest.raises(ImportError, match=r"Display.from_\w+ requires matplotlib"):
            draw()


def test_pictures_are_dark_on_white_in_any_style_and_never_given_to_tex(guard):
    for number in range(9):
        with matplotlib.style.context("dark_background"):
            with matplotlib.rc_context({"text.usetex": True}):
                ax = sheet()
                drawings(guard, ax)[number]()
        assert matplotlib.colors.to_hex(ax.get_facecolor()) == "#ffffff"
        assert matplotlib.colors.to_hex(ax.figure.get_facecolor()) == "#ffffff"
        for text in ax.figure.findobj(Text):
            assert not (text.get_usetex() and text.get_text().strip()), text
            if text.get_text().strip() and text.get_visible():
                shade = np.mean(matplotlib.colors.to_rgb(text.get_color()))
                assert shade < 0.65 or text.axes.images, text


@pytest.mark.parametrize(
    "target, size", [("$x^2$", (4, 3)), ("a" * 150, (7, 5)), ("", (4, 3))]
)
def test_hostile_names_are_drawn_as_they_are_and_fit(target, size):
    names = np.array(HOSTILE)
    n_classes = len(names)
    y = names[np.repeat(np.arange(n_classes), 4)]
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(1, 4, 4)).astype(np.float32)
    axes = [sheet(size) for _ in range(5)]
    search = record(
        np.arange(1, n_classes + 1),
        classes_=names,
        target_classes_=np.array([target]),
    )
    AnomalyIndexDisplay.from_estimator(search, ax=axes[0])
    LikelihoodRatioDisplay.from_predictions(
        rng.normal(size=len(y)), y, target_class=target, ax=axes[1]
    )
    FeatureSpaceDisplay.from_predictions(
        rng.normal(size=(len(y), 3)), y, target_class=target, ax=axes[2]
    )
    SourceConfusionDisplay.from_predictions(
        y, rng.permutation(y), target_class=target, ax=axes[3]
    )
    TriggerDisplay(
        trigger=corner_trigger(),
        label=target,
        clean=image,
        clean_label=target,
        stamped_label=target,
    ).plot(axes[4])
    for ax in axes:
        check_lettering(ax)
        for char in words(ax).replace("\n", ""):
            assert unicodedata.category(char)[0] != "C"


@pytest.mark.parametrize(
    "display, with_images",
    [
        (AnomalyIndexDisplay, False),
        (TriggerDisplay, False),
        (LikelihoodRatioDisplay, True),
        (FeatureSpaceDisplay, True),
        (SourceConfusionDisplay, True),
    ],
)
def test_what_is_not_fitted_or_of_another_kind_is_refused(display, with_images, guard):
    images = linear_images() if with_images else ()
    with pytest.raises(NotFittedError):
        display.from_estimator(BackdoorGuard(guard.victim), *images)
    with pytest.raises(TypeError, match="has type VictimNetwork, expected a fitted"):
        display.from_estimator(guard.victim_, *images)


@pytest.mark.parametrize(
    "display", [LikelihoodRatioDisplay, FeatureSpaceDisplay, SourceConfusionDisplay]
)
def test_a_class_that_is_not_defended_is_refused(display, guard, idle):
    X, y = linear_images()
    with pytest.raises(ValueError, match="target_class=17 is not among the classes"):
        display.from_estimator(guard, X, y, target_class=17)
    with pytest.raises(ValueError, match=r"4 is not defended; the guard defends \[2\]"):
        display.from_estimator(guard, X, y, target_class=4)
    with pytest.raises(ValueError, match=r"defends no class .* target_class=\.\.\."):
        display.from_estimator(idle, X, y)


def test_a_class_that_was_not_flagged_has_a_trigger_on_request(idle):
    with pytest.raises(ValueError, match="no target class was flagged.*label="):
        TriggerDisplay.from_estimator(idle)
    assert TriggerDisplay.from_estimator(idle, label=1, ax=sheet()).label == 1


def test_what_was_not_searched_for_cannot_be_compared(guard):
    with pytest.raises(ValueError, match="was given its trigger.* reverse engineer"):
        AnomalyIndexDisplay.from_estimator(guard)
    with pytest.raises(ValueError, match="was given its trigger"):
        TriggerDisplay.from_estimator(guard, label=4)
    search = record(np.ones(6), flagged=[3])
    with pytest.raises(ValueError, match="target_class=9 is not among the classes"):
        TriggerDisplay.from_estimator(search, label=9)
    with pytest.raises(TypeError, match="has type VictimNetwork, expected a trigger"):
        TriggerDisplay.from_trigger(guard.victim_)


# ---- lettering


@pytest.mark.parametrize(
    "name, drawn",
    [
        ("ship", "ship"),
        ("$x^2$", r"\$x^2\$"),
        ("\u4e2d", "□"),
        ("a\u202eb", r"a\u202eb"),
        ("e\u0301", "é"),
        ("a\u0321\u0321", "a"),
    ],
)
def test_names_are_made_legible(name, drawn):
    assert legible(name, 3, 10) == drawn


def test_long_names_are_cut_to_the_room_they_have():
    for room in (0.5, 1, 2):
        cut = legible("w" * 150, room, 10)
        assert cut.endswith("…") and width(cut, 10) < room
        assert width("w" + cut, 10) >= room  # one letter more would not fit
    assert legible("www", 0.01, 10) == "…"


def test_lines_are_wrapped_at_spaces_and_long_words_kept():
    text = "one two three\nfour extraordinarily five"
    lines = wrapped(text, 0.8, 10).split("\n")
    assert " ".join(lines) == text.replace("\n", " ")
    assert all(width(line, 10) <= 0.8 or " " not in line for line in lines)
    assert len(lines) > 3 and wrapped("a b", 9, 10) == "a b"
