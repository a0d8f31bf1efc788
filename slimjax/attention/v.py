"""Basis v: values only, K = V W_VK with W_VK = W_V^-1 W_K (arXiv 2503.05840, section "V-cache").

Values are cached without their bias, which lives in the output projection's.
"""

from collections.abc import Mapping

from jaxtyping import Array, Float, Int

from slimjax.attention.absorb import absorb_queries, bias_scores, row_scores
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import (
    Geometry,
    attend as attend_keys_values,
    weigh,
    weights as score_weights,
)
from slimjax.axes import Inputs, Queries, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec, too_narrow
from slimjax.numerics import einsum


def refusal(spec: DecodeSpec) -> str | None:
    """Why this spec cannot use the basis, or None."""
    if spec.scheme.option == 2 and spec.position.rotary:
        return "RoPE stands between a query and the absorbed key weights; use v1, which rebuilds the keys"
    return too_narrow(spec, "values", "keys")


def streams(spec: DecodeSpec) -> Streams:
    """v, [K, H]: E values per token."""
    return {"v": (spec.kv_heads, spec.head_dim)}


@typed
def rows(
    x: Inputs,
    projections: Projections,
    weights: DecodeWeights,
    positions: Int[Array, "B T"],
    spec: DecodeSpec,
) -> dict[str, Float[Array, "B T K H"]]:
    """What is cached of new tokens: x W_V, unrounded."""
    return {"v": project(x, projections.wv, None, spec.accumulation)}


@typed
def attend(
    q: Queries, cached: Mapping[str, Array], weights: DecodeWeights, spec: DecodeSpec, where: Geometry
) -> Queries:
    """Option 1: K = V W_VK, rotated, then ordinary attention. Option 2: (q W_VK^T) V^T for the scores."""
    v, w_vk = cached["v"], weights.w_vk
    if w_vk is None:
        raise ValueError(f"scheme {spec.scheme} needs weights.w_vk, [E, K, H]; got None")
    flat = v.reshape(*v.shape[:2], spec.key_width)
    if spec.scheme.option == 1:
        keys = einsum("bse,ekh->bskh", flat, w_vk.astype(flat.dtype))
        if weights.k_bias is not None:
            keys = keys + weights.k_bias.astype(keys.dtype)[None, None]
        keys = rotate(keys, where.key_positions[None], spec.position)
        return attend_keys_values(q, keys, v, where, spec)
    exact = q.astype(spec.dtype).astype(flat.dtype)
    raw = row_scores(absorb_queries(exact, w_vk), flat)
    if weights.k_bias is not None:
        raw = raw + bias_scores(exact, weights.k_bias)
    return weigh(score_weights(raw, where, spec), v).astype(spec.dtype)
