"""A decoder language model: a thin NNX module around the pure attention functions.

The same blocks run three ways, which differ in the attention function they are handed: without a cache
(training, scoring), filling one (prefill), and through one (decoding).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from slimjax.attention.layer import CachedAttention, attend_cached, attend_full, init_cache, prefill
from slimjax.attention.positions import Position
from slimjax.axes import Inputs, Lengths, Tokens
from slimjax.cache import Cache
from slimjax.config import ModelConfig
from slimjax.kernels.api import IMPLEMENTATIONS
from slimjax.models.layers import MLP, Norm
from slimjax.nn import MultiHeadAttention
from slimjax.numerics import accumulation_dtype, einsum
from slimjax.scheme import Scheme, suggest
from slimjax.solve import Figures, convert
from slimjax.solve.heads import permute_heads
from slimjax.solve.mixing import by_layer

Logits = Float[Array, "B T V"]
# The attention of a block: its (normalised) inputs to its outputs.
Attend = Callable[[Inputs], Inputs]


def position_of(config: ModelConfig) -> Position:
    """The position scheme of a config."""
    return Position(kind=config.position, theta=config.rope_theta, interleaved=config.rope_interleaved)


class Block(nnx.Module):
    """Pre-norm attention and MLP. ``attention`` holds parameters; ``attend`` says what is done with them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(config)
        self.attention = MultiHeadAttention(
            config.heads,
            config.width,
            num_kv_heads=config.K,
            head_dim=config.H,
            use_bias=config.bias or config.qkv_bias,
            position=position_of(config),
            window=config.window,
            out_kernel_init=_residual_init(config.layers),
            rngs=rngs,
        )
        if config.qkv_bias and not config.bias:
            self.attention.out.bias = nnx.data(None)
        if config.key_init == "orthogonal":
            self.attention.key.kernel[...] = _orthogonal(rngs.params(), (config.width, config.K, config.H))
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, h: Inputs, attend: Attend, dtype: str) -> Inputs:
        h = h + attend(self.attention_norm(h)).astype(h.dtype)
        return h + self.mlp(self.mlp_norm(h), dtype)


@functools.cache  # one object, so that blocks and models of one shape share what jit compiled for them
def _residual_init(layers: int) -> Callable[..., Array]:
    """Variance shared among the 2 L layers that add to the residual stream, as in GPT-2."""
    return jax.nn.initializers.variance_scaling(0.5 / layers, "fan_in", "normal")


def _orthogonal(key: Array, shape: tuple[int, int, int]) -> Float[Array, "D K H"]:
    """All singular values 1 (rows or columns orthonormal where W_K [D, K*H] is not square)."""
    flat = jax.nn.initializers.orthogonal()(key, (shape[0], shape[1] * shape[2]), jnp.float32)
    return flat.reshape(shape)


class DecoderLM(nnx.Module):
    """Embedding, blocks, final norm, logits. Parameters are float32; see ``ModelConfig`` for the choices."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        self.max_length = config.max_length
        self.embedding = normal(config.vocab, config.width)
        self.positions = normal(config.max_length, config.width) if config.position == "learned" else None
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = Norm(config)
        self.unembedding = None if config.tied else normal(config.vocab, config.width)

    def __call__(self, tokens: Tokens, dtype: str = "float32") -> Logits:
        """Next-token logits without a cache, [B, T, V] in the accumulation dtype of ``dtype``.

        Raises ValueError where learned positions do not reach as far as the tokens.
        """
        h = self.embed(tokens, dtype)
        for block in self.blocks:
            h = block(h, full_attention(block, dtype), dtype)
        return self.head(h, dtype)

    def with_cache(
        self,
        tokens: Tokens,
        layers: Sequence[CachedAttention],
        caches: Sequence[Cache],
        *,
        count: Lengths | None = None,
        fresh: bool = False,
        dtype: str | None = None,
        last: bool = False,
    ) -> tuple[Logits, tuple[Cache, ...]]:
        """Append T tokens to the caches and return their logits.

        Args:
            tokens: [B, T]; a sequence's first token stands at position ``caches[0].length``.
            layers: from ``convert_model``.
            caches: one for each layer, from ``init_caches`` or an earlier call.
            count: [B], how many of the T tokens are no padding; None: all.
            fresh: the caches are empty, so attention may use its own exact keys and values (prefill).
            dtype: compute dtype of all but attention; None: the accumulation dtype of the layers' specs, so that what
                a scheme or a compute dtype changes is attention's alone.
            last: only the logits of each sequence's last token, [B, 1, V].

        Returns:
            [B, T, V] logits (rows past ``count`` are meaningless), or [B, 1, V], and the longer caches.
        """
        dtype = layers[0].spec.accumulation.name if dtype is None else dtype
        step = prefill if fresh else attend_cached
        longer: list[Cache] = []
        h = self.embed(tokens, dtype, caches[0].length)
        for block, layer, cache in zip(self.blocks, layers, caches, strict=True):

            def attend(x: Inputs, layer: CachedAttention = layer, cache: Cache = cache) -> Inputs:
                y, filled = step(x, layer, cache, count=count)
                longer.append(filled)
                return y

            h = block(h, attend, dtype)
        if last:
            ends = jnp.full(len(h), h.shape[1]) if count is None else count
            h = jnp.take_along_axis(h, (ends - 1)[:, None, None], axis=1)
        return self.head(h, dtype), tuple(longer)

    def attention_inputs(self, tokens: Tokens, dtype: str = "float32") -> tuple[Inputs, ...]:
        """What every attention layer is given, [B, T, D] each: for calibration and for measuring errors."""
        h, inputs = self.embed(tokens, dtype), []
        for block in self.blocks:
            inputs.append(block.attention_norm(h))
            h = block(h, full_attention(block, dtype), dtype)
        return tuple(inputs)

    def embed(self, tokens: Tokens, dtype: str, start: Lengths | None = None) -> Inputs:
        """The residual stream's start, in the accumulation dtype; ``start``: position of the first tokens."""
        h = self.embedding[...][tokens]
        if self.positions is not None:
            length = tokens.shape[1]
            if length > self.max_length:
                raise ValueError(f"{length} tokens are more than {self.max_length=} learned positions")
            first = jnp.zeros(tokens.shape[:1], jnp.int32) if start is None else start
            where = first[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
            # NaN past the reach: a traced position cannot raise, and must not be clamped in silence.
            h = h + self.positions[...].at[where].get(mode="fill", fill_value=jnp.nan)
        return h.astype(accumulation_dtype(dtype))

    def head(self, h: Inputs, dtype: str) -> Logits:
        """Final norm and logits."""
        table = self.embedding if self.unembedding is None else self.unembedding
        return einsum("btd,vd->btv", self.norm(h).astype(dtype), table[...].astype(dtype))


def full_attention(block: Block, dtype: str) -> Attend:
    """The attention of a block on its own tokens, without a cache."""
    spec = block.attention.decode_spec(dtype=dtype)
    return lambda x: attend_full(x, block.attention.projections(), spec)


def convert_model(
    model: DecoderLM,
    scheme: str | Scheme | Sequence[str | Scheme],
    dtype: str = "float32",
    *,
    orders: Sequence[Sequence[int] | np.ndarray | None] | None = None,
    implementation: str | None = None,
) -> tuple[tuple[CachedAttention, ...], tuple[Figures, ...]]:
    """Every attention layer made ready for its scheme, on the host; one scheme serves all layers.

    Args:
        model: trained.
        scheme: one, or one for each layer.
        dtype: compute dtype of q, P and the attention output.
        orders: of each layer a permutation of its K key/value heads, those that bear fewer bits first
            (``slimjax.solve.mixing.head_orders``), or None for the order they have; None: no layer is permuted.
        implementation: of ``slimjax.decode``, the one that every layer takes; None: as there.

    Raises:
        NotImplementedError: a layer cannot use its scheme or order; the message names the alternative.
        ValueError: as many schemes, and orders, as layers are needed; an order that is not a permutation; an unknown
            implementation.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        hint = suggest(implementation, IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}{hint}")
    schemes = by_layer(scheme, len(model.blocks))
    moves = [None] * len(model.blocks) if orders is None else list(orders)
    if len(moves) != len(model.blocks):
        raise ValueError(f"{len(moves)} orders for {len(model.blocks)} layers: give one for each, or None")
    converted = []
    for index, (block, chosen, order) in enumerate(zip(model.blocks, schemes, moves, strict=True)):
        weights, spec = block.attention.projections(), block.attention.decode_spec(chosen, dtype)
        if order is not None:
            weights = permute_heads(weights, order, spec.position)
        spec = dataclasses.replace(spec, implementation=implementation)
        converted.append(convert(weights, spec, layer=f"layer {index}"))
    return tuple(each.layer for each in converted), tuple(each.figures for each in converted)


def init_caches(layers: Sequence[CachedAttention], batch: int, capacity: int) -> tuple[Cache, ...]:
    """An empty cache of ``capacity`` tokens for each layer."""
    return tuple(init_cache(layer.spec, batch=batch, capacity=capacity) for layer in layers)
