"""Basis x: the layer's inputs, from which keys and values both follow (arXiv 2503.05840, X-cache).

No inverse, so no conditioning: it works for any E, and for GQA and MQA too, where it may cost more bytes
than kv (D values per token against 2*E).
"""

from collections.abc import Mapping

from jaxtyping import Array, Float, Int

from slimjax.attention.absorb import absorb_queries, apply_heads, bias_scores, row_scores, weigh_rows
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import Geometry, attend as attend_keys_values, weights as score_weights
from slimjax.axes import Inputs, Queries, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec


def refusal(spec: DecodeSpec) -> str | None:
    """Why this spec cannot use the basis, or None."""
    if spec.scheme.option == 2 and spec.position.rotary:
        return (
            "RoPE stands between a query and the absorbed key weights; use x1, which rebuilds keys and values"
        )
    return None


def streams(spec: DecodeSpec) -> Streams:
    """x, [1, D]: D values per token."""
    return {"x": (1, spec.width)}


@typed
def rows(
    x: Inputs,
    projections: Projections,
    weights: DecodeWeights,
    positions: Int[Array, "B T"],
    spec: DecodeSpec,
) -> dict[str, Float[Array, "B T 1 D"]]:
    """What is cached of new tokens: x itself."""
    return {"x": x.astype(spec.accumulation)[:, :, None, :]}


@typed
def attend(
    q: Queries, cached: Mapping[str, Array], weights: DecodeWeights, spec: DecodeSpec, where: Geometry
) -> Queries:
    """Option 1: K and V from x, then ordinary attention. Option 2: (q W_K^T) X^T and (P X) W_V."""
    x, wk, wv = cached["x"][:, :, 0], weights.wk, weights.wv
    if wk is None or wv is None:
        raise ValueError(f"scheme {spec.scheme} needs weights.wk and weights.wv, [D, K, H]; got None")
    if spec.scheme.option == 1:
        keys = rotate(project(x, wk, weights.k_bias, x.dtype), where.key_positions[None], spec.position)
        return attend_keys_values(q, keys, project(x, wv, None, x.dtype), where, spec)
    exact = q.astype(spec.dtype).astype(x.dtype)
    raw = row_scores(absorb_queries(exact, wk), x)
    if weights.k_bias is not None:
        raw = raw + bias_scores(exact, weights.k_bias)
    return apply_heads(weigh_rows(score_weights(raw, where, spec), x), wv).astype(spec.dtype)
