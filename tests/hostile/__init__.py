"""Files of weights that are hostile or broken, each made in a folder of its own."""

from tests.hostile import archives, others, pickles, tensors
from tests.hostile.making import CASES, IN_CHILD

__all__ = ["CASES", "IN_CHILD", "archives", "others", "pickles", "tensors"]
