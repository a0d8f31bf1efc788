"""What a thresholded softmax spares on one attention layer, and what it costs, on the layer's own inputs."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slimjax.attention.cross import attend_filled, cross_full, fill
from slimjax.attention.layer import CachedAttention, attend_cached, attend_full, init_cache
from slimjax.attention.positions import rotate
from slimjax.attention.projections import Projections, project
from slimjax.attention.reference import geometry, scores, weights
from slimjax.attention.sparsity import skip_rates
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import relative_l2
from slimjax.scheme import parse_scheme

# What queries are made of [B, T, D] and what keys are made of [B, S, D]: the same array in self-attention.
Inputs = tuple[np.ndarray, np.ndarray]


def skipped(layer: Projections, spec: DecodeSpec, inputs: Sequence[Inputs]) -> dict[str, float]:
    """Shares of the visible (query, key) pairs of weight 0, all sequences together: `SkipRates` as metrics.

    Weights are those of exact queries and keys: what is cached, and how, has no say in them.
    """
    shares, pairs = np.zeros(3), 0.0
    for x, memory in inputs:
        queries, keys = jnp.asarray(x, spec.dtype), jnp.asarray(memory, spec.dtype)
        slots = jnp.arange(keys.shape[1], dtype=jnp.int32)
        steps = jnp.arange(queries.shape[1], dtype=jnp.int32)
        # Queries of cross-attention stand nowhere in the memory.
        at = jnp.broadcast_to((steps if spec.causal else jnp.zeros_like(steps))[None], queries.shape[:2])
        q = rotate(project(queries, layer.wq, layer.bq, spec.dtype), at, spec.position)
        k = rotate(project(keys, layer.wk, layer.bk, spec.dtype), slots[None], spec.position)
        held = jnp.full((keys.shape[0],), keys.shape[1], jnp.int32)
        where = geometry(at, slots, held, layer.position, spec)
        rates = skip_rates(weights(scores(q, k), where, spec), where.mask, spec.kv_heads)
        seen = float(jnp.sum(where.mask))
        shares += seen * np.array([float(rates.head), float(rates.group), float(rates.row)])
        pairs += seen
    names = ("skipped_by_head", "skipped_by_group", "skipped_by_all")
    return dict(zip(names, (shares / max(pairs, 1.0)).tolist(), strict=True))


def attention_error(layer: CachedAttention, trained: Projections, inputs: Sequence[Inputs]) -> float:
    """Relative L2 error of the layer's output through its cache, against exact attention without one.

    Args:
        layer: converted to its scheme, thresholded or not.
        trained: the layer as it was.
        inputs: of one shape of batch each; errors are taken over all of them together.
    """
    spec = layer.spec
    exact = dataclasses.replace(spec, scheme=parse_scheme("kv:float32"))
    found, wanted = [], []
    for x, memory in inputs:
        queries, keys = jnp.asarray(x, spec.dtype), jnp.asarray(memory, spec.dtype)
        cache = init_cache(spec, batch=keys.shape[0], capacity=keys.shape[1])
        if spec.causal:
            out, full = attend_cached(queries, layer, cache)[0], attend_full(queries, trained, exact)
        else:
            out = attend_filled(queries, layer, fill(keys, layer, cache))
            full = cross_full(queries, keys, trained, exact)
        found.append(_rows(out))
        wanted.append(_rows(full))
    return relative_l2(np.concatenate(found), np.concatenate(wanted))


def _rows(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])
