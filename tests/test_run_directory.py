"""A run directory: what it holds, how a run goes on in it, what is refused a place there."""

import errno
import fcntl
import json
from pathlib import Path

import pytest
import sweep_toy

from experiments import directory, run, settings
from slimjax.records import read, read_lines


@pytest.fixture
def toy(monkeypatch):
    """`toy(...)` sets what goes wrong with the experiment 'toy' of tests/sweep_toy.py."""
    monkeypatch.setitem(settings.EXPERIMENTS, "toy", "sweep_toy")

    def behave(**wrong):
        monkeypatch.setenv("SLIMJAX_TOY", json.dumps(wrong))

    behave()
    return behave


@pytest.fixture
def launch(toy, tmp_path):
    """Runs the toy in one directory."""
    path = tmp_path / "a.gin"
    path.write_text("Run.experiment = 'toy'")

    def start(*arguments: str) -> int:
        return run.main([str(path), "--out", str(tmp_path / "out"), *arguments])

    return start


ALL = list(range(12))


def test_a_run_directory_holds_what_made_it(launch, tmp_path, capsys):
    assert launch("--set", "Train.steps = 77") == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.endswith(f"report: {out / 'report.html'}\n")
    assert "Train.steps = 77" in (out / "config.gin").read_text()
    assert "Train.batch = 16" in (out / "operative.gin").read_text()
    resolved = json.loads((out / "resolved.json").read_text())
    assert resolved["config"]["steps"] == 77
    result = json.loads((out / "result.json").read_text())
    assert result["cells"] == {"ok": 12, "refused": 0, "failed": 0, "out-of-memory": 0}
    assert result["sweep"].keys() == {"cells", "seconds", "cells_per_minute", "compile_seconds", "jobs"}
    assert run.load(out / "config.gin").run == result["run"]
    stamp = json.loads((out / "stamp.json").read_text())
    assert stamp["source"] == directory.source_hash()
    assert stamp["versions"].keys() == {"python", "jax", "jaxlib", "flax", "numpy"}
    assert (result["source"], result["versions"]) == (stamp["source"], stamp["versions"])
    assert {record.provenance["source"] for record in read(out / "records.jsonl")} == {stamp["source"]}


def test_a_finished_run_is_only_reported(launch, tmp_path, capsys):
    assert [launch(), launch()] == [0, 0]
    assert sweep_toy.seen(tmp_path) == ALL
    assert "nothing to do" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(launch, toy, tmp_path, capsys):
    toy(**{"raise": {"KeyboardInterrupt": [6]}})
    assert launch() == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()
    assert (tmp_path / "out" / "report.html").read_text() == str(ALL[:4])  # of a half-finished run
    toy()
    assert launch() == 0
    assert sweep_toy.seen(tmp_path) == [*ALL[:6], *ALL[6:7], *ALL[6:]]
    assert (tmp_path / "out" / "report.html").read_text() == str(ALL)


def test_what_can_be_mended_ends_the_run_and_is_no_row(launch, toy, tmp_path, capsys):
    toy(**{"raise": {"Refused": [6]}})
    assert launch() == 2
    assert capsys.readouterr().err == "error: toy 6\n"
    toy()
    assert launch() == 0
    assert {record.status for record in read(tmp_path / "out" / "records.jsonl")} == {"ok"}


def test_no_resume_starts_again_and_keeps_the_old(launch, tmp_path):
    assert [launch(), launch("--no-resume")] == [0, 0]
    assert sweep_toy.seen(tmp_path) == ALL * 2
    assert (tmp_path / "out~1" / "result.json").exists()
    assert (tmp_path / "out" / "result.json").exists()


@pytest.fixture
def other_code(launch, toy, tmp_path, monkeypatch):
    """`other_code(finished=...)` leaves a run of other code, and this code to go on with it."""

    def leave(*, finished):
        with monkeypatch.context() as patch:
            patch.setattr(directory, "source_hash", lambda: "of other code")
            toy(**({} if finished else {"raise": {"KeyboardInterrupt": [6]}}))
            launch()
        toy()
        return sweep_toy.seen(tmp_path)

    return leave


@pytest.mark.parametrize("finished", [True, False])
def test_results_of_other_code_are_not_reused(other_code, launch, tmp_path, finished):
    before = other_code(finished=finished)
    assert launch() == 0
    assert sweep_toy.seen(tmp_path) == before + ALL
    assert (tmp_path / "out~1" / "records.jsonl").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_reuse_goes_on_with_results_of_other_code_and_says_so(other_code, launch, tmp_path, finished, capsys):
    before = other_code(finished=finished)
    out = tmp_path / "out"
    (out / "report.html").unlink()
    assert launch("--reuse") == 0
    assert sweep_toy.seen(tmp_path) == before + ([] if finished else ALL[6:])
    assert (
        "goes on with what other code or versions made there: source of other code" in capsys.readouterr().out
    )
    assert not (tmp_path / "out~1").exists()
    assert (out / "report.html").read_text() == str(ALL)
    stamp, result = (json.loads((out / name).read_text()) for name in ("stamp.json", "result.json"))
    assert stamp["source"] == directory.source_hash()
    assert stamp["reused"] == result["reused"]
    assert result["source"] == stamp["source"]
    assert [other["source"] for other in result["reused"]] == ["of other code"]
    assert result["reused"][0]["versions"] == stamp["versions"]
    sources = [record.provenance["source"] for record in read(out / "records.jsonl")]
    assert sources == ["of other code"] * len(set(before) - {6} if not finished else ALL) + (
        [] if finished else [stamp["source"]] * 6
    )
    assert launch() == 0  # accepted once, it is this run
    assert "nothing to do" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text()) == result


def test_failed_cells_are_rows_and_the_exit_status(launch, toy, tmp_path, capsys):
    toy(**{"raise": {"RuntimeError": [1], "MemoryError": [2], "NotImplementedError": [3]}})
    assert launch() == 1
    assert sweep_toy.seen(tmp_path) == ALL
    assert "2 cells failed" in capsys.readouterr().err
    found = {r.cell["batch"]: (r.status, r.reason) for r in read(tmp_path / "out" / "records.jsonl")}
    assert found[1] == ("failed", "RuntimeError: toy 1")
    assert found[2] == ("out-of-memory", "MemoryError: toy 2")
    assert found[3] == ("refused", "toy 3")
    assert found[4] == ("ok", "")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("Traceback") == 2
    assert launch() == 1  # a finished run is as bad as it was


def test_what_failed_is_measured_again_when_asked_and_says_so(launch, toy, tmp_path, capsys):
    out = tmp_path / "out"
    toy(**{"raise": {"RuntimeError": [1], "MemoryError": [2, 5], "NotImplementedError": [3], "Refused": [9]}})
    assert launch() == 2
    toy(**{"raise": {"MemoryError": [5]}})
    assert launch("--retry") == 1  # half-finished
    assert "3 cells that failed before are measured again" in capsys.readouterr().out
    assert sweep_toy.seen(tmp_path) == [*ALL[:10], 1, 2, 5, 9, 10, 11]
    assert [r.cell["batch"] for r in read(out / "records.jsonl")] == ALL
    assert json.loads((out / "result.json").read_text())["retried"] == 3
    toy()
    assert launch() == 1  # not asked
    assert launch("--retry") == 0  # finished
    output = capsys.readouterr()
    assert "1 cell that failed before is measured again" in output.out
    assert "1 cell failed, see" in output.err
    found = {record.cell["batch"]: record for record in read(out / "records.jsonl")}
    assert {record.status for record in found.values()} == {"ok", "refused"}
    before = [(row["status"], row["reason"]) for row in found[5].provenance["retried"]]
    assert before == [("out-of-memory", "MemoryError: toy 5")] * 2
    assert found[1].provenance["retried"][0]["reason"] == "RuntimeError: toy 1"
    assert "retried" not in found[3].provenance
    assert len(read_lines(out / "retried.jsonl")) == 4
    assert json.loads((out / "result.json").read_text())["cells"]["failed"] == 0
    assert launch("--retry") == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["prepare", "measure"])
def test_a_reader_that_leaves_costs_no_cell(launch, monkeypatch, tmp_path, capfd, place):
    def closed(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_toy, "prepare", closed if place == "prepare" else lambda *_: closed)
        assert launch() == 141
    assert capfd.readouterr().err == "standard output was closed; the same command goes on from here\n"
    assert read(tmp_path / "out" / "records.jsonl") == []
    assert launch() == 0


def test_to_retry_and_to_start_over_are_not_asked_together(launch, capsys):
    with pytest.raises(SystemExit):
        launch("--retry", "--no-resume")
    assert "--no-resume starts over" in capsys.readouterr().err


def test_results_of_another_text_are_not_reused(launch, tmp_path, monkeypatch, capsys):
    digests = {"text corpus": "one"}
    monkeypatch.setattr(sweep_toy, "check", lambda config: digests, raising=False)
    assert launch() == 0
    records = read(tmp_path / "out" / "records.jsonl")
    assert [dict(record.provenance["inputs"]) for record in records] == [{"text corpus": "one"}] * 12
    assert json.loads((tmp_path / "out" / "stamp.json").read_text())["inputs"] == {"text corpus": "one"}
    digests["text corpus"] = "two"
    assert launch() == 0
    assert "(another text corpus made it; --reuse goes on with it)" in capsys.readouterr().out
    assert sweep_toy.seen(tmp_path) == ALL * 2
    digests["text corpus"] = "three"
    assert launch("--reuse") == 0
    assert sweep_toy.seen(tmp_path) == ALL * 2
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [other["inputs"] for other in result["reused"]] == [{"text corpus": "two"}]


def test_a_unit_that_cannot_be_opened_is_a_row_for_each_of_its_cells(launch, monkeypatch, tmp_path):
    def prepare(unit, config, place, before=sweep_toy.prepare):
        if unit.data == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
        return before(unit, config, place)

    monkeypatch.setattr(sweep_toy, "prepare", prepare)
    assert launch() == 1
    assert sweep_toy.seen(tmp_path) == [*ALL[:4], *ALL[8:]]
    statuses = [record.status for record in read(tmp_path / "out" / "records.jsonl")]
    assert statuses == ["ok"] * 4 + ["out-of-memory"] * 4 + ["ok"] * 4


def test_a_run_killed_as_it_began_goes_on(launch, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "stamp.part").write_text('{"run": ')
    assert launch() == 0
    assert not (out / "stamp.part").exists()


@pytest.mark.parametrize("name", ["stamp.json", "config.gin"])
def test_a_disk_full_as_it_begins_leaves_what_was_there(launch, tmp_path, monkeypatch, capsys, name):
    out = tmp_path / "out"
    if name == "config.gin":
        assert launch() == 0
        (out / name).write_text("# as it was\n")
    replace = Path.replace

    def full(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert launch() == 2
    assert "the same command goes on" in capsys.readouterr().err
    assert list(out.glob("*.part")) == []
    if name == "config.gin":
        assert (out / name).read_text() == "# as it was\n"
    assert launch() == 0
    assert "Run.experiment = 'toy'" in (out / "config.gin").read_text()


def test_a_run_killed_as_it_was_moved_aside_is_still_one(launch, tmp_path, monkeypatch):
    """Its stamp goes last, in whatever order the folder is read."""
    assert launch() == 0
    moved = []

    def killed(self, target, before=Path.rename):
        before(self, target)
        moved.append(self.name)
        if len(moved) == 3:
            raise KeyboardInterrupt

    def read(self, before=Path.iterdir):
        return sorted(before(self), key=lambda child: child.name != "stamp.json")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(Path, "iterdir", read)
        assert launch("--no-resume") == 130
    assert launch("--no-resume") == 0


@pytest.mark.parametrize("stamp", ["", "{", "[]", '"run"', '{"run": "a"}', "\x00"])
def test_a_damaged_stamp_is_one_line(launch, tmp_path, capsys, stamp):
    assert launch() == 0
    capsys.readouterr()
    (tmp_path / "out" / "stamp.json").write_text(stamp)
    assert launch() == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'out' / 'stamp.json'}: damaged")
    assert err.count("\n") == 1


@pytest.mark.parametrize("place", ["a_file/out", "a_file/deep/out", "x" * 300, "unwritable"])
def test_a_place_that_can_hold_no_run_is_one_line(launch, tmp_path, capsys, monkeypatch, place):
    (tmp_path / "a_file").write_text("")
    mkdir = Path.mkdir

    def denied(self, *arguments, **options):
        if self.name == "unwritable":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", denied)
    assert launch("--out", str(tmp_path / place)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / place}: cannot hold a run: ")
    assert err.count("\n") == 1


def test_a_foreign_directory_is_left_alone(launch, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert launch() == 2
    assert "not a run directory" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_a_directory_of_another_run_is_left_alone(launch, capsys):
    assert launch() == 0
    assert launch("--set", "Train.seed = 5") == 2
    assert "holds run" in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(launch, tmp_path, capsys):
    assert launch() == 0
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert launch("--no-resume") == 2
    assert "another process is at work" in capsys.readouterr().err


def test_the_source_hash_covers_every_python_file(monkeypatch):
    read = Path.read_bytes
    before = directory.source_hash()
    for name in ("slimjax/records.py", "experiments/run.py", "slimjax/attention/reference.py"):
        monkeypatch.setattr(
            Path, "read_bytes", lambda self, name=name: read(self) + b"#" * self.as_posix().endswith(name)
        )
        assert directory.source_hash() != before
    monkeypatch.setattr(Path, "read_bytes", read)
    assert directory.source_hash() == before


def test_a_folder_of_something_else_is_left_as_it_was(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    code = run.main(["configs/quickstart.gin", "--out", str(tmp_path)])
    assert code == 2
    assert "not a run directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert run.main(["configs/quickstart.gin", "--out", str(tmp_path / "thesis.tex")]) == 2
