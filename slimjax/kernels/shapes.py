"""Attention shapes of real models, by name: what kernels are timed and tested on. Data alone."""

import dataclasses

from slimjax.attention.positions import Position
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import Scheme, parse_scheme


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention layer: N, K, H, D and its position scheme; ``causal`` is False for cross attention."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    position: str = "none"
    causal: bool = True

    def spec(self, scheme: str | Scheme, dtype: str) -> DecodeSpec:
        """The decode spec of this layer under a scheme. Raises ValueError as ``parse_scheme`` does."""
        return DecodeSpec(
            scheme=parse_scheme(scheme) if isinstance(scheme, str) else scheme,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            width=self.width,
            position=Position(kind=self.position),
            dtype=dtype,
            causal=self.causal,
        )


SHAPES: dict[str, Shape] = {
    "tiny": Shape(heads=2, kv_heads=2, head_dim=16, width=32),
    "tiny-rope": Shape(heads=4, kv_heads=4, head_dim=32, width=128, position="rope"),
    "tiny-gqa": Shape(heads=4, kv_heads=2, head_dim=32, width=128, position="rope"),
    "small-rope": Shape(heads=8, kv_heads=8, head_dim=64, width=512, position="rope"),
    "small": Shape(heads=8, kv_heads=8, head_dim=64, width=512),
    "llama-2-7b": Shape(heads=32, kv_heads=32, head_dim=128, width=4096, position="rope"),
    "llama-3-8b": Shape(heads=32, kv_heads=8, head_dim=128, width=4096, position="rope"),
    "phi-3-mini": Shape(heads=32, kv_heads=32, head_dim=96, width=3072, position="rope"),
    "whisper-large-self": Shape(heads=20, kv_heads=20, head_dim=64, width=1280, position="learned"),
    "whisper-large-cross": Shape(
        heads=20, kv_heads=20, head_dim=64, width=1280, position="learned", causal=False
    ),
    "smollm2-1.7b": Shape(heads=32, kv_heads=32, head_dim=64, width=2048, position="rope"),
    "t5-11b-self": Shape(heads=128, kv_heads=128, head_dim=128, width=1024, position="t5"),
    "t5-11b-cross": Shape(heads=128, kv_heads=128, head_dim=128, width=1024, causal=False),
}
