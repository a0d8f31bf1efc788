"""Rotated rows kept as asymmetric integers per token and head (QuaRot, arXiv 2404.00456, section 4.2, for K and V).

The rotation leaves inner products alone, so a kernel may rotate q instead of the keys; here decode turns back.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from slimjax.cache.codecs.base import Codec, Role
from slimjax.cache.codecs.extremes import largest, least as smallest
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
from slimjax.cache.codecs.rotation import rotate, unrotate
from slimjax.pytree import pytree, static


@pytree
class Affine:
    """Of rotated rows, value = low + code * step. ``size`` is H, as the last byte may be partly filled."""

    codes: UInt8[Array, "B S K P"]
    step: Float[Array, "B S K n"]
    low: Float[Array, "B S K n"]
    size: int = static()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HadamardCodec(Codec):
    """Rotate every head (``rotation.rotate``), then step = (max - min) / (2^bits - 1), code = round((y - min) / step).

    The rotation spreads a channel's outliers over the head, without which 4 bits per token are of no use for
    models whose keys have such channels. Rounding is half to even; codes are clamped to [0, 2^bits - 1].

    Bytes: B*S*K*(P + 2n * scale bytes), P = H * bits / 8 (rounded up to whole bytes), n = 1 or H / group.

    Attributes:
        bits: 4, 3, 2 or 8.
        group: rotated channels that share a step and a minimum, the last group of a head may be shorter; None:
            the whole head.
        scale_dtype: of step and minimum: float32, bfloat16 or float16. Rows are coded with both as stored.
        seed: of the rotation's signs.
    """

    bits: int = 4
    group: int | None = None
    scale_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.bits, (2, 3, 4, 8), self.scale_dtype, self.group, f"codec {self.name}")

    @property
    def name(self) -> str:
        return "hadamard_int4"

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Affine:
        size, most = rows.shape[-1], 2**self.bits - 1
        turned = rotate(rows.astype(jnp.float32), self.seed)
        parts = grouped(turned, self.group)
        least = smallest(parts, axis=-1)
        low, start = as_stored(least, self.scale_dtype)
        step, width = as_stored((largest(parts, axis=-1) - least) / most, self.scale_dtype)
        start, width = (spread(part, self.group, size) for part in (start, width))
        # A step of 0 stands for equal values, or too close for the step's dtype: all are the minimum.
        ratio = jnp.where(
            width == 0, jnp.zeros_like(turned), (turned - start) / jnp.where(width == 0, 1.0, width)
        )
        codes = jnp.clip(jnp.round(ratio), 0, most).astype(jnp.uint8)
        return Affine(codes=pack_rows(codes, self.bits), step=step, low=low, size=size)

    def decode(self, codes: Affine) -> Float[Array, "B S K H"]:
        whole = unpack_rows(codes.codes, self.bits, codes.size).astype(jnp.float32)
        step, low = (
            spread(part.astype(jnp.float32), self.group, codes.size) for part in (codes.step, codes.low)
        )
        return unrotate(low + whole * step, self.seed)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        scales = 2 * group_count(shape[3], self.group) * jnp.dtype(self.scale_dtype).itemsize
        return math.prod(shape[:3]) * (row_bytes(shape[3], self.bits) + scales)
