"""Reverse engineers: find the target class and estimate its trigger."""

from sklearn_backdoor.reverse._additive import AdditiveReverseEngineer
from sklearn_backdoor.reverse._auto import AutoReverseEngineer, default_engineers
from sklearn_backdoor.reverse._b3d import B3DReverseEngineer
from sklearn_backdoor.reverse._batch_norm import BatchNormReverseEngineer
from sklearn_backdoor.reverse._neural_cleanse import NCReverseEngineer
from sklearn_backdoor.reverse._neurons import NeuronReverseEngineer
from sklearn_backdoor.reverse._record import SearchRecord
from sklearn_backdoor.reverse._tabor import TABORReverseEngineer
from sklearn_backdoor.reverse._weights import WeightReverseEngineer

__all__ = [
    "AdditiveReverseEngineer",
    "AutoReverseEngineer",
    "B3DReverseEngineer",
    "BatchNormReverseEngineer",
    "NCReverseEngineer",
    "NeuronReverseEngineer",
    "SearchRecord",
    "TABORReverseEngineer",
    "WeightReverseEngineer",
    "default_engineers",
]
