"""Training in processes of its own, killed, stopped and out of disk: what goes on is the run that was never broken."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import run
from experiments.progress import steps_once
from slimjax import checkpoint
from slimjax.records import read, read_lines
from slimjax.train import state_shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STEPS, EVERY, KILLS = 300, 10, 10
CONFIG = f"""
Run.experiment = 'train'
Data.path = {{path!r}}
Data.held_out_percent = 30.0
Model.layers = 1
Model.width = 8
Model.heads = 2
Train.steps = {STEPS}
Train.warmup = 2
Train.batch = 2
Train.length = 16
Train.log_every = 1
Checkpoint.every = {EVERY}
Checkpoint.keep = 2
Training.held_out_tokens = 32
"""


class Place:
    """A copy of the source (an edit during the test must not make it other code), a config, and runs of it."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("slimjax", "experiments"):
            ignored = shutil.ignore_patterns("__pycache__", "records")
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, " * 40)
        self.config = folder / "a.gin"
        self.config.write_text(CONFIG.format(path=str(folder / "text.txt")))
        (self.variant,) = run.load(self.config).config.variants

    def start(self, out, *arguments, limit=None):
        """A process at work on `out`; limit: kB that a file may grow to."""
        environment = os.environ | {
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            # A limit is on the run's files: a program that compiles slowly beside other work is one more, which jax
            # warns of if it cannot be written.
            "JAX_ENABLE_COMPILATION_CACHE": "true" if limit is None else "false",
            "SLIMJAX_TYPECHECK": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "experiments.run", str(self.config), "--out", str(out), *arguments]
        if limit is not None:
            command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
        return subprocess.Popen(
            command,
            cwd=self.folder / "source",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, out, *arguments, limit=None):
        """(exit status, standard error) of a process that ends by itself."""
        process = self.start(out, *arguments, limit=limit)
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors

    def same(self, out, other):
        """Two finished runs are bit-equal: every step's loss however often taken, parameters, optimizer, record."""
        ours, theirs = read_lines(out / "metrics.jsonl"), read_lines(other / "metrics.jsonl")
        exact = {line["step"]: line["loss"] for line in theirs if "event" not in line}
        assert all(line["loss"] == exact[line["step"]] for line in ours if "event" not in line)
        assert sorted(line["step"] for line in steps_once(ours)) == list(range(1, STEPS + 1)) == sorted(exact)
        leaves = []
        for path in (out, other):
            folder = path / "models" / "default"
            checkpoint.restore(folder, state_shapes(self.variant.model, self.variant.train))
            saved = checkpoint.steps(folder)[STEPS]
            leaves.append(json.loads((saved / "manifest.json").read_text())["leaves"])
        assert leaves[0] == leaves[1]  # digests of params, opt_state, step and loss_sum
        assert {name.split("[")[0].split(".")[1] for name in leaves[0]} >= {"params", "opt_state"}
        (record,), (expected,) = (read(path / "records.jsonl") for path in (out, other))
        assert record.metrics | {"tokens_per_second": 0} == expected.metrics | {"tokens_per_second": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def unbroken(place):
    out = place.folder / "unbroken"
    assert place.finish(out) == (0, "")
    return out


def lines(out):
    return read_lines(out / "metrics.jsonl")


def wait_for_steps(process, out, count):
    """Until the process has reported so many steps of its own."""
    before, deadline = len(lines(out)), time.monotonic() + 60
    while len(lines(out)) < before + count + 1:  # one is the line of the restart
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(process):
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_at_random_times_it_ends_as_if_it_never_was(place, unbroken):
    out, times = place.folder / "killed", random.Random(0)
    for _ in range(2):  # before it has done anything, wherever that is
        process = place.start(out)
        time.sleep(times.uniform(0.5, 3))
        kill(process)
    for _ in range(KILLS):
        process = place.start(out)
        wait_for_steps(process, out, times.randint(1, 25))
        time.sleep(times.uniform(0, 0.02))
        kill(process)
    assert place.finish(out) == (0, "")
    place.same(out, unbroken)

    resumed = [(number, line) for number, line in enumerate(lines(out)) if "event" in line]
    assert len(resumed) >= KILLS
    reached = [lines(out)[number - 1].get("step", 0) if number else 0 for number, _ in resumed]
    for last, (_, line) in zip(reached, resumed, strict=True):
        assert line == {"event": "resume", "model": "default", "step": line["step"]}
        assert 0 <= last - line["step"] <= EVERY  # what a kill costs, a save at work included
    assert resumed[-1][1]["step"] > 0
    taken = len(lines(out)) - len(resumed)
    assert taken <= STEPS + EVERY * len(resumed)
    assert taken < sum(reached) + STEPS  # what starting over each time would have taken


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves_and_goes_on(place, unbroken, number, status):
    out = place.folder / f"stopped{status}"
    process = place.start(out)
    wait_for_steps(process, out, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    stopped = checkpoint.latest_step(out / "models" / "default")
    assert stopped == lines(out)[-1]["step"] < STEPS  # nothing is done twice
    assert place.finish(out) == (0, "")
    assert {"event": "resume", "model": "default", "step": stopped} in lines(out)
    assert len(lines(out)) == STEPS + 1
    place.same(out, unbroken)


def test_told_to_stop_while_it_is_measured_it_goes_on_from_there(place, unbroken):
    """Training is over and saved: nothing of it is done again."""
    out = place.folder / "measured"
    process = place.start(out)
    while checkpoint.latest_step(out / "models" / "default") != STEPS:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.endswith("terminated; the same command goes on from here\n")
    assert "Traceback" not in errors
    before = lines(out)
    assert place.finish(out) == (0, "")
    assert lines(out) == before
    place.same(out, unbroken)


def goes_on_after(place, out, status, errors):
    """The run ended with one line, and all that it had written can be read."""
    assert status == 2, errors
    assert errors.count("error: ") == errors.count("\n") == 1, errors
    assert "that mended, the same command goes on from step" in errors
    before = [line for line in lines(out) if "event" not in line]
    assert 0 < len(before) < STEPS
    folder = out / "models" / "default"
    assert before[-1]["step"] - checkpoint.latest_step(folder) <= EVERY
    checkpoint.restore(folder, state_shapes(place.variant.model, place.variant.train))
    return before


def test_a_quota_on_files_loses_nothing_written(place, unbroken):
    """metrics.jsonl outgrows 55 kB; no file before does."""
    out = place.folder / "quota"
    before = goes_on_after(place, out, *place.finish(out, limit=55))
    assert place.finish(out) == (0, "")
    assert lines(out)[: len(before)] == before
    place.same(out, unbroken)


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_full_disk_loses_nothing_written(place, unbroken, jobs):
    disk = place.folder / f"disk{jobs}"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        out, keep_all = disk / "run", ("--set", "Checkpoint.keep = 1000", "--jobs", str(jobs))
        before = goes_on_after(place, out, *place.finish(out, *keep_all))
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert place.finish(out, *keep_all) == (0, "")
        assert lines(out)[: len(before)] == before
        place.same(out, unbroken)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
