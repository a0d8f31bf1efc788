"""The benches end to end at the smallest sizes. No assertion is about how long anything takes."""

import importlib.metadata
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import decode_bench, decode_models, decode_peers, run, train_bench
from slimjax.config import ModelConfig
from slimjax.kernels.shapes import SHAPES
from slimjax.records import read
from slimjax.report import facts
from slimjax.timing import Timing

TRAIN = """
Run.experiment = 'train_bench'
TrainBench.models = ('tiny',)
TrainBench.seconds = 0.001
TrainBench.least = 2
Train.warmup = 0
Train.batch = 2
Train.length = 8
Model.layers = 1
Model.width = 16
Model.heads = 2
Model.vocab = 32
"""
DECODE = """
Run.experiment = 'decode_bench'
DecodeBench.shapes = ('tiny', 'tiny-gqa')
DecodeBench.schemes = ('kv:bf16', 'k:int16')
DecodeBench.contexts = (16,)
DecodeBench.seconds = 0.001
DecodeBench.least = 2
DecodeBench.copy_bytes = 4096
DecodeBench.models = ('tiny',)
DecodeBench.model_schemes = ('k:float32',)
DecodeBench.model_batches = (2,)
DecodeBench.prompt_length = 5
DecodeBench.generated = 60
Model.layers = 1
Model.width = 16
Model.heads = 2
Model.vocab = 32
"""


def records_of(tmp_path, text):
    config = tmp_path / "bench.gin"
    config.write_text(text)
    assert run.main([str(config), "--out", str(tmp_path / "out")]) == 0
    return read(tmp_path / "out" / "records.jsonl")


@pytest.fixture
def no_torch(monkeypatch):
    """As if PyTorch were not installed."""
    monkeypatch.delitem(sys.modules, "experiments.torch_peer", raising=False)
    monkeypatch.delattr(sys.modules["experiments"], "torch_peer", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.usefixtures("no_torch")
def test_training_without_pytorch(tmp_path):
    peer, ours = records_of(tmp_path, TRAIN)
    assert (peer.status, peer.cell["framework"]) == ("refused", "torch")
    assert "pip install 'slimjax[parity]'" in peer.reason
    assert ours.status == "ok"
    assert len(ours.metrics["milliseconds_samples"]) >= 2
    per_step = ours.metrics["milliseconds"] / 1e3
    assert ours.metrics["tokens_per_second"] == pytest.approx(2 * 8 / per_step)
    assert ours.metrics["compile_seconds"] > 0
    assert "speed_over_peer" not in ours.metrics


@pytest.mark.usefixtures("no_torch")
def test_decoding_without_pytorch(tmp_path):
    records = records_of(tmp_path, DECODE)
    by = {
        (r.cell.get("shape") or r.cell["model"], r.cell["scheme"], r.cell.get("backend", "")): r
        for r in records
    }
    torch = by["tiny", "kv:float32", decode_peers.SDPA]
    assert torch.status == "refused"
    assert "slimjax[parity]" in torch.reason
    ours, theirs = by["tiny", "k:int16", "reference"], by["tiny", "kv:float32", decode_peers.DOT]
    assert ours.metrics["speed_over_peer"] == pytest.approx(
        theirs.metrics["milliseconds"] / ours.metrics["milliseconds"]
    )
    share = ours.metrics["gigabytes_per_second"] / ours.metrics["copy_gigabytes_per_second"]
    assert ours.metrics["share_of_copy_bandwidth"] == pytest.approx(share)
    assert ours.metrics["compile_seconds"] > 0
    refused = by["tiny-gqa", "k:int16", "reference"]
    assert refused.status == "refused"
    assert "GQA" in refused.reason
    (generation,) = (r for r in records if r.cell.get("framework") == "slimjax")
    assert generation.status == "ok"
    assert {"tokens_per_second", "time_to_first_token"} <= generation.metrics.keys()
    json.dumps([r.to_json() for r in records])


@pytest.mark.parametrize("stalls", [1, 3])
def test_a_stall_while_the_first_token_is_timed_is_measured_again(stalls, monkeypatch):
    """The machine stalls the first few times: the difference is negative, so both are timed again, and longer."""
    asked = []

    def time_calls(call, *, least, **_):
        generated = call()
        asked.append((generated, least))
        stalled = generated == 1 and len(asked) <= 2 * stalls
        return Timing((100.0 if stalled else float(generated),) * least)

    monkeypatch.setattr(decode_models.timing, "time_calls", time_calls)
    bench = decode_bench.DecodeBenchConfig(least=2, generated=60)
    if stalls == 3:
        with pytest.raises(ValueError, match="no longer than its first token"):
            decode_models._short_and_long(np.asarray, bench)
    else:
        short, long = decode_models._short_and_long(np.asarray, bench)
        assert (short.milliseconds, long.milliseconds) == (1.0, 60.0)
        assert asked == [(1, 2), (60, 2), (1, 8), (60, 8)]


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("bench", [train_bench, decode_bench])
def test_records_and_tables_name_the_version_of_pytorch_where_installed(bench, tmp_path, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "7.7.7+cpu" if name == "torch" else real(name)
    )
    alone = re.sub(r"(?m)^(Model|DecodeBench.model).*\n", "", DECODE)  # attention by itself
    records = records_of(tmp_path, TRAIN if bench is train_bench else alone)
    assert {record.provenance["versions"]["torch"] for record in records} == {"7.7.7+cpu"}
    assert "torch 7.7.7+cpu" in facts(records)
    assert "torch 7.7.7+cpu" in (tmp_path / "out" / "report.html").read_text()
    assert "torch" not in json.loads((tmp_path / "out" / "stamp.json").read_text())["versions"]


@pytest.mark.parametrize("name", ["tiny", "tiny-gqa", "whisper-large-cross"])
@pytest.mark.parametrize("scheme", ["kv:bf16", "x1:int8"])
def test_bytes_are_those_of_the_cache_and_the_weights(name, scheme):
    shape = SHAPES[name]
    spec = shape.spec(scheme, "float32")
    random = decode_bench.random_weights(spec)
    cache = decode_bench.random_cache(spec, 2, 6, seed=0)
    heads, size, d = shape.kv_heads, shape.head_dim, shape.width
    rows = {"kv:bf16": 2 * heads * size * 2, "x1:int8": d + 4}[scheme]
    weights = {"kv:bf16": 0, "x1:int8": 2 * d * heads * size * 4}[scheme]
    assert cache.nbytes == 2 * 6 * rows
    assert decode_bench.bytes_read(random, cache) == 2 * 6 * rows + weights
    assert cache.length.tolist() == [6, 6]


def test_shapes_are_specs():
    for name, shape in SHAPES.items():
        spec = shape.spec("kv:bf16", "bfloat16")
        assert (spec.key_width, spec.causal) == (shape.kv_heads * shape.head_dim, shape.causal), name
    llama = SHAPES["llama-2-7b"].spec("kv:bf16", "bfloat16")
    assert 2 * 2 * llama.key_width == 16_384


def test_a_peer_that_disagrees_would_show():
    timing = train_bench.timing.Timing((2.0, 4.0))
    other = train_bench.timing.Timing((8.0, 8.0))
    found = train_bench._against([1.0, 2.0], timing, lambda name: ([1.0, 1.6], other))
    assert found["peer_difference"] == pytest.approx(0.25)
    assert found["speed_over_peer"] == pytest.approx(8 / 3)
    assert found["fastest_over_peer"] == pytest.approx(4.0)
    assert np.isfinite(list(found.values())).all()


@pytest.mark.usefixtures("no_torch")
def test_a_model_in_bfloat16_whose_layers_are_alike(tmp_path):
    """One conversion serves all layers, since they have the same weights; each has arrays of its own."""
    text = re.sub(r"(?m)^DecodeBench.shapes.*\n", "DecodeBench.shapes = ()\n", DECODE)
    text = text.replace("Model.layers = 1", "Model.layers = 3")
    text += "DecodeBench.model_dtype = 'bfloat16'\nDecodeBench.alike = True\n"
    peer, ours = records_of(tmp_path, text)
    assert (peer.status, peer.cell["scheme"]) == ("refused", "kv:bf16")
    assert "in float32, not in bfloat16" in peer.reason
    assert (ours.status, ours.cell["dtype"]) == ("ok", "bfloat16")
    row = 2 * 8 * 4  # K heads of H numbers, float32
    assert ours.metrics["cache_bytes"] == 3 * 2 * (16 + 64) * row  # of the slots, which are powers of two


def test_layers_made_alike_are_what_conversion_makes_of_each():
    config = ModelConfig(layers=2, width=16, heads=2, vocab=32)
    model = decode_models._random_model(config, "bfloat16", alike=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    alike = decode_models._layers(model, "k:int16", "bfloat16", alike=True)
    each = decode_models._layers(model, "k:int16", "bfloat16", alike=False)
    assert len(alike) == 2
    for mine, theirs in zip(jax.tree.leaves(alike), jax.tree.leaves(each), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    first, second = (layer.weights.w_kv for layer in alike)
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()
