"""The way in: every mistake in a config is one line before anything runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sweep_toy

from experiments import estimate, run, settings
from experiments.settings import Unit

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
        """A main config that names no experiment gets one, below all else."""
        if name == "a.gin" and "Run.experiment" not in text:
            text += "\nRun.experiment = 'quickstart'"
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
        ("n = %n\nTrain.steps = %n", ":1:", "%n is defined by itself"),
        ("a = (1, %b)\nb = %a\nTrain.steps = %a", ":1:", "%a is defined by itself"),
        ("Model.layers = %gin.REQUIRED", "", "not subsequently overridden"),
        ("Model.layers = @Model()", ":1:", "references are not allowed"),
        ("Data.path = @Train", ":1:", "references are not allowed"),
        ("Model.layers = 1 +", ":1:", "Expected newline"),
        ("Run.experiment = 'toy'\n\nModel.layers = (1,", ":3:", "multi-line"),
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
        ("Train.steps = 10", "warmup = 20 is longer than steps = 10"),
        ("Model.width = 30", "width = 30 is not a multiple of heads = 4"),
        ("default/Train.steps = 10", "default/Train: warmup = 20 is longer than steps = 10"),
        ("Train.length = 64", "learned positions end at max_length = 32, training needs 64"),
        ("Equivalence.generated = 32", "learned positions end at max_length = 32, the run needs 40"),
        ("Train.seed = @os.system()", "references are not allowed"),
    ],
)
def test_set_follows_the_same_rules(config, capsys, override, problem):
    text = """
Train.seed = 1
Train.warmup = 20
Train.length = 32
Model.position = 'learned'
Model.max_length = 32
Equivalence.length = 16
Equivalence.prompt_length = 8
Equivalence.generated = 8
"""
    message = refused(capsys, config(text), "--set", override)
    assert message.startswith(f"error: --set {override!r}: ")
    assert problem in message


def test_set_wins_and_gives_the_run_of_its_values(config):
    plain = run.load(config("Train.steps = 60\nTrain.seed = 2"))
    overridden = run.load(config("Train.steps = 70"), ["Train.steps = 60", "Train.seed = 2"])
    assert overridden.run == plain.run
    assert run.load(config("Train.steps = 61\nTrain.seed = 2")).run != plain.run


@pytest.mark.parametrize(
    "binding", ["Train.log_every = 7", "Checkpoint.every = 3", "Tracking.project = 'mine'"]
)
def test_what_no_result_depends_on_is_no_part_of_the_run(config, binding):
    path = config("Run.experiment = 'train'")
    told = run.load(path, [binding])
    assert told.run == run.load(path).run
    assert run.canonical_json(told.resolved) != run.canonical_json(run.load(path).resolved)
    assert run.load(path, ["Train.seed = 7"]).run != told.run


def test_scopes_set_one_model_apart(config):
    text = "Quickstart.models = ('one', 'two')\nModel.layers = 2\ntwo/Model.layers = 3\n"
    plan = run.load(config(text + "steps = 60\nTrain.steps = %steps"))
    one, two = plan.config.variants
    assert (one.model.layers, two.model.layers, one.train.steps, two.train.steps) == (2, 3, 60, 60)


def test_set_of_one_field_twice_is_refused(config, capsys):
    for second in ("1", "2"):
        message = refused(
            capsys,
            config("Train.batch = 2"),
            "--dry-run",
            "--set",
            "Train.seed = 1",
            "--set",
            f"Train.seed = {second}",
        )
        assert f"--set 'Train.seed = {second}': Train.seed is bound twice" in message


def test_a_config_that_names_no_experiment_is_told_them(config, capsys):
    message = refused(capsys, config("Train.steps = 60  # no Run.experiment"), "--dry-run")
    assert "expected Run.experiment = one of 'quickstart', 'train'" in message


@pytest.mark.parametrize(
    ("text", "overrides", "kept"),
    [
        (
            "# head\nTrain.steps = 70  # old\nTrain.seed = 2",
            ["Train.steps = 60"],
            ["# head", "Train.seed = 2"],
        ),
        (
            "Model:\n  layers = 3\n  heads = 2\nTrain.seed = 2",
            ["Model.heads = 4"],
            ["Model:", "  layers = 3", "Train.seed = 2"],
        ),
        ("Model:\n  heads = 2\nTrain.seed = 2", ["Model.heads = 4"], ["Train.seed = 2"]),
        (
            "Quickstart.models = (\n    'one',  # it\n\n    'two',\n)\n# below\nTrain.seed = 2",
            ["Quickstart.models = ('one',)", "one/Model.layers = 3"],
            ["# below", "Train.seed = 2"],
        ),
        ("include 'base.gin'\nModel.layers = 3", [], ["Train.seed = 2", "", "Model.layers = 3"]),
        ("n = 60\nTrain.steps = %n\nTrain.seed = 2", ["n = 70"], ["Train.steps = %n", "Train.seed = 2"]),
    ],
)
def test_the_saved_config_is_the_same_run(config, text, overrides, kept):
    config("Train.seed = 2\nModel.layers = 2\n", "base.gin")
    plan = run.load(config(text), overrides)
    lines = [*kept, "Run.experiment = 'quickstart'"]
    if overrides:
        lines += ["", "# Given with --set:", *overrides]
    assert plan.source == "\n".join(lines) + "\n"
    saved = run.load(config(plan.source))
    assert (saved.run, saved.source) == (plan.run, plan.source)


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


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("Train.steps = 1000000000000000000000", "expected a finite number >= 0 and <= 2147483647"),
        ("Train.batch = 2147483647", "a unit needs 256 TiB of memory, 16 GiB are here"),
        ("Train.batch = 1000000", " years here: expected fewer steps, or smaller ones"),
        ("Train.steps = 2147483647", ""),
        ("Model.vocab = 2147483647", "of memory, 16 GiB are here"),
        ("Model.width = 4294967296", "expected a finite number"),
    ],
)
def test_absurd_sizes_are_refused_or_have_a_sane_estimate(config, capsys, monkeypatch, override, problem):
    monkeypatch.setattr(estimate, "rate", lambda: 1e11)
    monkeypatch.setattr(estimate, "memory", lambda: 2**34)
    text = "Model.layers = 1\nTrain.steps = 500000\nEquivalence.schemes = ('kv:bf16',)"
    if problem:
        assert problem in refused(capsys, config(text), "--dry-run", "--set", override)
    else:
        assert run.main([str(config(text)), "--dry-run", "--set", override]) == 0
        assert re.search(r"FLOP, at least 714 days at", capsys.readouterr().out)


def test_times_and_sizes_are_said_in_units_that_suit_them():
    assert [estimate.duration(seconds) for seconds in (59, 7000, 8000, 3e5, 6e7, 1e8)] == [
        "under a minute",
        "at least 117 min",
        "at least 2 h",
        "at least 3 days",
        "at least 694 days",
        "at least 3 years",
    ]
    sizes = [estimate.size(number) for number in (3 << 20, 9 << 30, 1 << 34, 1 << 60)]
    assert sizes == ["3 MiB", "9,216 MiB", "16 GiB", "1,048,576 TiB"]


@pytest.mark.parametrize(
    "error", [MemoryError(), OverflowError("int too large"), ValueError("shapes"), TypeError("no")]
)
def test_sizes_beyond_all_reason_are_one_line(toy, config, capsys, monkeypatch, error):
    def forecast(unit, config):
        raise error

    monkeypatch.setattr(sweep_toy, "forecast", forecast)
    message = refused(capsys, config("Run.experiment = 'toy'"), "--dry-run")
    assert f"unit0 cannot be built: {error or 'not enough memory'}" in message


def test_a_reader_that_has_read_enough_ends_it_quietly(config):
    """Standard output is a pipe whose other end is closed, as after `| head -0`."""
    command = [sys.executable, "-m", "experiments.run", str(config("Train.seed = 1")), "--dry-run"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")
