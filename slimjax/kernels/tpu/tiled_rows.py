"""FlashQ's tiles as rows that ``rows.attend_rows`` reads: codes are expanded where they are used, a block at a time.

A code c of channel e in tile t stands for scale[t, head of e] (low[t, e] + step[t, e] c), arXiv 2412.08585, section 3.
Keys that are weighed as whole rows (slim attention's option 2) cannot keep their codes in the products, as
``flashq`` does: every query meets every column, whose steps differ. So both factors are multiplied together once a
tile and channel, and rows are made of codes by a product and a sum in float32; as operands they are rounded to the
compute dtype, which moves the largest by up to a quarter of an 8-bit step in bfloat16.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8, Int32

from slimjax.cache.codecs.flashq import FlashQ, FlashQTiles
from slimjax.cache.pack import PLANES
from slimjax.pytree import pytree, static

SUBLANES = 8  # of a float32 tile: parts of fewer rows would have to be moved
COUNT = 8  # tiles of a block, or a multiple: sublanes of their steps


@pytree
class Tiled:
    """Rows of K heads in n tiles of G tokens, as cached, or a block of m of them.

    Attributes:
        packed: the codes; at 8 bits INT8 codes, which have no step and low.
        factor: scale of each tile and head.
        bits: 2, 3, 4 or 8.
        tile: G.
    """

    packed: Array  # [B, n*G*bits/8, K*H]
    step: Int8[Array, "B n W"] | None
    low: Int8[Array, "B n W"] | None
    factor: Float[Array, "B n K"]
    bits: int = static()
    tile: int = static()

    @property
    def width(self) -> int:
        """W = K*H."""
        return self.packed.shape[-1]

    @property
    def tokens(self) -> int:
        """Of all tiles."""
        return self.factor.shape[-2] * self.tile

    @property
    def scale(self) -> None:
        """Rows come scaled."""
        return None

    @property
    def tokens_last(self) -> bool:
        """Never."""
        return False

    @property
    def stored(self) -> int:
        """Bytes of a value in fast memory, at most: its code, and of a short tile its step and low."""
        return math.ceil(self.bits / 8 + 2 / self.tile)

    def operands(self, dtype: Any) -> tuple[float, ...]:
        """Factors of the operands that codes are made into."""
        return (1.0,)

    def specs(self, block: int, at: Callable[..., Any]) -> "Tiled":
        """Of a block of so many tokens, whose number ``at`` tells from the grid's indices."""
        count = self.factor.shape[1]

        def rows(array: Array) -> pl.BlockSpec:
            size = array.shape[1] // count * (block // self.tile)
            return pl.BlockSpec((None, size, array.shape[2]), lambda *i: (i[0], at(*i), 0))

        return jax.tree.map(rows, self)

    def rows(self, columns: Any, left: Any) -> Float[Array, "C w"]:
        """Some columns of a block's rows; zero behind ``left`` tokens, unless that is None."""
        factor = _of_columns(self.factor[...], columns, self.width // self.factor.shape[-1])
        codes = unpacked(self.packed[:, columns], self.bits, len(factor)).astype(jnp.float32)
        if self.step is None or self.low is None:
            rows = codes * factor[:, None]
        else:
            step, low = (each[:, columns].astype(jnp.float32) * factor for each in (self.step, self.low))
            rows = codes * step[:, None] + low[:, None]
        rows = rows.reshape(-1, rows.shape[2])
        if left is None:
            return rows
        token = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        return jnp.where(token < left, rows, 0.0)


def refusal(codec: FlashQ) -> str | None:
    """Why the codec's rows cannot be read by a kernel, or None."""
    for bits in PLANES[codec.bits]:
        if codec.tile * bits % (8 * SUBLANES):
            least = 8 * SUBLANES // bits
            return (
                f"tiles of {codec.tile} tokens in {codec.bits} bits have no kernel; use a multiple of {least}"
            )
    return None


def tiled(tiles: FlashQTiles, tile: int) -> Tiled:
    """A stream's tiles as they lie, [B, n*r, W] codes."""
    return Tiled(
        packed=tiles.packed, step=tiles.step, low=tiles.low, factor=tiles.scale, bits=tiles.bits, tile=tile
    )


def unpacked(packed: Array, bits: int, count: int) -> Int32[Array, "m G w"]:
    """Codes in the order of their tokens. A byte's parts are other tokens of its tile, whole sublanes each."""
    whole = packed.astype(jnp.int32).reshape(count, -1, packed.shape[1])
    if bits == 8:
        return whole
    codes, first, place = None, 0, 0
    for width in PLANES[bits]:
        size = whole.shape[1] * width // bits
        plane = whole[:, first : first + size]
        parts = [(plane >> shift) & (2**width - 1) for shift in range(0, 8, width)]
        found = jnp.concatenate(parts, axis=1) << place
        codes = found if codes is None else codes | found
        first, place = first + size, place + width
    assert codes is not None  # there is a plane
    return codes


def _of_columns(factor: Float[Array, "m K"], columns: Any, size: int) -> Float[Array, "m w"]:
    """Every column's, of its head."""
    count, heads = factor.shape
    if heads == 1:
        return jnp.broadcast_to(factor, (count, columns.size))
    start = jnp.int32(columns.start)
    column = start + jax.lax.broadcasted_iota(jnp.int32, (1, columns.size), 1)
    head, first = jax.lax.div(column, jnp.full_like(column, size)), jax.lax.div(start, jnp.int32(size))
    lane = jax.lax.broadcasted_iota(jnp.int32, factor.shape, 1)
    found = jnp.zeros((count, columns.size), jnp.float32)
    for index in range(
        min(heads, math.ceil(columns.size / size) + 1)
    ):  # one more, where a part begins within one
        own = jnp.sum(jnp.where(lane == first + index, factor, 0.0), axis=1, keepdims=True)
        found = jnp.where(head == first + index, own, found)
    return found
