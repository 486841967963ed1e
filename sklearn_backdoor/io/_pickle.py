"""The pickle of a state dict, followed without running it.

A pickle is a program for a stack machine. This machine knows the few instructions that
torch.save writes for a dict of tensors, and computes with names and numbers only: no
object is made and nothing is imported. It also checks what torch takes on trust: that
storages have the bytes that they claim, and tensors lie within them.

Reference: CPython's Lib/pickletools.py (the instructions), torch/serialization.py and
torch/_utils.py (what torch.save writes).
"""

import math
import pickletools
from typing import NamedTuple

from sklearn_backdoor._text import printable
from sklearn_backdoor.io._errors import UnsafeFileError, damaged, refused

MAX_STEPS = 400_000
_STORAGES = {
    **{"Double": 8, "Long": 8, "ComplexFloat": 8, "Float": 4, "Int": 4, "Half": 2},
    **{"BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1},
}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = {
    *("collections.OrderedDict", "torch.Size", _REBUILD, _PARAMETER),
    *(f"torch.{name}Storage" for name in _STORAGES),
}
_PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT, _GET = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_WHAT = "pickle of a state dict"


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    n_items: int
    item_size: int


class _Opaque(NamedTuple):
    """A thing of which only the kind matters."""

    kind: str


_MARK, _DICT, _LIST = _Opaque("mark"), _Opaque("dict"), _Opaque("list")
_ORDERED, _TENSOR = _Opaque("OrderedDict"), _Opaque("tensor")
_CONSTANTS = {
    **{"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()},
    **{"MARK": _MARK, "EMPTY_DICT": _DICT, "EMPTY_LIST": _LIST},
}


def check_pickle(content, storages, n_bytes, path):
    """Refuse a pickle that is more than a dict of tensors, numbers and text.

    Parameters
    ----------
    content : bytes
    storages : dict of str to int
        Bytes of each storage.
    n_bytes : int
        What the tensors may take, each written out on its own.
    path : path-like
        For messages.

    Raises
    ------
    UnsafeFileError
        If it asks for anything but tensors, holds an instruction that torch.save does
        not write, a tensor reaches past its storage, or tensors share storages so that
        they would grow beyond measure when written out.
    """
    machine, last = _Machine(storages, n_bytes, path), len(content) - 1
    try:
        for number, (code, value, place) in enumerate(pickletools.genops(content)):
            if number > MAX_STEPS:
                raise refused(path, f"holds a pickle of over {MAX_STEPS:,} steps")
            if code.name == "STOP" and place != last:
                raise damaged(path, "something follows its pickle", _WHAT)
            machine.step(code.name, value)
    except UnsafeFileError:
        raise
    except Exception as error:  # a damaged pickle breaks anywhere
        reason = printable(error, 80) or type(error).__name__
        raise damaged(path, f"its pickle is broken ({reason})", _WHAT) from None


class _Machine:
    """The stack machine.

    Parameters
    ----------
    storages : dict of str to int
    n_bytes : int
    path : path-like
    """

    def __init__(self, storages, n_bytes, path):
        self.storages = storages
        self.bytes_left = n_bytes
        self.path = path
        self.stack = []
        self.memo = {}

    def step(self, name, value):
        """Follow one instruction; what torch.save does not write is refused."""
        stack = self.stack
        if name in _PLAIN:
            stack.append(value)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PUT:
            self.memo[value] = stack[-1]
        elif name in _GET:
            stack.append(self.memo[value])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_mark()))
        elif name == "GLOBAL":
            stack.append(self._find(value))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            stack.append(self._call(*self._pop(2)))
        else:
            self._change(name, value)

    def _change(self, name, value):
        """Follow an instruction that puts nothing new on the stack."""
        if name in ("SETITEM", "SETITEMS"):
            self._set(self._pop(2) if name == "SETITEM" else self._pop_mark())
        elif name in ("APPEND", "APPENDS"):
            self._pop(1) if name == "APPEND" else self._pop_mark()
            self._expect(_LIST)
        elif name == "BUILD":
            self._pop(1)
            self._expect(_ORDERED)
        elif name == "STOP":
            self._stop()
        elif (name, value) != ("PROTO", 2):
            raise refused(
                self.path,
                f"holds the pickle instruction {name}, which torch.save does not write "
                "for a state dict",
            )

    def _pop(self, count):
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        popped = self.stack[-count:]
        del self.stack[-count:]
        if any(one is _MARK for one in popped):
            raise ValueError("a mark in place of a value")
        return popped

    def _pop_mark(self):
        popped = []
        while (one := self.stack.pop()) is not _MARK:
            popped.append(one)
        return popped[::-1]

    def _expect(self, *kinds):
        if not any(self.stack[-1] is kind for kind in kinds):
            raise refused(self.path, "fills an object that is no dict or list")

    def _stop(self):
        if len(self.stack) != 1 or self.stack[0] not in (_DICT, _ORDERED):
            what = "a lone tensor" if self.stack == [_TENSOR] else "no dict"
            raise refused(self.path, f"holds {what}, expected a state dict")

    def _set(self, items):
        self._expect(_DICT, _ORDERED)
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key in items[::2]:  # other keys can be made to collide
            if not isinstance(key, str) and not _is_size(key, -(2**63)):
                raise refused(self.path, "holds a dict whose keys are no names")

    def _find(self, value):
        name = value.replace(" ", ".", 1)
        if name in _ALLOWED:
            return _Global(name)
        root = name.partition(".")[0]
        whole = root in ("__torch__", "torchvision", "timm") or ".nn." in name
        what = "a whole network" if whole else "code that is no part of a state dict"
        raise refused(
            self.path, f"holds a pickle that asks for {printable(name, 80)}: {what}"
        )

    def _storage(self, given):
        word, kind, key, place, n_items = given
        size = _STORAGES.get(kind.name.removeprefix("torch.").removesuffix("Storage"))
        if word != "storage" or size is None or not isinstance(place, str):
            raise ValueError("a storage of no known kind")
        if not _is_size(n_items) or self.storages.get(key) != n_items * size:
            raise damaged(
                self.path,
                f"storage {printable(key)} claims {printable(n_items)} numbers of "
                f"{size} bytes and has {self.storages.get(key)} bytes",
                _WHAT,
            )
        return _Storage(n_items, size)

    def _call(self, function, given):
        if not isinstance(given, tuple) or not isinstance(function, _Global):
            raise ValueError("a call of no function")
        if function.name == "collections.OrderedDict" and given == ():
            return _ORDERED
        if function.name == "torch.Size" and all(map(_is_size, *given)):
            return None
        if function.name == _PARAMETER and given[0] is _TENSOR and len(given) == 3:
            return _TENSOR
        if function.name == _REBUILD and len(given) == 6:
            self._check_tensor(*given[:4])
            return _TENSOR
        raise refused(self.path, f"calls {function.name} as torch.save does not")

    def _check_tensor(self, storage, offset, shape, strides):
        sizes = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ValueError("a tensor without storage or strides")
        if len(shape) > 16 or not all(map(_is_size, sizes)):
            raise damaged(self.path, "a tensor has impossible sizes", _WHAT)
        steps = zip(shape, strides, strict=True)
        last = offset + sum((n - 1) * stride for n, stride in steps)
        if math.prod(shape) and last >= storage.n_items:
            raise damaged(self.path, "a tensor reaches past its storage", _WHAT)
        self.bytes_left -= math.prod(shape) * storage.item_size
        if self.bytes_left < 0:
            raise refused(
                self.path, "claims far more numbers in tensors than its size explains"
            )


def _is_size(value, least=0):
    return type(value) is int and least <= value < 2**63
