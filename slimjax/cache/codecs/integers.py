"""Rows kept as integers: with one scale for a token's row (int16) or each of its heads (int8), or none (fixed16)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slimjax.cache.codecs.base import Codec, Role, needless_extra
from slimjax.cache.codecs.extremes import largest
from slimjax.cache.codecs.narrow import SCALE_DTYPES, as_stored
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

    Bytes: B*S*(K*H * itemsize + w * scales), scales = 1 (per token) or K (per token and head), of w bytes.

    Attributes:
        bits: 16 or 8.
        per_head: one scale for each key/value head, else one for the whole row.
        scale_dtype: float32, bfloat16 or float16. Rows are divided by the scale as stored.
    """

    bits: int
    per_head: bool
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"{self.scale_dtype=} is none of {', '.join(SCALE_DTYPES)}")
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
        peak = largest(jnp.abs(rows), axis=axes, keepdims=True)
        scale = jnp.where(peak == 0, jnp.ones_like(peak), peak / self.limit).astype(jnp.float32)
        if self.scale_dtype != "float32":
            # Not below what the dtype holds: rows that small would be divided by 0.
            tiny = float(jnp.finfo(self.scale_dtype).smallest_subnormal)
            least = jnp.full_like(scale, max(tiny, float(jnp.finfo("float32").tiny)))
            scale, _ = as_stored(jnp.where(scale < least, least, scale), self.scale_dtype)
        codes = jnp.clip(jnp.round(rows / scale.astype(rows.dtype)), -self.limit, self.limit)
        return Scaled(codes=codes.astype(f"int{self.bits}"), scale=scale)

    def decode(self, codes: Scaled) -> Float[Array, "B S K H"]:
        return codes.codes.astype(jnp.float32) * codes.scale.astype(jnp.float32)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        batch, tokens, heads, _ = shape
        scales = batch * tokens * (heads if self.per_head else 1)
        return math.prod(shape) * self.bits // 8 + jnp.dtype(self.scale_dtype).itemsize * scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedCodec(Codec):
    """Sixteen bits with the point in the middle: code = round(256 x), clamped to +-32,639. Nothing else is kept.

    So |x| <= 127.496 is stored to 1/512 and anything beyond is *clipped* to that. The rows must be made for it: a
    layer is brought to one static scale per channel by ``slimjax.solve.scales``, from calibration. Rows take
    B*S*K*H * 2 bytes; with code = 256*hi + lo, hi is the whole part of x. What is not finite is the code -32,768, and
    NaN when it is read.
    """

    step: ClassVar[float] = 1 / 256
    limit: ClassVar[int] = 32_639  # as int16's, for the same split into two int8
    lost: ClassVar[int] = -32_768

    @property
    def name(self) -> str:
        return "fixed16"

    @property
    def peak(self) -> float:
        """The largest value that is not clipped."""
        return self.limit * self.step

    def refusal(self, basis: str, streams: Mapping[str, tuple[int, int]], plain: int) -> str | None:
        if basis == "k":
            return needless_extra(self, streams)
        return "codec fixed16 has one scale per channel, which only the weights of basis k can take up; use int16"

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Int[Array, "B S K H"]:
        rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        codes = jnp.clip(jnp.round(rows / self.step), -self.limit, self.limit)
        return jnp.where(jnp.isfinite(rows), codes, self.lost).astype(jnp.int16)

    def decode(self, codes: Int[Array, "B S K H"]) -> Float[Array, "B S K H"]:
        return jnp.where(codes == self.lost, jnp.nan, codes.astype(jnp.float32) * self.step)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        return math.prod(shape) * 2
