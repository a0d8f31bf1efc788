"""The root `train` in this process: its record, its refusals, and what a second run finds."""

import errno
import functools
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

import slimjax.train
from experiments import progress
from slimjax import checkpoint
from slimjax.records import read, read_lines

OWN = """
Training.models = ('small', 'other')
other/Model.position = 'none'
Checkpoint.every = 2
Checkpoint.keep = 2
Training.held_out_tokens = 64
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a config of two models in one directory; returns the exit status."""
    config = small_runs.write(tmp_path, "train", small_runs.MODEL, small_runs.HEADS, OWN)
    return functools.partial(small_runs.launched, config, tmp_path / "out")


@pytest.fixture
def breaking(monkeypatch):
    """Makes the loss of one step of every model not-a-number, while `breaking.step` is set."""
    compiled = slimjax.train._compiled_step

    def broken(*configs):
        def step(state, tokens, given):
            bad = int(state.step) + 1 == broken.step
            state, loss = compiled(*configs)(state, tokens, given)
            return state, loss * jnp.asarray(np.nan if bad else 1.0, loss.dtype)

        return step

    broken.step = None
    monkeypatch.setattr(slimjax.train, "_compiled_step", broken)
    return broken


@pytest.mark.slow
def test_a_record_of_every_model(launch, tmp_path, capsys):
    out = tmp_path / "out"
    assert launch() == 0
    records = read(out / "records.jsonl")
    assert [record.cell["model"] for record in records] == ["small", "other"]
    assert [record.cell["position"] for record in records] == ["rope", "none"]
    for record in records:
        assert record.metrics.keys() == {"bits_per_byte", "count", "tokens_per_second", "parameters"}
        assert 4 < record.metrics["bits_per_byte"] < 9
        assert record.metrics["count"] == 64
        assert record.metrics["tokens_per_second"] > 0
        state = checkpoint.steps(out / "models" / record.cell["model"])
        assert list(state) == [4, 6]
        manifest = json.loads((state[6] / "manifest.json").read_text())["leaves"]
        sizes = [np.prod(leaf["shape"]) for name, leaf in manifest.items() if name.startswith(".params")]
        assert record.metrics["parameters"] == sum(sizes)
    steps = [(line["model"], line["step"]) for line in read_lines(out / "metrics.jsonl")]
    assert steps == [(model, step) for model in ("small", "other") for step in range(1, 7)]
    assert (out / "report.html").exists()
    assert capsys.readouterr().out.count("bits per byte") >= 6
    assert launch() == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_a_failed_row_and_keeps_what_was_good(launch, breaking, tmp_path):
    breaking.step = 5
    assert launch() == 1
    records = read(tmp_path / "out" / "records.jsonl")
    assert [record.status for record in records] == ["failed", "failed"]
    assert records[0].reason == "FloatingPointError: step 5: the loss is nan; lower the learning rate"
    assert list(checkpoint.steps(tmp_path / "out" / "models" / "small")) == [2, 4]
    assert "step 5" in (tmp_path / "out" / "log.txt").read_text()


def test_a_damaged_checkpoint_is_one_line_and_an_older_one_goes_on(
    launch, breaking, tmp_path, monkeypatch, capsys
):
    def interrupted(*_):
        raise KeyboardInterrupt

    out, folder = tmp_path / "out", tmp_path / "out" / "models" / "small"
    with monkeypatch.context() as patch:
        patch.setattr("experiments.train.held_out", interrupted)
        assert launch() == 130
    newest = checkpoint.steps(folder)[6]
    (newest / "manifest.json").write_text("{}")
    capsys.readouterr()
    assert launch() == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"{newest} is damaged: manifest.json" in errors
    newest.rename(tmp_path / "aside")
    assert launch() == 0
    assert {"event": "resume", "model": "small", "step": 4} in read_lines(out / "metrics.jsonl")
    small = [line for line in read_lines(out / "metrics.jsonl") if line["model"] == "small"]
    assert [line.get("step") for line in small] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert [line.get("loss") for line in small[4:6]] == [line["loss"] for line in small[7:]]
    assert [line["step"] for line in progress.steps_once(small)] == [2, 4, 6]


def test_a_reader_that_leaves_ends_the_run_in_one_true_line(launch, tmp_path, monkeypatch, capfd):
    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.train.show", closed)
        assert launch() == 141
    assert capfd.readouterr().err == "standard output was closed; the same command goes on from here\n"
    assert read(tmp_path / "out" / "records.jsonl") == []
    assert checkpoint.latest_step(tmp_path / "out" / "models" / "small") is None
    assert launch() == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_model_that_cannot_be_described_is_one_line(launch, tmp_path, monkeypatch, capsys, number):
    def full(*_):
        raise OSError(number, os.strerror(number), "model.json")

    with monkeypatch.context() as patch:
        patch.setattr("slimjax.pretrained.describe", full)
        assert launch() == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"{os.strerror(number)}: 'model.json'; that mended, the same command goes on from step 0" in errors
    assert read(tmp_path / "out" / "records.jsonl") == []


def test_how_it_is_followed_and_saved_is_no_other_run(launch, breaking, tmp_path):
    breaking.step = 5
    often = ("--set", "Train.log_every = 1", "--set", "Checkpoint.every = 1")
    breaking.step = 4
    assert launch("--set", "Train.log_every = 3", "--set", "Checkpoint.keep = 1") == 1
    breaking.step = None
    assert launch(*often, "--retry") == 0
    lines = [line for line in read_lines(tmp_path / "out" / "metrics.jsonl") if line["model"] == "small"]
    assert [line.get("step") for line in lines] == [1, 2, 3, 2, 3, 4, 5, 6]
    assert "Train.log_every = 1" in (tmp_path / "out" / "config.gin").read_text()


def test_what_cannot_be_trained_is_refused_before_it_starts(launch, tmp_path, monkeypatch, capsys):
    too_long = ("--set", "Model.position = 'learned'", "--set", "Model.max_length = 8")
    assert launch(*too_long) == 2
    assert "small: learned positions end at max_length = 8, training needs 16" in capsys.readouterr().err
    monkeypatch.setattr("slimjax.trackers.importlib.util.find_spec", lambda name: None)
    assert launch("--set", "Tracking.tracker = 'wandb'", "--dry-run") == 2
    assert "pip install 'slimjax[trackers]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
