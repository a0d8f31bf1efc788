"""How long one attention layer takes under each way to cache, in plain JAX: its prefill, and decoding behind it.

Everything that the layer does is timed: projections, encoding, attention, and in decoding the tiles that buffers are
flushed to. Keys and values in bfloat16 are the peer, in the same run.
"""

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments import schemes
from experiments.bench_settings import LayerBenchConfig
from experiments.directory import RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax import timing
from slimjax.attention.layer import CachedAttention, attend_cached, init_cache, prefill
from slimjax.attention.projections import Projections
from slimjax.axes import Inputs
from slimjax.cache import Cache
from slimjax.config import Config, ConfigError
from slimjax.kernels.shapes import SHAPES, Shape
from slimjax.scheme import parse_scheme, suggest
from slimjax.solve import convert

TITLE = "How long does a layer take under each cache?"
ALONE = True  # timings
PEER = "kv:bf16"
PHASES = ("prefill", "decode")
SEED = 0


@dataclass(frozen=True, kw_only=True)
class LayerBench(Config):
    """The whole run."""

    bench: LayerBenchConfig

    def validate(self) -> None:
        for name in self.bench.shapes:
            if name not in SHAPES:
                raise ConfigError(
                    f"shapes: unknown name {name!r}{suggest(name, SHAPES)}", "shapes", "LayerBench"
                )
            if not SHAPES[name].causal:
                raise ConfigError(
                    f"shapes: {name} is cross-attention, which appends nothing", "shapes", "LayerBench"
                )


def resolve(build: Build) -> LayerBench:
    """The run from its section."""
    return LayerBench(bench=build("LayerBench"))


def units(config: LayerBench) -> list[Unit]:
    """A shape with a batch and a dtype each; the peer's cells come first."""
    bench = config.bench
    grid = itertools.product(bench.shapes, bench.batches, bench.dtypes)
    return [_unit(bench, *point) for point in grid]


def _unit(bench: LayerBenchConfig, name: str, batch: int, dtype: str) -> Unit:
    shape = SHAPES[name]
    ours = (parse_scheme(text) for text in (PEER, *bench.schemes))
    cells = tuple(
        {
            "experiment": "layer_bench",
            "shape": name,
            "phase": phase,
            **schemes.parts(scheme),
            "position": shape.position,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "width": shape.width,
            "batch": batch,
            "context": bench.context,
            "dtype": dtype,
            "seed": SEED,
        }
        for phase, scheme in itertools.product(PHASES, dict.fromkeys(ours))
    )
    return Unit(f"{name}, batch {batch}, {dtype}", cells, (shape, batch, dtype))


def forecast(unit: Unit, config: LayerBench) -> Forecast:
    """The largest cache beside the inputs; what no layer of this shape takes is refused."""
    shape, batch, dtype = unit.data
    slots = config.bench.context + config.bench.generated
    refused, largest = {}, 0
    for index, cell in enumerate(unit.cells):
        try:
            cache = schemes.cache_bytes(shape.spec(str(cell["scheme"]), dtype), batch, slots)
        except NotImplementedError as error:
            refused[index] = str(error)
            continue
        largest = max(largest, cache)
    scores = 4 * batch * shape.heads * slots
    return Forecast(bytes=3 * largest + scores + 8 * batch * slots * shape.width, refused=refused)


def prepare(unit: Unit, config: LayerBench, directory: RunDirectory) -> Measure:
    """Random weights and inputs; a scheme's programs are made when a cell asks for them."""
    shape, batch, dtype = unit.data
    return _Layer(shape, batch, dtype, config.bench).measure


@functools.lru_cache(maxsize=1)
def random_projections(shape: Shape) -> Projections:
    """Weights whose W_K is as well-conditioned as a random matrix is, float32."""
    d, n, k, h = shape.width, shape.heads, shape.kv_heads, shape.head_dim
    keys = jax.random.split(jax.random.key(SEED), 4)
    sizes = ((d, n, h), (d, k, h), (d, k, h), (n, h, d))
    wq, wk, wv, wo = (jax.random.normal(key, size) * d**-0.5 for key, size in zip(keys, sizes, strict=True))
    return Projections(wq=wq, wk=wk, wv=wv, wo=wo)


class _Layer:
    """A shape with its inputs, and the peer's times once they are known."""

    def __init__(self, shape: Shape, batch: int, dtype: str, bench: LayerBenchConfig):
        self.shape, self.dtype, self.bench = shape, dtype, bench
        key = jax.random.key(SEED + 2)
        size = (batch, bench.context + bench.generated, shape.width)
        self.x = jax.random.normal(key, size).astype(dtype)
        self._timed = functools.cache(self._time)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Of a cell, the peer's own too."""
        phase, scheme = str(cell["phase"]), str(cell["scheme"])
        run, memory = self._timed(scheme, phase)
        peer, _ = self._timed(PEER, phase)
        tokens = self.x.shape[0] * (self.bench.context if phase == "prefill" else 1)
        return {
            **run.metrics(),
            **memory,
            "tokens_per_second": 1e3 * tokens / run.milliseconds,
            "speed_over_bf16": peer.milliseconds / run.milliseconds,
        }

    def _time(self, scheme: str, phase: str) -> tuple[timing.Timing, dict[str, float]]:
        """A prefill of the context, or one of the tokens decoded behind it; bytes of the cache, and of temporaries."""
        bench, spec = self.bench, self.shape.spec(scheme, self.dtype)
        layer = convert(random_projections(self.shape), spec).layer
        slots, prompt = bench.context + bench.generated, self.x[:, : bench.context]
        before = functools.partial(_prefilled, slots=slots)
        if phase == "prefill":
            program, seconds = timing.compiled(before, prompt, layer)
            inputs, tokens = (prompt, layer), 1
        else:
            _, cache = jax.jit(before)(prompt, layer)
            inputs, tokens = (self.x[:, bench.context :], layer, cache), bench.generated
            program, seconds = timing.compiled(decoded, *inputs)
        run = timing.time_calls(lambda: program(*inputs), seconds=bench.seconds, least=bench.least, warmup=1)
        samples = tuple(sample / tokens for sample in run.samples)
        analysis = program.memory_analysis()
        memory = {"cache_bytes": float(schemes.cache_bytes(spec, self.x.shape[0], bench.context))}
        if analysis is not None:  # not every backend tells
            memory["temporary_bytes"] = float(analysis.temp_size_in_bytes)
        return timing.Timing(samples, seconds), memory


def _prefilled(x: Inputs, layer: CachedAttention, *, slots: int) -> tuple[Inputs, Cache]:
    return prefill(x, layer, init_cache(layer.spec, batch=x.shape[0], capacity=slots))


def decoded(x: Inputs, layer: CachedAttention, cache: Cache) -> tuple[Float[Array, "T B D"], dict[str, Any]]:
    """Every token of x [B, T, D] by itself, one after the other, as generation does; the outputs and the codes."""

    def step(cache: Cache, token: Inputs) -> tuple[Cache, Inputs]:
        out, longer = attend_cached(token, layer, cache)
        return dataclasses.replace(longer, recent=None), out[:, 0]

    longer, outs = jax.lax.scan(step, cache, jnp.swapaxes(x, 0, 1)[:, :, None])
    return outs, longer.streams
