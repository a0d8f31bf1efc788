"""The way in: every mistake in a config is one line before anything runs; a run is done once and goes on."""

import fcntl
import json
from pathlib import Path

import pytest
import sweep_toy

from experiments import directory, run, settings
from experiments.settings import Unit
from slimjax.records import read

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toy(monkeypatch):
    """`toy(...)` sets what goes wrong with the experiment 'toy' of tests/sweep_toy.py."""
    monkeypatch.setitem(settings.EXPERIMENTS, "toy", "sweep_toy")

    def behave(**wrong):
        monkeypatch.setenv("SLIMJAX_TOY", json.dumps(wrong))

    behave()
    return behave


@pytest.fixture
def config(tmp_path):
    """Writes a config into a folder of its own, beside a secret that no config may reach."""
    (tmp_path / "secret.gin").write_text("Model.layers = 1\n")
    folder = tmp_path / "configs"
    folder.mkdir()

    def write(text: str, name: str = "a.gin") -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def refused(capsys, *argv: str | Path) -> str:
    """The one line that a wrong command ends with."""
    assert run.main([str(part) for part in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("\nModel.layerz = 4", ":2:", "unknown field Model.layerz; did you mean 'layers'?"),
        ("Modle.layers = 4", ":1:", "unknown section 'Modle'; did you mean 'Model'?"),
        ("slimjax.Model.layers = 4", ":1:", "unknown section"),
        ("Model.layers = '4'", ":1:", "layers = '4': expected int, got str"),
        ("Model:\n  heads = 2\n  layers = 4.0", ":3:", "expected int, got float"),
        ("Train.learning_rate = -1", ":1:", "expected a finite number > 0.0"),
        ("Model.heads = 3", ":1:", "width = 128 is not a multiple of heads = 3"),
        ("Train.seed = 1\nTrain.warmup = 9999", ":2:", "longer than steps"),
        ("Equivalence.schemes = ('kv:bf61',)", ":1:", "did you mean 'bf16'?"),
        ("Equivalence.schemes = ['kv:bf16']", ":1:", "expected a tuple"),
        ("Run.experiment = 'quickstrat'", ":1:", "did you mean 'quickstart'?"),
        ("Quickstart.models = ('a/b',)", ":1:", "expected distinct names"),
        ("Model.layers = 1\nModel.layers = 2", ":2:", "Model.layers is bound twice"),
        ("orthogonal/Model.layers = 2", ":1:", "orthogonal/Model.layers is bound but never used"),
        ("default/Model.layers = 2\nModel.layers = 3", ":2:", "Model.layers is bound but never used"),
        (
            "Quickstart.models = ('orthogonal',)\northgonal/Model.layers = 2",
            ":2:",
            "never used; did you mean 'orthogonal'?",
        ),
        ("steps = 3", ":1:", "steps is bound but never used"),
        ("Train.steps = %step\nsteps = 3", ":1:", "%step is not defined; did you mean 'steps'?"),
        ("Model.layers = %gin.REQUIRED", "", "not subsequently overridden"),
        ("Model.layers = @Model()", ":1:", "references are not allowed"),
        ("Data.path = @Train", ":1:", "references are not allowed"),
        ("Model.layers = 1 +", ":1:", "Expected newline"),
        ("\n\nModel.layers = (1,", ":3:", "multi-line"),
        ("Model.layers", ":1:", "Couldn't parse statement"),
        ("Model.layers = 1\x0cimport os", ":1:", "control character"),
        ("include 'missing.gin'", ":1:", "not a file"),
        ("Model.heads = 2\ninclude 'a.gin'", ":2:", "includes this file"),
        ("Model.layers = " + "(" * 5000, ":1:", ""),
    ],
)
def test_a_mistake_is_one_line_with_its_place(config, capsys, text, place, problem):
    message = refused(capsys, config(text), "--dry-run")
    assert f"a.gin{place}" in message
    assert problem in message


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        "from os import system",
        "import experiments.run as runner",
        "from __gin__ import dynamic_registration\nimport os\nos.system.command = 'touch {marker}'",
        "from __gin__ import dynamic_registration\nimport evil",
        "Train.seed = @os.system()",
        "include '../evil.gin'",
        "include '{folder}/evil.gin'",
        "include 'link.gin'",
        "include 'inner.gin'",
        "include '/dev/stdin'",
        "include __import__('os')",
    ],
)
def test_a_hostile_config_is_refused_before_anything_runs(config, capsys, monkeypatch, tmp_path, text):
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    (tmp_path / "evil.gin").write_text("Model.layers = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config("import evil\n", "inner.gin")
    (tmp_path / "configs" / "link.gin").symlink_to(tmp_path / "evil.gin")
    parsed = []
    monkeypatch.setattr(run.gin, "parse_config", lambda *arguments, **_: parsed.append(arguments))
    refused(capsys, config(text.format(marker=marker, folder=tmp_path)), "--dry-run")
    assert not marker.exists()
    assert parsed == []  # gin saw none of it


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("Train.step = 3", "did you mean 'steps'?"),
        ("Train.steps = 'x'", "expected int, got str"),
        ("import os", "only 'Section.field = value' lines"),
        ("include 'a.gin'", "only 'Section.field = value' lines"),
        ("Train.seed = 1\nimport os", "control character"),
        ("# nothing", "expected one"),
        ("other/Train.steps = 60", "never used"),
        ("Train.seed = @os.system()", "references are not allowed"),
    ],
)
def test_set_follows_the_same_rules(config, capsys, override, problem):
    message = refused(capsys, config("Train.seed = 1"), "--set", override)
    assert "--set" in message
    assert problem in message


def test_set_wins_and_gives_the_run_of_its_values(config):
    plain = run.load(config("Train.steps = 60\nTrain.seed = 2"))
    overridden = run.load(config("Train.steps = 70"), ["Train.steps = 60", "Train.seed = 2"])
    assert overridden.run == plain.run
    assert run.load(config("Train.steps = 61\nTrain.seed = 2")).run != plain.run


def test_scopes_set_one_model_apart(config):
    text = "Quickstart.models = ('one', 'two')\nModel.layers = 2\ntwo/Model.layers = 3\n"
    plan = run.load(config(text + "steps = 60\nTrain.steps = %steps"))
    one, two = plan.config.variants
    assert (one.model.layers, two.model.layers, one.train.steps, two.train.steps) == (2, 3, 60, 60)


def test_includes_are_put_in_place(config, capsys):
    config("Model.layers = 2\nModel.heads = 2\n", "base.gin")
    path = config("include 'base.gin'\nModel.layers = 3\n")
    assert [
        run.load(path).config.variants[0].model.layers,
        run.load(path).config.variants[0].model.heads,
    ] == [3, 2]
    config("Train.seed = 1\nModel.head = 2\n", "base.gin")
    assert "base.gin:2: unknown field Model.head" in refused(capsys, path, "--dry-run")


def test_no_other_file_imports_gin():
    importing = [
        path.relative_to(ROOT).as_posix()
        for folder in ("slimjax", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if any(line.startswith(("import gin", "from gin")) for line in path.read_text().splitlines())
    ]
    assert importing == ["experiments/run.py"]


def test_a_dry_run_writes_nothing(toy, config, capsys, tmp_path):
    toy(**{"raise": {"NotImplementedError": [5]}})
    assert run.main([str(config("Run.experiment = 'toy'")), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "12 cells in 3 units (1 will be refused)" in out
    assert '"experiment": "toy"' in out
    assert "batch=3\n" in out
    assert "batch=5  REFUSED: as foreseen\n" in out
    assert sweep_toy.seen(tmp_path) == []
    assert not (tmp_path / "out").exists()


def test_equal_cells_are_refused_before_the_first(toy, config, capsys, monkeypatch):
    unit = Unit("one", ({"batch": 1}, {"batch": 1}))
    monkeypatch.setattr(sweep_toy, "units", lambda config: [unit])
    assert run.main([str(config("Run.experiment = 'toy'"))]) == 2
    assert 'two cells are equal: {"batch": 1}' in capsys.readouterr().err
    monkeypatch.setattr(sweep_toy, "units", lambda config: [Unit("one", ({"batch": n},)) for n in range(2)])
    assert run.main([str(config("Run.experiment = 'toy'"))]) == 2
    assert "two units are called one" in capsys.readouterr().err


def test_what_cannot_be_built_is_refused_before_the_first(toy, config, capsys, monkeypatch, tmp_path):
    def forecast(unit, config):
        raise TypeError("shapes\nclash") if unit.data == 2 else NotImplementedError("no such layer")

    monkeypatch.setattr(sweep_toy, "forecast", forecast)
    assert run.main([str(config("Run.experiment = 'toy'")), "--out", str(tmp_path / "out")]) == 2
    assert "error: unit2 cannot be built: shapes clash\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def launch(toy, config, tmp_path):
    """Runs the toy in one directory."""
    path = config("Run.experiment = 'toy'")

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
    assert result["sweep"].keys() == {"cells", "seconds", "cells_per_minute", "jobs"}
    assert run.load(out / "config.gin").run == result["run"]
    stamp = json.loads((out / "stamp.json").read_text())
    assert stamp["source"] == directory.source_hash()
    assert stamp["versions"].keys() == {"python", "jax", "jaxlib", "flax", "numpy"}
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
