"""``MultiHeadAttention`` for Flax NNX models: flax's own layer, with cache schemes and position schemes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array

from slimjax.attention.layer import CachedAttention, attend_cached, attend_full, init_cache
from slimjax.attention.positions import Position, init_bias
from slimjax.attention.projections import Projections
from slimjax.cache import Cache
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve import convert

# What flax's own code would do and the pure functions do not.
_CONSTRUCTOR_ONLY_FLAX = (
    "normalize_qk", "dropout_rate", "attention_fn", "precision", "qkv_promote_dtype", "out_promote_dtype",
    "qkv_dot_general", "out_dot_general", "qkv_dot_general_cls", "out_dot_general_cls",
)  # fmt: skip


def _refuse(given: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for arguments that were given something."""
    names = [
        name for name, value in given.items() if value is not None and value is not False and value != 0.0
    ]
    if names:
        raise NotImplementedError(
            f"{', '.join(names)}: not offered with a scheme, position scheme or window; leave it out, or "
            "use flax.nnx.MultiHeadAttention"
        )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """``flax.nnx.MultiHeadAttention`` plus a choice of cache, head size, position scheme and window.

    Constructor, parameters and call are flax's: a trained layer's state loads into this one unchanged, and
    with the defaults of the extra arguments flax's own code runs.

    Args (beyond flax's):
        scheme: what ``decode=True`` caches, in the scheme grammar, e.g. "k:int16"; None: flax's own cache.
        head_dim: H; None: qkv_features / num_heads.
        position: the position scheme. Its trained bias parameters, if any, are ``position_bias``.
        window: tokens a query sees, itself included.

    With a scheme, call ``init_cache`` after the weights are loaded, and again if they change: it solves for
    W_KV from them. Decoding takes one or more tokens a call. With a scheme, position scheme or window inputs
    are [B, T, D], and refused with NotImplementedError are: ``normalize_qk``, dropout, ``attention_fn``,
    ``precision`` and other dot products than slimjax's own, ``sow_weights``, shardings, inputs of keys or
    values other than of queries, and a ``mask`` in decoding.
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
        if not self.plain:
            _refuse({name: kwargs.get(name) for name in _CONSTRUCTOR_ONLY_FLAX})
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

    def decode_spec(self, scheme: str | Scheme = "kv:float32", dtype: DTypeLike | None = None) -> DecodeSpec:
        """The static description of this layer under ``scheme``; dtype: None for the layer's own."""
        return DecodeSpec(
            scheme=parse_scheme(scheme) if isinstance(scheme, str) else scheme,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            width=self.in_features,
            position=self.position,
            window=self.window,
            dtype=jnp.dtype(dtype or self.dtype or self.param_dtype).name,
        )

    @property
    def cache(self) -> Cache | None:
        """The scheme's cache as it stands; None before ``init_cache`` or without a scheme."""
        rows = getattr(self, "rows", None)  # absent once a caller has popped the module's nnx.Cache state
        return None if rows is None else rows.get_value()

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
        # Only what conversion adds: the projections are read from the module, not kept twice.
        self.converted = nnx.Cache((layer.weights, layer.projections.bo))
        self.rows = nnx.Cache(init_cache(layer.spec, batch=input_shape[0], capacity=input_shape[1]))

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
    ) -> Array:
        """As flax's; with a scheme and ``decode=True`` through the scheme's cache."""
        if self.plain:
            passed = {"deterministic": deterministic, "rngs": rngs, "sow_weights": sow_weights}
            sharding = {"out_sharding": out_sharding, "qkv_sharding": qkv_sharding}
            return super().__call__(
                inputs_q,
                inputs_k,
                inputs_v,
                mask=mask,
                decode=decode,
                is_causal=is_causal,
                **passed,
                **sharding,
            )
        _refuse({"sow_weights": sow_weights, "out_sharding": out_sharding, "qkv_sharding": qkv_sharding})
        if any(other is not None and other is not inputs_q for other in (inputs_k, inputs_v)):
            raise NotImplementedError("a scheme or position scheme serves self-attention only")
        if inputs_q.ndim != 3:
            raise NotImplementedError(
                f"a scheme or position scheme takes inputs [B, T, D], got {inputs_q.shape}"
            )
        decoding = self.decode if decode is None else decode
        if decoding is None:
            raise ValueError("say decode=True or False, to the constructor or to the call")
        if decoding:
            return self._decode(inputs_q, mask)
        spec = dataclasses.replace(self.decode_spec(dtype=self._compute_dtype(inputs_q)), causal=is_causal)
        # flax makes masks of any dtype; nonzero is visible.
        visible = None if mask is None else mask.astype(bool)
        return attend_full(inputs_q, self.projections(), spec, mask=visible)

    def _compute_dtype(self, inputs: Array) -> DTypeLike:
        """As flax has it: ``dtype``, or what inputs and parameters promote to."""
        with jax.numpy_dtype_promotion("standard"):
            return self.dtype or jnp.promote_types(inputs.dtype, self.param_dtype)

    def _decode(self, inputs: Array, mask: Array | None) -> Array:
        """One step through the scheme's cache, which is updated in place as NNX modules do."""
        if mask is not None:
            raise NotImplementedError("a scheme's cache is causal; a further mask cannot be given")
        cache, converted = self.cache, getattr(self, "converted", None)
        if cache is None or converted is None or self.scheme is None or self.rows is None:
            raise ValueError("the cache is not initialised: call init_cache first")
        weights, bias = converted.get_value()
        layer = CachedAttention(
            projections=dataclasses.replace(self.projections(), bv=None, bo=bias),
            weights=weights,
            spec=self.decode_spec(self.scheme, self._compute_dtype(inputs)),
        )
        out, longer = attend_cached(inputs, layer, cache)
        self.rows.set_value(longer)
        return out
