"""The quickstart end to end on a model of a few hundred numbers: rows, refusals, failures, resuming."""

import json
import random

import pytest

from experiments import run
from slimjax import evaluate
from slimjax.records import read

pytestmark = pytest.mark.slow

CONFIG = """
Run.experiment = 'quickstart'
Quickstart.models = ('small',)
Data.path = {path!r}
Data.held_out_percent = 30.0
Model.layers = 1
Model.width = 16
Model.heads = 2
Train.steps = 4
Train.warmup = 1
Train.batch = 2
Train.length = 16
Train.log_every = 2
small/Model.key_init = 'orthogonal'
Equivalence.schemes = ('kv:bf16', 'k:int16', 'x:bf16')
Equivalence.dtypes = ('float32',)
Equivalence.tokens = 64
Equivalence.length = 16
Equivalence.generated = 4
Equivalence.prompts = 2
Equivalence.prompt_length = 8
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config and, in a folder of its own, a text with something to learn."""
    folder = tmp_path_factory.mktemp("quickstart")
    words = random.Random(0)
    for index in range(10):
        text = " ".join(words.choices(("cache", "key", "value", "query", "head"), k=200))
        (folder / f"{index}.txt").write_text(text)
    path = folder.parent / "small.gin"
    path.write_text(CONFIG.format(path=str(folder)))
    return path


@pytest.fixture(scope="module")
def finished(config):
    """The run directory of one finished run."""
    out = config.parent / "out"
    assert run.main([str(config), "--out", str(out)]) == 0
    return out


def test_every_cell_is_a_record(config, finished):
    plan = run.load(config)
    records = read(finished / "records.jsonl")
    assert [dict(record.cell) for record in records] == plan.experiment.cells(plan.config)
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
    assert [(line["model"], line["step"]) for line in steps] == [("small", 2), ("small", 4)]
    assert all(line["bits_per_byte"] > 0 for line in steps)


def test_the_saved_config_gives_the_same_run_and_the_same_numbers(config, finished):
    again = config.parent / "again"
    assert run.main([str(finished / "config.gin"), "--out", str(again)]) == 0
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
    assert run.main([str(config), "--out", out]) == 130
    monkeypatch.setattr("experiments.train.train", None)  # the model is on the disk
    assert run.main([str(config), "--out", out]) == 1
    records = read(config.parent / "trouble" / "records.jsonl")
    failed = [record for record in records if record.status == "failed"]
    assert [(record.cell["scheme"], record.reason) for record in failed] == [
        ("kv:bf16", "RuntimeError: out of memory")
    ]
    assert "Traceback" in (config.parent / "trouble" / "log.txt").read_text()
    assert "1 cells failed" in capsys.readouterr().err
    assert measured[:3] == ["kv:bf16", "k:int16", "k:int16"]
    assert "failed: RuntimeError" in (config.parent / "trouble" / "tables" / "schemes_small.csv").read_text()
