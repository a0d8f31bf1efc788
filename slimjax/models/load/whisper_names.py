"""What the formats call the parameters of ``slimjax.models.whisper.WhisperModel``."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor in a file, or one of several equal parts of it along its first axis."""

    name: str
    part: int = 0
    parts: int = 1


# Parameters that belong to no block: ours -> CTranslate2's, Hugging Face's.
_TOP = {
    "conv1.kernel": ("encoder/conv1/weight", "encoder.conv1.weight"),
    "conv1.bias": ("encoder/conv1/bias", "encoder.conv1.bias"),
    "conv2.kernel": ("encoder/conv2/weight", "encoder.conv2.weight"),
    "conv2.bias": ("encoder/conv2/bias", "encoder.conv2.bias"),
    "audio_positions": ("encoder/position_encodings/encodings", "encoder.embed_positions.weight"),
    "text_positions": ("decoder/position_encodings/encodings", "decoder.embed_positions.weight"),
    "embedding": ("decoder/embeddings/weight", "decoder.embed_tokens.weight"),
    "encoder_norm.scale": ("encoder/layer_norm/gamma", "encoder.layer_norm.weight"),
    "encoder_norm.bias": ("encoder/layer_norm/beta", "encoder.layer_norm.bias"),
    "decoder_norm.scale": ("decoder/layer_norm/gamma", "decoder.layer_norm.weight"),
    "decoder_norm.bias": ("decoder/layer_norm/beta", "decoder.layer_norm.bias"),
}

# Layers of a block. CTranslate2 fuses the projections of one input: queries, keys and values in the rows of
# one matrix. Their fused bias has zeros for the keys, which have none here.
_SELF = "self_attention/linear_0"
_CROSS = "attention/linear_1"
_CTRANSLATE2 = {
    "attention_norm": Part("self_attention/layer_norm"),
    "attention.query": Part(_SELF, 0, 3),
    "attention.key": Part(_SELF, 1, 3),
    "attention.value": Part(_SELF, 2, 3),
    "attention.out": Part("self_attention/linear_1"),
    "self_norm": Part("self_attention/layer_norm"),
    "self_attention.query": Part(_SELF, 0, 3),
    "self_attention.key": Part(_SELF, 1, 3),
    "self_attention.value": Part(_SELF, 2, 3),
    "self_attention.out": Part("self_attention/linear_1"),
    "cross_norm": Part("attention/layer_norm"),
    "cross_attention.query": Part("attention/linear_0"),
    "cross_attention.key": Part(_CROSS, 0, 2),
    "cross_attention.value": Part(_CROSS, 1, 2),
    "cross_attention.out": Part("attention/linear_2"),
    "mlp_norm": Part("ffn/layer_norm"),
    "mlp.up": Part("ffn/linear_0"),
    "mlp.down": Part("ffn/linear_1"),
}
_HUGGINGFACE = {
    "attention_norm": "self_attn_layer_norm",
    "self_norm": "self_attn_layer_norm",
    "cross_norm": "encoder_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    **{
        f"{ours}.{layer}": f"{theirs}.{short}_proj"
        for ours, theirs in (
            ("attention", "self_attn"),
            ("self_attention", "self_attn"),
            ("cross_attention", "encoder_attn"),
        )
        for layer, short in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))
    },
}


def ctranslate2_part(path: str) -> Part:
    """Where a parameter, by its path in our model ("decoder.0.mlp.up.kernel"), is in a ``model.bin``."""
    if path in _TOP:
        return Part(_TOP[path][0])
    half, index, layer, leaf = _split(path)
    found = _CTRANSLATE2[layer]
    norm = {"scale": "gamma", "bias": "beta"} if layer.endswith("norm") else {}
    name = f"{half}/layer_{index}/{found.name}/{norm.get(leaf, 'weight' if leaf == 'kernel' else leaf)}"
    return dataclasses.replace(found, name=name)


def huggingface_part(path: str, prefix: str = "model.") -> Part:
    """Where a parameter is in Hugging Face's state dict."""
    if path in _TOP:
        return Part(prefix + _TOP[path][1])
    half, index, layer, leaf = _split(path)
    return Part(
        f"{prefix}{half}.layers.{index}.{_HUGGINGFACE[layer]}.{'bias' if leaf == 'bias' else 'weight'}"
    )


def _split(path: str) -> tuple[str, str, str, str]:
    """ "decoder.0.mlp.up.kernel" -> "decoder", "0", "mlp.up", "kernel"."""
    half, index, rest = path.split(".", 2)
    layer, leaf = rest.rsplit(".", 1)
    return half, index, layer, leaf
