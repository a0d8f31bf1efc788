"""Random Llama-like decoders of a few kilobytes, and writers of their files that share no code with the readers."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from slimjax.config import ModelConfig
from slimjax.models.decoder import DecoderLM

WORDS = "the cat sat on 12 mats, and 345 dogs ran; it's what they'd do  in the rain\n"
SIZES = {"vocab": 300, "layers": 2, "width": 64, "mlp_width": 96, "max_length": 64, "norm_epsilon": 1e-5}
CONFIGS = {
    "llama": ModelConfig(**SIZES, heads=4, kv_heads=4, head_dim=16, rope_theta=500.0, tied=False),
    "llama-gqa": ModelConfig(**SIZES, heads=4, kv_heads=2, head_dim=8, rope_theta=1e5),
    "llama-biases": ModelConfig(**SIZES, heads=4, kv_heads=4, head_dim=16, bias=True),
    "mistral": ModelConfig(**SIZES, heads=4, kv_heads=1, head_dim=16, window=3, tied=False),
    "qwen2": ModelConfig(**SIZES, heads=4, kv_heads=4, head_dim=16, qkv_bias=True),
}


def random_model(config: ModelConfig, seed: int = 0) -> DecoderLM:
    """Every parameter random, zeros and ones of a fresh model included; few bits each, exact in bfloat16."""
    graph, state = nnx.split(nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        spread = 0.2 if len(leaf.shape) < 2 else leaf.shape[0] ** -0.5
        noise = spread * rng.standard_normal(leaf.shape) + ("scale" in jax.tree_util.keystr(path))
        return jnp.asarray((np.round(noise * 64).clip(-127, 127) / 64).astype(np.float32))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(drawn, state))


def arrays(model: DecoderLM, config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of a ``model.safetensors``, [out, in]."""
    out = {"model.embed_tokens.weight": model.embedding[...], "model.norm.weight": model.norm.scale[...]}
    if model.unembedding is not None:
        out["lm_head.weight"] = model.unembedding[...]
    for i, block in enumerate(model.blocks):
        start, own = f"model.layers.{i}", block.attention
        out[f"{start}.input_layernorm.weight"] = block.attention_norm.scale[...]
        out[f"{start}.post_attention_layernorm.weight"] = block.mlp_norm.scale[...]
        linears = {
            "self_attn.q_proj": own.query, "self_attn.k_proj": own.key, "self_attn.v_proj": own.value,
            "self_attn.o_proj": own.out, "mlp.gate_proj": block.mlp.gate, "mlp.up_proj": block.mlp.up,
            "mlp.down_proj": block.mlp.down,
        }  # fmt: skip
        for name, linear in linears.items():
            kernel = linear.kernel[...]
            flat = (
                kernel.reshape(-1, config.width) if "o_proj" in name else kernel.reshape(kernel.shape[0], -1)
            )
            out[f"{start}.{name}.weight"] = flat.T
            if linear.bias is not None:
                out[f"{start}.{name}.bias"] = linear.bias[...].reshape(-1)
    return {name: np.array(array, order="C") for name, array in out.items()}


def described(kind: str, config: ModelConfig) -> dict:
    """A ``config.json``."""
    return {
        "model_type": kind.partition("-")[0],
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.F,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "sliding_window": config.window,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }


def tokenizer():
    """A byte-level BPE with a few merges, digits apart, as SmolLM's is."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([WORDS] * 20, trainer)
    made.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return made


def write_huggingface(
    folder, kind: str, *, shards=1, dtype="float32", change=None, config=None, seed=0
) -> DecoderLM:
    """A directory; ``change`` may alter config and tensors. Returns the model."""
    folder.mkdir(exist_ok=True)
    sizes = CONFIGS[kind] if config is None else config
    model, said = random_model(sizes, seed), described(kind, sizes)
    tensors = arrays(model, sizes)
    if change is not None:
        change(said, tensors)
    tensors = {name: array.astype(getattr(ml_dtypes, dtype, dtype)) for name, array in tensors.items()}
    (folder / "config.json").write_text(json.dumps(said))
    tokenizer().save(str(folder / "tokenizer.json"))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, str(folder / "model.safetensors"))
        return model
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: a for n, a in tensors.items() if where[n] == file}, str(folder / file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return model


_GGUF = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_arrays(kind: str, tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """By GGUF's names; queries and keys of Llama in its order: the halves of a head interleaved."""
    out = {}
    for name, array in tensors.items():
        if name in _GGUF_TOP:
            out[_GGUF_TOP[name]] = array
            continue
        _, _, index, rest = name.split(".", 3)
        layer, leaf = rest.rsplit(".", 1)
        if kind.startswith("llama") and layer in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = array.reshape(-1, 2, config.H // 2, *array.shape[1:])
            rows = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)
        else:
            rows = array
        out[f"blk.{index}.{_GGUF[layer]}.{leaf}"] = rows
    return out


def gguf_values(kind: str, config: ModelConfig) -> dict:
    """The named values of a file, tokenizer included."""
    arch, made = kind.partition("-")[0], json.loads(tokenizer().to_str())
    vocab = made["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    values = {
        "block_count": config.layers, "context_length": config.max_length, "embedding_length": config.width,
        "feed_forward_length": config.F, "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope_theta, "rope.dimension_count": config.head_dim,
    }  # fmt: skip
    return {
        "general.architecture": arch,
        **{f"{arch}.{name}": value for name, value in values.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == "<|end|>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in made["model"]["merges"]],
    }


def write_gguf(path, kind: str, *, quantised=None, change=None, seed=0) -> DecoderLM:
    """A file by the package gguf's own writer; ``quantised`` names ggml's type of matrices. Returns the model."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    config = CONFIGS[kind]
    model = random_model(config, seed)
    tensors, values = gguf_arrays(kind, arrays(model, config), config), gguf_values(kind, config)
    if change is not None:
        change(values, tensors)
    writer = GGUFWriter(path, values["general.architecture"])
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for name, value in values.items():
        if name != "general.architecture":
            add[type(value)](name, value)
    for name, array in tensors.items():
        if quantised is None or array.ndim < 2:
            writer.add_tensor(name, array)
        else:
            sort = GGMLQuantizationType[quantised]
            writer.add_tensor(name, quantize(array, sort), raw_dtype=sort)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
