"""Reverse engineers: find the target class and estimate its trigger."""

from sklearn_backdoor.reverse._additive import AdditiveReverseEngineer
from sklearn_backdoor.reverse._auto import AutoReverseEngineer
from sklearn_backdoor.reverse._neural_cleanse import NCReverseEngineer

__all__ = ["AdditiveReverseEngineer", "AutoReverseEngineer", "NCReverseEngineer"]
