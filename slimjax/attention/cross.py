"""One cross-attention layer: queries from the decoder, keys and values from a memory that does not grow.

The memory (an encoder's output) is written into a cache once, ``fill``, and read at every step,
``attend_filled``. Under the bases e and h one cache serves every layer: the first layer fills it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.attention.layer import CachedAttention, append_rows
from slimjax.attention.projections import Projections, project, project_out
from slimjax.attention.reference import attend, geometry
from slimjax.axes import Inputs, Lengths, typed
from slimjax.cache import Cache
from slimjax.kernels.api import decode
from slimjax.kernels.spec import DecodeSpec

Memory = Float[Array, "B S D"]


def _check(spec: DecodeSpec) -> None:
    """Raise ValueError for a spec of self-attention."""
    if spec.causal or spec.position.kind not in ("none", "learned"):
        raise ValueError(
            f"cross-attention needs causal=False and no position scheme of its own, got "
            f"{spec.causal=} {spec.position.kind=}"
        )


@typed
def cross_full(
    x: Inputs, memory: Memory, projections: Projections, spec: DecodeSpec, *, length: Lengths | None = None
) -> Inputs:
    """Attention of x on the memory's own keys and values, no cache: training and scoring.

    Args:
        x: [B, T, D] inputs of the decoder's layer.
        memory: [B, S, D] output of the encoder.
        projections: the layer's weights, used in ``spec.dtype``.
        spec: not causal, without a position scheme; its scheme is not looked at.
        length: [B], positions of each memory that count; None: all S.

    Returns:
        The layer's output in ``spec.dtype``.
    """
    _check(spec)
    q = project(x, projections.wq, projections.bq, spec.dtype)
    k = project(memory, projections.wk, projections.bk, spec.dtype).astype(spec.dtype)
    v = project(memory, projections.wv, projections.bv, spec.dtype).astype(spec.dtype)
    slots = jnp.arange(memory.shape[1], dtype=jnp.int32)
    held = jnp.full(memory.shape[:1], memory.shape[1], jnp.int32) if length is None else length
    where = geometry(_zeros(x), slots, held, None, spec)
    return project_out(attend(q, k, v, where, spec), projections.wo, projections.bo, spec.dtype)


@typed
def fill(memory: Memory, layer: CachedAttention, cache: Cache, *, count: Lengths | None = None) -> Cache:
    """The cross phase: write the memory's rows into a cache, by the first layer where layers share one.

    Args:
        memory: [B, S, D].
        layer: the converted layer.
        cache: empty, of at least S slots.
        count: [B], positions of each memory that count; None: all S.
    """
    _check(layer.spec)
    return append_rows(memory, layer, cache, count, prompt=True)


@typed
def attend_filled(x: Inputs, layer: CachedAttention, cache: Cache) -> Inputs:
    """Attention of x, [B, T, D], on a filled cache, which stays as it is; output in ``spec.dtype``."""
    spec = layer.spec
    _check(spec)
    q = project(x, layer.projections.wq, layer.projections.bq, spec.dtype).astype(spec.dtype)
    out = decode(q, cache, layer.weights, spec, start=jnp.zeros_like(cache.length))
    return project_out(out, layer.projections.wo, layer.projections.bo, spec.dtype)


def _zeros(x: Inputs) -> Array:
    """Positions of queries that stand nowhere in the memory."""
    return jnp.zeros(x.shape[:2], jnp.int32)
