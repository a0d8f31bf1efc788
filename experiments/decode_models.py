"""How fast whole models write text, through which cache, and beside PyTorch eager where installed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import schemes
from experiments.bench_settings import DecodeBenchConfig
from experiments.settings import Cell, Measure
from experiments.train_bench import torch_peer
from slimjax import timing
from slimjax.attention.layer import CachedAttention
from slimjax.config import ModelConfig
from slimjax.generate import generate, slots_of
from slimjax.kernels.api import IMPLEMENTATIONS
from slimjax.models.decoder import DecoderLM, convert_model
from slimjax.solve import convert

EAGER = "torch"  # the peer
SEED = 0


def measure(config: ModelConfig, batch: int, bench: DecodeBenchConfig) -> Measure:
    """A cell's metrics, for one model and batch; the peer's time is taken once."""
    dtype = bench.model_dtype
    model = _random_model(config, dtype, bench.alike)
    random = np.random.default_rng(SEED)
    prompts = random.integers(0, config.vocab, (batch, bench.prompt_length)).astype(np.int32)

    @functools.cache
    def eager() -> tuple[np.ndarray, dict[str, Any]]:
        if dtype != "float32":
            raise NotImplementedError(f"the PyTorch peer generates in float32, not in {dtype}")
        peer = torch_peer()
        peer.use_threads(bench.threads)
        twin = peer.Peer(config, nnx.state(model, nnx.Param), train=False)
        return _timed_generation(lambda new: twin.generate(prompts, new), batch, bench)

    def one(cell: Cell) -> dict[str, Any]:
        if cell["framework"] == EAGER:
            return eager()[1]
        kernel = cell["framework"] if cell["framework"] in IMPLEMENTATIONS else None
        layers = _layers(model, str(cell["scheme"]), dtype, bench.alike, kernel)
        call = functools.partial(generate, model, prompts, layers=layers, dtype=dtype)
        tokens, metrics = _timed_generation(lambda new: np.asarray(call(max_new_tokens=new)), batch, bench)
        slots = slots_of(model, bench.prompt_length, bench.generated)
        metrics["cache_bytes"] = float(sum(schemes.cache_bytes(layer.spec, batch, slots) for layer in layers))
        try:
            others, theirs = eager()
        except NotImplementedError:
            return metrics  # the peer's own row says why
        # Until a rounding error tips one token, both programs write the same text.
        same = np.cumprod(tokens == others, axis=1).sum(axis=1)
        return {
            **metrics,
            "speed_over_peer": theirs["milliseconds"] / metrics["milliseconds"],
            "greedy_agreement": float(same.mean()),
            "generated": bench.generated,
            "sequences": batch,
        }

    return one


def _random_model(config: ModelConfig, dtype: str, alike: bool) -> DecoderLM:
    """As before training; in ``dtype`` from the start, since the largest would not fit in float32 beside it."""

    def make() -> DecoderLM:
        return DecoderLM(config, rngs=nnx.Rngs(SEED))

    def cast() -> nnx.State:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(make()))

    model = nnx.merge(nnx.split(nnx.eval_shape(make))[0], jax.jit(cast)())
    if alike:
        for block in model.blocks[1:]:
            nnx.update(block.attention, jax.tree.map(jnp.copy, nnx.state(model.blocks[0].attention)))
    return model


def _layers(
    model: DecoderLM, scheme: str, dtype: str, alike: bool, kernel: str | None = None
) -> tuple[CachedAttention, ...]:
    """Every attention layer made ready; with ``alike`` of copies of the first, each with arrays of its own to read."""
    if not alike:
        return convert_model(model, scheme, dtype, implementation=kernel)[0]
    first = model.blocks[0].attention
    spec = dataclasses.replace(first.decode_spec(scheme, dtype), implementation=kernel)
    layer = convert(first.projections(), spec).layer
    return tuple(jax.tree.map(jnp.copy, layer) for _ in model.blocks)


def _timed_generation(
    call: Callable[[int], np.ndarray], batch: int, bench: DecodeBenchConfig
) -> tuple[np.ndarray, dict[str, Any]]:
    """Milliseconds per token: those of the whole text less those of its first token, over the other tokens."""
    with timing.compiling_anew():
        first = timing.time_calls(lambda: call(1), seconds=0.0, least=1, most=1, warmup=0, wait=lambda x: x)
        whole = timing.time_calls(
            lambda: call(bench.generated), seconds=0.0, least=1, most=1, warmup=0, wait=lambda x: x
        )
    short, long = _short_and_long(call, bench)
    compile_seconds = (first.samples[0] + whole.samples[0] - short.milliseconds - long.milliseconds) / 1e3
    samples = [(each - short.milliseconds) / (bench.generated - 1) for each in long.samples]
    run = timing.Timing(tuple(samples), max(compile_seconds, 0.0))
    metrics = {
        **run.metrics(),
        "tokens_per_second": 1e3 * batch / run.milliseconds,
        "time_to_first_token": short.milliseconds,
    }
    return call(bench.generated), metrics


def _short_and_long(
    call: Callable[[int], np.ndarray], bench: DecodeBenchConfig
) -> tuple[timing.Timing, timing.Timing]:
    """Of the first token and of the whole text; again and longer where a stall of the machine hides the difference."""
    for times in (1, 4, 16):
        least = times * bench.least
        options = {"seconds": times * bench.seconds, "least": least, "most": max(100, least)}
        short = timing.time_calls(lambda: call(1), wait=lambda x: x, **options)
        long = timing.time_calls(lambda: call(bench.generated), wait=lambda x: x, **options)
        if long.milliseconds > short.milliseconds:
            return short, long
    raise ValueError("the whole text took no longer than its first token: generate more, or time it longer")
