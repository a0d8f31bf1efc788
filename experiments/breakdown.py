"""What a decode step through INT8 tiles takes its time for: expanding codes, Q K^T, the softmax, P V.

Every stage is a program of its own that reads its input from memory and writes its output there, as a step in separate
kernels would; `whole` is the step as `slimjax.decode` takes it, by the implementation that the cell names.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from experiments import schemes
from experiments.decode_bench import random_cache, random_weights
from experiments.directory import RunDirectory
from experiments.gpu_settings import BreakdownConfig
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax import timing
from slimjax.attention.softmax import exponential_of
from slimjax.cache import TiledCodec, codec_of
from slimjax.config import Config
from slimjax.kernels.api import decode, native
from slimjax.kernels.shapes import SHAPES, Shape
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import parse_scheme

TITLE = "What does a decode step take its time for?"
ALONE = True  # timings
FITS = True  # a cell that does not fit in memory is a result
TABLE = ("milliseconds", "gigabytes_per_second")  # printed at the end
PHASES = ("expand", "scores", "softmax", "values", "whole")
SEED = 0

Grouped = Float[Array, "B K G S"]


@dataclass(frozen=True, kw_only=True)
class Breakdown(Config):
    """The whole run."""

    breakdown: BreakdownConfig


def resolve(build: Build) -> Breakdown:
    """The run from its section."""
    return Breakdown(breakdown=build("Breakdown"))


def units(config: Breakdown) -> list[Unit]:
    """A shape, batch and context each."""
    asked = config.breakdown
    return [_unit(asked, *point) for point in itertools.product(asked.shapes, asked.batches, asked.contexts)]


def _unit(asked: BreakdownConfig, name: str, batch: int, context: int) -> Unit:
    shape = SHAPES[name]
    cells = tuple(
        {
            "experiment": "breakdown",
            "shape": name,
            "scheme": str(parse_scheme(scheme)),
            "phase": phase,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "batch": batch,
            "context": context,
            "dtype": "bfloat16",
            "backend": asked.implementation or native()[0],  # of the whole; its stages are XLA's
        }
        for scheme, phase in itertools.product(asked.schemes, PHASES)
    )
    return Unit(f"{name}, batch {batch}, context {context}", cells, (shape, batch, context))


def forecast(unit: Unit, config: Breakdown) -> Forecast:
    """Codes, expanded and not; schemes without integer tiles are refused."""
    shape, batch, context = unit.data
    refused, largest = {}, 0
    for index, cell in enumerate(unit.cells):
        try:
            spec = _spec(shape, str(cell["scheme"]))
            largest = max(largest, schemes.cache_bytes(spec, batch, context))
        except NotImplementedError as error:
            refused[index] = str(error)
    expanded = 2 * batch * context * shape.kv_heads * shape.head_dim
    return Forecast(bytes=largest + expanded, refused=refused)


def prepare(unit: Unit, config: Breakdown, directory: RunDirectory) -> Measure:
    """Nothing shared but the shape."""
    shape, batch, context = unit.data

    def measure(cell: Cell) -> dict[str, Any]:
        spec = _spec(shape, str(cell["scheme"]))
        spec = dataclasses.replace(spec, implementation=str(cell["backend"]))
        program, inputs, moved = _stage(str(cell["phase"]), spec, batch, context)
        compiled, seconds = timing.compiled(program, *inputs)
        asked = config.breakdown
        run = timing.time_calls(lambda: compiled(*inputs), seconds=asked.seconds, least=asked.least)
        run = timing.Timing(run.samples, seconds)
        return {**run.metrics(), "gigabytes_per_second": moved / run.milliseconds / 1e6}

    return measure


def _spec(shape: Shape, scheme: str) -> DecodeSpec:
    """Raises NotImplementedError for a cache without integer tiles."""
    spec = shape.spec(scheme, "bfloat16")
    codec = codec_of(spec.scheme)
    if not (isinstance(codec, TiledCodec) and codec.integral):
        raise NotImplementedError(f"scheme {scheme}: no INT8 tiles; flashq has them")
    return spec


def _stage(
    phase: str, spec: DecodeSpec, batch: int, context: int
) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    """A program, its inputs, and the bytes of its inputs and outputs."""
    heads, size = (batch, spec.kv_heads, spec.group), spec.head_dim
    draw = functools.partial(_random, jax.random.key(SEED))
    if phase in ("expand", "whole"):
        cache = random_cache(spec, batch, context, SEED)
        if phase == "whole":
            query = draw((batch, 1, spec.heads, size)).astype(spec.dtype)
            return functools.partial(decode, spec=spec), (query, cache, random_weights(spec)), cache.nbytes
        expand = functools.partial(_expand, codec=codec_of(spec.scheme))
        return expand, (cache.streams,), _moved(expand, cache.streams)
    codes = _codes((batch, context, spec.kv_heads, size))
    if phase == "scores":
        inputs = (_codes((*heads, size)), codes)
        return _scores, inputs, _moved(_scores, *inputs)
    scores = draw((*heads, context))
    if phase == "softmax":
        weigh = functools.partial(_softmax, softmax=spec.scheme.softmax)
        return weigh, (scores,), _moved(weigh, scores)
    inputs = (jax.nn.softmax(scores), codes)
    return _values, inputs, _moved(_values, *inputs)


def _random(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.normal(key, shape)


def _codes(shape: tuple[int, ...]) -> Int8[Array, "..."]:
    return jax.random.randint(jax.random.key(SEED), shape, -119, 120, jnp.int8)


def _moved(program: Callable[..., Any], *inputs: Any) -> int:
    """Bytes in and out."""
    found = jax.tree.leaves((inputs, jax.eval_shape(program, *inputs)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in found)


def _expand(streams: Any, *, codec: Any) -> Any:
    """INT8 codes of all tiles."""
    return {name: codec.integers(held.tiles.tiles()).codes for name, held in streams.items()}


def _scores(query: Int8[Array, "B K G H"], keys: Int8[Array, "B S K H"]) -> Grouped:
    met = jnp.einsum("bkgh,bskh->bkgs", query, keys, preferred_element_type=jnp.int32)
    return met.astype(jnp.float32) * 1e-4


def _softmax(scores: Grouped, *, softmax: str) -> Grouped:
    exponential = exponential_of(softmax)
    assert exponential is not None  # forecast's cells are of integer products, which need one
    p = exponential(jnp.max(scores, axis=-1, keepdims=True) - scores)
    return p / jnp.sum(p, axis=-1, keepdims=True)


def _values(p: Grouped, values: Int8[Array, "B S K H"]) -> Float[Array, "B K G H"]:
    """P in INT8, by its largest weight, and the product."""
    scale = jnp.max(p, axis=-1, keepdims=True) / 119
    codes = jnp.round(p / scale).astype(jnp.int8)
    met = jnp.einsum("bkgs,bskh->bkgh", codes, values, preferred_element_type=jnp.int32)
    return met.astype(jnp.float32) * scale
