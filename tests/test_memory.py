"""Memory that is kept: arrays made again and again take no new pages of the system."""

import os
import subprocess
import sys

import pytest

from experiments.memory import keep_memory, kept_by_children

MADE_AGAIN = """
import resource, sys, threading, time
from experiments.memory import keep_memory
if sys.argv[1] == "here":
    assert keep_memory()
else:  # whose memory is its own, unless the process was started otherwise
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
import jax, jax.numpy as jnp
turn = jax.jit(lambda x: jnp.cumsum(jnp.sin(x)[::-1]) * 2)
x = jnp.ones(3_000_000)
found = []
for _ in range(24):  # the heap grows for some ten of them, until arrays have places that small ones leave alone
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    turn(x).block_until_ready()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(found[12:])[6])
"""


def pages(how):
    command = [sys.executable, "-c", MADE_AGAIN, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is the GNU C library's")
def test_arrays_of_a_call_are_not_new_to_the_system():
    assert pages("here") < 100  # of 3,000 pages or more


@pytest.mark.skipif(sys.platform != "linux", reason="the variables are the GNU C library's")
def test_a_process_can_be_started_so_whatever_its_threads(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", str(32 << 20))
    with kept_by_children():
        assert os.environ["MALLOC_TOP_PAD_"] == str(32 << 20)  # as was said
        assert pages("started") < 100
    assert "MALLOC_ARENA_MAX" not in os.environ
    assert pages("started") > 1000


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("experiments.memory.ctypes.CDLL", lambda name: object())
    assert not keep_memory()
