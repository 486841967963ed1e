import copy
import dataclasses
from functools import cache

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator

from sklearn_backdoor import (
    AutoReverseEngineer,
    NCReverseEngineer,
    VictimNetwork,
)
from sklearn_backdoor.reverse import SearchRecord
from tests.common import LinearNetwork, linear_images

FIGURES = (
    "classes_",
    "triggers_",
    "norms_",
    "success_rates_",
    "converged_",
    "reasons_",
    "anomaly_indices_",
    "p_values_",
    "target_classes_",
    "target_class_",
    "trigger_",
    "verdict_",
    "n_image_passes_",
    "image_shape_",
)


@cache
def search(name="auto"):
    victim = VictimNetwork(LinearNetwork().eval())
    patch = NCReverseEngineer(victim, schedule="exhaustive", max_steps=6)
    fast = NCReverseEngineer(victim, max_steps=2)
    engineer = {
        "auto": AutoReverseEngineer(
            victim, engineers=[("exhaustive", patch), ("fast", fast)]
        ),
        "patch": patch,
        "strict": NCReverseEngineer(victim, threshold=1e6, max_steps=2),
        "fast": fast,
    }[name]
    return engineer.fit(*linear_images(5))


@pytest.mark.parametrize("name", ["auto", "patch", "strict"])
def test_a_record_says_what_the_engineer_says(name):
    engineer = search(name)
    record = SearchRecord.from_engineer(engineer)
    assert record.method == type(engineer).__name__
    for figure in FIGURES:
        of_record, of_engineer = getattr(record, figure), getattr(engineer, figure)
        if isinstance(of_engineer, list):
            of_engineer = tuple(of_engineer)
        np.testing.assert_equal(of_record, of_engineer)


def test_a_record_of_several_searches_keeps_their_table():
    record = SearchRecord.from_engineer(search())
    pd.testing.assert_frame_equal(record.report_, search().report_)
    assert record.methods_ == tuple(search().methods_)
    alone = SearchRecord.from_engineer(search("patch"))
    assert alone.report_ is None and alone.methods_ is None


@pytest.mark.parametrize(
    "name, alpha, threshold",
    [
        ("auto", 0.05, None),
        ("patch", None, 2.0),
        ("strict", None, 1e6),
        ("fast", 0.05, None),
    ],
)
def test_a_record_names_the_limit_that_flagged(name, alpha, threshold):
    record = SearchRecord.from_engineer(search(name))
    assert (record.alpha, record.threshold) == (alpha, threshold)


def test_a_record_cannot_be_altered_and_does_not_follow_its_engineer():
    engineer = copy.deepcopy(search("patch"))
    record = SearchRecord.from_engineer(engineer)
    norm = record.norms_[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.verdict_ = "nothing found"
    with pytest.raises(ValueError, match="read-only"):
        record.norms_[0] = 0
    engineer.norms_[0] = -1
    assert record.norms_[0] == norm


def test_frozen_engineers_and_records_are_taken_as_they_are():
    record = SearchRecord.from_engineer(FrozenEstimator(search("patch")))
    assert record.method == "NCReverseEngineer"
    assert SearchRecord.from_engineer(record) is record


def test_an_unfitted_engineer_has_no_record():
    with pytest.raises(NotFittedError):
        SearchRecord.from_engineer(NCReverseEngineer(VictimNetwork(LinearNetwork())))


def test_the_first_class_flagged_is_the_target_and_its_trigger_the_trigger():
    record = SearchRecord.from_engineer(search("patch"))
    flagged = dataclasses.replace(record, target_classes_=np.array([4, 2]))
    assert flagged.target_class_ == 4 and flagged.trigger_ is record.triggers_[4]
    assert "target_classes_=[4, 2]" in repr(flagged)
    assert copy.deepcopy(flagged) is flagged
