"""The cache of one attention layer: a frozen pytree, appended to by value, that knows its bytes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from slimjax.axes import Lengths, typed
from slimjax.cache.codecs import Codec
from slimjax.cache.codecs.base import Role, TiledCodec
from slimjax.cache.tiled import append_tiles, capacity_of, empty_tiles, read_tiles
from slimjax.pytree import pytree, static

# What a basis caches: the stream's name -> (heads, size) of one token's row.
Streams = Mapping[str, tuple[int, int]]


@pytree
class Cache:
    """Encoded rows of every stream of a basis, and how many tokens of each sequence they hold.

    Invariants: slots at and past ``length`` hold anything (NaN included) and are never read; a sequence whose
    ``length`` exceeds the capacity C has lost tokens, and ``decode`` answers NaN for it. Every leaf of a
    stream starts with the axes [B, C]; under a ``TiledCodec`` a stream is ``TiledRows``.

    Bytes: the sum over streams of ``codec.nbytes((B, C, heads, size))``, plus 4*B for the lengths, and under a
    ``TiledCodec`` the buffers.

    Attributes:
        streams: by name, what the codec made of the rows.
        length: tokens of each sequence.
        capacity: C, slots per sequence.
    """

    streams: dict[str, Any]
    length: Lengths
    capacity: int = static()

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
        if isinstance(codec, TiledCodec):
            return empty_tiles(codec, row, role_of(name), batch=batch, slots=slots)
        rows = jax.ShapeDtypeStruct((batch, slots, *row), jnp.float32)
        shapes = jax.eval_shape(lambda rows: codec.encode(rows, role_of(name)), rows)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    rows = {name: zeros(name, row) for name, row in streams.items()}
    return Cache(streams=rows, length=jnp.zeros((batch,), jnp.int32), capacity=slots)


def role_of(stream: str) -> Role:
    """What a stream's rows are to a codec: values, or keys and what stands in for them."""
    return "v" if stream == "v" else "k"


def row_bytes(streams: Streams, codec: Codec) -> float:
    """Bytes per token of a long cache: scales included, a ``TiledCodec``'s buffers, which do not grow, left out."""
    if not isinstance(codec, TiledCodec):
        return sum(codec.nbytes((1, 1, *row), role_of(name)) for name, row in streams.items())
    shapes = {name: (1, codec.tile, *row) for name, row in streams.items()}
    return sum(codec.tiles_nbytes(shape, role_of(name)) for name, shape in shapes.items()) / codec.tile


@typed
def append(
    cache: Cache, rows: Mapping[str, Float[Array, "B T ..."]], codec: Codec, count: Lengths | None = None
) -> Cache:
    """Encode T new rows per sequence and write them behind the tokens already there.

    Args:
        cache: what is there.
        rows: a row per stream, [B, T, heads, size], any float dtype.
        codec: the codec the cache was made with.
        count: [B], how many of the T rows are tokens; the rest is padding at the end and is not written.
            None: all of them.

    Raises:
        ValueError: streams differ from the cache's, or (outside jit) the capacity is exceeded or a count is
            not in 0..T. Under jit ``decode`` answers such a sequence with NaN, since a traced program
            cannot raise.
    """
    if rows.keys() != cache.streams.keys():
        raise ValueError(f"the cache holds {sorted(cache.streams)}, the new rows are {sorted(rows)}")
    tokens = next(iter(rows.values())).shape[1]
    new = jnp.full_like(cache.length, tokens) if count is None else count.astype(cache.length.dtype)
    wrong = (new < 0) | (new > tokens)
    length = jnp.where(wrong, jnp.full_like(new, cache.capacity + 1), cache.length + new)
    if not isinstance(length, Tracer):
        if bool(jnp.any(wrong)):
            raise ValueError(f"count = {new.tolist()}: expected 0..{tokens}, the tokens given")
        if int(jnp.max(length)) > cache.capacity:
            raise ValueError(f"{int(jnp.max(length))} tokens do not fit a cache of {cache.capacity} slots")
    step = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    # Padding goes to a slot that does not exist, where the scatter drops it.
    slots = jnp.where(step < new[:, None], cache.length[:, None] + step, cache.capacity)
    sequence = jnp.arange(cache.batch, dtype=jnp.int32)[:, None]

    def write(stored: Array, fresh: Array) -> Array:
        return stored.at[sequence, slots].set(fresh, mode="drop", unique_indices=False)

    def stream(name: str) -> Any:
        if isinstance(codec, TiledCodec):
            role = role_of(name)
            return append_tiles(cache.streams[name], rows[name], codec, role, cache.length, new)
        return jax.tree.map(write, cache.streams[name], codec.encode(rows[name], role_of(name)))

    return dataclasses.replace(cache, streams={name: stream(name) for name in rows}, length=length)


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

    def rows(codes: Any) -> Array:
        if isinstance(codec, TiledCodec):
            decoded = read_tiles(codes, codec, cache.length, start, count)
        else:
            decoded = codec.decode(codes if size is None else _slots(codes, start, count))
        decoded = decoded.astype(dtype)
        return jnp.where(valid[:, :, None, None], decoded, jnp.zeros_like(decoded))

    return {name: rows(codes) for name, codes in cache.streams.items()}


def _slots(codes: Any, start: Int[Array, ""] | int, size: int) -> Any:
    def part(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize >= 4:
            return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1)
        # As integers of its width: XLA on CPU cannot slice narrow floats, and widens the whole cache first.
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(
            jax.lax.dynamic_slice_in_dim(bits, start, size, axis=1), leaf.dtype
        )

    return jax.tree.map(part, codes)
