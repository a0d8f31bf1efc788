"""Tiles of keys and values as integer attention multiplies them: INT8 codes and scales, per head or per token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from slimjax.axes import Lengths
from slimjax.cache import Cache, TiledCodec, in_tiles, newest
from slimjax.cache.codecs.flashq import quantise
from slimjax.cache.tiled import Line, TiledRows, buffered, flushed, part_of
from slimjax.pytree import pytree


@pytree
class Tile:
    """S keys and values. The shapes fit scores [B, K, G, Q, T, S]: Q tiles of T queries.

    Attributes:
        k, v: codes.
        k_scale: of each head, or of each token, where a buffer's tokens came under a smaller scale than its last.
        v_scale: of each head, or as each query has it.
        share: each token's scale of V over ``v_scale``, at most 1: P is multiplied by it before it is rounded, so
            that one scale serves the whole product.
        mine: of a second tile, the queries that read it instead of the first.
    """

    k: Int8[Array, "B S K H"]
    v: Int8[Array, "B S K H"]
    k_scale: Float[Array, "B K 1 1 1 #S"]
    v_scale: Float[Array, "B K 1 #Q 1 1"]
    share: Float[Array, "B K 1 #Q 1 #S"]
    mine: Bool[Array, "B 1 1 Q 1 1"] | None = None


# Keys and values of ``size`` slots from ``start`` on: one tile, or one of tiles and one as the buffer held them.
Tiles = Callable[[Int[Array, ""] | int, int], tuple[Tile, ...]]


def tile_of(k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]) -> Tile:
    """Rows quantised here, to one tile."""
    (keys, k_scale), (values, v_scale) = (quantise(rows.astype(jnp.float32)) for rows in (k, v))
    v_scale = _heads(v_scale)
    return Tile(k=keys, v=values, k_scale=_heads(k_scale), v_scale=v_scale, share=jnp.ones_like(v_scale))


def stored_tiles(cache: Cache, codec: TiledCodec, positions: Int[Array, "B T"]) -> Tiles:
    """Tiles of a cache whose codec is ``integral``, expanded in integers, the newest ones from the buffer.

    Queries at ``positions`` whose tokens were just appended (``cache.recent``) have both, and read their own.
    """
    if cache.recent is None:
        return _now(cache, codec)
    recent, lines = cache.recent, cache.recent.lines
    reference = _so_far(lines["v"], recent.first, positions, codec.span)

    def tiles(start: Int[Array, ""] | int, count: int) -> tuple[Tile, ...]:
        done = start // codec.span < flushed(codec, cache.length)
        old = _expanded(cache, codec, start, done)
        k, v = (part_of(lines[name], recent.first, start, count) for name in ("k", "v"))
        slots = jnp.arange(count, dtype=jnp.int32)[None, :] + start
        there = (slots >= recent.first[:, None]) & (slots < cache.length[:, None])
        mine = ~in_tiles(codec, positions, slots[0, :1])[:, None, None, :, None]
        return old, _held(k, v, reference, there, mine)

    return tiles


def _now(cache: Cache, codec: TiledCodec) -> Tiles:
    """Tiles as the cache holds them now, for every query the same."""
    span, before = codec.span, flushed(codec, cache.length)
    slots = jnp.arange(span, dtype=jnp.int32)[None, :] + before[:, None] * span
    there = slots < cache.length[:, None]
    reference = _largest(_slots(cache.streams["v"], 0, span), there)

    def tiles(start: Int[Array, ""] | int, count: int) -> tuple[Tile, ...]:
        old = _expanded(cache, codec, start, start < cache.length)
        at = start % span
        k, v = (_slots(cache.streams[name], at, count) for name in ("k", "v"))
        newest = buffered(codec, cache.length, start // span * span, span)[:, 0]
        held = _held(k, v, reference, jax.lax.dynamic_slice_in_dim(there, at, count, axis=1), None)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(newest.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return (jax.tree.map(choose, held, old),)

    return tiles


def buffer_tiles(
    cache: Cache, codec: TiledCodec, positions: Int[Array, "B T"]
) -> tuple[Lengths, Bool[Array, "B 1 T S"], tuple[Tile, ...]]:
    """What queries find in the buffer, for who reads encoded tiles by itself.

    Returns:
        The slot of the first token, which of the S slots from there on each query finds there and not in tiles, and
        the slots' codes, tile by tile.
    """
    first, mine, lines = newest(cache, codec, positions)
    count, size = mine.shape[2], codec.tile
    there = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :] < cache.length[:, None]
    if cache.recent is None:
        reference = _largest(lines["v"], there)
    else:
        reference = _so_far(lines["v"], first, positions, codec.span)

    def tile(start: int) -> Tile:
        k, v = (jax.tree.map(lambda each: each[:, start : start + size], lines[name]) for name in "kv")
        return _held(k, v, reference, there[:, start : start + size], None)

    return first, mine[:, None], tuple(tile(start) for start in range(0, count, size))


def _slots(stored: TiledRows, start: Int[Array, ""] | int, count: int) -> Line:
    """Some slots of the buffer."""
    codes, marks = (
        None if each is None else jax.lax.dynamic_slice_in_dim(each, start, count, axis=1)
        for each in (stored.buffer, stored.scales)
    )
    assert codes is not None
    return Line(codes=codes, scales=marks)


def _expanded(cache: Cache, codec: TiledCodec, start: Int[Array, ""] | int, used: Bool[Array, "B"]) -> Tile:
    """The tile at ``start`` from tiles; scales of 0 where it is not used: what was not written may hold anything."""

    def codes(name: str) -> tuple[Array, Array]:
        found = codec.integers(cache.streams[name].tiles.tiles(start // codec.tile, 1))
        scale = found.scale[:, 0]
        return found.codes[:, 0], _heads(jnp.where(used[:, None], scale, jnp.zeros_like(scale)))

    (k, k_scale), (v, v_scale) = codes("k"), codes("v")
    return Tile(k=k, v=v, k_scale=k_scale, v_scale=v_scale, share=jnp.ones_like(v_scale))


def _held(
    k: Line,
    v: Line,
    reference: Float[Array, "B #T K"],
    there: Bool[Array, "B S"],
    mine: Bool[Array, "B 1 1 T 1 1"] | None,
) -> Tile:
    """Tokens of a buffer. ``reference``: the largest scale of V that each query finds in it."""
    assert k.scales is not None
    assert v.scales is not None

    def token(scales: Float[Array, "B S K 1"]) -> Float[Array, "B K 1 1 1 S"]:
        here = jnp.where(there[:, :, None, None], scales, jnp.zeros_like(scales))
        return jnp.moveaxis(here[..., 0], 1, 2)[:, :, None, None, None, :]

    v_scale = jnp.moveaxis(reference, 1, 2)[:, :, None, :, None, None]
    own = token(v.scales)
    # A scale of 0 is that of zeros: any share will do.
    share = jnp.where((own == 0) | (v_scale == 0), 1.0, own / jnp.where(v_scale == 0, 1.0, v_scale))
    return Tile(k=k.codes, v=v.codes, k_scale=token(k.scales), v_scale=v_scale, share=share, mine=mine)


def _largest(line: Line, there: Bool[Array, "B S"]) -> Float[Array, "B 1 K"]:
    """The largest scale of a buffer's tokens."""
    assert line.scales is not None  # an integer buffer has them
    marks = line.scales[..., 0]
    return jnp.max(jnp.where(there[:, :, None], marks, jnp.zeros_like(marks)), axis=1, keepdims=True)


def _so_far(line: Line, first: Lengths, positions: Int[Array, "B T"], span: int) -> Float[Array, "B T K"]:
    """The largest scale of the buffer's tokens when each query came."""
    assert line.scales is not None
    marks = line.scales[..., 0]
    windows = marks.reshape(len(marks), -1, span, marks.shape[2])
    largest = jax.lax.associative_scan(jnp.maximum, windows, axis=2).reshape(marks.shape)
    index = jnp.clip(positions - first[:, None], 0, marks.shape[1] - 1)
    return jnp.take_along_axis(largest, index[:, :, None], axis=1)


def _heads(scale: Float[Array, "B K"]) -> Float[Array, "B K 1 1 1 1"]:
    return scale[:, :, None, None, None, None]
