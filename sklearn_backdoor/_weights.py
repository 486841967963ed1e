"""The loader under its old name, until the command line uses `io`."""

from sklearn_backdoor import io
from sklearn_backdoor.io import file_digest

__all__ = ["file_digest", "load_network"]


def load_network(factory, weights):
    """Build a network and load its weights, as `io.load_network`."""
    return io.load_network(weights, factory)
