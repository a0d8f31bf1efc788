"""Rows kept as floating-point numbers of some width: rounding is relative to each value."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.cache.codecs.base import Codec, Role
from slimjax.numerics import accumulation_dtype

_DTYPES = {"float64": "float64", "float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatCodec(Codec):
    """A cast, to nearest even. Bytes: B*S*K*H * itemsize.

    ``float64`` needs jax's x64 mode and is meant for proofs of identity.

    Attributes:
        kind: "float64", "float32", "bf16" or "fp16" (values beyond 65,504 become infinite, as in any fp16 cache).
    """

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in _DTYPES:
            raise ValueError(f"{self.kind=} is none of {', '.join(_DTYPES)}")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def dtype(self) -> jnp.dtype:
        """The storage dtype."""
        return jnp.dtype(_DTYPES[self.kind])

    def encode(self, rows: Float[Array, "B S K H"], role: Role = "k") -> Float[Array, "B S K H"]:
        if self.kind == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError("codec float64 needs jax's 64-bit mode: run inside `with jax.enable_x64(True):`")
        return rows.astype(self.dtype)

    def decode(self, codes: Float[Array, "B S K H"]) -> Float[Array, "B S K H"]:
        return codes.astype(accumulation_dtype(self.dtype))

    def nbytes(self, shape: tuple[int, int, int, int], role: Role = "k") -> int:
        return math.prod(shape) * self.dtype.itemsize
