"""The quickstart end to end on a model of a few hundred numbers: rows, refusals, failures, resuming."""

import json

import pytest
import small_runs

from experiments import run
from experiments.launch import cells_of, checked_units
from slimjax import evaluate
from slimjax.records import read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of one model."""
    own = "Quickstart.models = ('small',)\nsmall/Model.key_init = 'orthogonal'\n"
    folder = tmp_path_factory.mktemp("quickstart")
    return small_runs.write(
        folder, "quickstart", own, small_runs.MODEL, small_runs.HEADS, small_runs.MEASURED
    )


@pytest.fixture(scope="module")
def finished(config):
    """The run directory of one finished run."""
    out = config.parent / "out"
    assert small_runs.launched(config, out) == 0
    return out


def test_every_cell_is_a_record(config, finished):
    plan = run.load(config)
    records = read(finished / "records.jsonl")
    assert [dict(record.cell) for record in records] == cells_of(checked_units(plan))
    for record in records:
        refused = record.cell["scheme"] == "x:bf16"
        assert record.status == ("refused" if refused else "ok")
        assert ("RoPE" in record.reason) == refused
        assert record.provenance["config"] == plan.run
        assert record.provenance["seconds"] >= 0
        expected = (
            {"identity_error"} if record.cell["dtype"] == "float64" else {"attention_error", "bits_per_byte"}
        )
        assert refused or expected <= record.metrics.keys()


def test_the_report_and_the_metrics_are_there(finished):
    assert "x:bf16" in (finished / "report.html").read_text()
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(line["model"], line["step"]) for line in steps] == [("small", step) for step in range(1, 7)]
    assert all(line["loss"] > 0 for line in steps)
    assert [line["step"] for line in steps if line.get("bits_per_byte", 0) > 0] == [2, 4, 6]


def test_the_saved_config_gives_the_same_run_and_the_same_numbers(config, finished):
    again = config.parent / "again"
    assert small_runs.launched(finished / "config.gin", again) == 0
    assert (
        json.loads((again / "result.json").read_text())["run"]
        == json.loads((finished / "result.json").read_text())["run"]
    )
    for ours, theirs in zip(read(again / "records.jsonl"), read(finished / "records.jsonl"), strict=True):
        assert ours.cell == theirs.cell
        assert ours.metrics == theirs.metrics


def test_a_failure_costs_one_cell_and_interruption_none(config, monkeypatch, capsys):
    out = str(config.parent / "trouble")
    measure, measured = evaluate.measure, []

    def broken(reference, scheme, dtype):
        measured.append(scheme)
        if len(measured) == 1:
            raise RuntimeError("out of\nmemory")
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(reference, scheme, dtype)

    monkeypatch.setattr(evaluate, "measure", broken)
    assert small_runs.launched(config, out) == 130
    monkeypatch.setattr("experiments.train.train", None)  # the model is on the disk
    assert small_runs.launched(config, out) == 1
    records = read(config.parent / "trouble" / "records.jsonl")
    failed = [record for record in records if record.status == "failed"]
    assert [(record.cell["scheme"], record.reason) for record in failed] == [
        ("kv:bf16", "RuntimeError: out of memory")
    ]
    assert "Traceback" in (config.parent / "trouble" / "log.txt").read_text()
    assert "1 cell failed" in capsys.readouterr().err
    assert measured[:3] == ["kv:bf16", "k:int16", "k:int16"]
    assert "failed: RuntimeError" in (config.parent / "trouble" / "tables" / "schemes_small.csv").read_text()
