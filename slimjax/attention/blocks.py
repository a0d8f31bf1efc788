"""Decode attention in floating point, a block of cached slots at a time: no more than a block is ever decoded.

Two passes, so that any softmax sees a query's scores whole: scores of all blocks, then the weighted rows of
all blocks. Scores take N*T*C values per sequence, a cache hundreds of times that per query head.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from slimjax.attention.bases import basis
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import Geometry, log_sums, weights as score_weights
from slimjax.axes import Block, Lengths, LogSums, Queries, Scores, typed
from slimjax.cache import Cache, Codec, TiledCodec, codec_of, in_tiles, read, read_at, read_both
from slimjax.kernels.spec import DecodeSpec

Carry = TypeVar("Carry")
Found = TypeVar("Found")
Part = tuple[Queries, LogSums | None]  # of a softmax that is not exact there are no log-sums

# Decoded rows of ``size`` slots from ``start`` on.
Held = Callable[[Int[Array, ""] | int, int], Block]

SLOTS = 1024  # of a block, about; a cache that has no more is one block


@typed
def decode(q: Queries, cache: Cache, where: Geometry, weights: DecodeWeights, spec: DecodeSpec) -> Part:
    """Attention of unrotated queries on a cache, output in ``spec.dtype``; and log-sums."""
    method, codec = basis(spec), codec_of(spec.scheme)
    ready = method.queries(q.astype(spec.dtype), where.query_positions, weights, spec)
    unit = codec.span if isinstance(codec, TiledCodec) else 1
    size = min(cache.capacity, max(SLOTS // unit, 1) * unit)
    positions = where.key_positions
    if cache.recent is not None and isinstance(codec, TiledCodec):
        return _decode_recent(ready, cache, where, weights, spec, size)

    def block(start: Int[Array, ""] | int, count: int) -> tuple[Block, Int[Array, "S"]]:
        rows = read(cache, codec, spec.accumulation, start=start, size=count)
        return rows, jax.lax.dynamic_slice_in_dim(positions, start, count)

    if size == cache.capacity:
        rows = read(cache, codec, spec.accumulation)
        raw = method.scores(ready, rows, positions, weights, spec)
        p = score_weights(raw, where, spec)
        return _part(method.weigh(p, rows, positions, weights, spec), raw, where, weights, spec)
    raw = each(
        cache.capacity, size, lambda start, count: method.scores(ready, *block(start, count), weights, spec)
    )
    p = score_weights(raw, where, spec)

    def weigh(start: Int[Array, ""] | int, count: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(p, start, count, axis=3)
        return method.weigh(part, *block(start, count), weights, spec)

    return _part(total(cache.capacity, size, weigh), raw, where, weights, spec)


def _part(mixed: Array, raw: Scores, where: Geometry, weights: DecodeWeights, spec: DecodeSpec) -> Part:
    """What was mixed, finished; log-sums cost nothing under jit where nobody takes them."""
    known = log_sums(raw, where, spec) if spec.scheme.softmax == "exact" else None
    return basis(spec).finish(mixed, weights, spec).astype(spec.dtype), known


def _decode_recent(
    ready: Any, cache: Cache, where: Geometry, weights: DecodeWeights, spec: DecodeSpec, size: int
) -> Part:
    """Queries of tokens just appended: each finds in tiles what was in tiles when it came, the rest as buffered.

    Every block is scored and weighed both ways, and each query keeps of each key the way that was its own.
    """
    method, codec = basis(spec), codec_of(spec.scheme)
    assert isinstance(codec, TiledCodec)
    done = in_tiles(codec, where.query_positions, where.key_positions)[:, None]

    def part(array: Array, start: Int[Array, ""] | int, count: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, count, axis=array.ndim - 1)

    def scores(start: Int[Array, ""] | int, count: int) -> Scores:
        at = part(where.key_positions, start, count)
        old, held = (
            method.scores(ready, rows, at, weights, spec)
            for rows in read_both(cache, codec, spec.accumulation, start=start, size=count)
        )
        return jnp.where(part(done, start, count), old, held)

    raw = each(cache.capacity, size, scores)
    p = score_weights(raw, where, spec)
    zero = jnp.zeros_like(p)

    def weigh(start: Int[Array, ""] | int, count: int) -> Array:
        at = part(where.key_positions, start, count)
        rows = read_both(cache, codec, spec.accumulation, start=start, size=count)
        old, held = (
            method.weigh(part(mine, start, count), each_, at, weights, spec)
            for mine, each_ in zip((jnp.where(done, p, zero), jnp.where(done, zero, p)), rows, strict=True)
        )
        return old + held

    return _part(total(cache.capacity, size, weigh), raw, where, weights, spec)


def as_held(
    q: Queries,
    cache: Cache,
    codec: Codec,
    where: Geometry,
    meet: Callable[[Queries, Held, Geometry], Found],
) -> Found:
    """Attention in which keys share a scale, and so must be taken together as they were when a query came.

    Queries of tokens just appended (``cache.recent``) meet them one after the other, each the tokens up to its own.
    """

    def held(at: Lengths | None) -> Held:
        def rows(start: Int[Array, ""] | int, count: int) -> Block:
            if at is None:
                return read(cache, codec, jnp.float32, start=start, size=count)
            return read_at(cache, codec, jnp.float32, at, start=start, size=count)

        return rows

    if cache.recent is None:
        return meet(q, held(None), where)

    def one(index: Int[Array, ""]) -> Found:
        here = where.query(index)
        at = jnp.minimum(here.query_positions[:, 0] + 1, cache.length)
        return meet(jax.lax.dynamic_slice_in_dim(q, index, 1, axis=1), held(at), here)

    found = jax.lax.map(one, jnp.arange(q.shape[1], dtype=jnp.int32))
    return jax.tree.map(lambda each: jnp.swapaxes(each[:, :, 0], 0, 1), found)


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
