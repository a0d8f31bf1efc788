"""The root `compare` on tiny models: its cells, its figures against a plain computation, the same ones every time."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import small_runs
from flax import nnx

from experiments import compare, run
from experiments.compilation import compile_seconds
from experiments.launch import checked_units
from slimjax import pretrained, windows
from slimjax.attention.layer import append_rows, attend_cached, attend_full, init_cache
from slimjax.compare import Choice, choose, edges, measure, named
from slimjax.config import DataConfig, ModelConfig
from slimjax.models.decoder import convert_model, init_caches
from slimjax.numerics import relative_l1
from slimjax.records import read
from slimjax.scheme import parse_scheme
from slimjax.solve.fit import fit
from slimjax.solve.mixing import for_prompt, head_orders
from slimjax.tasks import parse_task
from slimjax.tasks.task import row_length
from slimjax.windows import continued, overlapping, prepare

SIZES = ModelConfig(layers=3, width=32, heads=4, mlp_width=32, max_length=128, position="rope")
SCHEMES = ("kv:bf16", "kv:int8", "kv:flashq2-4/32", "k:int16", "kv:kivi4/32", "kv:int8@sas#sage")
TASK = "lookup_sum(keys=5,steps=2)"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A config, and the models it is told: one of a text, one of a task."""
    folder = tmp_path_factory.mktemp("compare")
    config = small_runs.write(
        folder,
        "compare",
        f"Compare.models = ()\nCompare.schemes = {SCHEMES!r}\nCompare.selectors = ('priority', 'random')\n",
        "Compare.fractions = (0.25, 0.5)\nCompare.seeds = (0, 1)\nCompare.protected = (0, 1, 2)\n",
        "Compare.tokens = 120\nCompare.length = 80\nCompare.prompt = 40\nCompare.calibration = 320\n",
        "Compare.problems = 6\n",
    )
    small_runs.write_model(
        folder / "letters", SIZES, DataConfig(path=str(folder / "text"), held_out_percent=30.0)
    )
    small_runs.write_model(
        folder / "sums", ModelConfig(layers=3, width=16, heads=4), DataConfig(task=TASK), seed=1
    )
    places = (str(folder / "letters"), str(folder / "sums"))
    return config, f"Compare.trained = {places!r}"


@pytest.fixture(scope="module")
def exact(told):
    config, trained = told
    subject = run.load(config, [trained]).config.subjects[0]
    grid = run.load(config, [trained]).config.grid
    corpus = compare.corpus_of(subject, grid)
    scored, calibration = compare.windows_of(corpus, subject, grid)
    model = pretrained.restore(pretrained.find(subject.folder))
    return prepare(model, scored, calibration, prompt=subject.prompt, bytes_per_token=corpus.bytes_per_token)


@functools.partial(jax.jit, static_argnames="graph")
def one_token(graph, params, token, layers, caches):
    return nnx.merge(graph, params).with_cache(token, layers, caches)


def plain(model, layers, tokens, prompt, *, prefill=True):
    """Logits behind a prompt whose exact rows are in the caches, a token at a time, [B, T-P, V]."""
    inputs, found = model.attention_inputs(tokens[:, :prompt]), []
    caches = tuple(
        append_rows(x, layer, cache, None, prompt=prefill)
        for x, layer, cache in zip(inputs, layers, init_caches(layers, *tokens.shape), strict=True)
    )
    graph, params = nnx.split(model)
    for at in range(prompt, tokens.shape[1]):
        logits, caches = one_token(graph, params, tokens[:, at : at + 1], layers, caches)
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
    (part,) = exact.parts
    tokens = part.tokens[:, :-1]
    ours = log_softmax(plain(exact.model, layers, tokens, 40))
    right = log_softmax(np.asarray(exact.model(tokens), np.float64)[:, 40:])
    kl = (np.exp(right) * (right - ours)).sum(axis=-1)
    nats = -np.take_along_axis(ours, np.asarray(part.tokens)[:, 41:, None], axis=-1)[..., 0]
    before = -np.take_along_axis(right, np.asarray(part.tokens)[:, 41:, None], axis=-1)[..., 0]
    # A KL is a difference of float32 logarithms of size 6: rounding alone is some 1e-7.
    close = functools.partial(pytest.approx, rel=1e-3, abs=3e-7)
    assert found["logit_kl"] == close(kl.mean())
    assert found["logit_kl_blocks"] == close(kl.mean(axis=1))  # a window scores fewer than 64
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert math.exp(np.mean(found["nats_blocks"])) == pytest.approx(found["perplexity"])
    assert found["bits_per_byte"] == pytest.approx(nats.mean() / math.log(2), rel=1e-5)
    assert exact.bits_per_byte == pytest.approx(before.mean() / math.log(2), rel=1e-5)
    assert found["top1_agreement"] == (ours.argmax(-1) == right.argmax(-1)).mean()
    assert found["count"] == kl.size == 120
    assert found["logit_kl_low"] < found["logit_kl"] < found["logit_kl_high"]
    # Layers, K and V, heads: codes and a float32 scale.
    assert found["bytes_per_token"] == 3 * 2 * 4 * (8 // 2 + 4)
    assert found["compression"] == pytest.approx(4 * 32 * 3 / found["bytes_per_token"])
    assert found["positions"] == [64, 80]
    assert found["logit_kl_by_position"] == close([kl[:, :24].mean(), kl[:, 24:].mean()])
    assert found["attention_l1"] >= found["attention_l1_mean"] > 0
    assert found["attention_cosine"] <= found["attention_cosine_mean"] < 1
    each = []
    for block, layer, x in zip(exact.model.blocks, layers, exact.model.attention_inputs(tokens), strict=True):
        cache = append_rows(x[:, :40], layer, init_cache(layer.spec, batch=3, capacity=80), None, prompt=True)
        wanted = attend_full(x, block.attention.projections(), layer.spec)[:, 40:]
        each.append(relative_l1(attend_cached(x[:, 40:], layer, cache)[0], wanted))
    assert found["attention_l1"] == pytest.approx(max(each), rel=1e-5)
    assert found["attention_l1_mean"] == pytest.approx(sum(each) / 3, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["kv:gear_l2/32", "kv:flashq2(universal=last)/32"])
def test_tiles_of_a_prompt_are_those_of_prefill(exact, scheme):
    """As in the same loop, but for codes on the edge; not as if the prompt had come token by token."""
    layers = convert_model(exact.model, scheme)[0]
    (part,) = exact.parts
    found = np.asarray(continued(exact.model, layers, part)[0])
    wanted, stepped = (
        plain(exact.model, layers, part.tokens[:, :-1], 40, prefill=prefill) for prefill in (True, False)
    )
    assert np.median(np.abs(found - wanted).max(axis=-1)) < 1e-5
    assert np.median(np.abs(found - stepped).max(axis=-1)) > 1e-3


def test_an_exact_cache_changes_nothing(exact):
    found = measure(exact, convert_model(exact.model, "kv:float32")[0], context=64)
    (part,) = exact.parts
    logits, outputs = continued(exact.model, convert_model(exact.model, "kv:float32")[0], part)
    whole = np.asarray(exact.model(part.tokens[:, :-1]))[:, 40:]
    assert np.abs(logits - whole).max() < 1e-5 * np.abs(whole).max()
    assert len(outputs) == 3
    assert found["logit_kl"] < 1e-7
    assert found["top1_agreement"] == 1
    assert found["attention_l1"] < 1e-5
    assert abs(found["bits_per_byte_change"]) < 1e-6


def test_protected_layers_have_the_other_scheme(exact):
    way = Choice(scheme=parse_scheme("kv:int2"), protected=1, protection=parse_scheme("kv:int8"))
    assert [str(layer.spec.scheme) for layer in choose(exact, way)] == ["kv:int8", "kv:int2", "kv:int8"]
    control = dataclasses.replace(way, protect="middle")
    assert [str(each) for each in control.schemes(5)] == [
        "kv:int2",
        "kv:int8",
        "kv:int8",
        "kv:int2",
        "kv:int2",
    ]
    assert [str(each) for each in control.schemes(4)] == ["kv:int2", "kv:int8", "kv:int8", "kv:int2"]
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


@pytest.mark.parametrize("scheme", ["kv:flashq2-4/32", "k:flashq2-4/32"])
def test_heads_are_ordered_by_calibration_and_the_map_is_of_that_order(exact, scheme):
    way = Choice(scheme=parse_scheme(scheme), selector="minmax")
    orders = head_orders(exact.model, exact.calibration, scheme, "minmax")
    assert any(order.tolist() != [0, 1, 2, 3] for order in orders)
    for index, (layer, order) in enumerate(zip(choose(exact, way), orders, strict=True)):
        assert exact.order(index, way.scheme, "minmax", 0).tolist() == order.tolist()
        weights = exact.model.blocks[index].attention.projections()
        assert np.array_equal(layer.projections.wq, np.asarray(weights.wq)[:, order])
        if scheme.startswith("k:"):
            wk, wv = (np.asarray(w, np.float64)[:, order].reshape(32, 32) for w in (weights.wk, weights.wv))
            best = fit(wk, wv, layer.spec, exact.calibrations[index]).solution.weight
            assert np.allclose(np.asarray(layer.weights.w_kv).reshape(32, 32), best, atol=1e-5)


def test_an_order_is_found_once(exact, monkeypatch):
    asked = []
    monkeypatch.setattr(windows, "head_order", lambda *_, **named: asked.append(named) or np.arange(4))
    for scheme in ("kv:flashq4-8/32", "kv:flashq4-8/32@sas", "kv:flashq4-8/32"):
        assert exact.order(1, parse_scheme(scheme), "priority", 0).tolist() == [0, 1, 2, 3]
    assert len(asked) == 1
    exact.order(1, parse_scheme("kv:flashq4-8/32@sas"), "calibrated", 0)  # looks at the softmax, too
    exact.order(2, parse_scheme("kv:flashq4-8/32"), "priority", 0)
    assert [named["seed"] for named in asked] == [(0, 1), (0, 1), (0, 2)]


def test_heads_are_chosen_on_the_first_calibration_windows_and_no_more_are_read(exact, monkeypatch):
    fresh = dataclasses.replace(exact)
    monkeypatch.setattr(windows, "HEAD_TOKENS", 2 * exact.calibration.shape[1] + 1)
    scheme = parse_scheme("kv:flashq2-4/32")
    order = fresh.order(0, scheme, "minmax", 0)
    assert len(fresh._calibrated) == 2
    few = head_orders(exact.model, exact.calibration[:2], str(scheme), "minmax")
    assert order.tolist() == few[0].tolist()
    whole = exact.model.attention_inputs(exact.calibration)
    read = fresh.calibration_inputs()
    assert len(read) == len(exact.calibration) == len(fresh._calibrated)
    for index, layer in enumerate(whole):
        np.testing.assert_allclose(np.concatenate([window[index] for window in read]), layer, atol=1e-5)


@pytest.mark.slow
def test_cells_of_one_shape_share_their_compilation(exact):
    """Which heads have few bits is in the weights' order, not in the program."""

    def seconds(**options):
        """Of compilation that a cell takes."""
        before = compile_seconds()
        choice = Choice(scheme=parse_scheme("kv:flashq2-4/32"), **options)
        measure(exact, choose(exact, choice), context=4096)
        return compile_seconds() - before

    seconds(selector="random", seed=0)
    assert seconds(selector="random", seed=1) == 0
    seconds(selector="priority")  # its own statistics
    assert seconds(selector="none") == 0
    assert seconds(selector="none", dtype="bfloat16") > 0


def test_a_prompt_orders_its_own_heads(exact):
    way = Choice(scheme=parse_scheme("kv:flashq2-8/32"), selector="dynamic")
    layers = choose(exact, way)
    found = measure(exact, layers, context=128, dynamic=True)
    (part,) = exact.parts
    tokens, each = part.tokens[:, :-1], []
    right = log_softmax(part.logits.astype(np.float64))
    for index in range(3):
        row = tokens[index : index + 1]
        ready = for_prompt(exact.model, row[:, :40], layers)
        ours = log_softmax(plain(exact.model, ready, row, 40))[0]
        each.append((np.exp(right[index]) * (right[index] - ours)).sum(axis=-1).mean())
    assert found["logit_kl_blocks"] == pytest.approx(each, rel=1e-3)
    assert found["count"] == 120


def test_selectors_need_heads_of_two_widths(exact):
    for scheme, problem in (
        ("kv:flashq4", "one width for all heads"),
        ("x1:xquant2", "one row for all of them"),
    ):
        with pytest.raises(NotImplementedError, match=problem):
            choose(exact, Choice(scheme=parse_scheme(scheme), selector="priority"))


def test_windows_overlap_by_their_prompts():
    """Of the shortest text every token behind the first prompt is scored once; of a longer one none twice."""
    found = overlapping(np.arange(100, 100 + 3 * 5 + 4), 3, 8, 3)
    assert found.dtype == np.int32
    assert found[:, 0].tolist() == [100, 105, 110]
    assert np.concatenate([row[4:] for row in found]).tolist() == list(range(104, 119))
    longer = overlapping(np.arange(400), 3, 8, 3)
    assert longer[:, 0].tolist() == [0, 195, 390]
    with pytest.raises(ValueError, match=r"text of 18 tokens has no 3 windows of 8, .* these need 19"):
        overlapping(np.arange(18), 3, 8, 3)
    with pytest.raises(ValueError, match="longer than a prompt"):
        overlapping(np.arange(18), 1, 8, 8)


def test_a_book_is_what_is_between_the_marks():
    assert (
        compare.book("head\n*** START OF IT ***\nfirst\nlast\n*** END OF IT ***\nlicence\n")
        == "first\nlast\n"
    )
    assert compare.book("no marks\n*** anywhere\n") == "no marks\n*** anywhere\n"


def test_ranges_of_positions_double():
    assert edges(1024) == [64, 128, 256, 512, 1024]
    assert edges(2048, 256) == [512, 1024, 2048]
    assert edges(300) == [64, 128, 256, 300]
    assert edges(1024, 512) == [1024]
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
    assert (answered.cell["length"], answered.cell["prompt"]) == (length, parse_task(TASK).prompt_length)
    assert len(answered.metrics["solved_samples"]) == answered.metrics["problems"] == 6
    assert (
        answered.metrics["accuracy_low"] <= answered.metrics["accuracy"] <= answered.metrics["accuracy_high"]
    )
    # Whole windows, at least as many tokens as asked for: the answer but its first token, which the prompt gives.
    scored = parse_task(TASK).answer_length - 1
    assert answered.metrics["count"] == -(-120 // scored) * scored
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
        ("Compare.known = ('nowhere',)", "known: nowhere: no finished run there"),
        ("Compare.trained = ()", "no model: add --set"),
        ("Compare.trained = ('nowhere',)", "nowhere: no such folder"),
        ("Compare.models = ('nowhere',)", "no Llama-like language model there; `make models`"),
        ("Compare.schemes = ('kv:int17',)", "unknown codec 'int17'"),
        ("Compare.schemes = ('kv:flashq4', 'kv:flashq4/64', 'kv:flashq4')", "expected distinct values"),
        ("Compare.protection = 'e'", "is not of the form"),
        ("Compare.tokens = 100", "not a multiple of the 40 that a window scores"),
        ("Compare.prompt = 80", "leaves nothing to score of windows of length = 80"),
        ("Compare.calibration = 4", "at least a token for each of 5 windows"),
        ("Compare.protect = ()", "expected distinct values, at least one"),
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
    with pytest.raises(run.Fault, match=r"letters: text of .* has no 10000 windows of 80, of which 40 each"):
        run.load(config, [trained, "Compare.tokens = 400000"]).checked()


def test_prompts_that_order_their_heads_answer_no_problems(told):
    config, trained = told
    told_more = [trained, "Compare.selectors = ('dynamic',)", "Compare.protected = (0,)"]
    plan = run.load(config, told_more)
    (unit,) = (unit for unit in checked_units(plan) if unit.name == "sums")
    refused = compare.forecast(unit, plan.config).refused
    assert [unit.cells[index]["selector"] for index in refused] == ["dynamic"] * 2  # of two fractions
    assert "layers of its own" in next(iter(refused.values()))
