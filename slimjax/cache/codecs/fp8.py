"""Rows kept as 8-bit floating-point numbers, E4M3: 3 bits of mantissa, up to 448, no infinity."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.cache.codecs.base import Codec, Role
from slimjax.cache.codecs.extremes import largest
from slimjax.cache.codecs.narrow import SCALE_DTYPES, as_stored
from slimjax.pytree import pytree

E4M3_MAX = 448.0


def to_e4m3(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """float8_e4m3fn, to nearest even; finite values beyond 448 become 448, and what is not finite NaN.

    The cast alone makes NaN of every value that is too large.
    """
    clipped = jnp.where(jnp.isfinite(x), jnp.clip(x, -E4M3_MAX, E4M3_MAX), jnp.nan)
    return clipped.astype(jnp.float8_e4m3fn)


@pytree
class Scaled8:
    """value = code * scale; None where no scale is stored."""

    codes: Float[Array, "B S K H"]
    scale: Float[Array, "B S #K 1"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Codec(Codec):
    """E4M3 with a scale that brings the largest value to 448. The error of a value is at most 1/16 of it.

    Values below 2^-9 of the scale underflow (steps of 2^-9 below 2^-6). Too large values saturate.

    Bytes: B*S*K*H + w * scales of w bytes: B*S*K ("head"), B*S ("token") or none.

    Attributes:
        scale: "head", one float32 per token and head; "token", one per token's row; "none", rows as they are; or a
            positive number, known beforehand (from calibration) and not stored: value = code * number. One scale
            of the tensor itself there cannot be in a cache that still grows.
        scale_dtype: of stored scales: float32, bfloat16 or float16. Rows are divided by the scale as stored.
    """

    scale: str | float = "head"
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_scale(self.scale, ("head", "token", "none"), "codec fp8")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"codec fp8: {self.scale_dtype=} is none of {', '.join(SCALE_DTYPES)}")

    @property
    def name(self) -> str:
        return "fp8"

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Scaled8:
        rows = rows.astype(jnp.float32)
        if self.scale in ("head", "token"):
            peak = largest(jnp.abs(rows), axis=(3,) if self.scale == "head" else (2, 3), keepdims=True)
            scale = jnp.where(peak == 0, jnp.ones_like(peak), peak / E4M3_MAX)
            if self.scale_dtype != "float32":
                scale, read = as_stored(scale, self.scale_dtype)
            else:
                read = scale
            # The smallest numbers vanish in the division.
            return Scaled8(codes=to_e4m3(rows / jnp.where(read == 0, 1.0, read)), scale=scale)
        return Scaled8(codes=to_e4m3(rows / self._known), scale=None)

    def decode(self, codes: Scaled8) -> Float[Array, "B S K H"]:
        scale = self._known if codes.scale is None else codes.scale.astype(jnp.float32)
        return codes.codes.astype(jnp.float32) * scale

    @property
    def _known(self) -> float:
        return 1.0 if isinstance(self.scale, str) else float(self.scale)

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        batch, tokens, heads, _ = shape
        scales = {"head": batch * tokens * heads, "token": batch * tokens}.get(str(self.scale), 0)
        return math.prod(shape) + jnp.dtype(self.scale_dtype).itemsize * scales


def check_scale(scale: str | float, allowed: tuple[str, ...], where: str) -> None:
    """Raise ValueError where ``scale`` is neither one of the names nor a positive, finite number."""
    if isinstance(scale, str):
        fine = scale in allowed
    else:
        fine = not isinstance(scale, bool) and 0 < scale < math.inf
    if fine:
        return
    names = ", ".join(repr(name) for name in allowed)
    why = (
        "; a scale over a whole tensor changes with every token that a cache appends: give a known one as a number"
        if scale == "tensor"
        else ""
    )
    raise ValueError(f"{where}: {scale=} is none of {names}, nor a positive number{why}")
