"""Files of weights that are hostile until shown otherwise.

The architecture is code that the user trusts; the weights are evidence. Nothing is
unpickled in this process, and nothing is assigned before it was compared.
"""

from sklearn_backdoor.io._architectures import architecture_names
from sklearn_backdoor.io._convert import convert
from sklearn_backdoor.io._errors import UnsafeFileError
from sklearn_backdoor.io._files import file_digest
from sklearn_backdoor.io._load import load_network

__all__ = [
    "UnsafeFileError",
    "architecture_names",
    "convert",
    "file_digest",
    "load_network",
]
