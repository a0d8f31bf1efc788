"""The static half of a decode call: everything about a layer's attention that is not an array."""

import dataclasses

import jax.numpy as jnp

from slimjax.attention.positions import Position
from slimjax.scheme import Scheme

_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSpec:
    """What ``decode`` needs to know beside its arrays. Hashable: a jit's static argument.

    Attributes:
        scheme: basis, option, codec, softmax.
        heads, kv_heads, head_dim, width: N, K, H, D.
        position: the position scheme.
        window: tokens a query sees, itself included; None: all before it.
        softcap: scores become softcap * tanh(scores / softcap); None: as they are.
        scale: what scores are multiplied by; None: H^-0.5.
        dtype: compute dtype of q, P and the output. Rows read from the cache are never rounded to it
            before they meet W_KV.
        causal: whether a query sees only keys at and before its own position.
        implementation: what ``decode`` takes where it is not told otherwise, and so what a layer takes; None: the
            first of the running backend's that does not refuse.

    Raises:
        ValueError: heads not a multiple of kv_heads, a non-positive size, window or softcap, an odd head
            size under RoPE, or a dtype that is not listed.
    """

    scheme: Scheme
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    position: Position = Position()
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    dtype: str = "float32"
    causal: bool = True
    implementation: str | None = None

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim, self.width) < 1:
            raise ValueError(f"heads, kv_heads, head_dim and width must be positive: {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads=} is not a multiple of {self.kv_heads=}")
        if not isinstance(self.scheme, Scheme):
            raise ValueError(f"{self.scheme=}: expected a Scheme; parse_scheme makes one from text")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.dtype=} is none of {', '.join(_DTYPES)}")
        if self.position.rotary and self.head_dim % 2:
            raise ValueError(f"RoPE needs an even head size, got head_dim={self.head_dim}")
        if (self.window is not None and self.window < 1) or (self.softcap is not None and self.softcap <= 0):
            raise ValueError(f"{self.window=} and {self.softcap=} must be positive or None")

    @property
    def group(self) -> int:
        """G, query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def key_width(self) -> int:
        """E = K*H."""
        return self.kv_heads * self.head_dim

    @property
    def accumulation(self) -> jnp.dtype:
        """The dtype of sums and of rows read from the cache: float64 for float64, else float32."""
        return jnp.dtype("float64" if self.dtype == "float64" else "float32")


def too_narrow(spec: DecodeSpec, cached: str, missing: str) -> str | None:
    """Why rows of E values, and the scheme's R extra ones, cannot stand in for what is missing, or None.

    They determine it only if E + R >= D, and save memory only if E + R < 2*E: so E > D/2, and E >= D
    without extra coordinates.
    """
    wide, extra, lacking = spec.key_width, spec.scheme.extra, spec.width - spec.key_width
    kind = "GQA or MQA: " if spec.kv_heads < spec.heads else ""
    if wide + extra < spec.width:
        more = f" and {extra} extra coordinates" if extra else ""
        use = (
            f"add +{lacking} or more, or use kv or x"
            if cached == "keys" and lacking < wide
            else "use kv or x"
        )
        return (
            f"{kind}{cached} of width E = {wide}{more} do not determine {missing} of inputs of width "
            f"D = {spec.width}; {use}"
        )
    if extra >= wide:
        return f"{kind}{wide} keys and {extra} extra coordinates are no fewer than the 2*E of kv; use kv or x"
    return None
