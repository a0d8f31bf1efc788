"""Whisper from a directory: CTranslate2 (``model.bin``) or Hugging Face (``config.json``, safetensors)."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from slimjax.models.load.converted import ConvertedParameters, is_converted
from slimjax.models.load.ctranslate2 import CTranslate2File
from slimjax.models.load.parameters import Parameters, build
from slimjax.models.load.safetensors import INDEX, SINGLE, SafetensorsFolder
from slimjax.models.load.source import Source, read_json, read_part
from slimjax.models.load.speech_tokens import SpeechTokens, speech_tokens
from slimjax.models.load.whisper_names import Part, ctranslate2_part, huggingface_part
from slimjax.models.whisper import WhisperConfig, WhisperModel

TOKENIZER = "tokenizer.json"
_GELU = 3  # CTranslate2's number for the exact one


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedWhisper:
    """A model ready to transcribe.

    Attributes:
        model: float32 parameters.
        tokens: its tokenizer and special tokens.
        directory: where it came from.
        layout: "ctranslate2" or "huggingface".
    """

    model: WhisperModel
    tokens: SpeechTokens
    directory: Path
    layout: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedWhisper:
    """A Whisper directory, looked at and not yet read.

    Attributes:
        config: its sizes.
        parameters: where they are read from.
        tokens, directory, layout: as in ``LoadedWhisper``.
        multilingual: whether the directory says that the model has languages; None: it says nothing.
    """

    config: WhisperConfig
    parameters: Parameters
    tokens: SpeechTokens
    directory: Path
    layout: str
    multilingual: bool | None = None


def load_whisper(directory: str | Path) -> LoadedWhisper:
    """Read a Whisper model of any size, English-only or multilingual, or what ``slimjax convert`` made of one.

    Raises:
        OSError: the directory, or a file in it, is missing.
        ValueError: a damaged file, another architecture, a tensor that is missing, of a wrong shape or not
            finite; one line that names the file and the tensor.
        NotImplementedError: quantised weights.
    """
    return read_whisper(open_whisper(directory))


def read_whisper(opened: OpenedWhisper) -> LoadedWhisper:
    """The model of an opened directory, every parameter read, one at a time. Raises as ``load_whisper``."""
    model = build(lambda: WhisperModel(opened.config, rngs=nnx.Rngs(0)), opened.parameters)
    return LoadedWhisper(model=model, tokens=opened.tokens, directory=opened.directory, layout=opened.layout)


def open_whisper(directory: str | Path) -> OpenedWhisper:
    """What a directory holds, and the sizes of it; no weight is read. Raises as ``load_whisper``."""
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")
    if is_converted(folder):
        return _open_converted(folder)
    multilingual = None
    if (folder / "model.bin").exists():
        layout, opened = "ctranslate2", _open_ctranslate2(folder)
        config = _sizes(opened)
    elif (folder / SINGLE).exists() or (folder / INDEX).exists():
        layout, opened = "huggingface", _open_huggingface(folder)
        config = _sizes(opened)
        _check_config(folder / "config.json", config)
        if (folder / "generation_config.json").exists():
            multilingual = read_json(folder / "generation_config.json").get("is_multilingual")
    else:
        raise FileNotFoundError(
            f"{folder}: no model there; expected model.bin (CTranslate2), or config.json with {SINGLE} or {INDEX}"
        )
    tokens = speech_tokens(folder / TOKENIZER, config.vocab, multilingual=multilingual)
    return OpenedWhisper(
        config=config,
        parameters=opened,
        tokens=tokens,
        directory=folder,
        layout=layout,
        multilingual=multilingual,
    )


def _open_converted(folder: Path) -> OpenedWhisper:
    """OUT of ``slimjax convert``."""
    parameters = ConvertedParameters(folder)
    if parameters.section.kind != "whisper":
        raise ValueError(f"{folder}: a converted model of kind {parameters.section.kind!r}, no Whisper")
    config = parameters.section.made(WhisperConfig)
    multilingual = parameters.section.details.get("multilingual")
    return OpenedWhisper(
        config=config,
        parameters=parameters,
        tokens=speech_tokens(folder / TOKENIZER, config.vocab, multilingual=multilingual),
        directory=folder,
        layout="slimjax",
        multilingual=multilingual,
    )


@dataclasses.dataclass(frozen=True)
class _Opened:
    """Weights, where a parameter of ours is in them, and the heads of encoder and decoder, which no shape tells."""

    source: Source
    name: Callable[[str], Part]
    heads: tuple[object, object]
    said_by: Path

    def dtype(self, path: str) -> np.dtype:
        stored = self.source.dtype(self.name(path).name)
        return stored if stored.itemsize <= 4 else np.dtype("float32")  # nothing is read at more

    def file(self, path: str) -> Path:
        return self.source.file(self.name(path).name)

    def read(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        part, kernel = self.name(path), path.endswith("kernel")
        stored = _stored_shape(path, shape) if kernel else _flat_shape(path, shape)
        rows = read_part(self.source, part.name, stored, part.part, part.parts)
        whole = np.ascontiguousarray(rows.T if kernel else rows).reshape(shape)
        return whole.astype(self.dtype(path))  # back from float32, which holds all of them


def _open_ctranslate2(folder: Path) -> _Opened:
    file = CTranslate2File(folder / "model.bin")
    if file.spec != "WhisperSpec":
        raise ValueError(f"{file.path}: architecture {file.spec!r} is not known here; WhisperSpec is")
    expected = {"activation": _GELU, "pre_norm": 1, "scale_embeddings": 0, "alibi": 0}
    for name, number in expected.items():
        if (path := f"decoder/{name}") in file.shapes and file.number(path) != number:
            raise ValueError(f"{file.path}: {path} = {file.number(path)}, Whisper has {number}")
    heads = (file.number("encoder/num_heads"), file.number("decoder/num_heads"))
    return _Opened(file, ctranslate2_part, heads, file.path)


def _open_huggingface(folder: Path) -> _Opened:
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "whisper":
        raise ValueError(f"{path}: architecture {config.get('model_type')!r} is not known here; 'whisper' is")
    if config.get("activation_function", "gelu") != "gelu" or config.get("scale_embedding", False):
        raise ValueError(f"{path}: expected the exact gelu and embeddings without a scale")
    source = SafetensorsFolder(folder)
    # A bare encoder-decoder is saved without the prefix that the one with logits has.
    prefix = "" if "encoder.conv1.weight" in source.shapes else "model."
    heads = (config.get("encoder_attention_heads"), config.get("decoder_attention_heads"))
    return _Opened(source, functools.partial(huggingface_part, prefix=prefix), heads, path)


def _sizes(opened: _Opened) -> WhisperConfig:
    """The sizes as the tensors have them: nothing is allocated for a number that a file merely claims."""
    source, name, heads = opened.source, opened.name, opened.heads[0]
    if not isinstance(heads, int) or heads < 1 or heads != opened.heads[1]:
        raise ValueError(
            f"{opened.said_by}: heads of encoder and decoder = {opened.heads}, expected two equal positive numbers"
        )

    def shape(path: str, rank: int) -> tuple[int, ...]:
        part = name(path)
        found = source.shapes.get(part.name)
        if found is None or len(found) != rank or not math.prod(found):
            state = "missing" if found is None else f"of shape {found}"
            raise ValueError(
                f"{source.file(part.name)}: tensor {part.name!r} is {state}, expected {rank} dimensions"
            )
        return found

    def layers(half: str) -> int:
        count = sum(
            name(f"{half}.{i}.mlp.up.kernel").name in source.shapes for i in range(len(source.shapes))
        )
        return count or len(shape(f"{half}.0.mlp.up.kernel", 2))  # the latter raises

    width, mels, _ = shape("conv1.kernel", 3)
    sizes = {
        "mels": mels,
        "width": width,
        "heads": heads,
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "mlp_width": shape("encoder.0.mlp.up.kernel", 2)[0],
        "vocab": shape("embedding", 2)[0],
        "audio_positions": shape("audio_positions", 2)[0],
        "text_positions": shape("text_positions", 2)[0],
    }
    try:
        return WhisperConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{opened.said_by}: {error}") from None


def _check_config(path: Path, config: WhisperConfig) -> None:
    """Raise ValueError where config.json contradicts the tensors."""
    said = read_json(path)
    names = {
        "d_model": config.width,
        "num_mel_bins": config.mels,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_ffn_dim": config.mlp_width,
        "decoder_ffn_dim": config.mlp_width,
        "vocab_size": config.vocab,
        "max_source_positions": config.audio_positions,
        "max_target_positions": config.text_positions,
    }
    for name, found in names.items():
        if said.get(name, found) != found:
            raise ValueError(f"{path}: {name} = {said[name]!r}, the tensors have {found}")


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Files hold kernels with their axes reversed, [out, in], and heads flattened."""
    if path.startswith("conv"):
        return shape[::-1]
    if ".out." in path:  # [N, H, D]
        return (shape[-1], math.prod(shape[:-1]))
    return (math.prod(shape[1:]), shape[0])  # [D, N, H] or [D, F]


def _flat_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A bias per head [N, H] is stored flat; all else as it is."""
    return (math.prod(shape),) if path.endswith("bias") else shape
