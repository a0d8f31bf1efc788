"""Basis k: keys only, V = K W_KV with W_KV = W_K^-1 W_V (slim attention, arXiv 2503.05840, sections 1-2).

Keys are cached before RoPE and without their bias: rotated on read for the scores, raw for the values.
With R extra coordinates, ``k:codec+R``, the rows are [K, X U] and V = [K, X U] W_KV: what W_K loses, U keeps
(slimjax's own remedy; with R = D - E also the extension to D/2 < E < D, arXiv 2503.05840, "GQA and MQA").
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slimjax.attention.absorb import apply_heads, weigh_rows
from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import Geometry, scores, weigh, weights as score_weights
from slimjax.axes import Inputs, Queries, Scores, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec, too_narrow
from slimjax.numerics import einsum


def refusal(spec: DecodeSpec) -> str | None:
    """Why this spec cannot use the basis, or None."""
    return too_narrow(spec, "keys", "values")


def streams(spec: DecodeSpec) -> Streams:
    """k, [K, H], and r, [1, R], where there are extra coordinates: E + R values per token."""
    keys = {"k": (spec.kv_heads, spec.head_dim)}
    return keys | {"r": (1, spec.scheme.extra)} if spec.scheme.extra else keys


@typed
def rows(
    x: Inputs,
    projections: Projections,
    weights: DecodeWeights,
    positions: Int[Array, "B T"],
    spec: DecodeSpec,
) -> dict[str, Float[Array, "B T _ _"]]:
    """What is cached of new tokens: x W_K, neither biased nor rotated nor rounded, and x U."""
    return {"k": project(x, projections.wk, None, spec.accumulation)} | extra_rows(x, weights, spec)


def extra_rows(x: Inputs, weights: DecodeWeights, spec: DecodeSpec) -> dict[str, Float[Array, "B T 1 R"]]:
    """The extra coordinates of new tokens, x U; empty where the scheme has none."""
    if not spec.scheme.extra:
        return {}
    if weights.extra is None:
        raise ValueError(f"scheme {spec.scheme} needs weights.extra, [D, R]; got None")
    return {"r": project(x, weights.extra[:, None], None, spec.accumulation)}


@typed
def attend(
    q: Queries, cached: Mapping[str, Array], weights: DecodeWeights, spec: DecodeSpec, where: Geometry
) -> Queries:
    """Option 1: V = K W_KV, then P V (2*S*E*H per head). Option 2: (P K) W_KV,n (2*S*E + 2*E*H per head)."""
    raw = cached["k"]
    biased = raw if weights.k_bias is None else raw + weights.k_bias.astype(raw.dtype)[None, None]
    keys = rotate(biased, where.key_positions[None], spec.position)
    turned = rotate(q, where.query_positions, spec.position).astype(spec.dtype).astype(keys.dtype)
    p = score_weights(scores(turned, keys), where, spec)
    return values(p, raw, cached.get("r"), weights, spec)


def values(
    p: Scores,
    keys: Float[Array, "B S K H"],
    extra: Float[Array, "B S 1 R"] | None,
    weights: DecodeWeights,
    spec: DecodeSpec,
) -> Queries:
    """P V from keys as projected and extra coordinates, by the scheme's option, in ``spec.dtype``."""
    if weights.w_kv is None:
        raise ValueError(f"scheme {spec.scheme} needs weights.w_kv, [E+R, K, H]; got None")
    row = keys.reshape(*keys.shape[:2], spec.key_width)
    if extra is not None:
        row = jnp.concatenate([row, extra[:, :, 0]], axis=-1)
    if spec.scheme.option == 1:
        out = weigh(p, einsum("bse,ekh->bskh", row, weights.w_kv.astype(row.dtype)))
    else:
        out = apply_heads(weigh_rows(p, row), weights.w_kv)
    return out.astype(spec.dtype)
