"""Do the kernels give what the reference gives in float64, on the device at hand?

One ragged batch a cell: sequences of no token, of one, and ending beside, at and inside a block, up to a full cache.
What lies behind a sequence's end is NaN where codes are floats, and random where they are integers: a kernel that
reads it shows. Each runs twice, and must give the same bits.
"""

import dataclasses
import functools
import itertools
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
    cells = tuple(
        {
            "experiment": "parity",
            "shape": name,
            "scheme": str(parse_scheme(scheme)),
            "backend": backend,
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
        for scheme, backend, tokens, dtype in itertools.product(
            asked.schemes, config.implementations, asked.tokens, asked.dtypes
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
    weights = random_weights(spec)
    clean = random_cache(spec, len(_lengths(asked)), asked.context, asked.seed)
    clean = dataclasses.replace(clean, length=jnp.asarray(_lengths(asked), jnp.int32))
    tokens = int(str(cell["tokens"]))
    size = (clean.batch, tokens, spec.heads, spec.head_dim)
    query = jax.random.normal(jax.random.key(asked.seed + 1), size).astype(spec.dtype)
    # A query that stands before the first token sees nothing; cross-attention's have no place among the keys.
    start = jnp.maximum(clean.length - tokens, 0) if spec.causal else jnp.zeros_like(clean.length)
    wanted = _exact(query, clean, weights, spec, start)

    spoilt = poisoned(clean)

    @functools.cache  # a second compilation may choose otherwise, and is no second run
    def program(implementation: str) -> Any:
        return jax.jit(functools.partial(decode, spec=spec, implementation=implementation))

    def run(implementation: str) -> np.ndarray:
        return np.asarray(program(implementation)(query, spoilt, weights, start=start), np.float64)

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


def _exact(
    query: jax.Array, cache: Cache, weights: DecodeWeights, spec: DecodeSpec, start: jax.Array
) -> np.ndarray:
    """The reference on the same codes, in float64 on the CPU; INT8 products and their scales are what they are."""
    spec = dataclasses.replace(spec, dtype="float64")
    given = jax.tree.map(np.asarray, (query, cache, weights, start))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        query, cache, weights, start = jax.tree.map(jnp.asarray, given)
        weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), weights)
        call = functools.partial(decode, spec=spec, implementation="reference")
        return np.asarray(jax.jit(call)(query.astype(jnp.float64), cache, weights, start=start))
