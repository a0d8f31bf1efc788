"""How cells are dealt to processes, and processes to cores; tests/test_sweep.py runs them."""

import os
import subprocess
import sys

import pytest

from experiments.settings import Unit
from experiments.worker import _on_cores, shared_out

CELLS = tuple({"batch": index} for index in range(5))


def test_a_divisible_unit_is_dealt_to_all_and_another_is_left_whole():
    unit = Unit("one", CELLS, "data", divisible=True)
    parts = shared_out(unit, 2)
    assert [[cell["batch"] for cell in part.cells] for part in parts] == [[0, 2, 4], [1, 3]]
    assert all((part.name, part.data) == ("one", "data") for part in parts)
    assert [len(part.cells) for part in shared_out(unit, 8)] == [1] * 5
    assert shared_out(unit, 1) == [unit]
    whole = Unit("one", CELLS)
    assert shared_out(whole, 2) == [whole]


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system does not bind processes to cores"
)
def test_what_starts_on_its_cores_has_a_share_of_them():
    cores = sorted(os.sched_getaffinity(0))

    def seen(place, of):
        with _on_cores(place, of):
            code = "import os; print(*sorted(os.sched_getaffinity(0)))"
            found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert sorted(os.sched_getaffinity(0)) == cores
        return [int(core) for core in found.stdout.split()]

    parts = [seen(place, len(cores)) for place in range(len(cores))]
    assert sorted(core for part in parts for core in part) == cores
    assert all(len(part) == 1 for part in parts)
    assert seen(0, 1) == seen(0, len(cores) + 1) == cores
