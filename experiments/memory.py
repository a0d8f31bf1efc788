"""Memory that a process has once had is kept for its next arrays: the system would clear every page of it anew.

XLA asks the C library for the buffers of every call, and that gives larger ones back to the system as soon as they
are free. Clearing their pages at the next call took a third of the time of models of a hundred million parameters.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator

# Of malloc.h: one heap for all threads, as those of further threads are given back; no array by mmap, which is; and
# nothing at the heap's end is. It grows by 64 MB at a time.
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -8, -4, -1, -2
KEPT = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, 64 << 20))
# The same as the C library reads it when a process starts.
INHERITED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def keep_memory() -> bool:
    """Give no memory back before the process ends; False where the C library cannot be told, other than GNU's.

    Called before other threads have memory of their own, which stays as it was.
    """
    try:
        settle = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, no C library by that name (Windows)
        return False
    return all(settle(name, value) for name, value in KEPT)


@contextlib.contextmanager
def kept_by_children() -> Iterator[None]:
    """Processes that are started here keep their memory from the start, whichever threads they begin with.

    What the environment says already stays.
    """
    fresh = {name: value for name, value in INHERITED.items() if name not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for name in fresh:
            os.environ.pop(name, None)
