"""The root `compare` on tiny models: its cells, its figures against a plain computation, the same ones every time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import tiny_cli
from flax import nnx

from experiments import compare, run
from experiments.launch import checked_units
from slimjax import checkpoint, pretrained
from slimjax.compare import Choice, choose, edges, measure, named, prepare
from slimjax.config import DataConfig, ModelConfig
from slimjax.evaluate import cached_logits
from slimjax.models.decoder import DecoderLM, convert_model, init_caches
from slimjax.numerics import relative_l1
from slimjax.pretrained import describe
from slimjax.records import read
from slimjax.scheme import parse_scheme
from slimjax.solve.fit import fit
from slimjax.tasks import parse_task
from slimjax.tasks.task import row_length

SIZES = ModelConfig(layers=3, width=32, heads=4, mlp_width=32, max_length=128, position="rope")
SCHEMES = ("kv:bf16", "kv:int8", "kv:flashq2-4/32", "k:int16", "kv:kivi4/32", "kv:int8@sas#sage")
TASK = "lookup_sum(keys=5,steps=2)"


def write_model(folder, sizes, data, seed=0):
    describe(folder, sizes, data)
    params = nnx.state(DecoderLM(sizes, rngs=nnx.Rngs(seed)), nnx.Param)
    checkpoint.save(folder, 1, tiny_cli.State(params=params))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A config, and the models it is told: one of a text, one of a task."""
    folder = tmp_path_factory.mktemp("compare")
    config = small_runs.write(
        folder,
        "compare",
        f"Compare.models = ()\nCompare.schemes = {SCHEMES!r}\nCompare.selectors = ('priority', 'random')\n",
        "Compare.fractions = (0.25, 0.5)\nCompare.seeds = (0, 1)\nCompare.protected = (0, 1, 2)\n",
        "Compare.tokens = 128\nCompare.length = 64\nCompare.calibration = 320\nCompare.problems = 6\n",
    )
    write_model(folder / "letters", SIZES, DataConfig(path=str(folder / "text"), held_out_percent=30.0))
    write_model(folder / "sums", ModelConfig(layers=3, width=16, heads=4), DataConfig(task=TASK), seed=1)
    places = (str(folder / "letters"), str(folder / "sums"))
    return config, f"Compare.trained = {places!r}"


@pytest.fixture(scope="module")
def exact(told):
    config, trained = told
    subject = run.load(config, [trained]).config.subjects[0]
    grid = run.load(config, [trained]).config.grid
    corpus = compare.corpus_of(subject, grid.calibration)
    scored, calibration = compare.windows_of(corpus, subject, grid)
    model = pretrained.restore(pretrained.find(subject.folder))
    return prepare(model, scored, calibration, bytes_per_token=corpus.bytes_per_token)


def plain(model, layers, tokens):
    """Logits through the caches, a token at a time, [B, T, V]."""
    caches, found = init_caches(layers, *tokens.shape), []
    step = jax.jit(lambda token, caches: model.with_cache(token, layers, caches))
    for at in range(tokens.shape[1]):
        logits, caches = step(tokens[:, at : at + 1], caches)
        found.append(np.asarray(logits, np.float64))
    return np.concatenate(found, axis=1)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_its_figures_are_those_of_a_plain_computation(exact):
    """Logits token by token through the cache, in numpy from there on; attention's error from one layer by hand."""
    scheme = "kv:int4"
    layers = choose(exact, Choice(scheme=parse_scheme(scheme)))
    found = measure(exact, layers, context=128)
    tokens = np.concatenate([np.asarray(part.tokens) for part in exact.parts])
    ours = log_softmax(plain(exact.model, layers, jnp.asarray(tokens[:, :-1])))
    right = log_softmax(np.asarray(exact.model(jnp.asarray(tokens[:, :-1])), np.float64))
    kl = (np.exp(right) * (right - ours)).sum(axis=-1)
    nats = -np.take_along_axis(ours, tokens[:, 1:, None], axis=-1)[..., 0]
    assert found["logit_kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert found["logit_kl_blocks"] == pytest.approx(kl.mean(axis=1), rel=1e-3)  # 64 tokens are a window here
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats.mean() / math.log(2), rel=1e-5)
    assert found["top1_agreement"] == (ours.argmax(-1) == right.argmax(-1)).mean()
    assert found["count"] == 128
    assert found["logit_kl_low"] < found["logit_kl"] < found["logit_kl_high"]
    assert found["bytes_per_token"] == 3 * 2 * 4 * (
        8 // 2 + 4
    )  # layers, K and V, heads: codes and a float32 scale
    assert found["compression"] == pytest.approx(4 * 32 * 3 / found["bytes_per_token"])
    assert found["attention_l1"] >= found["attention_l1_mean"] > 0
    assert found["attention_cosine"] <= found["attention_cosine_mean"] < 1
    (part,) = exact.parts
    outputs = cached_logits(exact.model, layers, part.tokens[:, :-1], part.inputs)[1]
    each = [relative_l1(a, b) for a, b in zip(outputs, part.outputs, strict=True)]
    assert found["attention_l1"] == pytest.approx(max(each), rel=1e-6)
    assert found["attention_l1_mean"] == pytest.approx(sum(each) / 3, rel=1e-6)


def test_an_exact_cache_changes_nothing(exact):
    found = measure(exact, convert_model(exact.model, "kv:float32")[0], context=64)
    assert found["logit_kl"] < 1e-9
    assert found["top1_agreement"] == 1
    assert found["attention_l1"] < 1e-5
    assert abs(found["bits_per_byte_change"]) < 1e-6


def test_protected_layers_have_the_other_scheme(exact):
    way = Choice(scheme=parse_scheme("kv:int2"), protected=1, protection=parse_scheme("kv:int8"))
    assert [str(layer.spec.scheme) for layer in choose(exact, way)] == ["kv:int8", "kv:int2", "kv:int8"]
    with pytest.raises(NotImplementedError, match="2 protected layers at either end leave none of 3"):
        Choice(scheme=way.scheme, protected=2, protection=way.protection).schemes(3)


def test_keys_alone_have_the_map_that_calibration_chooses(exact):
    """One of the candidates that ``fit`` makes of the calibration tokens: not the exact inverse's."""
    chosen = choose(exact, Choice(scheme=parse_scheme("k:int4")))
    for index, layer in enumerate(chosen):
        weights = exact.model.blocks[index].attention.projections()
        wk, wv = (np.asarray(w, np.float64).reshape(32, 32) for w in (weights.wk, weights.wv))
        best = fit(wk, wv, layer.spec, exact.calibrations[index]).solution.weight
        assert np.allclose(np.asarray(layer.weights.w_kv).reshape(32, 32), best, atol=1e-5)
        assert not np.allclose(best, np.linalg.solve(wk, wv), atol=1e-3)


def test_ranges_of_positions_double():
    assert edges(1024) == [64, 128, 256, 512, 1024]
    assert edges(300) == [64, 128, 256, 300]
    assert edges(64) == [64]
    assert edges(20) == [20]


def test_a_fraction_is_an_option_of_schemes_of_two_widths():
    assert str(named("kv:flashq2-4", 0.25)) == "kv:flashq2-4(share=0.25)"
    assert str(named("kv:flashq2-4", None)) == "kv:flashq2-4"
    assert str(named("kv:flashq4", 0.25)) == "kv:flashq4"


@pytest.fixture(scope="module")
def finished(told):
    config, trained = told
    out = config.parent / "out"
    assert small_runs.launched(config, out, "--set", trained) == 0
    return out


@pytest.mark.slow
def test_every_way_is_a_row(told, finished):
    config, trained = told
    records = read(finished / "records.jsonl")
    cells = [cell for unit in checked_units(run.load(config, [trained])) for cell in unit.cells]
    assert [dict(record.cell) for record in records] == cells
    for model in ("letters", "sums"):
        here = [record for record in records if record.cell["model"] == model]
        # Five schemes of one width; one of two, by two fractions, priority and random with two seeds; three times.
        assert len(here) == (5 + 2 * 3) * 3
        assert {r.status for r in here if r.cell["protected"] == 2} == {"refused"}
        for record in here:
            if record.cell["protected"] < 2:
                assert record.status == "ok", record.reason
                assert record.metrics["logit_kl"] >= 0
                assert ("accuracy" in record.metrics) == (model == "sums")
    (answered,) = (
        r
        for r in records
        if r.cell["model"] == "sums" and r.cell["scheme"] == "kv:bf16" and not r.cell["protected"]
    )
    length = row_length(parse_task(TASK))
    assert answered.cell["length"] == length
    assert len(answered.metrics["solved_samples"]) == answered.metrics["problems"] == 6
    assert (
        answered.metrics["accuracy_low"] <= answered.metrics["accuracy"] <= answered.metrics["accuracy_high"]
    )
    windows = 128 // length
    assert answered.metrics["count"] == windows * (length - parse_task(TASK).prompt_length + 1)
    page = (finished / "report.html").read_text()
    assert "<svg" in page
    assert {path.stem for path in (finished / "tables").iterdir()} == {"main", "main_letters", "main_sums"}


@pytest.mark.slow
def test_the_same_config_gives_the_same_metrics_bit_by_bit(told, finished):
    config, trained = told
    again = config.parent / "again"
    fewer = f"Compare.schemes = {('kv:flashq2-4/32', 'k:int16', 'kv:int8@sas#sage')!r}"
    assert small_runs.launched(config, again, "--set", trained, "--set", fewer) == 0
    before = {record.key: record.metrics for record in read(finished / "records.jsonl")}
    records = read(again / "records.jsonl")
    assert len(records) == 2 * 3 * (2 + 2 * 3)
    for record in records:
        assert record.metrics == before[record.key]


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("Compare.trained = ()", "no model: add --set"),
        ("Compare.trained = ('nowhere',)", "nowhere: no such folder"),
        ("Compare.models = ('nowhere',)", "no Llama-like language model there; `make models`"),
        ("Compare.schemes = ('kv:int17',)", "unknown codec 'int17'"),
        ("Compare.schemes = ('kv:flashq4', 'kv:flashq4/64', 'kv:flashq4')", "expected distinct values"),
        ("Compare.protection = 'e'", "is not of the form"),
        ("Compare.tokens = 100", "not a multiple of length = 64"),
        ("Compare.selectors = ('best',)", "expected one of 'none'"),
    ],
)
def test_what_it_refuses(told, wrong, problem):
    config, trained = told
    with pytest.raises(run.Fault) as caught:
        run.load(config, [*([] if "trained" in wrong else [trained]), wrong])
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_has_to_be_enough_text(told):
    config, trained = told
    with pytest.raises(run.Fault, match=r"letters: held-out text of .* has no 10000 windows"):
        run.load(config, [trained, "Compare.tokens = 640000"]).checked()
