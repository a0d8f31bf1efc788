"""The way in: every mistake in a config is one line before anything runs; a run is done once and goes on."""

import fcntl
import json
import os
import types
from pathlib import Path

import pytest

from experiments import directory, run, settings
from slimjax.records import Record, RecordLog

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted((ROOT / "configs").rglob("*.gin"))


@pytest.fixture
def toy(monkeypatch):
    """An experiment of four cells that counts its measurements; `toy.fail` and `toy.stop` are cells."""
    module = types.SimpleNamespace(measured=[], fail=None, stop=None)

    def cells(config):
        return [{"experiment": "toy", "seed": config.seed, "batch": batch} for batch in range(4)]

    def measure(config, place):
        log = RecordLog(place.path / "records.jsonl")
        for cell in cells(config):
            if cell in log:
                continue
            if cell["batch"] == module.stop:
                raise KeyboardInterrupt
            module.measured.append(cell["batch"])
            failed = cell["batch"] == module.fail
            log.add(Record(cell, status="failed", reason="toy") if failed else Record(cell, {"count": 1}))
        (place.path / "report.html").write_text("report")
        return log.records

    module.resolve = lambda build: build("Train")
    module.cells, module.run = cells, measure
    monkeypatch.setitem(settings.EXPERIMENTS, "toy", "toy")
    monkeypatch.setattr(run, "load_experiment", lambda name: module)
    return module


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_resolve_to_their_golden_values(path):
    """After a deliberate change: SLIMJAX_WRITE_GOLDEN=1 writes them anew."""
    plan = run.load(path)
    text = run.canonical_json(plan.resolved)
    golden = GOLDEN / f"{path.stem}.json"
    if os.environ.get("SLIMJAX_WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()
    assert len(run.checked_cells(plan)) == len(
        {Record(cell).key for cell in plan.experiment.cells(plan.config)}
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_binding_of_a_shipped_config_is_checked(path, config):
    """Each line in turn: a misspelt field and a value of a wrong type are refused."""
    text = path.read_text()
    found = run.bindings(run.gather(path, path.parent.resolve()))
    assert found
    for binding in found:
        misspelt = text.replace(f"{binding.name} =", f"{binding.name}x =")
        assert misspelt != text
        with pytest.raises(run.Fault, match="did you mean"):
            run.load(config(misspelt))
        with pytest.raises(run.Fault, match=r"expected|unknown"):
            run.load(path, [f"{binding.name} = {{'a': 1}}"])


def test_no_other_file_imports_gin():
    importing = [
        path.relative_to(ROOT).as_posix()
        for folder in ("slimjax", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if any(line.startswith(("import gin", "from gin")) for line in path.read_text().splitlines())
    ]
    assert importing == ["experiments/run.py"]


def test_a_dry_run_writes_nothing(toy, config, capsys, tmp_path):
    assert run.main([str(config("Run.experiment = 'toy'")), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "4 cells" in out
    assert '"experiment": "toy"' in out
    assert "batch=3" in out
    assert toy.measured == []
    assert not (tmp_path / "out").exists()


def test_equal_cells_are_refused_before_the_first(toy, config, capsys):
    toy.cells = lambda config: [{"batch": 1}, {"batch": 1}]
    assert run.main([str(config("Run.experiment = 'toy'"))]) == 2
    assert 'two cells are equal: {"batch": 1}' in capsys.readouterr().err


@pytest.fixture
def launch(toy, config, tmp_path):
    """Runs the toy in one directory."""
    path = config("Run.experiment = 'toy'")

    def start(*arguments: str) -> int:
        return run.main([str(path), "--out", str(tmp_path / "out"), *arguments])

    return start


def test_a_run_directory_holds_what_made_it(launch, toy, tmp_path, capsys):
    assert launch("--set", "Train.steps = 77") == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.endswith(f"report: {out / 'report.html'}\n")
    assert "Train.steps = 77" in (out / "config.gin").read_text()
    assert "Train.batch = 16" in (out / "operative.gin").read_text()
    resolved = json.loads((out / "resolved.json").read_text())
    assert resolved["config"]["steps"] == 77
    result = json.loads((out / "result.json").read_text())
    assert result["cells"] == {"ok": 4, "refused": 0, "failed": 0}
    assert run.load(out / "config.gin").run == result["run"]
    stamp = json.loads((out / "stamp.json").read_text())
    assert stamp["source"] == directory.source_hash()
    assert stamp["versions"].keys() == {"python", "jax", "jaxlib", "flax", "numpy"}


def test_a_finished_run_is_only_reported(launch, toy, capsys):
    assert [launch(), launch()] == [0, 0]
    assert toy.measured == [0, 1, 2, 3]
    assert "nothing to do" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(launch, toy, tmp_path, capsys):
    toy.stop = 2
    assert launch() == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()
    toy.stop = None
    assert launch() == 0
    assert toy.measured == [0, 1, 2, 3]


def test_no_resume_starts_again_and_keeps_the_old(launch, toy, tmp_path):
    assert [launch(), launch("--no-resume")] == [0, 0]
    assert toy.measured == [0, 1, 2, 3] * 2
    assert (tmp_path / "out~1" / "result.json").exists()
    assert (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_results_of_other_code_are_not_reused(launch, toy, tmp_path, monkeypatch, finished):
    toy.stop = None if finished else 2
    launch()
    toy.stop, toy.measured = None, []
    monkeypatch.setattr(directory, "source_hash", lambda: "of other code")
    assert launch() == 0
    assert toy.measured == [0, 1, 2, 3]
    assert (tmp_path / "out~1" / "records.jsonl").exists()


def test_failed_cells_are_rows_and_the_exit_status(launch, toy, tmp_path, capsys):
    toy.fail = 1
    assert launch() == 1
    assert toy.measured == [0, 1, 2, 3]
    assert "1 cells failed" in capsys.readouterr().err
    assert launch() == 1  # a finished run is as bad as it was


def test_a_foreign_directory_is_left_alone(launch, toy, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert launch() == 2
    assert "not a run directory" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_a_directory_of_another_run_is_left_alone(launch, toy, capsys):
    assert launch() == 0
    assert launch("--set", "Train.seed = 5") == 2
    assert "holds run" in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(launch, toy, tmp_path, capsys):
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
