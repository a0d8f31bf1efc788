"""Which cells of another run stand for a run's own: those that nothing but the table's name tells apart."""

import json
from pathlib import Path

import pytest
import small_runs

from experiments import run
from experiments.directory import RunDirectory, write_json
from experiments.known import known_records
from experiments.launch import cells_of, checked_units
from slimjax.config import DataConfig, ModelConfig, resolved
from slimjax.records import Record, provenance, read, write_records

TASK = "lookup_sum(keys=5,steps=2)"


@pytest.fixture
def asked(tmp_path):
    """A config, and the models it is told: one of a text, one of a task."""
    config = small_runs.write(
        tmp_path,
        "compare",
        "Compare.models = ()\nCompare.schemes = ('kv:bf16', 'kv:int8')\nCompare.study = 'components'\n",
        "Compare.tokens = 120\nCompare.length = 80\nCompare.prompt = 40\nCompare.calibration = 320\n",
    )
    letters, sums = tmp_path / "letters", tmp_path / "sums"
    sizes = ModelConfig(layers=1, width=16, heads=2)
    text = DataConfig(path=str(tmp_path / "text"), held_out_percent=30.0)
    small_runs.write_model(letters, sizes, text)
    small_runs.write_model(sums, sizes, DataConfig(task=TASK))
    return config, f"Compare.trained = {(str(letters), str(sums))!r}"


@pytest.fixture
def other(asked, tmp_path):
    """`other(*settings, **provenance)`: a plan told of a run of another table that was made with those."""
    (config, trained), done = asked, tmp_path / "done"

    def made(*settings, status="ok", **facts):
        plan = run.load(config, [trained, "Compare.study = 'main'", *settings])
        source = provenance(config=plan.run) | {"source": "abc", "inputs": {"text of letters": "one"}} | facts
        done.mkdir()
        write_json(done / "resolved.json", resolved(plan.resolved))
        cells = cells_of(checked_units(plan))
        metrics = {} if status != "ok" else {"logit_kl": 0.25}
        reason = "" if status == "ok" else "as it happens"
        write_records(
            done / "records.jsonl", [Record(cell, metrics, status, reason, source) for cell in cells]
        )
        (done / "result.json").touch()
        return run.load(config, [trained, f"Compare.known = ({str(done)!r},)"])

    return made


def found(plan, cells=None):
    """What is taken over by a run of source abc, whose text is one: model and scheme."""
    directory = RunDirectory(Path(), plan.run, "abc", (), {"text of letters": "one"})
    cells = cells_of(checked_units(plan)) if cells is None else cells
    return known_records(plan.config, cells, directory)


def taken(plan):
    return [(record.cell["model"], record.cell["scheme"]) for record in found(plan)]


LETTERS = [("letters", "kv:bf16"), ("letters", "kv:int8")]
SUMS = [("sums", "kv:bf16"), ("sums", "kv:int8")]


def test_all_but_the_study_is_the_same(other):
    plan = other()
    assert taken(plan) == LETTERS + SUMS
    one = found(plan)[1]
    assert one.cell["study"] == "components"
    assert one.metrics == {"logit_kl": 0.25}
    assert one.provenance["measured_for"] == "main"
    assert one.provenance["config"] != plan.run
    assert json.loads(one.to_json())["provenance"] == dict(one.provenance)
    assert found(plan, cells_of(checked_units(plan))[3:])[0].cell["model"] == "sums"


@pytest.mark.parametrize(
    "settings",
    [
        "Compare.tokens = 160",
        "Compare.calibration = 400",
        "Compare.context = 64",
        "Compare.protected = (1,)",
        "Compare.schemes = ('kv:int4',)",
    ],
)
def test_other_settings_are_other_cells(other, settings):
    assert taken(other(settings)) == []


def test_problems_count_where_there_is_a_task(other):
    assert taken(other("Compare.problems = 6")) == LETTERS


def test_windows_of_a_task_have_their_own_length(other):
    assert taken(other("Compare.length = 120", "Compare.prompt = 80")) == SUMS


@pytest.mark.parametrize(
    "facts", [{"source": "abd"}, {"versions": {}}, {"device": "another"}, {"cpus": 1}, {"xla_flags": "-x"}]
)
def test_another_source_or_machine_measures_for_itself(other, facts):
    assert taken(other(**facts)) == []


def test_another_text_is_another_input(other):
    assert taken(other(inputs={"text of letters": "two"})) == SUMS


def test_what_was_not_measured_is_tried(other):
    assert taken(other(status="failed")) == []


def test_a_row_that_was_taken_over_names_who_measured_it(other):
    assert {record.provenance["measured_for"] for record in found(other(measured_for="sas"))} == {"sas"}


def test_a_cell_that_another_table_has_is_measured_once(asked, tmp_path, capsys):
    config, trained = asked
    first, second = tmp_path / "first", tmp_path / "second"
    settings = ("--set", trained, "--set", "Compare.study = 'main'")
    assert small_runs.launched(config, first, *settings) == 0
    known = ("--set", trained, "--set", f"Compare.known = ({str(first)!r},)")
    schemes = ("--set", "Compare.schemes = ('kv:int8', 'kv:int4')")
    assert small_runs.launched(config, second, *known, *schemes) == 0
    assert "2 cells taken over as other runs measured them" in capsys.readouterr().out
    before, now = read(first / "records.jsonl"), read(second / "records.jsonl")
    assert [record.cell["scheme"] for record in now] == ["kv:int8", "kv:int4"] * 2
    assert {record.cell["study"] for record in now} == {"components"}
    for index in (0, 2):
        assert now[index].metrics == before[index + 1].metrics
        assert now[index].provenance == before[index + 1].provenance | {"measured_for": "main"}
        assert "measured_for" not in now[index + 1].provenance
        assert now[index + 1].provenance["config"] != before[index].provenance["config"]
