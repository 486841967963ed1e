"""Read a state dict that passed the look at its outside; run as a process of its own.

This file is started by its path and imports nothing of the package. Its input is the
file, its argument the limits, its output one JSON object; what crashes, hangs or wants
too much here costs nobody anything.
"""

import json
import sys

try:
    import resource
except ImportError:  # not on Windows: there the parent's clock is the only limit
    resource = None  # type: ignore[assignment]

_MOST_NAMED = 20


class _Refused(ValueError):
    """What the parent says of the file."""


def main():
    """Write the one dict of tensors to a safetensors file, and say what was left out.

    The JSON object has ``refused`` (a reason), or ``wrapper`` (a name or None) and
    ``ignored``, ``tied``, ``not_finite``: the first few names, and their count.
    """
    order = json.loads(sys.argv[1])
    sys.path.extend(order["packages"])
    import torch
    from safetensors.torch import save_file

    print("ready", flush=True)  # before the limits, which may end it at once
    _limit(order)
    try:
        with open(0, "rb", closefd=False) as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
        state, about = _choose(found)
        _check(state, order["n_bytes"])
        state = _separate(state, about)
        about["not_finite"] = [
            name
            for name, value in state.items()
            if (value.is_floating_point() or value.is_complex())
            and not value.isfinite().all()
        ]
        save_file(state, order["out"])
    except _Refused as error:
        about = {"refused": str(error)}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        about = {"refused": "needs far more memory than its size explains"}
    print(json.dumps({key: _brief(value) for key, value in about.items()}))


def _limit(order):
    """Bound memory, time and files; the import before has trusted code only."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + order["cpu_seconds"])
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: order["n_bytes"],
        resource.RLIMIT_CORE: 0,
    }
    try:
        with open("/proc/self/statm") as file:  # torch's libraries take gigabytes
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = mapped + order["memory"]
    except OSError:  # macOS, which does not hold this limit either
        pass
    for what, most in limits.items():
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(what, (most, most))


def _choose(found):
    """Return the one dict of tensors, and what was left out."""
    import torch

    if not isinstance(found, dict):
        raise _Refused(f"holds {type(found).__name__}, expected a state dict")
    groups = {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, dict) and _tensors(value)
    }
    own = _tensors(found)
    if groups and all(value.ndim == 0 for value in own.values()):
        own = {}  # a best accuracy, beside the state dict
    wrapper, state, beside = None, own, []
    if not own:
        if len(groups) != 1:
            names = ", ".join(repr(name[:40]) for name in list(groups)[:5])
            raise _Refused(
                f"holds several state dicts: {names}" if groups else "holds no tensors"
            )
        wrapper = next(iter(groups))
        state = _tensors(groups[wrapper])
        beside = [name for name in groups[wrapper] if name not in state]
    ignored = [*beside, *(name for name in found if name not in (wrapper, *own))]
    wrong = [name for name, value in state.items() if value.layout != torch.strided]
    if wrong or any(value.is_quantized for value in state.values()):
        raise _Refused("holds sparse or quantised tensors, expected dense ones")
    return state, {"wrapper": wrapper, "ignored": list(map(str, ignored)), "tied": []}


def _tensors(values):
    import torch

    return {
        name: value.detach()
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }


def _check(state, n_bytes):
    """Refuse what would grow when views are written out, before any is."""
    total = sum(value.numel() * value.element_size() for value in state.values())
    if total > n_bytes:
        raise _Refused(
            f"claims tensors of {total:,} bytes, far more than its size explains"
        )


def _separate(state, about):
    """Give each tensor its own contiguous memory."""
    seen: dict = {}
    separate = {}
    for name, value in state.items():
        storage = value.untyped_storage()
        if storage.nbytes():
            first = seen.setdefault(storage.data_ptr(), name)
            if first != name:
                about["tied"].append(name)
                value = value.clone()
        separate[name] = value.contiguous()
    return separate


def _brief(value):
    if isinstance(value, list):
        named = [one[:200] for one in value[:_MOST_NAMED]]
        return {"names": named, "count": len(value)}
    return value[:200] if isinstance(value, str) else value


if __name__ == "__main__":
    main()
