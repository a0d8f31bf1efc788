"""Do the kernels give what the reference gives in float64, on the device at hand?

One ragged batch a cell: sequences of no token, of one, and ending beside, at and inside a block, up to a full cache.
What lies behind a sequence's end is NaN where codes are floats, and random where they are integers: a kernel that
reads it shows. Each runs twice, and must give the same bits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode_bench import random_cache, random_weights
from experiments.directory import RunDirectory
from experiments.gpu_settings import ParityConfig
from experiments.schemes import cache_bytes
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax.attention.projections import DecodeWeights
from slimjax.cache import Cache
from slimjax.config import Config
from slimjax.kernels.api import decode, native
from slimjax.kernels.prompts import attend_prompt
from slimjax.kernels.shapes import SHAPES, Shape
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import relative_l2
from slimjax.scheme import parse_scheme

TITLE = "Do the kernels give what the reference gives?"


@dataclass(frozen=True, kw_only=True)
class Parity(Config):
    """The whole run."""

    parity: ParityConfig
    implementations: tuple[str, ...]


def resolve(build: Build) -> Parity:
    """The run from its section; the implementations are those made for the backend in use."""
    parity = build("Parity")
    return Parity(parity=parity, implementations=parity.implementations or native())


def units(config: Parity) -> list[Unit]:
    """A shape each."""
    return [_unit(config, name) for name in config.parity.shapes]


def _unit(config: Parity, name: str) -> Unit:
    asked, shape = config.parity, SHAPES[name]
    steps = itertools.product(asked.schemes, asked.tokens)
    phases = [("decode", *each) for each in steps] + [
        ("prefill", each, asked.context) for each in asked.prompts
    ]
    cells = tuple(
        {
            "experiment": "parity",
            "shape": name,
            "scheme": str(parse_scheme(scheme)),
            "backend": backend,
            "phase": phase,
            "tokens": tokens,
            "position": shape.position,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "width": shape.width,
            "context": asked.context,
            "dtype": dtype,
            "seed": asked.seed,
        }
        for (phase, scheme, tokens), backend, dtype in itertools.product(
            phases, config.implementations, asked.dtypes
        )
    )
    return Unit(name, cells, shape)


def forecast(unit: Unit, config: Parity) -> Forecast:
    """What no layer of this shape takes is refused; a kernel says for itself what it does not serve."""
    refused, largest = {}, 0
    for index, cell in enumerate(unit.cells):
        spec = unit.data.spec(str(cell["scheme"]), str(cell["dtype"]))
        try:
            largest = max(largest, cache_bytes(spec, len(_lengths(config.parity)), config.parity.context))
        except NotImplementedError as error:
            refused[index] = str(error)
    return Forecast(bytes=2 * largest, refused=refused)


def prepare(unit: Unit, config: Parity, directory: RunDirectory) -> Measure:
    """Nothing shared but the shape."""
    return functools.partial(_measure, shape=unit.data, asked=config.parity)


def _lengths(asked: ParityConfig) -> tuple[int, ...]:
    block, slots = asked.block, asked.context
    return (0, 1, block - 1, block, block + 1, slots - block // 2, slots)


def _measure(cell: Cell, *, shape: Shape, asked: ParityConfig) -> dict[str, Any]:
    spec = shape.spec(str(cell["scheme"]), str(cell["dtype"]))
    length = jnp.asarray(_lengths(asked), jnp.int32)
    given = _prompt if cell["phase"] == "prefill" else _step
    call, spoilt, wanted = given(spec, length, asked, int(str(cell["tokens"])))

    @functools.cache  # a second compilation may choose otherwise, and is no second run
    def program(implementation: str) -> Any:
        return jax.jit(functools.partial(call, implementation=implementation))

    def run(implementation: str) -> np.ndarray:
        return np.asarray(program(implementation)(*spoilt), np.float64)

    found = run(str(cell["backend"]))
    if not np.isfinite(found).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(found))} of {found.size} values are not finite")
    if found[0].any():
        raise ValueError("a sequence without tokens has an answer")
    if not np.array_equal(found, run(str(cell["backend"]))):
        raise ValueError("a second run gave other bits")
    return {
        "attention_error": relative_l2(found, wanted),
        "reference_error": relative_l2(run("reference"), wanted),
    }


Given = tuple[
    Callable[..., jax.Array], tuple[Any, ...], np.ndarray
]  # a call, its poisoned arguments, its exact answer


def _step(spec: DecodeSpec, length: jax.Array, asked: ParityConfig, tokens: int) -> Given:
    """So many query tokens on a ragged cache."""
    weights = random_weights(spec)
    clean = random_cache(spec, len(length), asked.context, asked.seed)
    clean = dataclasses.replace(clean, length=length)
    size = (clean.batch, tokens, spec.heads, spec.head_dim)
    query = jax.random.normal(jax.random.key(asked.seed + 1), size).astype(spec.dtype)
    # A query that stands before the first token sees nothing; cross-attention's have no place among the keys.
    start = jnp.maximum(length - tokens, 0) if spec.causal else jnp.zeros_like(length)

    def call(
        query: jax.Array,
        cache: Cache,
        weights: DecodeWeights,
        start: jax.Array,
        *,
        implementation: str,
        spec: DecodeSpec = spec,
    ) -> jax.Array:
        return decode(query, cache, weights, spec, start=start, implementation=implementation)

    wanted = _exact(call, (query, clean, weights, start), spec)
    return call, (query, poisoned(clean), weights, start), wanted


def _prompt(spec: DecodeSpec, length: jax.Array, asked: ParityConfig, tokens: int) -> Given:
    """Prompts of these lengths on themselves."""
    keys = jax.random.split(jax.random.key(asked.seed + 1), 3)
    heads = (spec.heads, spec.kv_heads, spec.kv_heads)
    rows = [
        jax.random.normal(key, (len(length), tokens, count, spec.head_dim)).astype(spec.dtype)
        for key, count in zip(keys, heads, strict=True)
    ]
    past = (jnp.arange(tokens)[None] >= length[:, None])[:, :, None, None]

    def call(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        length: jax.Array,
        *,
        implementation: str,
        spec: DecodeSpec = spec,
    ) -> jax.Array:
        return attend_prompt(q, k, v, spec, length, implementation=implementation)

    wanted = _exact(call, (*rows, length), spec)
    return call, (*(jnp.where(past, jnp.nan, each) for each in rows), length), wanted


def poisoned(cache: Cache) -> Cache:
    """NaN behind each sequence's tokens, in rows of floats and in scales of rows, [B, S, ...] or [B, *, S]."""
    slots = jnp.arange(cache.capacity)[None]
    past = slots >= cache.length[:, None]

    def spoil(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if leaf.shape[:2] == past.shape:
            behind = past.reshape(*past.shape, *(1,) * (leaf.ndim - 2))
        elif leaf.ndim == 3 and leaf.shape[::2] == past.shape:  # tokens last
            behind = past[:, None]
        else:
            return leaf
        return jnp.where(behind, jnp.full_like(leaf, jnp.nan), leaf)

    return dataclasses.replace(cache, streams=jax.tree.map(spoil, cache.streams))


def _exact(call: Callable[..., jax.Array], given: tuple[Any, ...], spec: DecodeSpec) -> np.ndarray:
    """The reference on the same codes, in float64 on the CPU; INT8 products and their scales are what they are."""
    exact = functools.partial(
        call, implementation="reference", spec=dataclasses.replace(spec, dtype="float64")
    )
    held = jax.tree.map(np.asarray, given)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        widened = jax.tree.map(_widened, held, is_leaf=lambda leaf: isinstance(leaf, Cache))
        return np.asarray(jax.jit(exact)(*widened))


def _widened(leaf: Any) -> Any:
    """Floats in float64, but a cache's, which are part of its codes."""
    if isinstance(leaf, Cache):
        return jax.tree.map(jnp.asarray, leaf)
    return jnp.asarray(leaf, jnp.float64 if jnp.issubdtype(leaf.dtype, jnp.floating) else None)
