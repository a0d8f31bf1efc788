"""Memory that is kept: arrays made again and again take no new pages of the system."""

import subprocess
import sys

import pytest

from experiments.memory import keep_memory

MADE_AGAIN = """
import resource, sys, threading
from experiments.memory import keep_memory
assert keep_memory() or not int(sys.argv[1])
import jax, jax.numpy as jnp
turn = jax.jit(lambda x: jnp.cumsum(jnp.sin(x)[::-1]) * 2)
x = jnp.ones(3_000_000)
found = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    turn(x).block_until_ready()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(found[4:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is the GNU C library's")
def test_arrays_of_a_call_are_not_new_to_the_system():
    done = subprocess.run([sys.executable, "-c", MADE_AGAIN, "1"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # of 3,000 pages or more


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("experiments.memory.ctypes.CDLL", lambda name: object())
    assert not keep_memory()
