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


def run_threaded(file, names, count):
    """The tests of a file with these names in a process of enough threads, in which ``count`` have to pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k"]
    enough = os.environ | {"NPROC": str(mosaic.THREADS)}
    done = subprocess.run(
        [*command, " or ".join(names), file],
        check=False,
        env=enough,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(rf"\b{count} passed", done.stdout), done.stdout[-400:]
