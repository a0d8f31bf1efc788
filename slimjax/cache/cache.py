"""The cache of one attention layer: a frozen pytree, appended to by value, that knows its bytes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from slimjax.axes import Lengths, typed
from slimjax.cache.codecs import Codec
from slimjax.cache.codecs.base import Role, TiledCodec
from slimjax.cache.layout import empty_like
from slimjax.cache.tiled import (
    Line,
    append_tiles,
    capacity_of,
    empty_tiles,
    flushed,
    part_of,
    read_tiles,
    read_window,
)
from slimjax.pytree import pytree, static

# What a basis caches: the stream's name -> (heads, size) of one token's row.
Streams = Mapping[str, tuple[int, int]]


@pytree
class Recent:
    """What the last call appended, as it was before any of it was encoded: what its own queries saw.

    Attributes:
        lines: by stream, under a ``TiledCodec``; empty under codecs whose codes never change.
        first: [B], the slot of the lines' first token.
    """

    lines: dict[str, Line]
    first: Lengths


@pytree
class Cache:
    """Encoded rows of every stream of a basis, and how many tokens of each sequence they hold.

    Invariants: slots at and past ``length`` hold anything (NaN included) and are never read; a sequence whose
    ``length`` exceeds the capacity C has lost tokens, and ``decode`` answers NaN for it. A stream is ``LaidOut``,
    under a ``TiledCodec`` ``TiledRows``.

    Bytes: the sum over streams of ``codec.nbytes((B, C, heads, size))``, plus 4*B for the lengths, and under a
    ``TiledCodec`` the buffers.

    Attributes:
        streams: by name, what the codec made of the rows.
        length: tokens of each sequence.
        capacity: C, slots per sequence.
        recent: between ``append(keep=True)`` and the queries of the same tokens; else None.
    """

    streams: dict[str, Any]
    length: Lengths
    capacity: int = static()
    recent: Recent | None = None

    @property
    def batch(self) -> int:
        """Sequences, B."""
        return self.length.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as stored, measured from the leaves (lengths left out)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.streams))

    @property
    def bytes_per_token(self) -> float:
        """Measured bytes per slot of one sequence."""
        return self.nbytes / (self.batch * self.capacity)


def empty(streams: Streams, codec: Codec, *, batch: int, capacity: int) -> Cache:
    """A cache with no tokens, of at least ``capacity`` slots (a ``TiledCodec`` rounds up to whole buffers).

    Raises ValueError where batch or capacity is not positive.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"a cache needs at least one sequence and one slot, got {batch=} {capacity=}")
    slots = capacity_of(capacity, codec) if isinstance(codec, TiledCodec) else capacity

    def zeros(name: str, row: tuple[int, int]) -> Any:
        own = codec.stream(name)
        if isinstance(own, TiledCodec):
            return empty_tiles(own, row, role_of(name), batch=batch, slots=slots)
        rows = jax.ShapeDtypeStruct((batch, slots, *row), jnp.float32)
        shapes = jax.eval_shape(lambda rows: own.encode(rows, role_of(name)), rows)
        return empty_like(shapes, few=name == "r")

    rows = {name: zeros(name, row) for name, row in streams.items()}
    return Cache(streams=rows, length=jnp.zeros((batch,), jnp.int32), capacity=slots)


def role_of(stream: str) -> Role:
    """What a stream's rows are to a codec: values, or keys and what stands in for them."""
    return "v" if stream == "v" else "k"


def row_bytes(streams: Streams, codec: Codec) -> float:
    """Bytes per token of a long cache: scales included, a ``TiledCodec``'s buffers, which do not grow, left out."""

    def of(name: str, row: tuple[int, int]) -> float:
        own = codec.stream(name)
        if isinstance(own, TiledCodec):
            return own.tiles_nbytes((1, own.tile, *row), role_of(name)) / own.tile
        return own.nbytes((1, 1, *row), role_of(name))

    return sum(of(name, row) for name, row in streams.items())


@typed
def append(
    cache: Cache,
    rows: Mapping[str, Float[Array, "B T ..."]],
    codec: Codec,
    count: Lengths | None = None,
    *,
    prompt: bool = True,
    keep: bool = False,
) -> Cache:
    """Encode T new rows per sequence and write them behind the tokens already there.

    However they are cut into calls, the same rows leave the same codes, unless they are a prompt under a
    ``TiledCodec``.

    Args:
        cache: what is there.
        rows: a row per stream, [B, T, heads, size], any float dtype.
        codec: the codec the cache was made with.
        count: [B], how many of the T rows are tokens; the rest is padding at the end and is not written.
            None: all of them.
        prompt: a ``TiledCodec`` that ``prefills`` encodes windows that lie within this call from its rows, and
            a buffer's scale is that of all rows of the call. False: as if the tokens came one by one.
        keep: leave in ``recent`` what queries of these very tokens need: see ``read_both``.

    Raises:
        ValueError: streams differ from the cache's, or (outside jit) the capacity is exceeded or a count is
            not in 0..T. Under jit ``decode`` answers such a sequence with NaN, since a traced program
            cannot raise.
    """
    if rows.keys() != cache.streams.keys():
        raise ValueError(f"the cache holds {sorted(cache.streams)}, the new rows are {sorted(rows)}")
    tokens = next(iter(rows.values())).shape[1]
    new, length = _grown(cache, tokens, count)
    step = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    # Padding goes to a slot that does not exist, where the scatter drops it.
    slots = jnp.where(step < new[:, None], cache.length[:, None] + step, cache.capacity)
    streams: dict[str, Any] = {}
    lines: dict[str, Line] = {}
    for name, fresh in rows.items():
        own, held, role = codec.stream(name), cache.streams[name], role_of(name)
        if isinstance(own, TiledCodec):
            streams[name], lines[name] = append_tiles(
                held, fresh, own, role, cache.length, new, prompt=prompt
            )
        else:
            streams[name] = held.written(own.encode(fresh, role), slots)
    first = jnp.zeros_like(cache.length)
    if isinstance(codec, TiledCodec):
        first = flushed(codec, cache.length) * codec.span
    recent = Recent(lines=lines, first=first) if keep else None
    return dataclasses.replace(cache, streams=streams, length=length, recent=recent)


def _grown(cache: Cache, tokens: int, count: Lengths | None) -> tuple[Lengths, Lengths]:
    """New tokens of each sequence and its length with them, past the capacity where the count is wrong."""
    new = jnp.full_like(cache.length, tokens) if count is None else count.astype(cache.length.dtype)
    wrong = (new < 0) | (new > tokens)
    length = jnp.where(wrong, jnp.full_like(new, cache.capacity + 1), cache.length + new)
    if not isinstance(length, Tracer):
        if bool(jnp.any(wrong)):
            raise ValueError(f"count = {new.tolist()}: expected 0..{tokens}, the tokens given")
        if int(jnp.max(length)) > cache.capacity:
            raise ValueError(f"{int(jnp.max(length))} tokens do not fit a cache of {cache.capacity} slots")
    return new, length


def read(
    cache: Cache,
    codec: Codec,
    dtype: jax.typing.DTypeLike,
    *,
    start: Int[Array, ""] | int = 0,
    size: int | None = None,
) -> dict[str, Float[Array, "B S K H"]]:
    """Rows of slots start .. start + size - 1, decoded to ``dtype`` (float32 or float64), zero past each length.

    Zero, not whatever is there: a weight of 0 times a NaN is NaN.

    Args:
        cache: what to read.
        codec: the codec the cache was made with.
        dtype: float32 or float64.
        start: of a ``TiledCodec``, a multiple of its ``span``.
        size: likewise; None: the whole capacity.
    """
    count = cache.capacity if size is None else size
    index = jnp.arange(count, dtype=jnp.int32) + start
    valid = index[None, :] < cache.length[:, None]

    def rows(name: str, codes: Any) -> Array:
        own = codec.stream(name)
        if isinstance(own, TiledCodec):
            decoded = read_window(codes, own, cache.length, start, count)
        else:
            decoded = own.decode(codes.codes(start, size))
        return _within(decoded.astype(dtype), valid)

    return {name: rows(name, codes) for name, codes in cache.streams.items()}


def read_both(
    cache: Cache, codec: TiledCodec, dtype: jax.typing.DTypeLike, *, start: Int[Array, ""] | int, size: int
) -> tuple[dict[str, Float[Array, "B S K H"]], dict[str, Float[Array, "B S K H"]]]:
    """As ``read`` of a cache with ``recent``: the rows in tiles, and the rows that the last call had in the buffer.

    Rows of its flushed windows are in both: a query sees the tiles of the windows that were full when it came
    (``in_tiles``), and other tokens as the buffer held them. Rows that are in neither are zero.
    """
    recent = cache.recent
    assert recent is not None  # of ``append(keep=True)``
    slots = jnp.arange(size, dtype=jnp.int32)[None, :] + start
    valid = slots < cache.length[:, None]
    old, held = {}, {}
    for name, codes in cache.streams.items():
        own = codec.stream(name)
        if isinstance(own, TiledCodec):
            done = slots // own.span < flushed(own, cache.length)[:, None]
            line = part_of(recent.lines[name], recent.first, start, size)
            old[name] = _within(read_tiles(codes, own, start, size).astype(dtype), valid & done)
            rows = own.held(line.codes, line.scales).astype(dtype)
            held[name] = _within(rows, valid & (slots >= recent.first[:, None]))
        else:
            old[name] = held[name] = _within(own.decode(codes.codes(start, size)).astype(dtype), valid)
    return old, held


def read_at(
    cache: Cache,
    codec: Codec,
    dtype: jax.typing.DTypeLike,
    at: Lengths,
    *,
    start: Int[Array, ""] | int,
    size: int,
) -> dict[str, Float[Array, "B S K H"]]:
    """As ``read`` when each sequence held ``at`` tokens, no fewer than before the call that left ``recent``."""
    if not isinstance(codec, TiledCodec):
        return read(dataclasses.replace(cache, length=at), codec, dtype, start=start, size=size)
    old, held = read_both(cache, codec, dtype, start=start, size=size)
    slots = jnp.arange(size, dtype=jnp.int32) + start
    done = in_tiles(codec, at[:, None] - 1, slots)[:, 0, :, None, None]
    valid = slots[None, :] < at[:, None]
    return {name: _within(jnp.where(done, old[name], held[name]), valid) for name in old}


def in_tiles(codec: TiledCodec, positions: Int[Array, "B T"], slots: Int[Array, "S"]) -> Bool[Array, "B T S"]:
    """Whether the query at a position, once its own token is held, finds a slot in tiles."""
    return slots[None, None, :] // codec.span < flushed(codec, positions + 1)[:, :, None]


def newest(
    cache: Cache, codec: TiledCodec, positions: Int[Array, "B T"]
) -> tuple[Lengths, Bool[Array, "B T S"], dict[str, Line]]:
    """What queries find in the buffer, for who reads encoded tiles by itself.

    Returns:
        The slot of the first token; which of the S slots from there on each query finds there and not in tiles; and
        by stream of tiles these slots, which hold anything where no query finds them.
    """
    first, lines = flushed(codec, cache.length) * codec.span, {}
    if cache.recent is None:
        for name, stored in cache.streams.items():
            if isinstance(codec.stream(name), TiledCodec):
                lines[name] = Line(codes=stored.buffer, scales=stored.scales)
    else:
        first, lines = cache.recent.first, cache.recent.lines
    count = next(iter(lines.values())).codes.shape[1]
    slots = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    mine = jnp.broadcast_to((slots < cache.length[:, None])[:, None], (len(slots), positions.shape[1], count))
    if cache.recent is not None:
        mine = mine & ~(slots[:, None] // codec.span < flushed(codec, positions + 1)[:, :, None])
    return first, mine, lines


def _within(rows: Float[Array, "B S K H"], valid: Bool[Array, "B S"]) -> Float[Array, "B S K H"]:
    return jnp.where(valid[:, :, None, None], rows, jnp.zeros_like(rows))
