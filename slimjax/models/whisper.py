"""Whisper (arXiv 2212.04356): an encoder-decoder as a thin NNX module around the pure attention functions.

The decoder runs three ways, which differ in the two attention functions its blocks are handed: without a cache
(``decode``: scoring, calibration), and with caches, filling the self caches or through them (``with_cache``).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slimjax.attention.cross import Memory, attend_filled, cross_full
from slimjax.attention.layer import attend_cached, attend_full, prefill
from slimjax.axes import Inputs, Lengths, Tokens
from slimjax.kernels.spec import DecodeSpec
from slimjax.models.layers import Dense, normalise
from slimjax.models.whisper_caches import WhisperCaches, WhisperLayers
from slimjax.nn import MultiHeadAttention
from slimjax.numerics import accumulation_dtype, einsum
from slimjax.pytree import pytree
from slimjax.scheme import Scheme

EPSILON = 1e-5  # of every LayerNorm
KERNEL = 3  # frames that a convolution sees
Mel = Float[Array, "B F M"]
Logits = Float[Array, "B T V"]
Attend = Callable[[Inputs], Inputs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Sizes of a Whisper model, from tiny to large-v3. Hashable.

    Attributes:
        mels: bands of the spectrogram, 80 or 128.
        width: D.
        heads: N, of every attention layer; there are as many key/value heads.
        encoder_layers, decoder_layers: blocks of each.
        mlp_width: F, 4 D in every published model.
        vocab: V.
        audio_positions: encoder positions, two spectrogram frames each (1500 = 30 s).
        text_positions: tokens the decoder reaches, its prompt included.
    """

    mels: int = 80
    width: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    mlp_width: int
    vocab: int
    audio_positions: int = 1500
    text_positions: int = 448

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}={value!r}: expected a whole number of at least 1")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"{self.width=} must be even and a multiple of {self.heads=}")


class LayerNorm(nnx.Module):
    """LayerNorm with a bias, in the dtype of its input."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Inputs) -> Inputs:
        return normalise(x, self.scale[...], self.bias[...], centre=True, epsilon=EPSILON)


class Convolution(nnx.Module):
    """Over three frames, padded by one on either side; then GELU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, rngs: nnx.Rngs):
        gain = (KERNEL * inputs) ** -0.5
        self.kernel = nnx.Param(gain * jax.random.normal(rngs.params(), (KERNEL, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))
        self.stride = stride

    def __call__(self, x: Inputs, dtype: str) -> Inputs:
        out = jax.lax.conv_general_dilated(
            x.astype(dtype),
            self.kernel[...].astype(dtype),
            window_strides=(self.stride,),
            padding=((1, 1),),
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=accumulation_dtype(dtype),
        )
        return jax.nn.gelu(out + self.bias[...].astype(out.dtype)[None, None], approximate=False)


class MLP(nnx.Module):
    """Two dense layers around an exact GELU."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        self.up = Dense(config.width, config.mlp_width, bias=True, rngs=rngs)
        self.down = Dense(config.mlp_width, config.width, bias=True, rngs=rngs)

    def __call__(self, x: Inputs, dtype: str) -> Inputs:
        return self.down(jax.nn.gelu(self.up(x, dtype), approximate=False), dtype)


def _attention(config: WhisperConfig, rngs: nnx.Rngs) -> MultiHeadAttention:
    """Biases on queries, values and output; none on keys, where softmax would cancel it."""
    attention = MultiHeadAttention(config.heads, config.width, use_bias=True, rngs=rngs)
    attention.key.bias = None
    return attention


class EncoderBlock(nnx.Module):
    """Pre-norm attention in both directions, and an MLP."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.width)
        self.attention = _attention(config, rngs)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, h: Inputs, dtype: str) -> Inputs:
        spec = _both_ways(self.attention, dtype=dtype)
        out = attend_full(self.attention_norm(h), self.attention.projections(), spec)
        h = h + out.astype(h.dtype)
        return h + self.mlp(self.mlp_norm(h), dtype)


class DecoderBlock(nnx.Module):
    """Pre-norm causal self-attention, cross-attention and an MLP; what attends is handed in."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        self.self_norm = LayerNorm(config.width)
        self.self_attention = _attention(config, rngs)
        self.cross_norm = LayerNorm(config.width)
        self.cross_attention = _attention(config, rngs)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, h: Inputs, attend_self: Attend, attend_cross: Attend, dtype: str) -> Inputs:
        h = h + attend_self(self.self_norm(h)).astype(h.dtype)
        h = h + attend_cross(self.cross_norm(h)).astype(h.dtype)
        return h + self.mlp(self.mlp_norm(h), dtype)

    def self_spec(self, scheme: str | Scheme = "kv:float32", dtype: str = "float32") -> DecodeSpec:
        """The static description of the self-attention under ``scheme``."""
        return self.self_attention.decode_spec(scheme, dtype)

    def cross_spec(self, scheme: str | Scheme = "kv:float32", dtype: str = "float32") -> DecodeSpec:
        """The same of the cross-attention, which is not causal."""
        return _both_ways(self.cross_attention, scheme, dtype)


def _both_ways(
    attention: MultiHeadAttention, scheme: str | Scheme = "kv:float32", dtype: str = "float32"
) -> DecodeSpec:
    return dataclasses.replace(attention.decode_spec(scheme, dtype), causal=False)


@pytree
class AttentionInputs:
    """What the attention layers of the decoder are given: for calibration and for measuring errors.

    Attributes:
        memory: the encoder's output, of which every cross-attention makes its keys and values.
        self_inputs: of every self-attention layer (queries, keys and values).
        cross_inputs: of every cross-attention layer (queries).
    """

    memory: Memory
    self_inputs: tuple[Inputs, ...]
    cross_inputs: tuple[Inputs, ...]


class WhisperModel(nnx.Module):
    """Parameters are float32; ``dtype`` arguments say in which dtype products are computed."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        self.config = config
        self.conv1 = Convolution(config.mels, config.width, stride=1, rngs=rngs)
        self.conv2 = Convolution(config.width, config.width, stride=2, rngs=rngs)
        self.audio_positions = nnx.Param(_sinusoids(config.audio_positions, config.width))
        self.encoder = nnx.List([EncoderBlock(config, rngs=rngs) for _ in range(config.encoder_layers)])
        self.encoder_norm = LayerNorm(config.width)
        self.embedding = normal(config.vocab, config.width)
        self.text_positions = normal(config.text_positions, config.width)
        self.decoder = nnx.List([DecoderBlock(config, rngs=rngs) for _ in range(config.decoder_layers)])
        self.decoder_norm = LayerNorm(config.width)

    def encode(self, mel: Mel, dtype: str = "float32") -> Memory:
        """A spectrogram [B, F, M] to the encoder's output [B, F/2, D], in the accumulation dtype.

        Raises ValueError where the frames are more than the positions, odd in number, or of other bands.
        """
        frames, reach = mel.shape[1], 2 * self.config.audio_positions
        if mel.shape[2] != self.config.mels or frames % 2 or not 0 < frames <= reach:
            raise ValueError(
                f"a spectrogram of shape {mel.shape}: expected [B, frames, {self.config.mels}] with an even "
                f"number of frames up to {reach}"
            )
        h = self.conv2(self.conv1(mel, dtype), dtype)
        h = h + self.audio_positions[...][None, : h.shape[1]].astype(h.dtype)
        for block in self.encoder:
            h = block(h, dtype)
        return self.encoder_norm(h)

    def decode(self, tokens: Tokens, memory: Memory, dtype: str = "float32") -> Logits:
        """Next-token logits of given tokens without a cache, [B, T, V]."""
        return self._teach(tokens, memory, dtype)[0]

    def attention_inputs(self, tokens: Tokens, memory: Memory, dtype: str = "float32") -> AttentionInputs:
        """What every attention layer of the decoder is given when it reads ``tokens``."""
        _, self_inputs, cross_inputs = self._teach(tokens, memory, dtype)
        return AttentionInputs(
            memory=memory, self_inputs=tuple(self_inputs), cross_inputs=tuple(cross_inputs)
        )

    def _teach(self, tokens: Tokens, memory: Memory, dtype: str) -> tuple[Logits, list[Inputs], list[Inputs]]:
        self_inputs: list[Inputs] = []
        cross_inputs: list[Inputs] = []
        h = self._embed(tokens, jnp.zeros(tokens.shape[:1], jnp.int32), dtype)
        for block in self.decoder:

            def attend_self(x: Inputs, block: DecoderBlock = block) -> Inputs:
                self_inputs.append(x)
                return attend_full(x, block.self_attention.projections(), block.self_spec(dtype=dtype))

            def attend_cross(x: Inputs, block: DecoderBlock = block) -> Inputs:
                cross_inputs.append(x)
                weights, spec = block.cross_attention.projections(), block.cross_spec(dtype=dtype)
                return cross_full(x, memory, weights, spec)

            h = block(h, attend_self, attend_cross, dtype)
        return self._head(h, dtype), self_inputs, cross_inputs

    def with_cache(
        self,
        tokens: Tokens,
        layers: WhisperLayers,
        caches: WhisperCaches,
        *,
        count: Lengths | None = None,
        fresh: bool = False,
    ) -> tuple[Logits, WhisperCaches]:
        """Append T tokens to the self caches and return their logits; the cross caches are read as they are.

        All but attention is computed in the accumulation dtype of the layers' specs.

        Args:
            tokens: [B, T]; a sequence's first token stands at the position that its self caches have reached.
            layers: from ``convert_whisper``.
            caches: from ``begin``, or an earlier call.
            count: [B], how many of the T tokens are no padding; None: all.
            fresh: the self caches are empty, so self-attention may use its own exact keys and values.

        Returns:
            [B, T, V] logits (rows past ``count`` are meaningless) and the caches with longer self caches.
        """
        dtype = layers.self_layers[0].spec.accumulation.name
        step, longer = (prefill if fresh else attend_cached), []
        h = self._embed(tokens, caches.self_caches[0].length, dtype)
        for index, block in enumerate(self.decoder):

            def attend_self(x: Inputs, index: int = index) -> Inputs:
                y, cache = step(x, layers.self_layers[index], caches.self_caches[index], count=count)
                longer.append(cache)
                return y

            def attend_cross(x: Inputs, index: int = index) -> Inputs:
                return attend_filled(x, layers.cross_layers[index], caches.cross(index))

            h = block(h, attend_self, attend_cross, dtype)
        return self._head(h, dtype), dataclasses.replace(caches, self_caches=tuple(longer))

    def _embed(self, tokens: Tokens, start: Lengths, dtype: str) -> Inputs:
        if tokens.shape[1] > self.config.text_positions:
            raise ValueError(f"{tokens.shape[1]} tokens are more than {self.config.text_positions=}")
        where = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        # NaN past the reach: a traced position cannot raise, and must not be clamped in silence.
        positions = self.text_positions[...].at[where].get(mode="fill", fill_value=jnp.nan)
        return (self.embedding[...][tokens] + positions).astype(accumulation_dtype(dtype))

    def _head(self, h: Inputs, dtype: str) -> Logits:
        table = self.embedding[...].astype(dtype)
        return einsum("btd,vd->btv", self.decoder_norm(h).astype(dtype), table)


def _sinusoids(length: int, width: int) -> Float[Array, "S D"]:
    """Sines, then cosines, of wavelengths from 2 pi to 20,000 pi positions."""
    half = width // 2
    rates = jnp.exp(-math.log(10_000) / max(half - 1, 1) * jnp.arange(half, dtype=jnp.float32))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
