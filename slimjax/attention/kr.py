"""Basis kr: keys only, cached after RoPE; rows are un-rotated where their value counts (arXiv 2503.05840, RoPE).

The scores read the cache as it is. The value side needs K before RoPE, so a row is turned back, but only if
its weight survives the softmax's threshold (``@sparse(...)``): one head is enough under either option, since
a row holds all heads' keys. ``attention.sparsity`` counts how many rows that spares.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slimjax.attention.k import extra_rows, finish, streams, weigh_keys
from slimjax.attention.positions import rotate, unrotate
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import scores as head_scores, turned
from slimjax.axes import Block, Inputs, Queries, Scores, typed
from slimjax.kernels.spec import DecodeSpec, too_narrow

__all__ = ["finish", "queries", "refusal", "rows", "scores", "streams", "weigh"]


def refusal(spec: DecodeSpec) -> str | None:
    """Why this spec cannot use the basis, or None."""
    if not spec.position.rotary:
        return f"position scheme {spec.position.kind!r} rotates no keys; use k"
    return too_narrow(spec, "keys", "values")


@typed
def rows(
    x: Inputs,
    projections: Projections,
    weights: DecodeWeights,
    positions: Int[Array, "B T"],
    spec: DecodeSpec,
) -> dict[str, Float[Array, "B T _ _"]]:
    """What is cached of new tokens: their rotated keys, bias included, and x U; unrounded."""
    keys = project(x, projections.wk, projections.bk, spec.accumulation)
    return {"k": rotate(keys, positions, spec.position)} | extra_rows(x, weights, spec)


@typed
def queries(q: Queries, positions: Int[Array, "B T"], weights: DecodeWeights, spec: DecodeSpec) -> Queries:
    """Rotated as the cached keys are."""
    return turned(q, positions, spec)


@typed
def scores(
    ready: Queries, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Scores:
    """Against the rows as cached."""
    return head_scores(ready, cached["k"])


@typed
def weigh(
    p: Scores, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Float[Array, "B T N _"]:
    """As basis k, of the surviving rows alone, turned back.

    The reference turns all rows of the block back and zeroes the others: static shapes leave nothing to skip.
    A kernel may skip whole rows; ``attention.sparsity`` says how many.
    """
    keys = unrotate(cached["k"], positions[None], spec.position)
    if weights.k_bias is not None:
        keys = keys - weights.k_bias.astype(keys.dtype)[None, None]
    survives = jnp.any(p > 0, axis=(1, 2))[:, :, None, None]
    keys = jnp.where(survives, keys, jnp.zeros_like(keys))
    return weigh_keys(p, keys, cached.get("r"), weights, spec)
