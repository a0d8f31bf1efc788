"""``MultiHeadAttention`` for Flax NNX models: flax's own layer, with cache schemes and position schemes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

from slimjax.attention.layer import CachedAttention, attend_cached, attend_full, init_cache
from slimjax.attention.positions import Position, init_bias
from slimjax.attention.projections import Projections
from slimjax.cache import Cache
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve import convert


class MultiHeadAttention(nnx.MultiHeadAttention):
    """``flax.nnx.MultiHeadAttention`` plus a choice of cache, head size, position scheme and window.

    Constructor, parameters and call are flax's: a trained layer's state loads into this one unchanged, and
    with the defaults of the extra arguments flax's own code runs.

    Args (beyond flax's):
        scheme: what ``decode=True`` caches, in the scheme grammar, e.g. "k:int16"; None: flax's own cache.
        head_dim: H; None: qkv_features / num_heads.
        position: the position scheme. Its trained bias parameters, if any, are ``position_bias``.
        window: tokens a query sees, itself included.

    With a scheme, call ``init_cache`` after the weights are loaded: it solves for W_KV from them. Decoding
    takes one or more tokens a call. Not offered with a scheme or a position scheme: ``normalize_qk``,
    dropout, and in decoding ``mask`` and inputs of keys or values other than of queries.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *args: Any,
        scheme: str | Scheme | None = None,
        head_dim: int | None = None,
        position: Position = Position(),
        window: int | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if head_dim is not None:
            if args or kwargs.get("qkv_features") is not None:
                raise ValueError(f"give either {head_dim=} or qkv_features, not both")
            kwargs["qkv_features"] = num_heads * head_dim
            kwargs.setdefault("out_features", in_features)
        super().__init__(num_heads, in_features, *args, rngs=rngs, **kwargs)
        self.position = position
        self.window = window
        self.plain = scheme is None and window is None and position.kind in ("none", "learned")
        if not self.plain and (self.normalize_qk or self.dropout_rate > 0):
            raise NotImplementedError("normalize_qk and dropout cannot be combined with a scheme or position")
        if scheme is None and not self.plain:
            scheme = "kv:float32"  # flax's own cache knows neither rotation nor window
        self.scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
        bias = init_bias(position, num_heads, rngs.params()) if position.trained else None
        self.position_bias = nnx.data(None if bias is None else {k: nnx.Param(v) for k, v in bias.items()})
        self.converted: nnx.Cache | None = nnx.data(None)
        self.rows: nnx.Cache | None = nnx.data(None)

    def projections(self) -> Projections:
        """The layer's weights as pure functions take them."""

        def bias(linear: nnx.LinearGeneral) -> Array | None:
            return None if linear.bias is None else linear.bias[...]

        trained = self.position_bias
        return Projections(
            wq=self.query.kernel[...],
            wk=self.key.kernel[...],
            wv=self.value.kernel[...],
            wo=self.out.kernel[...],
            bq=bias(self.query),
            bk=bias(self.key),
            bv=bias(self.value),
            bo=bias(self.out),
            position=None if trained is None else {name: array[...] for name, array in trained.items()},
        )

    def decode_spec(self, scheme: str | Scheme = "kv:float32", dtype: str | None = None) -> DecodeSpec:
        """The static description of this layer under ``scheme``; dtype: None for the layer's own."""
        return DecodeSpec(
            scheme=parse_scheme(scheme) if isinstance(scheme, str) else scheme,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            width=self.in_features,
            position=self.position,
            window=self.window,
            dtype=dtype or jnp.dtype(self.dtype or self.param_dtype).name,
        )

    @property
    def cache(self) -> Cache | None:
        """The scheme's cache as it stands; None before ``init_cache`` or without a scheme."""
        return None if self.rows is None else self.rows.get_value()

    def init_cache(self, input_shape: Sequence[int], dtype: Any = jnp.float32) -> None:
        """Make an empty cache for ``input_shape`` [B, capacity, D]; with a scheme, ``dtype`` is the codec's.

        Raises ValueError under jit: W_KV is solved for on the host, from concrete weights.
        """
        if self.scheme is None:
            super().init_cache(input_shape, dtype)
            return
        if len(input_shape) != 3:
            raise ValueError(f"a scheme's cache needs inputs [B, capacity, D], got {input_shape=}")
        weights = self.projections()
        if isinstance(weights.wk, Tracer):
            raise ValueError("init_cache with a scheme solves for W_KV on the host: call it outside jit")
        layer = convert(weights, self.decode_spec(self.scheme), layer="attention").layer
        self.converted = nnx.Cache(layer)
        self.rows = nnx.Cache(init_cache(layer.spec, batch=input_shape[0], capacity=input_shape[1]))

    def __call__(self, inputs_q: Array, inputs_k=None, inputs_v=None, *, mask=None, decode=None, **kwargs):
        """As flax's; with a scheme and ``decode=True`` through the scheme's cache."""
        decoding = self.decode if decode is None else decode
        if self.plain:
            return super().__call__(inputs_q, inputs_k, inputs_v, mask=mask, decode=decode, **kwargs)
        if any(other is not None and other is not inputs_q for other in (inputs_k, inputs_v)):
            raise NotImplementedError("a scheme or position scheme serves self-attention only")
        if decoding:
            return self._decode(inputs_q, mask)
        spec = self.decode_spec()
        spec = dataclasses.replace(spec, causal=bool(kwargs.get("is_causal", False)))
        # flax makes masks of any dtype; nonzero is visible.
        return attend_full(
            inputs_q, self.projections(), spec, mask=None if mask is None else mask.astype(bool)
        )

    def _decode(self, inputs: Array, mask: Array | None) -> Array:
        """One step through the scheme's cache, which is updated in place as NNX modules do."""
        if mask is not None:
            raise NotImplementedError("a scheme's cache is causal; a further mask cannot be given")
        if self.rows is None or self.converted is None:
            raise ValueError("the cache is not initialised: call init_cache first")
        layer: CachedAttention = self.converted.get_value()
        cache: Cache = self.rows.get_value()
        out, longer = attend_cached(inputs, layer, cache)
        self.rows.set_value(longer)
        return out
