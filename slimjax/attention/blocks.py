"""Decode attention in floating point, a block of cached slots at a time: no more than a block is ever decoded.

Two passes, so that any softmax sees a query's scores whole: scores of all blocks, then the weighted rows of
all blocks. Scores take N*T*C values per sequence, a cache hundreds of times that per query head.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from slimjax.attention.bases import basis
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import Geometry, weights as score_weights
from slimjax.axes import Block, Queries, Scores, typed
from slimjax.cache import Cache, TiledCodec, codec_of, read
from slimjax.kernels.spec import DecodeSpec

Carry = TypeVar("Carry")

SLOTS = 1024  # of a block, about; a cache that has no more is one block


@typed
def decode(q: Queries, cache: Cache, where: Geometry, weights: DecodeWeights, spec: DecodeSpec) -> Queries:
    """Attention of unrotated queries on a cache; output in ``spec.dtype``."""
    method, codec = basis(spec), codec_of(spec.scheme)
    ready = method.queries(q.astype(spec.dtype), where.query_positions, weights, spec)
    unit = codec.span if isinstance(codec, TiledCodec) else 1
    size = min(cache.capacity, max(SLOTS // unit, 1) * unit)
    positions = where.key_positions

    def block(start: Int[Array, ""] | int, count: int) -> tuple[Block, Int[Array, "S"]]:
        rows = read(cache, codec, spec.accumulation, start=start, size=count)
        return rows, jax.lax.dynamic_slice_in_dim(positions, start, count)

    if size == cache.capacity:
        rows = read(cache, codec, spec.accumulation)
        p = score_weights(method.scores(ready, rows, positions, weights, spec), where, spec)
        return method.finish(method.weigh(p, rows, positions, weights, spec), weights, spec).astype(
            spec.dtype
        )
    raw = each(
        cache.capacity, size, lambda start, count: method.scores(ready, *block(start, count), weights, spec)
    )
    p = score_weights(raw, where, spec)

    def weigh(start: Int[Array, ""] | int, count: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(p, start, count, axis=3)
        return method.weigh(part, *block(start, count), weights, spec)

    return method.finish(total(cache.capacity, size, weigh), weights, spec).astype(spec.dtype)


def each(slots: int, size: int, scores: Callable[[Int[Array, ""] | int, int], Scores]) -> Scores:
    """Scores of every block side by side; the last block may be shorter."""
    size = min(size, slots)
    whole = slots // size
    starts = jnp.arange(whole, dtype=jnp.int32) * size
    parts = jax.lax.map(lambda start: scores(start, size), starts)
    joined = jnp.moveaxis(parts, 0, 3).reshape(*parts.shape[1:4], whole * size)
    if whole * size == slots:
        return joined
    return jnp.concatenate([joined, scores(whole * size, slots - whole * size)], axis=3)


def total(slots: int, size: int, weigh: Callable[[Int[Array, ""] | int, int], Array]) -> Array:
    """The sum of every block's weighted rows."""
    size = min(size, slots)
    whole = slots // size
    rest = slots - whole * size
    # The first block, or the shorter last one, outside the loop: it says of what shape the sum is.
    begun, first = (weigh(whole * size, rest), 0) if rest else (weigh(0, size), 1)
    starts = jnp.arange(first, whole, dtype=jnp.int32) * size
    return jax.lax.scan(lambda sum_, start: (sum_ + weigh(start, size), None), begun, starts)[0]


def fold(
    slots: int, size: int, step: Callable[[Carry, Int[Array, ""] | int, int], Carry], state: Carry
) -> Carry:
    """``step(state, start, count)`` over all blocks in order; the last block may be shorter."""
    size = min(size, slots)
    whole = slots // size
    starts = jnp.arange(whole, dtype=jnp.int32) * size
    state = jax.lax.scan(lambda state, start: (step(state, start, size), None), state, starts)[0]
    rest = slots - whole * size
    return step(state, whole * size, rest) if rest else state
