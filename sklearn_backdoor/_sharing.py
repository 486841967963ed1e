"""A network that clones share and pickles carry, and that no parameter resets."""

from abc import ABC, abstractmethod
from typing import Any

from sklearn.base import BaseEstimator, clone

from sklearn_backdoor._exclusive import snapshot
from sklearn_backdoor._forward import module_of


class BaseSharedNetwork(BaseEstimator, ABC):
    """For an estimator with the parameter ``net``, which it may open as ``_opened``."""

    net: Any

    @abstractmethod
    def _open(self):
        """Make what no pickle holds."""

    def __sklearn_clone__(self):
        params = self.get_params(deep=False)
        net = params.pop("net")
        copied = {name: clone(value, safe=False) for name, value in params.items()}
        twin = type(self)(net, **copied)
        if hasattr(self, "_sklearn_output_config"):
            twin._sklearn_output_config = dict(self._sklearn_output_config)
        return twin

    def get_params(self, deep=True):
        """Return the parameters, never those of ``net``."""
        return super().get_params(deep=False)

    def set_params(self, **params):
        """Set parameters; one of ``net`` is refused, since it would lose the weights.

        Raises
        ------
        ValueError
            For a name that starts with ``net__``.
        """
        for name in params:
            if name.startswith("net__"):
                raise ValueError(
                    f"{name} cannot be set: it would initialise the network anew and "
                    "lose its weights. Set net to another trained network instead."
                )
        return super().set_params(**params)

    def __getstate__(self):
        state = dict(super().__getstate__())
        state.pop("net_", None)
        network = module_of(self.net)
        opened = state.get("_opened", network)
        # not the network itself: another thread may be in the middle of a pass
        state["net"], copied = snapshot(opened, network, opened)
        if "_opened" in state:
            state["_opened"] = copied
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if "_opened" in state:
            self._open()
