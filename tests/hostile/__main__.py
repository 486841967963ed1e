"""Load files in one process: ``python -m tests.hostile ORDER.json``.

Prints how each was refused, what it took, and the peaks of memory.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

from sklearn_backdoor.io import load_network


def load_all(paths):
    """Load files by name; return how each was refused, and what all took."""
    found = {}
    for name, path in paths.items():
        start, used = time.perf_counter(), cpu_seconds()
        try:
            load_network(path, "tests.common:LinearNetwork")
            said = ["nothing", ""]
        except Exception as error:
            kinds = [one.__name__ for one in type(error).__mro__]
            said = [kinds, str(error)]
        seconds = time.perf_counter() - start
        found[name] = [*said, seconds, cpu_seconds() - used]
    in_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"found": found, "peaks": [peak_memory(), in_child]}


def peak_memory():
    """Return this process's peak in bytes; rusage would count its parent's, too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")
        )
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cpu_seconds():
    """Return what this process and its ended children took."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    json.dump(load_all(json.loads(Path(sys.argv[1]).read_text())), sys.stdout)
