"""A random Whisper of a few kilobytes, and writers of its files that share no code with the readers."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from slimjax.models.whisper import WhisperConfig, WhisperModel

LETTERS = 50
SPECIAL = (
    "endoftext",
    "startoftranscript",
    "en",
    "de",
    "translate",
    "transcribe",
    "startoflm",
    "startofprev",
    "nospeech",
    "notimestamps",
)
CONFIG = WhisperConfig(
    mels=8,
    width=16,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    mlp_width=24,
    vocab=LETTERS + len(SPECIAL) + 4,
    audio_positions=20,
    text_positions=24,
)
SAMPLES = 2 * CONFIG.audio_positions * 160  # of one chunk
_CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}


def random_model(config: WhisperConfig = CONFIG, seed: int = 0) -> WhisperModel:
    """Every parameter random, the zeros and ones of a fresh model included; few bits each, exact in bfloat16."""
    graph, state = nnx.split(nnx.eval_shape(lambda: WhisperModel(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        spread = 0.2 if len(leaf.shape) < 2 else leaf.shape[0] ** -0.5
        noise = spread * rng.standard_normal(leaf.shape) + ("scale" in jax.tree_util.keystr(path))
        return jnp.asarray((np.round(noise * 64).clip(-127, 127) / 64).astype(np.float32))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(drawn, state))


def write_tokenizer(folder, special=SPECIAL) -> None:
    """Letters that stand for themselves, and the special tokens behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {chr(ord("0") + i): i for i in range(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))


def parameter(model: WhisperModel, path: str) -> np.ndarray:
    """A parameter by its attribute path, "decoder.0.mlp.up.kernel"."""
    found = model
    for step in path.split("."):
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    return np.asarray(found[...])


def _linear(model, path):
    """A kernel as files have it, [out, in], and its bias."""
    kernel = parameter(model, f"{path}.kernel")
    joined = path.endswith("out")
    flat = kernel.reshape(-1, kernel.shape[-1]) if joined else kernel.reshape(kernel.shape[0], -1)
    bias = np.zeros(flat.shape[1], np.float32) if path.endswith("key") else parameter(model, f"{path}.bias")
    return flat.T.copy(), bias.reshape(-1)


def ctranslate2_arrays(model: WhisperModel) -> dict[str, np.ndarray]:
    """The variables of a ``model.bin``."""
    out = {
        "decoder/embeddings/weight": parameter(model, "embedding"),
        "decoder/activation": np.int8(3),
        "decoder/pre_norm": np.int8(1),
        "decoder/num_heads": np.int16(model.config.heads),
        "encoder/num_heads": np.int16(model.config.heads),
        "encoder/position_encodings/encodings": parameter(model, "audio_positions"),
        "decoder/position_encodings/encodings": parameter(model, "text_positions"),
    }

    def norm(name, path):
        out[f"{name}/gamma"] = parameter(model, f"{path}.scale")
        out[f"{name}/beta"] = parameter(model, f"{path}.bias")

    def fused(name, *paths):
        weights, biases = zip(*(_linear(model, path) for path in paths), strict=True)
        out[f"{name}/weight"], out[f"{name}/bias"] = np.concatenate(weights), np.concatenate(biases)

    for conv in ("conv1", "conv2"):
        out[f"encoder/{conv}/weight"] = parameter(model, f"{conv}.kernel").transpose(2, 1, 0).copy()
        out[f"encoder/{conv}/bias"] = parameter(model, f"{conv}.bias")
    for half, count in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        norm(f"{half}/layer_norm", f"{half}_norm")
        for i in range(count):
            ours, theirs = f"{half}.{i}", f"{half}/layer_{i}"
            own = "attention" if half == "encoder" else "self_attention"
            norm(
                f"{theirs}/self_attention/layer_norm",
                f"{ours}.{'attention' if half == 'encoder' else 'self'}_norm",
            )
            fused(
                f"{theirs}/self_attention/linear_0",
                *(f"{ours}.{own}.{p}" for p in ("query", "key", "value")),
            )
            fused(f"{theirs}/self_attention/linear_1", f"{ours}.{own}.out")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.mlp_norm")
            fused(f"{theirs}/ffn/linear_0", f"{ours}.mlp.up")
            fused(f"{theirs}/ffn/linear_1", f"{ours}.mlp.down")
            if half == "decoder":
                cross = f"{ours}.cross_attention"
                norm(f"{theirs}/attention/layer_norm", f"{ours}.cross_norm")
                fused(f"{theirs}/attention/linear_0", f"{cross}.query")
                fused(f"{theirs}/attention/linear_1", f"{cross}.key", f"{cross}.value")
                fused(f"{theirs}/attention/linear_2", f"{cross}.out")
    return out


def ctranslate2_bytes(arrays, *, spec="WhisperSpec", version=6, dtype="float16", alias=True) -> bytes:
    """A ``model.bin``; arrays of float32 are stored in ``dtype``."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", version), text(spec), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        stored = np.asarray(array)
        stored = stored.astype(getattr(ml_dtypes, dtype, dtype)) if stored.dtype == np.float32 else stored
        shape = struct.pack(f"<B{stored.ndim}I", stored.ndim, *stored.shape)
        data = np.ascontiguousarray(stored).tobytes()
        parts += [text(name), shape, struct.pack("<BI", _CODES[stored.dtype.name], len(data)), data]
    pairs = [("decoder/projection/weight", "decoder/embeddings/weight")] if alias else []
    parts += [struct.pack("<I", len(pairs)), *(text(a) + text(b) for a, b in pairs)]
    return b"".join(parts)


def write_ctranslate2(folder, model: WhisperModel, **options) -> None:
    """A CTranslate2 directory."""
    (folder / "model.bin").write_bytes(ctranslate2_bytes(ctranslate2_arrays(model), **options))
    write_tokenizer(folder)


def huggingface_arrays(model: WhisperModel, prefix: str = "model.") -> dict[str, np.ndarray]:
    """The tensors of a ``model.safetensors``."""
    out = {
        "encoder.embed_positions.weight": parameter(model, "audio_positions"),
        "decoder.embed_positions.weight": parameter(model, "text_positions"),
        "decoder.embed_tokens.weight": parameter(model, "embedding"),
    }
    for conv in ("conv1", "conv2"):
        out[f"encoder.{conv}.weight"] = parameter(model, f"{conv}.kernel").transpose(2, 1, 0).copy()
        out[f"encoder.{conv}.bias"] = parameter(model, f"{conv}.bias")

    def norm(name, path):
        out[f"{name}.weight"] = parameter(model, f"{path}.scale")
        out[f"{name}.bias"] = parameter(model, f"{path}.bias")

    def linear(name, path):
        out[f"{name}.weight"], bias = _linear(model, path)
        if not path.endswith("key"):
            out[f"{name}.bias"] = bias

    for half, count in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        norm(f"{half}.layer_norm", f"{half}_norm")
        for i in range(count):
            theirs, ours = f"{half}.layers.{i}", f"{half}.{i}"
            kinds = {"self_attn": "attention"} if half == "encoder" else {
                "self_attn": "self_attention", "encoder_attn": "cross_attention"
            }  # fmt: skip
            for name, path in kinds.items():
                norm(f"{theirs}.{name}_layer_norm", f"{ours}.{path.replace('_attention', '')}_norm")
                for short, layer in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
                    linear(f"{theirs}.{name}.{short}_proj", f"{ours}.{path}.{layer}")
            norm(f"{theirs}.final_layer_norm", f"{ours}.mlp_norm")
            linear(f"{theirs}.fc1", f"{ours}.mlp.up")
            linear(f"{theirs}.fc2", f"{ours}.mlp.down")
    return {prefix + name: np.ascontiguousarray(array) for name, array in out.items()}


def huggingface_config(config: WhisperConfig = CONFIG) -> dict:
    """A ``config.json``."""
    both = {"attention_heads": config.heads, "ffn_dim": config.mlp_width}
    return {
        "model_type": "whisper",
        "d_model": config.width,
        "num_mel_bins": config.mels,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "vocab_size": config.vocab,
        "max_source_positions": config.audio_positions,
        "max_target_positions": config.text_positions,
        **{f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in both.items()},
    }


def write_huggingface(
    folder, model: WhisperModel, *, shards=1, prefix="model.", dtype="float32", multilingual=None
) -> None:
    """A Hugging Face directory."""
    kind = getattr(ml_dtypes, dtype, dtype)
    arrays = {name: array.astype(kind) for name, array in huggingface_arrays(model, prefix).items()}
    (folder / "config.json").write_text(json.dumps(huggingface_config(model.config)))
    write_tokenizer(folder)
    if multilingual is not None:
        (folder / "generation_config.json").write_text(json.dumps({"is_multilingual": multilingual}))
    if shards == 1:
        save_file(arrays, str(folder / "model.safetensors"))
        return
    where = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(arrays))
    }
    for file in set(where.values()):
        save_file({n: a for n, a in arrays.items() if where[n] == file}, str(folder / file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
