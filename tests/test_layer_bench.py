"""The bench of whole layers at the smallest sizes. No assertion is about how long anything takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import layer_bench, run
from experiments.layer_bench import random_projections
from slimjax.attention.layer import attend_cached, init_cache, prefill
from slimjax.kernels.shapes import SHAPES
from slimjax.records import read
from slimjax.solve import convert

TINY = """
Run.experiment = 'layer_bench'
LayerBench.shapes = ('tiny-rope', 'tiny-gqa')
LayerBench.schemes = ('kv:flashq4@sas', 'k:int16+4')
LayerBench.context = 16
LayerBench.generated = 3
LayerBench.seconds = 0.001
LayerBench.least = 2
"""


def test_prefill_and_decoding_of_every_scheme_are_held_against_bf16(tmp_path, capsys):
    config = tmp_path / "bench.gin"
    config.write_text(TINY)
    assert run.main([str(config), "--out", str(tmp_path / "out")]) == 0
    found = read(tmp_path / "out" / "records.jsonl")
    by = {(r.cell["shape"], r.cell["phase"], r.cell["scheme"]): r for r in found}
    assert len(by) == len(found) == 12
    refused = [key for key, record in by.items() if record.status == "refused"]
    assert refused == [("tiny-gqa", phase, "k:int16+4") for phase in ("prefill", "decode")]
    assert "GQA" in by[refused[0]].reason
    for (shape, phase, scheme), record in by.items():
        if record.status == "refused":
            continue
        metrics, peer = record.metrics, by[shape, phase, "kv:bf16"].metrics
        assert metrics["speed_over_bf16"] == pytest.approx(peer["milliseconds"] / metrics["milliseconds"])
        tokens = 16 if phase == "prefill" else 1
        assert metrics["tokens_per_second"] == pytest.approx(1e3 * tokens / metrics["milliseconds"])
        cache = init_cache(SHAPES[shape].spec(scheme, "float32"), batch=1, capacity=16)
        assert metrics["cache_bytes"] == cache.nbytes
        assert metrics["temporary_bytes"] > 0
    assert "kv:bf16's time / this" in (tmp_path / "out" / "report.html").read_text().replace("&#x27;", "'")


@pytest.mark.parametrize("scheme", ["kv:float32", "kv:flashq4(window=32)/32"])
def test_what_is_timed_is_one_token_after_the_other(scheme):
    """All 20 tokens are decoded behind the 16 of the prefill, each on the cache that the one before it left."""
    spec = SHAPES["tiny-rope"].spec(scheme, "float32")
    layer = convert(random_projections(SHAPES["tiny-rope"]), spec).layer
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 36, spec.width), np.float32))
    _, cache = prefill(x[:, :16], layer, init_cache(spec, batch=2, capacity=36))
    outs, streams = jax.jit(layer_bench.decoded)(x[:, 16:], layer, cache)
    wanted = []
    for index in range(16, 36):
        out, cache = attend_cached(x[:, index : index + 1], layer, cache)
        wanted.append(np.asarray(out)[:, 0])
    np.testing.assert_allclose(np.asarray(outs), np.stack(wanted), rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(streams), jax.tree.leaves(cache.streams), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [("('nano',)", "unknown name 'nano'"), ("('whisper-large-cross',)", "cross-attention")],
)
def test_a_shape_that_cannot_be_timed_is_refused_before_the_run(shapes, named, tmp_path, capsys):
    config = tmp_path / "bench.gin"
    config.write_text(TINY)
    assert run.main([str(config), "--set", f"LayerBench.shapes = {shapes}", "--dry-run"]) == 2
    assert named in capsys.readouterr().err
