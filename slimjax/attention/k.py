"""Basis k: keys only, V = K W_KV with W_KV = W_K^-1 W_V (slim attention, arXiv 2503.05840, sections 1-2).

Keys are cached before RoPE and without their bias: rotated on read for the scores, raw for the values.
"""

from collections.abc import Mapping

from jaxtyping import Array, Float, Int

from slimjax.attention.absorb import apply_heads, weigh_rows
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import Geometry, scores, weigh, weights as score_weights
from slimjax.axes import Inputs, Queries, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec, too_narrow
from slimjax.numerics import einsum


def refusal(spec: DecodeSpec) -> str | None:
    """Why this spec cannot use the basis, or None."""
    if spec.scheme.extra:
        return f"extra coordinates (+{spec.scheme.extra}) are not implemented"
    return too_narrow(spec, "keys", "values")


def streams(spec: DecodeSpec) -> Streams:
    """k, [K, H]: E values per token."""
    return {"k": (spec.kv_heads, spec.head_dim)}


@typed
def rows(
    x: Inputs, projections: Projections, positions: Int[Array, "B T"], spec: DecodeSpec
) -> dict[str, Float[Array, "B T K H"]]:
    """What is cached of new tokens: x W_K, neither biased nor rotated nor rounded."""
    return {"k": project(x, projections.wk, None, spec.accumulation)}


@typed
def attend(
    q: Queries, cached: Mapping[str, Array], weights: DecodeWeights, spec: DecodeSpec, where: Geometry
) -> Queries:
    """Option 1: V = K W_KV, then P V (2*S*E*H per head). Option 2: (P K) W_KV,n (2*S*E + 2*E*H per head)."""
    raw, w_kv = cached["k"], weights.w_kv
    if w_kv is None:
        raise ValueError(f"scheme {spec.scheme} needs weights.w_kv, [E, K, H]; got None")
    biased = raw if weights.k_bias is None else raw + weights.k_bias.astype(raw.dtype)[None, None]
    keys = rotate(biased, where.key_positions[None], spec.position)
    turned = rotate(q, where.query_positions, spec.position).astype(spec.dtype).astype(keys.dtype)
    p = score_weights(scores(turned, keys), where, spec)
    flat = raw.reshape(*raw.shape[:2], spec.key_width)
    if spec.scheme.option == 1:
        out = weigh(p, einsum("bse,ekh->bskh", flat, w_kv.astype(flat.dtype)))
    else:
        out = apply_heads(weigh_rows(p, flat), w_kv)
    return out.astype(spec.dtype)
