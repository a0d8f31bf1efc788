"""Sweeps in processes of their own: the records of one process, whoever dies; nobody left behind, nothing twice."""

import errno
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
import sweep_toy

from experiments import directory, run, settings
from slimjax import records
from slimjax.records import read, read_lines

ROOT = Path(__file__).parent.parent
KILLS = 10
ALL = list(range(sweep_toy.UNITS * sweep_toy.CELLS))


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """`sweep(jobs, **wrong)` runs the toy in a directory for that number of jobs; (exit status, directory)."""
    monkeypatch.setitem(settings.EXPERIMENTS, "toy", "sweep_toy")
    config = tmp_path / "a.gin"
    config.write_text("Run.experiment = 'toy'\n")

    def start(jobs, *arguments, **wrong):
        monkeypatch.setenv("SLIMJAX_TOY", json.dumps(wrong))
        out = tmp_path / str(jobs) / "out"
        return run.main([str(config), "--out", str(out), "--jobs", str(jobs), *arguments]), out

    return start


def what(out):
    """The records without what may differ between two runs."""
    return [(dict(r.cell), dict(r.metrics), r.status, r.reason) for r in read(out / "records.jsonl")]


def text(out):
    """The same as bytes on the disk, provenance aside."""
    return [line.partition(', "provenance"')[0] for line in (out / "records.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_records(sweep, tmp_path):
    wrong = {"raise": {"RuntimeError": [1], "MemoryError": [6], "NotImplementedError": [7]}}
    made = {}
    for jobs in (0, 1, 2):
        status, out = sweep(jobs, **wrong)
        assert status == 1
        assert sorted(sweep_toy.seen(out.parent)) == ALL
        made[jobs] = text(out), what(out), (out / "report.html").read_text()
        assert len(read_lines(out / "metrics.jsonl")) == len(ALL)  # whole lines, though several wrote them
        assert json.loads((out / "result.json").read_text())["sweep"]["jobs"] == jobs
    assert made[0] == made[1] == made[2]
    assert [cell["batch"] for cell, *_ in made[2][1]] == ALL  # in the order of the cells
    workers = {line["pid"] for line in read_lines(tmp_path / "2" / "measured.txt")}
    assert len(workers) == 2
    assert os.getpid() not in workers


@pytest.mark.slow
def test_a_process_that_dies_costs_its_cell_and_says_how(sweep, capfd):
    status, out = sweep(2, die={signal.SIGKILL: [1], signal.SIGSEGV: [7]}, unopened=0)
    assert status == 1
    found = {cell["batch"]: (status, reason) for cell, _, status, reason in what(out)}
    killed, crashed = found.pop(1), found.pop(7)
    assert killed == (
        "out-of-memory",
        "its process was ended by SIGKILL, as the system does when memory runs out",
    )
    assert crashed == ("failed", "its process was ended by SIGSEGV")
    assert set(found.values()) == {("ok", "")}
    assert sorted(sweep_toy.seen(out.parent)) == ALL
    opened = [line["open"] for line in read_lines(out.parent / "measured.txt") if "open" in line]
    assert sorted(opened) == ["unit0", "unit0", "unit1", "unit2"]  # after 7 unit1 has nothing left
    assert "2 cells failed" in capfd.readouterr().err


@pytest.mark.slow
def test_a_unit_that_kills_its_process_is_tried_a_few_times(sweep):
    status, out = sweep(1, unopened=signal.SIGKILL)
    assert status == 1
    found = [(status, reason) for _, _, status, reason in what(out)]
    assert found[:4] + found[8:] == [("ok", "")] * 8
    assert {status for status, _ in found[4:8]} == {"out-of-memory"}
    assert found[4][1].endswith("memory runs out, 3 times in a row before its first cell")
    opened = [line["open"] for line in read_lines(out.parent / "measured.txt") if "open" in line]
    assert opened.count("unit1") == 3


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_or_must_be_ends_the_run(sweep, capfd):
    status, out = sweep(1, die={signal.SIGTERM: [5]})
    assert status == 143
    assert "terminated; the same command goes on from here" in capfd.readouterr().err
    status, out = sweep(1, **{"raise": {"Refused": [5]}})
    assert status == 2
    assert capfd.readouterr().err == "error: toy 5\n"
    status, out = sweep(1)
    assert status == 0
    assert sweep_toy.seen(out.parent) == [*ALL[:6], *ALL[5:6], *ALL[5:]]
    assert [cell["batch"] for cell, *_ in what(out)] == ALL


def test_times_are_not_taken_side_by_side(sweep, monkeypatch, capsys):
    monkeypatch.setattr(sweep_toy, "ALONE", True, raising=False)
    assert sweep(2)[0] == 2
    assert "at most --jobs 1" in capsys.readouterr().err


def test_a_run_waits_for_the_workers_of_the_one_before(sweep, monkeypatch, capsys, tmp_path):
    import fcntl

    monkeypatch.setattr(directory, "PATIENCE", 0.2)
    (tmp_path / "0" / "out").mkdir(parents=True)
    with (tmp_path / "0" / "out" / directory.WORKERS).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert sweep(0)[0] == 2
    assert "processes of an earlier run are still at work there" in capsys.readouterr().err
    assert sweep(0)[0] == 0


@pytest.mark.parametrize("jobs", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_full_at_a_record_loses_nothing_written(sweep, monkeypatch, capfd, jobs):
    append = records.append_line

    def full(path, line, **options):
        if path.name != "records.jsonl" or json.loads(line)["cell"]["batch"] != 5:
            return append(path, line, **options)
        with path.open("a") as file:
            file.write(line[: len(line) // 2])  # what there was room for
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(records, "append_line", full)
        status, out = sweep(jobs)
    assert status == 2
    told = capfd.readouterr().err
    assert told.startswith("error: [Errno 28] No space left on device")
    assert told.endswith("that mended, the same command goes on\n")
    assert told.count("\n") == 1
    assert not (out / "result.json").exists()
    kept = text(out)[:-1]
    kept_cells = [cell["batch"] for cell, *_ in what(out)]
    assert kept_cells == ALL[:5]
    assert sweep(jobs) == (0, out)
    assert text(out)[:5] == kept
    assert [(cell["batch"], status) for cell, _, status, _ in what(out)] == [(n, "ok") for n in ALL]
    assert [sweep_toy.seen(out.parent).count(cell) for cell in kept_cells] == [1] * 5  # not measured again


# Killed from outside ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the source, so that an edit during the test does not make it other code."""
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("slimjax", "experiments"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("sweep_toy.py"), folder / "source")
    (folder / "a.gin").write_text("Run.experiment = 'toy'\n")
    return folder


def start(place, out, jobs, slow=0.05):
    """The toy at work in processes of its own, a group that a terminal would signal together."""
    environment = os.environ | {
        "SLIMJAX_TOY": json.dumps({"slow": slow}),
        "PYTHONPATH": str(place / "source"),
        "SLIMJAX_TYPECHECK": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "sweep_toy.py", str(place / "a.gin"), "--out", str(out), "--jobs", str(jobs)]
    return subprocess.Popen(
        command,
        cwd=place / "source",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def recorded(out):
    return len(read_lines(out / "records.jsonl"))


def alive(folder):
    """Processes that a folder's runs have measured in, and that are at work still."""
    pids = {line["pid"] for line in read_lines(folder / "measured.txt")}
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def nobody_left(folder):
    deadline = time.monotonic() + 5
    while (left := alive(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []


@pytest.mark.slow
def test_a_worker_in_the_middle_of_a_long_cell_dies_with_its_parent(place):
    out = place / "long" / "out"
    out.parent.mkdir()
    process, deadline = start(place, out, 1, slow=60), time.monotonic() + 60
    while not sweep_toy.seen(out.parent):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert alive(out.parent)
    process.kill()
    process.wait()  # not for the pipes, which a worker would hold open
    nobody_left(out.parent)
    process.communicate()


@pytest.mark.slow
def test_a_second_process_is_refused_and_disturbs_nothing(place):
    out = place / "two" / "out"
    out.parent.mkdir()
    first, deadline = start(place, out, 0, slow=0.5), time.monotonic() + 60
    while not recorded(out):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = start(place, out, 0)
    _, errors = second.communicate(timeout=60)
    assert (second.returncode, errors) == (2, f"error: {out}: another process is at work on this run\n")
    assert (first.communicate(timeout=60)[1], first.returncode) == ("", 0)
    assert sweep_toy.seen(out.parent) == ALL
    assert [cell["batch"] for cell, *_ in what(out)] == ALL


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [0, 2])
def test_killed_at_random_times_it_ends_as_if_it_never_was(place, jobs):
    out, times, kills = place / f"killed{jobs}" / "out", random.Random(jobs), 0
    out.parent.mkdir()
    while kills < KILLS:
        process, before = start(place, out, jobs), recorded(out)
        deadline, wanted = time.monotonic() + 60, times.choice((0, 0, 1, 1, 2))
        while recorded(out) < before + wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(times.uniform(0, 0.06) if wanted else times.uniform(0.3, 1.5))
        process.kill()
        process.wait()
        nobody_left(out.parent)
        process.communicate()
        if process.returncode == 0:  # it was done before
            shutil.move(out, out.with_name(f"done{kills}"))
            continue
        assert process.returncode == -signal.SIGKILL
        kills += 1
    process = start(place, out, jobs)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert [cell["batch"] for cell, *_ in what(out)] == ALL
    unbroken = place / f"unbroken{jobs}" / "out"
    unbroken.parent.mkdir()
    process = start(place, unbroken, jobs)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    assert text(out) == text(unbroken)
    assert len(sweep_toy.seen(out.parent)) < (KILLS + 1) * len(ALL) / 2  # what was recorded is not done again


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_all_stop_in_one_line(place, number, status):
    out = place / f"stopped{status}" / "out"
    out.parent.mkdir()
    process, deadline = start(place, out, 2), time.monotonic() + 60
    while recorded(out) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.count("\n") == 1
    assert errors.endswith("the same command goes on from here\n")
    assert alive(out.parent) == []
    process = start(place, out, 2)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    assert [cell["batch"] for cell, *_ in what(out)] == ALL
