"""Dimensions of a model on disk: from the `config.json` of a Hugging Face directory, or as slimjax reads it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimjax.cost.architectures import Architecture, architecture
from slimjax.scheme import suggest

Fields = Mapping[str, Any]


class _Reader:
    """Takes whole numbers out of a config, with an error that names the file and the field."""

    def __init__(self, fields: Fields, source: str):
        self.fields, self.source = fields, source

    def whole(self, *names: str, default: int | None = None) -> int:
        """The first of the fields that is there and not null."""
        for name in names:
            value = self.fields.get(name)
            if value is not None:
                if type(value) is not int or value < 1:
                    raise ValueError(f"{self.source}: {name} = {value!r}: expected a positive whole number")
                return value
        if default is None:
            raise ValueError(f"{self.source}: no field {' or '.join(map(repr, names))}")
        return default

    def sizes(self, width: str, heads: str, layers: str) -> dict[str, int]:
        """D, N, K, H, L."""
        d, n = self.whole(width), self.whole(heads)
        size = self.whole("head_dim", default=max(1, d // n))
        if self.fields.get("head_dim") is None and d % n:
            raise ValueError(
                f"{self.source}: {width} = {d} is not a multiple of {heads} = {n}, and there is no head_dim"
            )
        kv = self.whole("num_key_value_heads", default=n)
        return {"width": d, "heads": n, "kv_heads": kv, "head_dim": size, "layers": self.whole(layers)}


def _standard(
    read: _Reader, *, position: str = "rope", matrices: int = 3, mlp: str = "intermediate_size"
) -> dict[str, Any]:
    return read.sizes("hidden_size", "num_attention_heads", "num_hidden_layers") | {
        "position": position,
        "context": read.whole("max_position_embeddings"),
        "mlp_width": read.whole(mlp),
        "mlp_matrices": matrices,
    }


def _gpt2(read: _Reader) -> dict[str, Any]:
    sizes = read.sizes("n_embd", "n_head", "n_layer")
    mlp = read.whole("n_inner", default=4 * sizes["width"])
    return sizes | {
        "position": "learned",
        "context": read.whole("n_positions"),
        "mlp_width": mlp,
        "mlp_matrices": 2,
    }


def _bloom(read: _Reader) -> dict[str, Any]:
    sizes = read.sizes("hidden_size", "n_head", "n_layer")
    context = read.whole("seq_length", default=2048)  # what it was trained with; ALiBi has no limit
    return sizes | {
        "position": "alibi",
        "context": context,
        "mlp_width": 4 * sizes["width"],
        "mlp_matrices": 2,
    }


def _mpt(read: _Reader) -> dict[str, Any]:
    attention = read.fields.get("attn_config") or {}
    sizes = read.sizes("d_model", "n_heads", "n_layers")
    kv = _Reader(attention, f"{read.source}: attn_config").whole("kv_n_heads", default=sizes["heads"])
    position = "alibi" if attention.get("alibi") else "rope" if attention.get("rope") else "learned"
    mlp = read.whole("expansion_ratio", default=4) * sizes["width"]
    more = {"position": position, "context": read.whole("max_seq_len"), "mlp_width": mlp, "mlp_matrices": 2}
    return sizes | {"kv_heads": kv} | more


def _whisper(read: _Reader) -> dict[str, Any]:
    return read.sizes("d_model", "decoder_attention_heads", "decoder_layers") | {
        "position": "learned",
        "context": read.whole("max_target_positions"),
        "encoder_tokens": read.whole("max_source_positions"),
        "mlp_width": read.whole("decoder_ffn_dim"),
        "mlp_matrices": 2,
    }


def _t5(read: _Reader) -> dict[str, Any]:
    heads = read.whole("num_heads")
    gated = str(read.fields.get("feed_forward_proj", "relu")).startswith("gated")
    return {
        "width": read.whole("d_model"), "heads": heads, "kv_heads": heads, "head_dim": read.whole("d_kv"),
        "layers": read.whole("num_decoder_layers", "num_layers"), "position": "t5",
        "context": read.whole("n_positions", default=512), "encoder_tokens": read.whole("n_positions", default=512),
        "mlp_width": read.whole("d_ff"), "mlp_matrices": 3 if gated else 2,
    }  # fmt: skip


FAMILIES = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "phi3",
            "olmo",
            "olmo2",
            "stablelm",
            "granite",
            "smollm3",
        ),
        _standard,
    ),
    "phi": lambda read: _standard(read, matrices=2),
    "gpt_neox": lambda read: _standard(read, matrices=2),
    "opt": lambda read: _standard(read, position="learned", matrices=2, mlp="ffn_dim"),
    "gpt2": _gpt2,
    "bloom": _bloom,
    "mpt": _mpt,
    "whisper": _whisper,
    "t5": _t5,
    "mt5": _t5,
}


def from_config(fields: Fields, source: str) -> Architecture:
    """The architecture that a config describes; `source` names it in messages and in the result.

    Raises ValueError: an unknown `model_type`, a missing or wrong field, or layers that forget (a sliding window).
    """
    kind = fields.get("model_type")
    if kind is None and {"width", "heads", "layers"} <= set(fields):
        return _own(fields, source)
    if kind not in FAMILIES:
        raise ValueError(f"{source}: unknown architecture {kind!r}{suggest(str(kind), FAMILIES)}")
    if fields.get("sliding_window") is not None and fields.get("use_sliding_window", True):
        raise ValueError(
            f"{source}: sliding_window = {fields['sliding_window']}: layers that forget are not covered; set it to null"
        )
    read = _Reader(fields, source)
    return Architecture(name=source, vocab=read.whole("vocab_size"), **FAMILIES[kind](read))


def _own(fields: Fields, source: str) -> Architecture:
    """A `slimjax.config.ModelConfig` as JSON."""
    from slimjax.config import ModelConfig

    known = {field.name for field in dataclasses.fields(ModelConfig)}
    return _sized(ModelConfig(**{name: value for name, value in fields.items() if name in known}), source)


def _sized(sizes: Any, source: str) -> Architecture:
    """From a `ModelConfig` or a `WhisperConfig`."""
    from slimjax.config import ModelConfig

    if isinstance(sizes, ModelConfig):
        return Architecture(
            name=source, width=sizes.width, heads=sizes.heads, kv_heads=sizes.K, head_dim=sizes.H,
            layers=sizes.layers, position=sizes.position, context=sizes.max_length, mlp_width=sizes.F,
            mlp_matrices=3 if sizes.mlp == "swiglu" else 2, vocab=sizes.vocab,
        )  # fmt: skip
    return Architecture(
        name=source, width=sizes.width, heads=sizes.heads, kv_heads=sizes.heads,
        head_dim=sizes.width // sizes.heads, layers=sizes.decoder_layers, position="learned",
        context=sizes.text_positions, encoder_tokens=sizes.audio_positions, mlp_width=sizes.mlp_width,
        mlp_matrices=2, vocab=sizes.vocab,
    )  # fmt: skip


def _opened(path: Path) -> Architecture:
    """Of any model that `slimjax.models.opened` reads; no weights are read. Raises OSError or ValueError."""
    from slimjax.config import ModelConfig
    from slimjax.models.load.converted import is_converted, read_section
    from slimjax.models.opened import open_model
    from slimjax.models.whisper import WhisperConfig

    if is_converted(path):
        section = read_section(path)
        return _sized(section.made(ModelConfig if section.kind == "decoder" else WhisperConfig), str(path))
    return _sized(open_model(path).sizes, str(path))


def find(model: str) -> Architecture:
    """A published architecture by name, or that of a model on disk, a config.json alone included.

    Raises:
        ValueError: in one line, where it is neither or cannot be read.
        OSError: a file of the model is missing.
    """
    path = Path(model)
    if not path.exists():
        if "/" in model or path.suffix == ".json":
            raise ValueError(f"{model}: no such file or directory")
        return architecture(model)
    file = path / "config.json" if path.is_dir() else path
    if path.suffix == ".gguf" or (path.is_dir() and not file.exists()):
        return _opened(path)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {getattr(error, 'strerror', None) or 'not JSON'}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: not a JSON object")
    if path.is_dir() and (fields.get("model_type") == "slimjax" or (path / "model.bin").exists()):
        return _opened(path)
    return from_config(fields, str(path))
