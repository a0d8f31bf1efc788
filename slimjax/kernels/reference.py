"""The reference implementation of ``decode``: any backend, any scheme, a block of the cache at a time."""

import jax.numpy as jnp

from slimjax.attention.blocks import Part
from slimjax.attention.compute import compute_of
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import geometry
from slimjax.axes import Lengths, Queries, typed
from slimjax.cache import Cache
from slimjax.kernels.spec import DecodeSpec


@typed
def decode_part(q: Queries, cache: Cache, weights: DecodeWeights, spec: DecodeSpec, start: Lengths) -> Part:
    """As ``slimjax.decode_part``; memory: a decoded block in float32, and N*T*C scores per sequence."""
    step = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)
    where = geometry(start[:, None] + step, slots, cache.length, weights.position, spec)
    out, log_sums = compute_of(spec).decode(q.astype(spec.dtype), cache, where, weights, spec)
    overfull = cache.length > cache.capacity
    return jnp.where(overfull[:, None, None, None], jnp.full_like(out, jnp.nan), out), log_sums


def decode(q: Queries, cache: Cache, weights: DecodeWeights, spec: DecodeSpec, start: Lengths) -> Queries:
    """The answer alone."""
    return decode_part(q, cache, weights, spec, start)[0]
