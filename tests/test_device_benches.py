"""Parity, ceilings, breakdown and peers at the smallest sizes. No assertion is about how long anything takes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from experiments import breakdown, decode_bench, decode_peers, parity, run
from slimjax.cache import codec_of
from slimjax.cache.pack import unpack
from slimjax.kernels import api
from slimjax.kernels.shapes import SHAPES
from slimjax.numerics import relative_l2
from slimjax.records import read

PARITY = """
Run.experiment = 'parity'
Parity.shapes = ('tiny-rope', 'tiny-gqa')
Parity.schemes = ('kv:bf16', 'k2:bf16', 'kv:flashq4')
Parity.tokens = (1, 3)
Parity.prompts = ('kv:flashq4@sas',)
Parity.block = 16
Parity.context = 72
"""
CEILINGS = """
Run.experiment = 'ceilings'
Ceilings.copy_bytes = 4096
Ceilings.product = 8
Ceilings.seconds = 0.001
Ceilings.least = 2
"""
BREAKDOWN = """
Run.experiment = 'breakdown'
Breakdown.shapes = ('tiny-gqa',)
Breakdown.schemes = ('kv:flashq4@sas', 'kv:int8')
Breakdown.contexts = (128,)
Breakdown.seconds = 0.001
Breakdown.least = 2
"""


def records_of(tmp_path, text, status=(0, 1)):
    config = tmp_path / "bench.gin"
    config.write_text(text)
    assert run.main([str(config), "--out", str(tmp_path / "out")]) in status
    assert (tmp_path / "out" / "report.html").exists()
    return read(tmp_path / "out" / "records.jsonl")


def test_the_reference_is_itself_in_float64_but_for_rounding(tmp_path):
    found = records_of(tmp_path, PARITY)
    assert len(found) == 2 * (3 * 2 + 1)
    assert sum(r.cell["phase"] == "prefill" for r in found) == 2
    refused = [r for r in found if r.status == "refused"]
    assert {(r.cell["shape"], r.cell["scheme"]) for r in refused} == {("tiny-gqa", "k:bf16")}
    for record in found:
        if record.status != "refused":
            assert record.status == "ok", record.reason
            assert record.metrics["attention_error"] == record.metrics["reference_error"]
            assert 1e-4 < record.metrics["attention_error"] < 2e-2


BROKEN = {
    "reads what is behind the end": (lambda q, cache, *rest: cache.streams["k"].leaves[0], "not finite"),
    "answers without keys": (lambda q, cache, *rest: jnp.ones_like(q), "without tokens has an answer"),
    "is another each time": (None, "other bits"),
    "is a tenth too large": (1.1, "more than"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_a_failed_row(fault, tmp_path, monkeypatch):
    answer, reason = BROKEN[fault]
    calls = iter(range(100))

    def decode_part(q, cache, weights, spec, start):
        if answer is None:
            out = api.reference.decode(q, cache, weights, spec, start)
            scalar = jax.ShapeDtypeStruct((), out.dtype)
            more = io_callback(lambda: np.asarray(next(calls), scalar.dtype), scalar)
            return jnp.where(cache.length[:, None, None, None] > 0, out + more, out), None
        if isinstance(answer, float):
            return answer * api.reference.decode(q, cache, weights, spec, start), None
        made = answer(q, cache)
        return made if made.shape == q.shape else jnp.full_like(q, jnp.sum(made)), None

    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_gpu", decode_part)
    text = PARITY.replace("('kv:bf16', 'k2:bf16', 'kv:flashq4')", "('kv:bf16',)").replace("(1, 3)", "(1,)")
    text = text.replace("('kv:flashq4@sas',)", "()")
    found = records_of(tmp_path, text + "Parity.implementations = ('pallas_gpu',)\n")
    assert {record.status for record in found} == {"failed"}
    assert all(reason in record.reason for record in found)


def test_a_long_sequence_that_is_wrong_is_not_hidden_by_short_ones(tmp_path, monkeypatch):
    """Means over many tokens are smaller than one token's value."""

    def decode_part(q, cache, weights, spec, start):
        out = api.reference.decode(q, cache, weights, spec, start)
        return out * jnp.where(cache.length == 72, 1.1, 1.0)[:, None, None, None], None

    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_gpu", decode_part)
    text = PARITY.replace("('tiny-rope', 'tiny-gqa')", "('tiny-rope',)").replace("(1, 3)", "(1,)")
    text = text.replace("('kv:bf16', 'k2:bf16', 'kv:flashq4')", "('kv:bf16',)")
    text = text.replace("('kv:flashq4@sas',)", "()") + "Parity.implementations = ('pallas_gpu',)\n"
    (record,) = records_of(tmp_path, text)
    assert record.status == "failed"
    assert record.reason.startswith("ValueError: error 1.0")


def test_a_kernel_of_tiles_is_as_close_as_the_reference(tmp_path):
    """Ragged, its caches encoded as a prompt's rows are: of codes that no codec makes, kernels wrap otherwise."""
    text = PARITY.replace("('tiny-rope', 'tiny-gqa')", "('tiny-rope',)").replace("(1, 3)", "(1,)")
    text = text.replace("('kv:bf16', 'k2:bf16', 'kv:flashq4')", "('kv:flashq4',)").replace("= 72", "= 128")
    text = text.replace("('kv:flashq4@sas',)", "()") + "Parity.implementations = ('pallas_tpu',)\n"
    (record,) = records_of(tmp_path, text)
    assert record.status == "ok", record.reason
    assert record.metrics["attention_error"] < 1.5 * record.metrics["reference_error"]


@pytest.mark.parametrize("scheme", ["kv:flashq4", "kv:flashq2-4", "kv:flashq8", "k2:int16+8"])
def test_caches_for_timing_hold_what_a_codec_makes(scheme):
    spec = SHAPES["tiny-rope"].spec(scheme, "bfloat16")
    cache = decode_bench.random_cache(spec, 3, 320, seed=0)
    assert (cache.length.tolist(), cache.capacity) == ([320] * 3, 320)
    for held in cache.streams.values():
        if not hasattr(held, "tiles"):
            scales = next(leaf for leaf in held.leaves if leaf.dtype == jnp.float32)
            assert (np.asarray(scales) > 0).all()
            continue
        whole = held.tiles.tiles()
        for tiles in [whole] if hasattr(whole, "scale") else [whole.few, whole.many]:
            assert (np.asarray(tiles.scale) > 0).all()
            if tiles.step is None:
                assert abs(np.asarray(tiles.packed, np.int32)).max() <= 119
            else:
                assert (np.asarray(tiles.step) >= 1).all()
                codes = np.asarray(unpack(tiles.packed, tiles.bits, axis=-3), np.int32)
                step, low = (np.asarray(each, np.int32)[..., None, :, :] for each in (tiles.step, tiles.low))
                assert abs(codes * step + low).max() <= 127


@pytest.mark.parametrize("scheme", ["kv:bf16", "k2:bf16+8", "k2:int16+8"])
def test_poison_lies_behind_every_sequence_and_nowhere_else(scheme):
    spec = SHAPES["tiny-rope"].spec(scheme, "bfloat16")
    cache = decode_bench.random_cache(spec, 3, 16, seed=0)
    cache = parity.dataclasses.replace(cache, length=jnp.asarray([0, 5, 16], jnp.int32))
    spoilt_leaves = 0
    for stream in parity.poisoned(cache).streams.values():
        for leaf, tokens_last in zip(stream.leaves, stream.tokens_last, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                continue
            values = np.asarray(leaf, np.float32)
            spoilt = np.isnan(np.swapaxes(values, 1, 2) if tokens_last else values).reshape(3, 16, -1)
            assert [int(each.all(axis=-1).sum()) for each in spoilt] == [16, 11, 0]
            assert spoilt.sum() == 27 * spoilt.shape[-1]
            spoilt_leaves += 1
    assert spoilt_leaves == 2


def test_ceilings_are_of_copies_sums_and_products(tmp_path):
    found = records_of(tmp_path, CEILINGS)
    assert [(r.cell["phase"], r.cell["dtype"]) for r in found] == [
        ("copy", "float32"), ("read", "float32"), ("product", "float32"), ("product", "bfloat16")
    ]  # fmt: skip
    assert all(r.metrics["gigabytes_per_second"] > 0 for r in found[:2])
    for record in found[2:]:
        rate = 2 * 8**3 / record.metrics["milliseconds"] / 1e9
        assert record.metrics["teraflops_per_second"] == pytest.approx(rate)


def test_every_stage_is_timed_and_other_codecs_have_none(tmp_path):
    found = records_of(tmp_path, BREAKDOWN)
    ours, others = found[:5], found[5:]
    assert [r.cell["phase"] for r in ours] == list(breakdown.PHASES)
    assert {r.status for r in ours} == {"ok"}
    assert {r.status for r in others} == {"refused"}
    assert all("no INT8 tiles" in r.reason for r in others)


@pytest.mark.parametrize("scheme", ["kv:flashq4", "kv:flashq4@sas"])
def test_the_stages_together_are_attention(scheme):
    """On the codes that the first expands: keys of scale 1 and values of scale 1."""
    spec = SHAPES["tiny-gqa"].spec(scheme, "bfloat16")
    cache = decode_bench.random_cache(spec, 2, 128, seed=0)
    codes = breakdown._expand(cache.streams, codec=codec_of(spec.scheme))
    keys, values = (codes[name].reshape(2, 128, 2, 32) for name in ("k", "v"))
    query = breakdown._codes((2, 2, 2, 32))
    scores = breakdown._scores(query, keys)
    weights = breakdown._softmax(scores, softmax=spec.scheme.softmax)
    found = np.asarray(breakdown._values(weights, values))
    q, k, v = (np.asarray(each, np.float64) for each in (query, keys, values))
    exact = 1e-4 * np.einsum("bkgh,bskh->bkgs", q, k)
    assert relative_l2(np.asarray(scores), exact) < 1e-6
    p = np.exp(exact - exact.max(axis=-1, keepdims=True))
    wanted = np.einsum("bkgs,bskh->bkgh", p / p.sum(axis=-1, keepdims=True), v)
    assert relative_l2(found, wanted) < 5e-2  # P has 119 levels


SIZES = decode_peers.Sizes(
    batch=2, context=8, heads=4, kv_heads=2, head_dim=16, dtype="float32", caches=2, steps=3, threads=1
)


def test_a_peer_takes_as_many_steps_in_turn():
    ready = decode_peers.ready(decode_peers.DOT, SIZES)
    first, second, third = ready.call()
    assert first.shape == (2, 1, 4, 16)
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)
    assert SIZES.nbytes == 2 * 2 * 8 * 2 * 16 * 4


@pytest.mark.parametrize(
    "name", [decode_peers.CUDNN, decode_peers.FLASH3, decode_peers.TOKAMAX, "torch flash"]
)
def test_what_is_made_for_gpus_is_refused_elsewhere(name):
    if name.startswith("torch"):
        pytest.importorskip("torch")
    with pytest.raises(NotImplementedError, match="is for GPUs"):
        decode_peers.ready(name, SIZES)


def test_what_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn3_jax", None)
    with pytest.raises(NotImplementedError, match="pip install flash-attn3-jax"):
        decode_peers._installed("flash_attn3_jax")


@pytest.mark.parametrize("late", [False, True])
def test_a_peer_that_does_not_work_is_refused_with_its_reason(late, monkeypatch):
    def step(q, k, v):
        if not late:
            raise RuntimeError("head size 16: built for 128 only")
        return io_callback(lambda: 1 / 0, jax.ShapeDtypeStruct((), q.dtype)) + q

    monkeypatch.setattr(decode_peers, "_jax_step", lambda name, sizes: step)
    reason = "ZeroDivisionError" if late else "RuntimeError: head size 16: built for 128 only"
    with pytest.raises(NotImplementedError, match=reason):
        decode_peers.ready(decode_peers.FLASH3, SIZES)

    def full(name, sizes):
        raise RuntimeError("RESOURCE_EXHAUSTED: so many caches")

    monkeypatch.setattr(decode_peers, "_jax_step", full)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        decode_peers.ready(decode_peers.FLASH3, SIZES)


def test_a_peer_that_breaks_down_does_not_break_our_rows(tmp_path, monkeypatch, capsys):
    def ready(name, sizes):
        raise MemoryError("RESOURCE_EXHAUSTED: so many caches")

    monkeypatch.setattr(decode_peers, "ready", ready)
    text = """
Run.experiment = 'decode_bench'
DecodeBench.shapes = ('tiny',)
DecodeBench.schemes = ('k:int16',)
DecodeBench.contexts = (16,)
DecodeBench.steps = 3
DecodeBench.seconds = 0.001
DecodeBench.least = 2
DecodeBench.copy_bytes = 4096
"""
    *peers, ours = records_of(tmp_path, text, status=(0,))  # what does not fit is a result
    output = capsys.readouterr()
    assert "2 cells did not fit in memory" in output.out
    assert output.err == ""
    table = output.out.splitlines()
    (row,) = (line for line in table if line.startswith("k:int16 "))
    assert len(row.split()) == 4  # scheme, implementation, time, share
    assert table[-1].startswith("report: ")
    assert len(peers) == 2
    assert {record.status for record in peers} == {"out-of-memory"}
    assert ours.status == "ok"
    assert "speed_over_peer" not in ours.metrics
    assert ours.metrics["temporary_bytes"] >= 0
