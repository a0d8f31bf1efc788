"""NVFP4: 4-bit floating-point values (E2M1) in blocks of 16 channels, scaled by E4M3 numbers and a float32 one.

The format has one float32 scale per tensor. In a cache that grows, the tensor is not there yet when its first token
is written, and codes made with one scale are wrong under the next. So here the tensor is a token's row (K*H values,
4 bytes a token), which keeps the codec token-local and loses nothing, as a smaller tensor is only fitted more
closely; or its scale is a number known beforehand, as runtimes with calibrated scales have it, and not stored.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from slimjax.cache.codecs.base import Codec, Role
from slimjax.cache.codecs.extremes import largest
from slimjax.cache.codecs.fp8 import E4M3_MAX, check_scale, to_e4m3
from slimjax.cache.codecs.narrow import (
    as_stored,
    group_count,
    grouped,
    pack_rows,
    row_bytes,
    spread,
    unpack_rows,
)
from slimjax.pytree import pytree, static

# The magnitudes of E2M1: 2 bits of exponent, 1 of mantissa. A code is its index, plus 8 for negative values.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def to_e2m1(x: Float[Array, "*S"]) -> UInt8[Array, "*S"]:
    """4-bit codes of the nearest E2M1 value, a tie to the even code; larger values saturate at 6, NaN is 0."""
    magnitude, code = jnp.abs(x), jnp.zeros(x.shape, jnp.uint8)
    for index, (low, high) in enumerate(itertools.pairwise(MAGNITUDES)):
        middle = (low + high) / 2
        # The next code is even where this one is odd: then it gets the tie.
        above = magnitude >= middle if index % 2 else magnitude > middle
        code = code + above.astype(jnp.uint8)
    return code | (jnp.signbit(x).astype(jnp.uint8) << jnp.uint8(3))


def from_e2m1(codes: UInt8[Array, "*S"]) -> Float[Array, "*S"]:
    """The values of 4-bit codes, float32."""
    table = jnp.asarray([*MAGNITUDES, *(-value for value in MAGNITUDES)], jnp.float32)
    return jnp.take(table, codes, mode="clip")


@pytree
class Blocks:
    """value = E2M1 code * block scale * row scale; the last is None where it is known. ``size`` is H."""

    codes: UInt8[Array, "B S K P"]
    block: Float[Array, "B S K n"]
    row: Float[Array, "B S 1 1"] | None
    size: int = static()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nvfp4Codec(Codec):
    """Block scales max|x| / 6 in E4M3, in units of the row scale, which is max|row| / (448 * 6); values in E2M1.

    Values are divided by both scales as stored, and saturate where the block's was rounded down. A value is off by
    at most 0.18 of its block's maximum (1/6, and a sixteenth of that where the block scale was rounded up); by more
    only in blocks whose maximum is below 2^-6 / 448 of the row's, whose scales are coarse.

    Bytes: B*S*(K*(H/2 + n) + 4): n = H / group block scales of a byte each, rounded up as H/2 is; 4 bytes fewer with
    a known row scale.

    Attributes:
        group: channels of a block along H; the last of a head may be shorter.
        scale: "token", the row scale above; or a positive number to stand in its place, not stored. "tensor" is
            refused: see the module.
    """

    group: int = 16
    scale: str | float = "token"

    def __post_init__(self) -> None:
        check_scale(self.scale, ("token",), "codec nvfp4")
        if self.group < 1:
            raise ValueError(f"codec nvfp4: {self.group=}: a block has at least one channel")

    @property
    def name(self) -> str:
        return "nvfp4"

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Blocks:
        rows, size = rows.astype(jnp.float32), rows.shape[-1]
        row = self._row(rows)
        unit = rows / (self._known if row is None else jnp.where(row == 0, 1.0, row))
        peak = largest(jnp.abs(grouped(unit, self.group)), axis=-1)
        block, read = as_stored(to_e4m3(peak / MAGNITUDES[-1]), jnp.float8_e4m3fn)
        wide = spread(read, self.group, size)
        ratio = jnp.where(wide == 0, jnp.zeros_like(unit), unit / jnp.where(wide == 0, 1.0, wide))
        return Blocks(codes=pack_rows(to_e2m1(ratio), 4), block=block, row=row, size=size)

    def _row(self, rows: Float[Array, "B S K H"]) -> Float[Array, "B S 1 1"] | None:
        if self.scale != "token":
            return None
        return largest(jnp.abs(rows), axis=(2, 3), keepdims=True) / (E4M3_MAX * MAGNITUDES[-1])

    @property
    def _known(self) -> float:
        return float(self.scale)

    def decode(self, codes: Blocks) -> Float[Array, "B S K H"]:
        block = spread(codes.block.astype(jnp.float32), self.group, codes.size)
        row: jax.Array | float = self._known if codes.row is None else codes.row
        return from_e2m1(unpack_rows(codes.codes, 4, codes.size)) * (block * row)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        batch, tokens, heads, size = shape
        each = row_bytes(size, 4) + group_count(size, self.group)
        return batch * tokens * (heads * each + (4 if self.scale == "token" else 0))
