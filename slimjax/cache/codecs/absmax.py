"""Rows kept as symmetric integers of 4, 3 or 2 bits with one scale per token and head: the plainest there is."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from slimjax.cache.codecs.base import Codec, Role
from slimjax.cache.codecs.extremes import largest
from slimjax.cache.codecs.narrow import (
    as_stored,
    check,
    group_count,
    grouped,
    pack_rows,
    row_bytes,
    spread,
    unpack_rows,
)
from slimjax.pytree import pytree, static


@pytree
class Symmetric:
    """value = (code - limit) * scale. ``size`` is H, as the last byte may be partly filled."""

    codes: UInt8[Array, "B S K P"]
    scale: Float[Array, "B S K n"]
    size: int = static()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsmaxCodec(Codec):
    """Symmetric absmax: scale = max|x| / limit, limit = 2^(bits-1) - 1, code = round(x / scale) + limit, half to even.

    The error of a value is at most half a scale: max|x| / 14 at 4 bits, / 6 at 3, / 2 at 2, where the codes are
    -1, 0 and 1. In a scheme these are ``int4``, ``int3`` and ``int2``; ``int8`` is the family's 8-bit member.

    Bytes: B*S*K*(P + n * scale bytes), P = H * bits / 8 (rounded up to whole bytes), n = 1 or H / group.

    Attributes:
        bits: 4, 3 or 2.
        group: channels that share a scale, the last group of a head may be shorter; None: the whole head.
        scale_dtype: float32, bfloat16 or float16. Rows are divided by the scale as stored.
    """

    bits: int = 4
    group: int | None = None
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        check(self.bits, (2, 3, 4), self.scale_dtype, self.group, "codec absmax")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def limit(self) -> int:
        """The largest code before the offset."""
        return 2 ** (self.bits - 1) - 1

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Symmetric:
        rows = rows.astype(jnp.float32)
        peak = largest(jnp.abs(grouped(rows, self.group)), axis=-1)
        scale, read = as_stored(peak / self.limit, self.scale_dtype)
        wide = spread(read, self.group, rows.shape[-1])
        # A scale of 0 stands for rows of 0, or too small for the scale's dtype: code 0 before the offset.
        ratio = jnp.where(wide == 0, jnp.zeros_like(rows), rows / jnp.where(wide == 0, 1.0, wide))
        codes = jnp.clip(jnp.round(ratio), -self.limit, self.limit) + self.limit
        return Symmetric(
            codes=pack_rows(codes.astype(jnp.uint8), self.bits), scale=scale, size=rows.shape[-1]
        )

    def decode(self, codes: Symmetric) -> Float[Array, "B S K H"]:
        whole = unpack_rows(codes.codes, self.bits, codes.size).astype(jnp.float32) - self.limit
        return whole * spread(codes.scale.astype(jnp.float32), self.group, codes.size)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        scales = group_count(shape[3], self.group) * jnp.dtype(self.scale_dtype).itemsize
        return math.prod(shape[:3]) * (row_bytes(shape[3], self.bits) + scales)
