"""Basis k: keys only, V = K W_KV with W_KV = W_K^-1 W_V (slim attention, arXiv 2503.05840, sections 1-2).

Keys are cached before RoPE and without their bias: rotated on read for the scores, raw for the values.
With R extra coordinates, ``k:codec+R``, the rows are [K, X U] and V = [K, X U] W_KV: what W_K loses, U keeps
(slimjax's own remedy; with R = D - E also the extension to D/2 < E < D, arXiv 2503.05840, "GQA and MQA").
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slimjax.attention.absorb import apply_heads, weigh_rows
from slimjax.attention.pair import Pair, through
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import turned, turned_scores, weigh as weigh_heads
from slimjax.axes import Block, Inputs, Queries, Scores, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec, too_narrow


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
def queries(q: Queries, positions: Int[Array, "B T"], weights: DecodeWeights, spec: DecodeSpec) -> Queries:
    """Rotated as keys are on read."""
    return turned(q, positions, spec)


@typed
def scores(
    ready: Queries, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Scores:
    """Against the keys with their bias, rotated."""
    raw = cached["k"]
    biased = raw if weights.k_bias is None else raw + weights.k_bias.astype(raw.dtype)[None, None]
    return turned_scores(ready, biased, positions, spec)


@typed
def weigh(
    p: Scores, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Float[Array, "B T N _"]:
    """Option 1: P V with V = K W_KV (2*S*E*H per head). Option 2: P [K, X U] (2*S*E), and W_KV at the end."""
    return weigh_keys(p, cached["k"], cached.get("r"), weights, spec)


def weigh_keys(
    p: Scores,
    keys: Float[Array, "B S K H"],
    extra: Float[Array, "B S 1 R"] | None,
    weights: DecodeWeights,
    spec: DecodeSpec,
) -> Float[Array, "B T N _"]:
    """The value side from keys as projected and extra coordinates, by the scheme's option."""
    row = keys.reshape(*keys.shape[:2], spec.key_width)
    if extra is not None:
        row = jnp.concatenate([row, extra[:, :, 0]], axis=-1)
    if spec.scheme.option == 1:
        return weigh_heads(p, through("bse,ekh->bskh", row, _map(weights, spec)))
    return weigh_rows(p, row)


@typed
def finish(mixed: Float[Array, "B T N _"], weights: DecodeWeights, spec: DecodeSpec) -> Queries:
    """Option 2: (P [K, X U]) W_KV,n of every head n (2*E*H per head)."""
    return mixed if spec.scheme.option == 1 else apply_heads(mixed, _map(weights, spec))


def _map(weights: DecodeWeights, spec: DecodeSpec) -> Float[Array, "E+R K H"] | Pair:
    if weights.w_kv is None:
        raise ValueError(f"scheme {spec.scheme} needs weights.w_kv, [E+R, K, H]; got None")
    return weights.w_kv
