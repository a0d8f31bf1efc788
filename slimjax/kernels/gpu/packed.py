"""FlashQ's packed codes on Hopper: which tokens rows of bytes are of, and how a byte's part becomes INT8 codes.

64 rows of bytes are those of 8/bits tiles of 64 tokens; the parts of a byte (``cache.pack``) are other tokens of its
tile. So a part of 64 rows of bytes is 64 tokens, of several tiles: their order is not that of the sequence.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from slimjax.kernels.gpu import mosaic
from slimjax.kernels.gpu.ring import BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How codes of so many ``bits``, in tiles of ``tile`` tokens, lie in rows of bytes."""

    bits: int
    tile: int

    @property
    def parts(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def rows(self) -> int:
        """Rows of bytes of a tile."""
        return self.tile // self.parts

    @property
    def count(self) -> int:
        """Tiles of 64 rows."""
        return BLOCK // self.rows

    @property
    def span(self) -> int:
        """Tokens of 64 rows."""
        return self.count * self.tile

    def brought(self, width: int) -> int:
        """Tiles of which numbers, so many bytes each, are brought at a time: copies are multiples of 128 bytes."""
        return self.count * (128 // math.gcd(self.count * width, 128))

    # Rows and parts are powers of two: shifts serve numbers in kernels and outside alike.
    def tile_of(self, row: Any) -> Any:
        """Which of the tiles of 64 rows this one is of."""
        return row >> (self.rows.bit_length() - 1)

    def offset(self, row: Any) -> Any:
        """Tokens from the first of 64 rows, or of a part of them, to this one."""
        return self.tile_of(row) * (self.tile - self.rows) + row

    def split(self, block: Any) -> tuple[Any, Any]:
        """Which 64 rows, and which part of their bytes, a block of 64 tokens is."""
        return block >> (self.parts.bit_length() - 1), block & (self.parts - 1)


def refusal(bits: int, tile: int) -> str | None:
    """Why tiles have no kernel, or None."""
    if bits == 3:
        return "tiles of 3 bits have no kernel for GPUs; it has 8, 4 and 2"
    if BLOCK % (tile * bits // 8):
        return f"tiles of {tile} tokens in {bits} bits have no kernel for GPUs; use 32 or 64"
    return None


def expanded(
    held: dict[str, Any], columns: Any, part: Any, packing: Packing, *, interpreted: bool
) -> Int32[Array, "64 w"]:
    """The INT8 codes of a part of 64 rows of bytes in shared memory, and their tiles' steps and lows."""
    packed = mosaic.load(held[""].at[:, columns], interpreted=interpreted).astype(jnp.int32)
    if packing.bits == 8:
        return packed
    both = _steps(held, columns, packed, packing, interpreted)
    by = (part * packing.bits).astype(jnp.int32)
    code = jax.lax.shift_right_logical(packed, by) & jnp.int32(2**packing.bits - 1)
    return code * (both & 255) + jax.lax.shift_right_arithmetic(both, jnp.int32(8))


def _steps(held: dict[str, Any], columns: Any, like: Array, packing: Packing, interpreted: bool) -> Array:
    """256 low + step of each row's tile and column: one number rather than two while tiles are chosen."""
    tile = packing.tile_of(mosaic.iota(like.shape, 0, interpreted=interpreted))
    found = jnp.zeros_like(like)
    for index in range(packing.count):
        step, low = (
            mosaic.by_column(held[name].at[index, columns], interpreted=interpreted).astype(jnp.int32)
            for name in ("step", "low")
        )
        mine = mosaic.down((step & 255) | jax.lax.shift_left(low, jnp.int32(8)), like)
        found = mine if index == 0 else jnp.where(tile == index, mine, found)
    return found
