"""Dimensions of published models, as data: what the cost model needs to know of each.

Widths, layers, contexts and parameter counts are those of arXiv 2503.05840, tables 1, 4, 7 and 10 (contexts of
table 10, heads, MLP widths and vocabularies, which it does not print, are those of each model's public
configuration). Nothing here is a result.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from slimjax.scheme import suggest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A transformer's sizes. Axis letters: D width, N heads, K key/value heads, H head size, L layers, F MLP width.

    Attributes:
        name: as published.
        width, heads, kv_heads, head_dim, layers: D, N, K, H, L; the decoder's, where there is an encoder.
        position: "rope", "learned" (added to the inputs), "t5", "alibi" or "none".
        context: longest sequence in tokens, the decoder's where there is an encoder; None: not known.
        encoder_tokens: rows of the encoder's output that cross attention reads; None: no encoder.
        parameters: all weights; None: not known, they are then counted from the sizes.
        active: the weights a token passes, where these are fewer (mixture of experts).
        mlp_width, mlp_matrices, vocab: F, weight matrices per MLP (3 with a gate, else 2), V; None: not known.
        publisher, year: who and when.

    Raises:
        ValueError: a size that is not positive, or heads that are not a multiple of kv_heads.
    """

    name: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    position: str = "rope"
    context: int | None = None
    encoder_tokens: int | None = None
    parameters: float | None = None
    active: float | None = None
    mlp_width: int | None = None
    mlp_matrices: int = 3
    vocab: int | None = None
    publisher: str = ""
    year: int | None = None

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.kv_heads, self.head_dim, self.layers) < 1:
            raise ValueError(
                f"{self.name}: width, heads, kv_heads, head_dim and layers must be positive: {self}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: {self.heads=} is not a multiple of {self.kv_heads=}")

    @property
    def key_width(self) -> int:
        """E = K*H, values of a token's keys in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def query_width(self) -> int:
        """A = N*H, values of a token's queries in one layer."""
        return self.heads * self.head_dim

    @property
    def encoder_decoder(self) -> bool:
        """Whether there is cross attention."""
        return self.encoder_tokens is not None


def _plain(name: str, d: int, n: int, layers: int, **fields: Any) -> Architecture:
    """Multi-head attention with D = N*H."""
    return Architecture(name=name, width=d, heads=n, kv_heads=n, head_dim=d // n, layers=layers, **fields)


_K = 1024


def _table1() -> tuple[Architecture, ...]:
    """Table 1, in its order. Of T5's and Chronos' two caches it counts one: the cross cache."""
    m24 = {"year": 2024}
    return (
        _plain("CodeLlama-7B", 4096, 32, 32, context=16 * _K, parameters=7e9, publisher="Meta", **m24),
        _plain("CodeLlama-13B", 5120, 40, 40, context=16 * _K, parameters=13e9, publisher="Meta", **m24),
        CODEGEMMA,
        _plain("Aya-23-35B", 8192, 64, 40, context=8 * _K, parameters=35e9, publisher="Cohere", **m24),
        _plain(
            "SmolLM2-1.7B", 2048, 32, 24, context=8 * _K, parameters=1.7e9, publisher="HuggingFace", **m24
        ),
        _plain("SmolVLM", 2048, 32, 24, context=16 * _K, parameters=2.3e9, publisher="HuggingFace", **m24),
        _plain(
            "Evo-1-131k", 4096, 32, 32, context=128 * _K, parameters=6.5e9, publisher="Together AI", **m24
        ),
        _plain(
            "Phi-3-mini-128k", 3072, 32, 32, context=128 * _K, parameters=3.8e9, publisher="Microsoft", **m24
        ),
        _plain(
            "BitNet_b1_58-3B", 3200, 32, 26, context=2 * _K, parameters=3.3e9, publisher="Microsoft", **m24
        ),
        _plain("DCLM-7B", 4096, 32, 32, context=2 * _K, parameters=6.9e9, publisher="Apple", **m24),
        _plain("OLMo-1B", 2048, 16, 16, context=4 * _K, parameters=1.3e9, publisher="Ai2", **m24),
        _plain("OLMo-2-1124-13B", 5120, 40, 40, context=4 * _K, parameters=13.7e9, publisher="Ai2", **m24),
        _t5(
            "Chronos-Bolt-tiny",
            256,
            4,
            64,
            4,
            9e6,
            mlp_width=1024,
            mlp_matrices=2,
            vocab=2,
            publisher="Amazon",
            **m24,
        ),
        _t5(
            "Chronos-Bolt-base",
            768,
            12,
            64,
            12,
            205e6,
            mlp_width=3072,
            mlp_matrices=2,
            vocab=2,
            publisher="Amazon",
            **m24,
        ),
        _plain("Qwen2-Audio-7B", 4096, 32, 32, context=8 * _K, parameters=8.4e9, publisher="Alibaba", **m24),
        _plain("LLaVA-NeXT-Video", 4096, 32, 32, context=4 * _K, parameters=7.1e9, publisher="LLaVA", **m24),
        _plain(
            "LLaVA-Vicuna-13B", 5120, 40, 40, context=4 * _K, parameters=13.4e9, publisher="LLaVA", year=2023
        ),
        _plain("Vicuna-7B-16k", 4096, 32, 32, context=16 * _K, parameters=7e9, publisher="LMSYS", year=2023),
        _plain(
            "Vicuna-13B-16k", 5120, 40, 40, context=16 * _K, parameters=13e9, publisher="LMSYS", year=2023
        ),
        _t5(
            "Flan-T5-base",
            768,
            12,
            64,
            12,
            248e6,
            mlp_width=2048,
            mlp_matrices=3,
            vocab=32128,
            publisher="Google",
            year=2022,
        ),
        _t5(
            "Flan-T5-XXL",
            4096,
            64,
            64,
            24,
            11.3e9,
            mlp_width=10240,
            mlp_matrices=3,
            vocab=32128,
            publisher="Google",
            year=2022,
        ),
        WHISPER[0],
        dataclasses.replace(WHISPER[4], name="Whisper-large-v3", vocab=51866),
        _plain(
            "GPT-2 XL",
            1600,
            25,
            48,
            context=_K,
            parameters=1.6e9,
            position="learned",
            publisher="OpenAI",
            year=2019,
        ),
    )


def _t5(
    name: str,
    d: int,
    n: int,
    h: int,
    layers: int,
    parameters: float,
    encoder_tokens: int = 512,
    **fields: Any,
) -> Architecture:
    return Architecture(
        name=name, width=d, heads=n, kv_heads=n, head_dim=h, layers=layers, position="t5", context=0,
        encoder_tokens=encoder_tokens, parameters=parameters, **fields,
    )  # fmt: skip


def _whisper(name: str, d: int, layers: int, parameters: float) -> Architecture:
    return _plain(
        name, d, d // 64, layers, position="learned", context=448, encoder_tokens=1500, parameters=parameters,
        mlp_width=4 * d, mlp_matrices=2, vocab=51865, publisher="OpenAI", year=2022,
    )  # fmt: skip


# Table 7.
WHISPER = (
    _whisper("Whisper-tiny", 384, 4, 38e6),
    _whisper("Whisper-base", 512, 6, 73e6),
    _whisper("Whisper-small", 768, 12, 242e6),
    _whisper("Whisper-medium", 1024, 24, 764e6),
    _whisper("Whisper-large", 1280, 32, 1.5e9),
)

CODEGEMMA = Architecture(
    name="CodeGemma-7B", width=3072, heads=16, kv_heads=16, head_dim=256, layers=28, context=8 * _K,
    parameters=8.5e9, publisher="Google", year=2024,
)  # fmt: skip

# Table 4: E > D. T5's head size is 128 whatever its width.
NON_SQUARE = (
    CODEGEMMA,
    _t5(
        "T5-3B",
        1024,
        32,
        128,
        24,
        2.8e9,
        mlp_width=16384,
        mlp_matrices=2,
        vocab=32128,
        publisher="Google",
        year=2019,
    ),
    _t5(
        "T5-11B",
        1024,
        128,
        128,
        24,
        11.3e9,
        mlp_width=65536,
        mlp_matrices=2,
        vocab=32128,
        publisher="Google",
        year=2019,
    ),
)

TABLE_1 = _table1()


def _table10() -> tuple[Architecture, ...]:
    """Table 10, in its order; it prints no contexts."""

    def model(
        name: str,
        d: int,
        n: int,
        layers: int,
        parameters: float,
        context: int,
        by: str,
        year: int = 2024,
        **more: Any,
    ) -> Architecture:
        return _plain(
            name, d, n, layers, parameters=parameters, context=context, publisher=by, year=year, **more
        )

    speech = {
        "position": "learned",
        "encoder_tokens": 1500,
        "mlp_width": 5120,
        "mlp_matrices": 2,
        "vocab": 51866,
    }
    return (
        model("METAGENE-1", 4096, 32, 32, 6.5e9, 512, "Metagene", 2025),
        model("OLMoE-1B-7B-0125", 2048, 16, 16, 6.9e9, 4 * _K, "Ai2", 2025, active=1.3e9),
        model("DRAMA-base", 768, 12, 12, 212e6, 8 * _K, "Meta", 2025),
        model("Chameleon-7B", 4096, 32, 32, 7e9, 4 * _K, "Meta"),
        model("llm-compiler-13B", 5120, 40, 40, 13e9, 16 * _K, "Meta"),
        model("DeepSeek-vl2-tiny", 1280, 10, 12, 3.4e9, 4 * _K, "DeepSeek"),
        model("CrisperWhisper", 1280, 20, 32, 1.6e9, 448, "nyra health", **speech),
        # 125 encoder rows for every 3 seconds of sound: here, as in Whisper, 30 seconds.
        model(
            "Moonshine-base",
            416,
            8,
            8,
            61e6,
            194,
            "Useful Sensors",
            mlp_width=1664,
            vocab=32768,
            encoder_tokens=1250,
        ),
        model("Moondream-2", 2048, 32, 24, 1.9e9, 2 * _K, "Moondream"),
        model("Stable-Code-3B", 2560, 32, 32, 2.8e9, 16 * _K, "Stability AI"),
        model("Stable-LM2-1.6B", 2048, 32, 24, 1.6e9, 4 * _K, "Stability AI"),
        model("OpenMath-CodeLlama-13B", 5120, 40, 40, 13e9, 16 * _K, "NVIDIA"),
        model("MAIRA-2", 4096, 32, 32, 6.9e9, 4 * _K, "Microsoft"),
        model("Rocket-3B", 2560, 32, 32, 2.8e9, 4 * _K, "Pansophic"),
        model("OpenLLaMA-13B", 5120, 40, 40, 13e9, 2 * _K, "OpenLM Research"),
        model("TimesFM-1.0-200M", 1280, 16, 20, 200e6, 512, "Google", position="none"),
        _t5(
            "MetricX-24-hybrid-XXL",
            4096,
            64,
            64,
            24,
            13e9,
            publisher="Google",
            year=2024,
            mlp_width=10240,
            mlp_matrices=3,
            vocab=250112,
            encoder_tokens=1536,
        ),
        model("BioMedLM", 2560, 20, 32, 2.7e9, _K, "Stanford", position="learned"),
        model("MiniCPM-V2", 2304, 36, 40, 3.4e9, 4 * _K, "OpenBMB"),
        model("UltraLM-65B", 8192, 64, 80, 65e9, 2 * _K, "OpenBMB", 2023),
        model("LLaMA-2-7B-32K", 4096, 32, 32, 7e9, 32 * _K, "Together AI", 2023),
        model("Dolly-v2-12B", 5120, 40, 36, 12e9, 2 * _K, "Databricks", 2023),
        model("MPT-7B-8K", 4096, 32, 32, 7e9, 8 * _K, "Mosaic ML", 2023, position="alibi"),
        model("MPT-30B", 7168, 64, 48, 30e9, 8 * _K, "Mosaic ML", 2023, position="alibi"),
        model("BLOOM", 14336, 112, 70, 176e9, 2 * _K, "BigScience", 2022, position="alibi"),
    )


TABLE_10 = _table10()

# Outside the tables: its section on grouped queries, and what others measure on.
OTHERS = (
    Architecture(
        name="Gemma2-9B", width=3584, heads=16, kv_heads=8, head_dim=256, layers=42, context=8 * _K,
        parameters=9.2e9, publisher="Google", year=2024,
    ),
    _plain("Llama-2-7B", 4096, 32, 32, context=4 * _K, parameters=6.7e9, publisher="Meta", year=2023),
    Architecture(
        name="Llama-3-8B", width=4096, heads=32, kv_heads=8, head_dim=128, layers=32, context=8 * _K,
        parameters=8.0e9, publisher="Meta", year=2024,
    ),
)  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = types.MappingProxyType(
    {a.name: a for a in (*TABLE_1, *WHISPER, *NON_SQUARE, *TABLE_10, *OTHERS)}
)


def architecture(name: str) -> Architecture:
    """The architecture of that name, in any case of letters. Raises ValueError, with the nearest name, for another."""
    found = [a for known, a in ARCHITECTURES.items() if known.lower() == name.lower()]
    if not found:
        raise ValueError(f"unknown model {name!r}{suggest(name, ARCHITECTURES)}")
    return found[0]
