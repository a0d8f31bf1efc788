"""The cache of one attention layer: a frozen pytree, appended to by value, that knows its bytes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from slimjax.axes import Lengths, typed
from slimjax.cache.codecs import Codec
from slimjax.pytree import pytree

# What a basis caches: the stream's name -> (heads, size) of one token's row.
Streams = Mapping[str, tuple[int, int]]


@pytree
class Cache:
    """Encoded rows of every stream of a basis, and how many tokens of each sequence they hold.

    Invariants: every leaf of ``streams`` starts with the axes [B, C]; slots at and past ``length`` hold
    anything (NaN included) and are never read; a sequence whose ``length`` exceeds the capacity C has lost
    tokens, and ``decode`` answers NaN for it.

    Bytes: the sum over streams of ``codec.nbytes((B, C, heads, size))``, plus 4*B for the lengths.
    """

    streams: dict[str, Any]
    length: Lengths

    @property
    def capacity(self) -> int:
        """Slots per sequence, C."""
        return jax.tree.leaves(self.streams)[0].shape[1]

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
    """A cache with no tokens. Raises ValueError where batch or capacity is not positive."""
    if batch < 1 or capacity < 1:
        raise ValueError(f"a cache needs at least one sequence and one slot, got {batch=} {capacity=}")

    def zeros(heads: int, size: int) -> Any:
        rows = jax.ShapeDtypeStruct((batch, capacity, heads, size), jnp.float32)
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(codec.encode, rows)
        )

    rows = {name: zeros(*shape) for name, shape in streams.items()}
    return Cache(streams=rows, length=jnp.zeros((batch,), jnp.int32))


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

    streams = {name: jax.tree.map(write, cache.streams[name], codec.encode(rows[name])) for name in rows}
    return Cache(streams=streams, length=length)


def read(cache: Cache, codec: Codec, dtype: jax.typing.DTypeLike) -> dict[str, Float[Array, "B C K H"]]:
    """Every stream's rows decoded to ``dtype`` (float32 or float64), zero in the slots past each length.

    Zero, not whatever is there: a weight of 0 times a NaN is NaN.
    """
    valid = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :] < cache.length[:, None]

    def rows(codes: Any) -> Array:
        decoded = codec.decode(codes).astype(dtype)
        return jnp.where(valid[:, :, None, None], decoded, jnp.zeros_like(decoded))

    return {name: rows(codes) for name, codes in cache.streams.items()}
