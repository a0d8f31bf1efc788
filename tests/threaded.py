"""Tests whose interpreted kernels' warpgroups wait for each other in threads of XLA, which has as many as cores."""

import os
import re
import subprocess
import sys

import pytest

from slimjax.kernels.gpu import mosaic

ENOUGH = mosaic.threads() >= mosaic.THREADS
threaded = pytest.mark.skipif(not ENOUGH, reason="run by a test of this file, in a process of enough threads")
alone = pytest.mark.skipif(ENOUGH, reason="this is that process")


def run_threaded(request, names, count):
    """The tests of a file with these names in a process of enough threads; of all cases ``count`` have to pass."""
    cases = request.config.getoption("--cases")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-k",
        " or ".join(names),
    ]
    sample = [] if cases is None else ["--cases", str(cases)]
    enough = os.environ | {"NPROC": str(mosaic.THREADS)}
    done = subprocess.run(
        [*command, *sample, str(request.path)],
        check=False,
        env=enough,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-400:]
    assert int(passed[1]) == count if cases is None else int(passed[1]) >= len(names)
