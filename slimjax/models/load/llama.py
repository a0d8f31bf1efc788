"""Decoders of Llama's architecture from a Hugging Face directory (safetensors) or a GGUF file."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from slimjax.config import ModelConfig
from slimjax.models.decoder import DecoderLM
from slimjax.models.load.gguf import GGUFFile
from slimjax.models.load.llama_facts import Facts, gguf_facts, huggingface_facts
from slimjax.models.load.parameters import Parameters, build
from slimjax.models.load.safetensors import INDEX, SINGLE, SafetensorsFolder
from slimjax.models.load.source import Source, read_json, read_part
from slimjax.models.load.text_tokens import TOKENIZER, gguf_tokenizer, read_tokenizer, tokenizer_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What belongs to no block, and the layers of a block: ours -> Hugging Face's, GGUF's.
_TOP = {
    "embedding": ("embed_tokens.weight", "token_embd.weight"),
    "norm.scale": ("norm.weight", "output_norm.weight"),
    "unembedding": ("lm_head.weight", "output.weight"),
}
_BLOCK = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention.query": ("self_attn.q_proj", "attn_q"),
    "attention.key": ("self_attn.k_proj", "attn_k"),
    "attention.value": ("self_attn.v_proj", "attn_v"),
    "attention.out": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "mlp.gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp.up": ("mlp.up_proj", "ffn_up"),
    "mlp.down": ("mlp.down_proj", "ffn_down"),
}
_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints hold what RoPE computes


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedDecoder:
    """A decoder on disk, looked at and not yet read.

    Attributes:
        config: its sizes.
        parameters: where they are read from.
        tokenizer: makes the text of its ``tokenizer.json``, raising what ``load_decoder`` does; None: it has none.
        directory: as given, or the file.
        layout: "huggingface" or "gguf".
    """

    config: ModelConfig
    parameters: Parameters
    tokenizer: Callable[[], str] | None
    directory: Path
    layout: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedDecoder:
    """A decoder ready to run.

    Attributes:
        model: float32 parameters.
        config: its sizes.
        tokenizer: of its text; None: there is none beside the weights.
        directory, layout: as in ``OpenedDecoder``.
    """

    model: DecoderLM
    config: ModelConfig
    tokenizer: "Tokenizer | None"
    directory: Path
    layout: str


def load_decoder(place: str | Path) -> LoadedDecoder:
    """Read a model of the architecture of Llama (arXiv 2302.13971), Mistral (2310.06825) or Qwen2 (2407.10671).

    Args:
        place: a directory with config.json and safetensors, one with a ``.gguf``, or a ``.gguf`` file. A
            ``tokenizer.json`` beside the weights goes before the one that a GGUF holds.

    Raises:
        OSError: the directory, or a file in it, is missing.
        ValueError: a damaged file, another architecture, a tensor that is missing, of a wrong shape or not
            finite; one line that names the file and the tensor.
        NotImplementedError: a variant of the architecture, quantised safetensors, or a GGUF's tokenizer that is
            not known.
    """
    opened = open_decoder(place)
    where = opened.parameters.file("embedding")
    tokens = None if opened.tokenizer is None else tokenizer_of(opened.tokenizer(), where)
    model = build(lambda: DecoderLM(opened.config, rngs=nnx.Rngs(0)), opened.parameters)
    return LoadedDecoder(
        model=model,
        config=opened.config,
        tokenizer=tokens,
        directory=opened.directory,
        layout=opened.layout,
    )


def is_decoder(place: Path) -> bool:
    """Whether a directory or file is this reader's, by names alone, or says that it is none of Whisper's."""
    if place.suffix == ".gguf" and place.is_file():
        return True
    if (place / "model.bin").exists():
        return False
    if (place / SINGLE).exists() or (place / INDEX).exists():
        config = place / "config.json"
        return config.is_file() and read_json(config).get("model_type") != "whisper"
    return any(place.glob("*.gguf"))


def open_decoder(place: str | Path) -> OpenedDecoder:
    """What a place holds, and the sizes of it; no weight is read. Raises as ``load_decoder``."""
    folder = Path(place)
    if folder.is_dir() and ((folder / SINGLE).exists() or (folder / INDEX).exists()):
        return _open_huggingface(folder)
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else [folder]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"{folder}: no model there; expected config.json with {SINGLE}, or a .gguf file"
        )
    if len(files) > 1:
        raise ValueError(f"{folder}: holds several models ({', '.join(f.name for f in files)}); name one")
    return _open_gguf(folder, files[0])


def _open_huggingface(folder: Path) -> OpenedDecoder:
    path = folder / "config.json"
    facts, source = huggingface_facts(read_json(path), path), SafetensorsFolder(folder)
    # A bare decoder is saved without the prefix that the one with logits has.
    name = functools.partial(huggingface_name, prefix="" if "norm.weight" in source.shapes else "model.")
    tokenizer = folder / TOKENIZER
    return OpenedDecoder(
        config=_sizes(source, name, facts),
        parameters=LlamaParameters(source=source, name=name),
        tokenizer=functools.partial(read_tokenizer, tokenizer) if tokenizer.is_file() else None,
        directory=folder,
        layout="huggingface",
    )


def _open_gguf(place: Path, path: Path) -> OpenedDecoder:
    source = GGUFFile(path)
    facts, beside = gguf_facts(source.values, path), path.parent / TOKENIZER
    return OpenedDecoder(
        config=_sizes(source, gguf_name, facts),
        parameters=LlamaParameters(source=source, name=gguf_name, paired=facts.paired),
        tokenizer=functools.partial(read_tokenizer, beside)
        if beside.is_file()
        else functools.partial(gguf_tokenizer, source.values, path),
        directory=place,
        layout="gguf",
    )


def huggingface_name(path: str, prefix: str = "model.") -> str:
    """What a state dict calls a parameter, by its path in our model ("blocks.0.mlp.up.kernel")."""
    if path in _TOP:
        return _TOP[path][0] if path == "unembedding" else prefix + _TOP[path][0]
    _, index, layer, leaf = _split(path)
    return f"{prefix}layers.{index}.{_BLOCK[layer][0]}.{'bias' if leaf == 'bias' else 'weight'}"


def gguf_name(path: str) -> str:
    """What GGUF calls a parameter."""
    if path in _TOP:
        return _TOP[path][1]
    _, index, layer, leaf = _split(path)
    return f"blk.{index}.{_BLOCK[layer][1]}.{'bias' if leaf == 'bias' else 'weight'}"


def _split(path: str) -> tuple[str, str, str, str]:
    """ "blocks.0.mlp.up.kernel" -> "blocks", "0", "mlp.up", "kernel"."""
    blocks, index, rest = path.split(".", 2)
    layer, leaf = rest.rsplit(".", 1)
    return blocks, index, layer, leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaParameters:
    """The parameters of a decoder in files that hold kernels as [out, in] with heads flattened.

    Attributes:
        source: the files.
        name: what they call a parameter.
        paired: whether the rows of a head's queries and keys are interleaved, as GGUF's are for Llama: what RoPE
            rotates together stands side by side there, and in two halves with us and Hugging Face.
    """

    source: Source
    name: Callable[[str], str]
    paired: bool = False

    def dtype(self, path: str) -> np.dtype:
        stored = self.source.dtype(self.name(path))
        return stored if stored.itemsize <= 4 else np.dtype("float32")  # nothing is read at more

    def file(self, path: str) -> Path:
        return self.source.file(self.name(path))

    def read(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        kernel = path.endswith("kernel")
        inputs = 0
        if kernel:
            inputs = (
                math.prod(shape[:-1]) if ".out." in path else shape[0]
            )  # [N, H, D], or [D, N, H] and [D, F]
            stored = (math.prod(shape) // inputs, inputs)
        else:
            stored = (math.prod(shape),) if path.endswith("bias") else shape
        rows = read_part(self.source, self.name(path), stored)
        if self.paired and (".query." in path or ".key." in path):
            heads, size = shape[-2:]
            rows = rows.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(stored)
        whole = np.ascontiguousarray(rows.T if kernel else rows).reshape(shape)
        return whole.astype(self.dtype(path))  # back from float32, which holds all of them


def _sizes(source: Source, name: Callable[[str], str], facts: Facts) -> ModelConfig:
    """The sizes as the tensors have them: nothing is allocated for a number that a file merely claims."""

    def shape(path: str) -> tuple[int, int]:
        found = source.shapes.get(name(path))
        if found is None or len(found) != 2 or not math.prod(found):
            state = "missing" if found is None else f"of shape {found}"
            raise ValueError(
                f"{source.file(name(path))}: tensor {name(path)!r} is {state}, expected 2 dimensions"
            )
        return found[0], found[1]

    vocab, width = shape("embedding")
    count = sum(name(f"blocks.{i}.mlp.up.kernel") in source.shapes for i in range(len(source.shapes)))
    rows, keys, hidden = (
        shape(f"blocks.0.{layer}.kernel")[0] for layer in ("attention.query", "attention.key", "mlp.up")
    )
    size = facts.head_dim or width // facts.heads
    kv_heads = facts.kv_heads or keys // max(size, 1)
    found = {"layers": count, "width": width, "mlp_width": hidden, "vocab": vocab}
    for what, number in found.items():
        said = getattr(facts, what)
        if said is not None and said != number:
            raise ValueError(f"{facts.path}: {facts.names[what]} = {said}, the tensors have {number}")
    if (rows, keys) != (facts.heads * size, kv_heads * size):
        raise ValueError(
            f"{facts.path}: {facts.heads} heads and {kv_heads} of keys, of {size} each; the tensors have {rows} and "
            f"{keys} rows"
        )
    tied = name("unembedding") not in source.shapes if facts.tied is None else facts.tied
    try:
        config = ModelConfig(
            layers=count,
            width=width,
            mlp_width=hidden,
            vocab=vocab,
            heads=facts.heads,
            kv_heads=kv_heads,
            head_dim=size,
            tied=tied,
            bias=facts.bias,
            qkv_bias=facts.qkv_bias,
            norm_epsilon=facts.epsilon,
            rope_theta=facts.theta,
            window=facts.window,
            max_length=facts.max_length,
        )
    except ValueError as error:
        raise ValueError(f"{facts.path}: {error}") from None
    _check_nothing_is_left(source, name, config, facts)
    return config


def _check_nothing_is_left(
    source: Source, name: Callable[[str], str], config: ModelConfig, facts: Facts
) -> None:
    """Raise NotImplementedError for a tensor that this network has no place for: it would be another network."""
    known = {name(path) for path in ("embedding", "norm.scale", "unembedding")}
    for i in range(config.layers):
        for layer in _BLOCK:
            known |= {name(f"blocks.{i}.{layer}.scale"), name(f"blocks.{i}.{layer}.bias")}
            if ("norm" in layer) or not _biased(layer, config):
                known.discard(name(f"blocks.{i}.{layer}.bias"))
    left = sorted(each for each in source.shapes if each not in known and not each.endswith(_COMPUTED))
    if left:
        raise NotImplementedError(
            f"{source.file(left[0])}: tensor {left[0]!r} has no place in {facts.architecture!r} as it is read here; "
            "another architecture, or a variant of it"
        )


def _biased(layer: str, config: ModelConfig) -> bool:
    return config.bias or (
        config.qkv_bias and layer in ("attention.query", "attention.key", "attention.value")
    )
