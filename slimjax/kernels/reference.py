"""The reference implementation of ``decode``: reads the whole cache, any backend, any scheme."""

import jax.numpy as jnp

from slimjax.attention.bases import basis
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import geometry
from slimjax.axes import Lengths, Queries, typed
from slimjax.cache import Cache, codec_of, read
from slimjax.kernels.spec import DecodeSpec


@typed
def decode(q: Queries, cache: Cache, weights: DecodeWeights, spec: DecodeSpec, start: Lengths) -> Queries:
    """As ``slimjax.decode``; memory: the decoded cache in float32, and N*T*C scores per sequence."""
    rows = read(cache, codec_of(spec.scheme), spec.accumulation)
    step = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)
    where = geometry(start[:, None] + step, slots, cache.length, weights.position, spec)
    out = basis(spec).attend(q.astype(spec.dtype), rows, weights, spec, where)
    overfull = cache.length > cache.capacity
    return jnp.where(overfull[:, None, None, None], jnp.full_like(out, jnp.nan), out)
