"""Rows kept as integers with one float32 scale for a token's row (int16) or for each head of it (int8)."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slimjax.cache.codecs.base import Codec, Role
from slimjax.pytree import pytree


@pytree
class Scaled:
    """Integer codes and their scale: value = codes * scale."""

    codes: Int[Array, "B S K H"]
    scale: Float[Array, "B S #K 1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerCodec(Codec):
    """Symmetric fixed point: scale = max|x| / limit over the scale's group, codes = round(x / scale).

    Rounding is the same for every value under one scale (rms scale / sqrt(12)), unlike a float's, which
    is what makes int16 seven bits finer than bfloat16 near a row's maximum at the same two bytes.

    Bytes: B*S*(K*H * itemsize + 4 * scales), scales = 1 (per token) or K (per token and head).

    Attributes:
        bits: 16 or 8.
        per_head: one scale for each key/value head, else one for the whole row.
    """

    bits: int
    per_head: bool

    def __post_init__(self) -> None:
        if self.bits not in (8, 16):
            raise ValueError(f"an integer codec has 8 or 16 bits, not {self.bits=}")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def limit(self) -> int:
        """The largest code. 32,639 = 127*256 + 127, so that an int16 code is 256*hi + lo with both int8."""
        return {8: 127, 16: 32_639}[self.bits]

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Scaled:
        # At least float32: codes of bfloat16 rows would otherwise be divided at 8 bits of precision.
        rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        axes = (3,) if self.per_head else (2, 3)
        peak = jnp.max(jnp.abs(rows), axis=axes, keepdims=True)
        scale = jnp.where(peak == 0, jnp.ones_like(peak), peak / self.limit).astype(jnp.float32)
        codes = jnp.clip(jnp.round(rows / scale.astype(rows.dtype)), -self.limit, self.limit)
        return Scaled(codes=codes.astype(f"int{self.bits}"), scale=scale)

    def decode(self, codes: Scaled) -> Float[Array, "B S K H"]:
        return codes.codes.astype(jnp.float32) * codes.scale

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        batch, tokens, heads, _ = shape
        scales = batch * tokens * (heads if self.per_head else 1)
        return math.prod(shape) * self.bits // 8 + 4 * scales
