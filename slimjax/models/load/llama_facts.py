"""What files say of a decoder besides its tensors: config.json of Hugging Face, the named values of GGUF."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

KNOWN = ("llama", "mistral", "qwen2")  # Hugging Face's model_type
GGUF_KNOWN = ("llama", "qwen2")
_THETA, _EPSILON = 1e4, 1e-6  # where a file does not say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """A decoder by what its file says. Of what is None the file says nothing, and the tensors decide.

    Attributes:
        path: the file.
        architecture: as it names it.
        names: our name -> the file's, of the sizes that the tensors have, too.
        heads, kv_heads, head_dim, layers, width, mlp_width, vocab, max_length: sizes.
        epsilon: of RMSNorm.
        theta: RoPE's base.
        window: tokens a query sees; None: all.
        tied: whether embedding and unembedding are one.
        bias, qkv_bias: as in ``ModelConfig``.
        paired: see ``LlamaParameters``.
    """

    path: Path
    architecture: str
    names: Mapping[str, str]
    heads: int
    kv_heads: int | None
    head_dim: int | None
    layers: int | None
    width: int | None
    mlp_width: int | None
    vocab: int | None
    max_length: int
    epsilon: float
    theta: float
    window: int | None = None
    tied: bool | None = None
    bias: bool = False
    qkv_bias: bool = False
    paired: bool = False


class _Reader:
    """Takes numbers out of a mapping, with an error that names the file and the field."""

    def __init__(self, fields: Mapping[str, Any], path: Path):
        self.fields, self.path = fields, path

    def whole(self, name: str, default: int | None = None) -> int | None:
        value = self.fields.get(name)
        if value is None:
            return default
        if type(value) is not int or value < 1:
            self.fail(name, "a positive whole number")
        return value

    def needed(self, name: str) -> int:
        value = self.whole(name)
        return self.fail(name, "a positive whole number") if value is None else value

    def real(self, name: str, default: float) -> float:
        value = self.fields.get(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self.fail(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name, default)
        if type(value) is not bool:
            self.fail(name, "true or false")
        return value

    def refuse(self, name: str, known: str) -> NoReturn:
        raise NotImplementedError(f"{self.path}: {name} = {self.fields.get(name)!r} is not read; {known}")

    def fail(self, name: str, expected: str) -> NoReturn:
        raise ValueError(f"{self.path}: {name} = {self.fields.get(name)!r}, expected {expected}")


def huggingface_facts(config: Mapping[str, Any], path: Path) -> Facts:
    """Facts of a config.json.

    Raises:
        ValueError: another architecture, or a field that is missing or makes no sense.
        NotImplementedError: a variant: scaled RoPE, biases elsewhere, windows of some layers, quantised weights.
    """
    read, kind = _Reader(config, path), config.get("model_type")
    if kind not in KNOWN:
        raise ValueError(
            f"{path}: architecture {kind!r} is not known here; {', '.join(map(repr, KNOWN))} and 'whisper' are"
        )
    if config.get("quantization_config") is not None:
        read.refuse("quantization_config", "quantised weights are read from GGUF alone")
    if config.get("hidden_act", "silu") != "silu":
        read.refuse("hidden_act", "'silu' is")
    bias, mlp = read.flag("attention_bias", False), read.flag("mlp_bias", False)
    if bias != mlp:
        read.refuse("attention_bias", f"with mlp_bias = {mlp}: biases in both, in neither, or qwen2's")
    names = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "mlp_width": "intermediate_size",
        "vocab": "vocab_size",
    }
    return Facts(
        path=path,
        architecture=kind,
        names=names,
        heads=read.needed("num_attention_heads"),
        kv_heads=read.whole("num_key_value_heads"),
        head_dim=read.whole("head_dim"),
        layers=read.needed("num_hidden_layers"),
        width=read.needed("hidden_size"),
        mlp_width=read.needed("intermediate_size"),
        vocab=read.needed("vocab_size"),
        max_length=read.whole("max_position_embeddings", 2048) or 2048,
        epsilon=read.real("rms_norm_eps", _EPSILON),
        theta=_theta(read),
        window=_window(read, kind),
        tied=None if config.get("tie_word_embeddings") is None else read.flag("tie_word_embeddings", False),
        bias=bias,
        qkv_bias=kind == "qwen2",
    )


def _theta(read: _Reader) -> float:
    """RoPE's base; plain RoPE alone is read."""
    for name in ("rope_scaling", "rope_parameters"):
        said = read.fields.get(name)
        if said is not None and not isinstance(said, dict):
            read.fail(name, "an object")
        if said and said.get("rope_type", said.get("type", "default")) != "default":
            read.refuse(name, "plain RoPE ('default') is")
        if said and said.get("partial_rotary_factor", 1.0) != 1.0:
            read.refuse(name, "RoPE of all coordinates is")
    if read.fields.get("partial_rotary_factor", 1.0) != 1.0:
        read.refuse("partial_rotary_factor", "RoPE of all coordinates is")
    parameters = read.fields.get("rope_parameters") or {}
    if "rope_theta" in parameters:
        return _Reader(parameters, read.path).real("rope_theta", _THETA)
    return read.real("rope_theta", _THETA)


def _window(read: _Reader, kind: str) -> int | None:
    """The window that all layers have, or None. NotImplementedError where only some have one."""
    if kind == "llama":
        return None
    if kind == "mistral":
        # Files of Mistral's first version leave out what is the default.
        return read.whole("sliding_window", None if "sliding_window" in read.fields else 4096)
    if not read.flag("use_sliding_window", False) or read.fields.get("sliding_window") is None:
        return None
    kinds = read.fields.get("layer_types")
    if kinds is None:
        layers, full = read.needed("num_hidden_layers"), read.fields.get("max_window_layers", 28)
        if type(full) is not int or full < 0:
            read.fail("max_window_layers", "a number of layers")
        kinds = ["full_attention"] * min(full, layers) + ["sliding_attention"] * max(0, layers - full)
    found = set(kinds) if isinstance(kinds, list) and all(isinstance(each, str) for each in kinds) else set()
    if found == {"full_attention"}:
        return None
    if found != {"sliding_attention"}:
        read.refuse(
            "layer_types" if "layer_types" in read.fields else "max_window_layers", "one kind is, for all"
        )
    return read.needed("sliding_window")


def gguf_facts(values: Mapping[str, Any], path: Path) -> Facts:
    """Facts of a GGUF's values. Raises as ``huggingface_facts``."""
    read, kind = _Reader(values, path), values.get("general.architecture")
    if kind not in GGUF_KNOWN:
        raise ValueError(
            f"{path}: architecture {kind!r} is not known here; {' and '.join(map(repr, GGUF_KNOWN))} are"
        )
    names = {"layers": "block_count", "width": "embedding_length", "mlp_width": "feed_forward_length"}
    names = {ours: f"{kind}.{theirs}" for ours, theirs in names.items()}
    for name in ("expert_count", "attention.sliding_window"):
        if values.get(f"{kind}.{name}", 0) != 0:
            read.refuse(f"{kind}.{name}", "a network without is")
    if values.get(scaling := f"{kind}.rope.scaling.type", "none") != "none":
        read.refuse(scaling, "plain RoPE ('none') is")
    size = read.whole(f"{kind}.attention.key_length")
    if read.whole(f"{kind}.attention.value_length", size) != size:
        read.refuse(f"{kind}.attention.value_length", f"as long as keys, {size}, is")
    heads, width = read.needed(f"{kind}.attention.head_count"), read.needed(names["width"])
    whole = size or width // heads
    if (turned := read.whole(f"{kind}.rope.dimension_count", whole)) != whole:
        read.refuse(f"{kind}.rope.dimension_count", f"RoPE of all {whole} coordinates, not {turned}, is")
    epsilon = f"{kind}.attention.layer_norm_rms_epsilon"
    if epsilon not in values:
        read.fail(epsilon, "a positive number")
    return Facts(
        path=path,
        architecture=kind,
        names=names | {"vocab": f"{kind}.vocab_size"},
        heads=heads,
        kv_heads=read.whole(f"{kind}.attention.head_count_kv", heads),
        head_dim=size,
        layers=read.needed(names["layers"]),
        width=width,
        mlp_width=read.needed(names["mlp_width"]),
        vocab=read.whole(f"{kind}.vocab_size"),
        max_length=read.whole(f"{kind}.context_length", 2048) or 2048,
        epsilon=read.real(epsilon, _EPSILON),
        theta=read.real(f"{kind}.rope.freq_base", _THETA),
        qkv_bias=kind == "qwen2",
        paired=kind == "llama",
    )
