"""What kernels over tiles leave to XLA: the newest tokens, which are in the cache's buffer and in no tile yet."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from slimjax.attention.bases import basis
from slimjax.attention.positions import bias
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import Geometry, geometry, scaled
from slimjax.attention.softmax import exponential_of
from slimjax.axes import Lengths, Queries
from slimjax.cache import Cache, TiledCodec, newest
from slimjax.cache.layout import LaidOut
from slimjax.cache.tiled import flushed
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import MASK


def tokens_in_tiles(cache: Cache, codec: TiledCodec, positions: Int[Array, "B T"]) -> Int32[Array, "B T"]:
    """Tokens that each query finds in tiles."""
    windows = jnp.broadcast_to(flushed(codec, cache.length)[:, None], positions.shape)
    if cache.recent is not None:
        windows = jnp.minimum(windows, flushed(codec, positions + 1))
    return (windows * codec.span).astype(jnp.int32)


def buffer_geometry(
    first: Lengths,
    mine: Bool[Array, "B T S"],
    positions: Int[Array, "B T"],
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
) -> Geometry:
    """Of the S slots from each sequence's own first one on; ``first`` and ``mine`` are from ``cache.newest``."""
    slots = jnp.arange(mine.shape[2], dtype=jnp.int32)
    where = geometry(positions - first[:, None], slots, cache.length - first, weights.position, spec)
    if where.bias is not None:  # some depend on where the query stands, and not on its distance alone

        def one(query: Array, start: Array) -> Array:
            found = bias(
                spec.position, weights.position, query[None], start + slots, spec.heads, spec.accumulation
            )
            assert found is not None  # as there is one of the first slots
            return found[0]

        where = dataclasses.replace(where, bias=jax.vmap(one)(positions, first))
    return where.restrict(mine[:, None])


def attend_buffer(
    q: Queries, cache: Cache, weights: DecodeWeights, spec: DecodeSpec, codec: TiledCodec, start: Lengths
) -> tuple[Float[Array, "B T N A"], Float[Array, "B T N"]]:
    """What queries mix of the tokens in the buffer, before ``finish``, and its log-sums: a part for ``combine``.

    SAS is relative to the maximum of these tokens.
    """
    method = basis(spec)
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    first, mine, lines = newest(cache, codec, positions)
    at = first[:, None] + jnp.arange(mine.shape[2], dtype=jnp.int32)[None]
    seen = jnp.any(mine, axis=1)[:, :, None, None]

    def rows(name: str) -> Array:
        own = codec.stream(name)
        if isinstance(own, TiledCodec):
            found = own.held(lines[name].codes, lines[name].scales)
        else:
            found = own.decode(_at(cache.streams[name], first, mine.shape[2]).codes())
        return jnp.where(seen, found.astype(spec.accumulation), 0)  # a weight of 0 times a NaN is NaN

    held = {name: rows(name) for name in cache.streams}
    ready = method.queries(q.astype(spec.dtype), positions, weights, spec)

    def met(ready: Array, held: dict[str, Array], at: Array) -> Array:
        alone, block = jax.tree.map(lambda each: each[None], (ready, held))
        return method.scores(alone, block, at, weights, spec)[0]

    where = buffer_geometry(first, mine, positions, cache, weights, spec)
    value = jnp.where(where.mask, scaled(jax.vmap(met)(ready, held, at), where, spec), MASK)
    peak = jnp.max(value, axis=3, keepdims=True)
    exponential = exponential_of(spec.scheme.softmax)
    assert exponential is not None  # others are refused
    p = jnp.where(where.mask, exponential(peak - value), 0.0)
    total = jnp.sum(p, axis=3, keepdims=True)
    some = jnp.where(total > 0, total, 1.0)
    mixed = method.weigh(p / some, held, at[0], weights, spec)  # which looks at no position
    log_sums = jnp.where(total > 0, peak + jnp.log(some), MASK)[..., 0]
    return mixed, jnp.moveaxis(log_sums, 1, 2)


def _at(stored: LaidOut, first: Lengths, count: int) -> LaidOut:
    """So many slots of each sequence, from its own first one on."""

    def part(leaf: Array, last: bool) -> Array:
        index = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        index = jnp.clip(index, 0, leaf.shape[2 if last else 1] - 1)
        where = index[:, None, :] if last else index[:, :, None]
        return jnp.take_along_axis(leaf, where, axis=2 if last else 1)

    leaves = tuple(map(part, stored.leaves, stored.tokens_last))
    return dataclasses.replace(stored, leaves=leaves)
