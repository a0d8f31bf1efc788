"""How codes lie in a cache: a row in one piece, as kernels read it.

A codec gives [B, T, K, W] arrays, which a TPU lays out in tiles of K by W. Rows of K*W numbers it lays out in tiles of
tokens by numbers, and a kernel reads them as they lie. What has one number a head (scales), and extra coordinates,
which are few, would fill 128 lanes with a handful of numbers: there tokens come last. Of tiles of tokens, all rows of
all tiles lie one behind the other.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from slimjax.pytree import pytree, static

LANES = 128


@pytree
class LaidOut:
    """One stream's codes.

    Attributes:
        leaves: of the codec's pytree in its order, each [B, C, K*W], or [B, K*W, C] where tokens come last.
        rows: K, W of each leaf.
        tokens_last: of each leaf.
        structure: the codec's pytree.
    """

    leaves: tuple[Array, ...]
    rows: tuple[tuple[int, ...], ...] = static()
    tokens_last: tuple[bool, ...] = static()
    structure: Any = static()

    def codes(self, start: Int[Array, ""] | int = 0, size: int | None = None) -> Any:
        """The codec's pytree, [B, S, K, W] leaves, of all slots or of ``size`` from ``start`` on."""
        parts = []
        for leaf, row, last in zip(self.leaves, self.rows, self.tokens_last, strict=True):
            part = leaf if size is None else _slots(leaf, start, size, axis=2 if last else 1)
            part = jnp.swapaxes(part, 1, 2) if last else part
            parts.append(part.reshape(*part.shape[:2], *row))
        return jax.tree.unflatten(self.structure, parts)

    def written(self, codes: Any, slots: Int[Array, "B T"]) -> "LaidOut":
        """With new codes, [B, T, K, W] leaves, at these slots; a slot that does not exist is not written."""
        sequence = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]

        def write(leaf: Array, fresh: Array, last: bool) -> Array:
            flat = fresh.reshape(*fresh.shape[:2], -1)
            if not last:
                return leaf.at[sequence, slots].set(flat, mode="drop", unique_indices=False)
            if slots.shape[1] > 1:
                return _scattered(leaf, flat, slots)
            return jax.lax.platform_dependent(leaf, flat, slots, tpu=_one_by_one, default=_scattered)

        fresh = jax.tree.leaves(codes)
        return dataclasses.replace(self, leaves=tuple(map(write, self.leaves, fresh, self.tokens_last)))


def empty_like(codes: Any, *, few: bool = False) -> LaidOut:
    """Zeros for codes of these shapes, [B, C, K, W] leaves; ``few``: rows are a few numbers, extra coordinates."""
    shapes, structure = jax.tree.flatten(codes)
    rows = tuple(shape.shape[2:] for shape in shapes)
    last = tuple(row[-1] == 1 or (few and math.prod(row) < LANES) for row in rows)

    def zeros(shape: jax.ShapeDtypeStruct, row: tuple[int, ...], last: bool) -> Array:
        flat = (math.prod(row), shape.shape[1]) if last else (shape.shape[1], math.prod(row))
        return jnp.zeros((shape.shape[0], *flat), shape.dtype)

    leaves = tuple(map(zeros, shapes, rows, last))
    return LaidOut(leaves=leaves, rows=rows, tokens_last=last, structure=structure)


def _scattered(
    leaf: Num[Array, "B W C"], fresh: Num[Array, "B T W"], slots: Int[Array, "B T"]
) -> Num[Array, "B W C"]:
    sequence = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
    return leaf.at[sequence, :, slots].set(fresh, mode="drop", unique_indices=False)


def _one_by_one(
    leaf: Num[Array, "B W C"], fresh: Num[Array, "B 1 W"], slots: Int[Array, "B 1"]
) -> Num[Array, "B W C"]:
    """The same of one token each, by whole lanes of each sequence.

    A scatter of single columns, and a loop that writes them, XLA for TPU gives the whole leaf another layout for, in
    which lanes are filled up, and turns it back. A slot that does not exist is in no lane. Where sequences are spread
    over devices it belongs within ``shard_map``: the loop goes over all of them.
    """
    width = min(LANES, leaf.shape[2])
    start = jnp.minimum(slots // width * width, leaf.shape[2] - width)

    def step(b: Array, leaf: Array) -> Array:
        at, row = start[b, 0], jax.lax.dynamic_slice_in_dim(fresh, b, 1)
        corner = (b.astype(at.dtype), jnp.zeros_like(at), at)
        here = at + jnp.arange(width, dtype=slots.dtype) == slots[b, 0]
        held = jax.lax.dynamic_slice(leaf, corner, (1, leaf.shape[1], width))
        new = jnp.where(here, jnp.swapaxes(row, 1, 2).astype(leaf.dtype), held)
        return jax.lax.dynamic_update_slice(leaf, new, corner)

    return jax.lax.fori_loop(0, len(leaf), step, leaf)


def _slots(leaf: Array, start: Int[Array, ""] | int, size: int, axis: int) -> Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize >= 4:
        return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=axis)
    # As integers of its width: XLA on CPU cannot slice narrow floats, and widens the whole cache first.
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(
        jax.lax.dynamic_slice_in_dim(bits, start, size, axis=axis), leaf.dtype
    )


@pytree
class LaidTiles:
    """The codes of n tiles, of which each leaf has r rows.

    Attributes:
        leaves: of the codec's pytree in its order, each [B, n*r, row].
        shapes: of each leaf behind [B, n].
        structure: the codec's pytree.
    """

    leaves: tuple[Array, ...]
    shapes: tuple[tuple[int, ...], ...] = static()
    structure: Any = static()

    @property
    def count(self) -> int:
        """n."""
        return self.leaves[0].shape[1] // _rows_of(self.shapes[0])

    def tiles(self, start: Int[Array, ""] | int = 0, count: int | None = None) -> Any:
        """The codec's pytree, [B, n, ...] leaves, of all tiles or of ``count`` from ``start`` on."""
        parts = []
        for leaf, shape in zip(self.leaves, self.shapes, strict=True):
            rows = _rows_of(shape)
            part = leaf if count is None else _slots(leaf, start * rows, count * rows, axis=1)
            parts.append(part.reshape(len(part), -1, *shape))
        return jax.tree.unflatten(self.structure, parts)

    def written(self, codes: Any, places: Int[Array, "B T"]) -> "LaidTiles":
        """With new tiles, [B, T, ...] leaves, at these places; a place that does not exist is not written."""
        sequence = jnp.arange(places.shape[0], dtype=jnp.int32)[:, None]

        def write(leaf: Array, fresh: Array, shape: tuple[int, ...]) -> Array:
            rows = _rows_of(shape)
            within = jnp.arange(rows, dtype=jnp.int32)[None, None]
            at = (places[:, :, None] * rows + within).reshape(len(places), -1)
            return leaf.at[sequence, at].set(fresh.reshape(*at.shape, -1), mode="drop")

        fresh = jax.tree.leaves(codes)
        return dataclasses.replace(self, leaves=tuple(map(write, self.leaves, fresh, self.shapes)))


def empty_tiles_like(codes: Any) -> LaidTiles:
    """Zeros for codes of these shapes, [B, n, ...] leaves."""
    leaves, structure = jax.tree.flatten(codes)
    shapes = tuple(leaf.shape[2:] for leaf in leaves)

    def zeros(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> Array:
        batch, count = leaf.shape[:2]
        return jnp.zeros((batch, count * _rows_of(shape), math.prod(shape[-2:])), leaf.dtype)

    return LaidTiles(leaves=tuple(map(zeros, leaves, shapes)), shapes=shapes, structure=structure)


def _rows_of(shape: tuple[int, ...]) -> int:
    """Rows of a tile's array: its last two axes are one."""
    return math.prod(shape[:-2])
