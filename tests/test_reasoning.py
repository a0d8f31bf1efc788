"""The root `reasoning` on a model of a few hundred numbers, and training on a task: what is learnt, what is skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from experiments import run
from experiments.launch import cells_of, checked_units
from slimjax import pretrained
from slimjax.config import DataConfig, ModelConfig, TrainConfig
from slimjax.data import load_corpus
from slimjax.models.decoder import DecoderLM, convert_model
from slimjax.numerics import cross_entropy
from slimjax.optimizer import numbers
from slimjax.records import read
from slimjax.tasks import LookupSum, answered, parse_task, problems, solved
from slimjax.tasks.task import row_length
from slimjax.train import compiled_step, initial_state, train, trained_model

TASK = parse_task("lookup_sum(keys=5,steps=2)")
OWN = """
Run.experiment = 'reasoning'
Data.task = 'lookup_sum(keys=5,steps=2)'
Model.layers = 1
Model.width = 16
Model.heads = 2
Train.steps = 4
Train.warmup = 1
Train.batch = 4
Train.length = 20
Train.log_every = 2
Reasoning.models = ('small',)
Reasoning.schemes = ('kv:float32', 'kv:kivi2/8', 'x:bf16')
Reasoning.problems = 7
"""
MODEL = ModelConfig(layers=1, width=16, heads=2)
TRAIN = TrainConfig(steps=4, warmup=1, batch=4, length=20)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "reasoning.gin"
    path.write_text(OWN)
    return path


@pytest.fixture
def corpus():
    return load_corpus(DataConfig(task=str(TASK)))


@pytest.mark.slow
def test_every_scheme_is_a_record_and_the_model_can_be_loaded(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert small_runs.launched(config, out) == 0
    records = read(out / "records.jsonl")
    assert [dict(record.cell) for record in records] == cells_of(checked_units(run.load(config)))
    assert [record.status for record in records] == ["ok", "ok", "refused"]
    assert "RoPE" in records[2].reason
    for record in records[:2]:
        assert record.metrics["count"] == 7
        assert record.metrics["accuracy_low"] <= record.metrics["accuracy"] <= record.metrics["accuracy_high"]
        assert record.metrics["accuracy"] * 7 == pytest.approx(round(record.metrics["accuracy"] * 7))
    assert records[0].metrics["compression"] == 0.5
    # Of 4,096 tokens, 128 of them uncompressed; a row of 20 would have none that are compressed.
    assert records[1].cell["context"] == 4096
    assert records[1].metrics["compression"] == pytest.approx(32 / 13)
    found = pretrained.find(out)
    assert found.data.task == str(TASK)
    model, asked = pretrained.restore(found), problems(TASK, 0, 7)
    layers, _ = convert_model(model, "kv:kivi2/8")
    right, exact = (
        solved(model, held, TASK, asked) for held in (layers, convert_model(model, "kv:float32")[0])
    )
    assert answered(right, exact).items() <= records[1].metrics.items()
    capsys.readouterr()
    assert small_runs.launched(config, out) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "replacement", "problem"),
    [
        ("Data.task = 'lookup_sum(keys=5,steps=2)'\n", "", "task is not given"),
        ("Train.length = 20", "Train.length = 19", "has 20 tokens to read, not 19"),
        ("'kv:kivi2/8'", "'kv:int99'", "unknown codec 'int99'"),
        ("keys=5", "keys=1", "keys = 1: expected a whole number of 4..52"),
    ],
)
def test_a_config_that_cannot_run_says_why(config, capsys, line, replacement, problem):
    config.write_text(OWN.replace(line, replacement))
    assert small_runs.launched(config, config.parent / "out", "--dry-run") == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_prompts_are_given_and_not_learnt(corpus):
    """The loss of a step is that of the answer's tokens, of prompts that are read as they are."""
    state = initial_state(MODEL, TRAIN)
    tokens = corpus.batch(0, 0, 4, 20)
    known = jnp.asarray(np.where(tokens < 0, ~tokens, tokens))
    logits = trained_model(MODEL, state)(known[:, :-1])
    expected = float(cross_entropy(logits[:, 13:], known[:, 14:]))
    whole = float(cross_entropy(logits, known[:, 1:]))
    _, loss = compiled_step(MODEL, TRAIN, corpus.masked)(state, jnp.asarray(tokens), numbers(TRAIN))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert abs(whole - expected) > 1e-4


def test_where_nothing_is_given_the_loss_is_that_of_a_text():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9), np.int32))
    losses = [
        compiled_step(MODEL, TRAIN, masked)(initial_state(MODEL, TRAIN), tokens, numbers(TRAIN))[1]
        for masked in (False, True)
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


def test_training_that_stops_and_goes_on_is_training_that_does_not(corpus):
    corpus = dataclasses.replace(corpus, first=parse_task("lookup_sum(keys=4,steps=1)"), first_steps=3)
    straight = train(MODEL, TRAIN, corpus)
    stopped = train(MODEL, TRAIN, corpus, until=2)
    resumed = train(MODEL, TRAIN, corpus, state=stopped)
    jax.tree.map(np.testing.assert_array_equal, straight.params, resumed.params)


def test_answers_are_held_against_the_unquantised_problem_by_problem():
    exact = np.repeat([True, False], [96, 4])
    right = exact.copy()
    right[:9] = False  # nine lost, two won: McNemar's p is 2 (1 + 11 + 55) / 2^11
    right[-2:] = True
    found = answered(right, exact)
    assert found["accuracy"] == 0.89
    assert found["accuracy_change"] == pytest.approx(-0.07)
    assert found["p_value"] == pytest.approx(134 / 2048)
    # Wilson: (0.89 + z^2/200 -+ z sqrt(0.89 * 0.11 / 100 + z^2/40000)) / (1 + z^2/100), z = 1.959964
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.813687, 0.937458), abs=1e-6)
    with pytest.raises(ValueError, match="as many answers"):
        answered(right, exact[1:])


def test_answers_do_not_depend_on_how_problems_are_batched():
    model = DecoderLM(dataclasses.replace(MODEL, vocab=128), rngs=_rngs())
    layers, _ = convert_model(model, "kv:bf16")
    easy = _Anything(keys=5, steps=2)
    asked = problems(TASK, 0, 5)
    answers = tuple(_told(model, layers, asked))
    asked = dataclasses.replace(asked, answers=(*answers[:2], "no", *answers[3:]))
    for batch in (1, 2, 5, 9):
        assert solved(model, layers, easy, asked, batch=batch).tolist() == [True, True, False, True, True]
    with pytest.raises(ValueError, match="batch=0"):
        solved(model, layers, easy, asked, batch=0)


class _Anything(LookupSum):
    """A task whose answer is whatever was generated."""

    @property
    def answer_length(self):
        return 3

    def answer(self, worked):
        return " ".join(map(str, worked))


def _told(model, layers, asked):
    from slimjax.generate import generate

    found = generate(model, asked.prompts, asked.lengths, layers=layers, max_new_tokens=3)
    return [" ".join(map(str, row)) for row in np.asarray(found)]


def _rngs():
    from flax import nnx

    return nnx.Rngs(1)


def test_a_row_of_the_small_task_is_as_long_as_its_config_says():
    assert row_length(TASK) == 20
