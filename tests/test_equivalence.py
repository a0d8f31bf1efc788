"""The root `equivalence` on a model that `train` has trained: its cells, its identity, and what it refuses."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import small_runs
from flax import nnx

from experiments import run
from experiments.estimate import estimate
from experiments.launch import checked_units
from experiments.schemes import abstract_layer, layer_spec
from slimjax import checkpoint, evaluate, pretrained
from slimjax.attention.positions import KINDS
from slimjax.attention.projections import Projections
from slimjax.config import ModelConfig, TrainConfig
from slimjax.data import load_corpus
from slimjax.records import read
from slimjax.solve import convert
from slimjax.train import state_shapes

pytestmark = pytest.mark.slow

POSITIONS = "Pretrained.positions = ('rope', 'kerple', 'fire')\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run directory of a trained model with Kerple's bias, and a config that measures it."""
    folder = tmp_path_factory.mktemp("equivalence")
    config = small_runs.write(
        folder,
        "train",
        small_runs.MODEL,
        small_runs.HEADS,
        "Model.position = 'kerple'\nTraining.held_out_tokens = 64\n",
    )
    assert small_runs.launched(config, folder / "trained") == 0
    small_runs.write(folder, "equivalence", POSITIONS, small_runs.MEASURED)
    return folder


def plan(folder, place="trained", *more):
    return run.load(folder / "equivalence.gin", [f"Pretrained.checkpoint = {str(folder / place)!r}", *more])


@pytest.fixture(scope="module")
def finished(trained):
    out = trained / "out"
    setting = f"Pretrained.checkpoint = {str(trained / 'trained')!r}"
    assert small_runs.launched(trained / "equivalence.gin", out, "--set", setting) == 0
    return read(out / "records.jsonl")


def test_every_scheme_dtype_and_position_is_a_row(trained, finished):
    assert [dict(record.cell) for record in finished] == [
        cell for unit in checked_units(plan(trained)) for cell in unit.cells
    ]
    assert list(dict.fromkeys(record.cell["position"] for record in finished)) == [
        "kerple",  # the model's own first
        "rope",
        "fire",
    ]
    for record in finished:
        own, rope = record.cell["position"] == "kerple", record.cell["position"] == "rope"
        if rope and record.cell["scheme"] == "x:bf16":
            assert record.status == "refused"
            continue
        assert record.status == "ok", record.reason
        assert record.cell["steps"] == 6
        if record.cell["dtype"] == "float64":
            assert record.metrics["identity_error"] < 1e-12
        else:
            assert 0 < record.metrics["attention_error"] < 0.1
            assert ("bits_per_byte" in record.metrics) == own
    errors = {
        r.cell["position"]: r.metrics["attention_error"]
        for r in finished
        if r.cell["scheme"] == "k:int16" and "attention_error" in r.metrics
    }
    assert len(set(errors.values())) == len(errors)  # each position scheme is another layer


def test_what_will_be_refused_is_known_before(trained, finished):
    found = plan(trained)
    known = estimate(found.experiment, checked_units(found), found.config).refused
    assert known == {i: record.reason for i, record in enumerate(finished) if record.status == "refused"}
    assert known


def test_under_its_own_position_a_layer_is_what_the_model_says(trained):
    found = pretrained.find(trained / "trained")
    model, config = pretrained.restore(found), plan(trained).config
    reference = evaluate.prepare(model, load_corpus(found.data), config.equivalence)
    layers = evaluate.at_position(reference, model.blocks[0].attention.position, seed=0)
    whole, single = (
        evaluate.measure(reference, "k:int16", "float32"),
        evaluate.layer_errors(layers, "k:int16", "float32"),
    )
    assert single == pytest.approx({name: whole[name] for name in single}, rel=1e-3)
    assert {"attention_error", "value_error", "bytes_per_token", "condition_number"} <= single.keys()


def test_the_parameters_alone_are_read_and_are_those_that_were_saved(trained):
    folder = trained / "trained" / "models" / "default"
    found = pretrained.find(trained / "trained")
    assert (found.folder, found.step, found.model.position) == (folder, 6, "kerple")

    whole = checkpoint.restore(folder, state_shapes(found.model, TrainConfig()))
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(pretrained.restore(found), nnx.Param)),
        jax.tree.leaves(whole.params),
        strict=True,
    ):
        assert np.array_equal(ours, theirs)


def test_the_run_is_that_of_the_contents_wherever_they_lie(trained):
    shutil.copytree(trained / "trained" / "models", trained / "elsewhere" / "models")
    here, there = plan(trained), plan(trained, "elsewhere")
    assert here.run == there.run == plan(trained, "trained/models/default").run
    folder = trained / "elsewhere" / "models" / "default"
    found = pretrained.find(folder)

    state = checkpoint.restore(folder, state_shapes(found.model, TrainConfig()))
    parameters = jax.tree.map(lambda leaf: leaf + jax.numpy.ones((), leaf.dtype), state.params)

    checkpoint.save(folder, 6, dataclasses.replace(state, params=parameters))
    assert plan(trained, "elsewhere").run != here.run


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("missing", "no such folder; expected one of a trained model"),
        ("text", "no model.json there or in models/*/"),
        ("several", "holds several models (a, b); name one"),
        ("torn", "model.json: not the description of a model"),
        ("foreign", "model.json: not the description of a model (unknown speed)"),
        ("untrained", "no complete checkpoint yet"),
    ],
)
def test_a_wrong_place_is_one_line(trained, tmp_path, capsys, place, problem):
    described = (trained / "trained" / "models" / "default" / "model.json").read_text()
    foreign = json.loads(described)
    foreign["model"]["speed"] = 1
    texts = {
        "several/models/a": described,
        "several/models/b": described,
        "torn": described[:30],
        "foreign": json.dumps(foreign),
        "untrained": described,
    }
    for name, text in texts.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.json").write_text(text)
    (tmp_path / "text").mkdir()
    setting = f"Pretrained.checkpoint = {str(tmp_path / place)!r}"
    assert small_runs.launched(trained / "equivalence.gin", tmp_path / "out", "--set", setting) == 2
    errors = capsys.readouterr().err
    assert errors.startswith('error: --set "Pretrained.checkpoint')
    assert problem in errors
    assert errors.count("\n") == 1


def test_no_place_at_all_says_how_to_give_one(trained, tmp_path, capsys):
    assert small_runs.launched(trained / "equivalence.gin", tmp_path / "out") == 2
    assert "checkpoint is not given: add --set \"Pretrained.checkpoint = 'PATH'\"" in capsys.readouterr().err


@pytest.mark.parametrize("position", KINDS)
@pytest.mark.parametrize(
    "scheme", ["kv:bf16", "k:int16", "k1:int16", "v1:int8", "v:bf16", "x:bf16", "x1:bf16"]
)
def test_a_layer_in_the_abstract_has_the_shapes_of_one_converted(scheme, position):

    spec = layer_spec(ModelConfig(width=8, heads=2), scheme, "float32", position)
    abstract = abstract_layer(spec)
    key = iter(jax.random.split(jax.random.key(0), 30))
    drawn = jax.tree.map(
        lambda leaf: jax.random.normal(next(key), leaf.shape, leaf.dtype), abstract.projections
    )
    assert isinstance(drawn, Projections)
    try:
        layer = convert(drawn, spec).layer
    except NotImplementedError:
        assert position == "rope"
        return
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), each) for each in (layer, abstract)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
