"""Basis v: values only, K = V W_VK with W_VK = W_V^-1 W_K (arXiv 2503.05840, section "V-cache").

Values are cached without their bias, which lives in the output projection's.
"""

from jaxtyping import Array, Float, Int

from slimjax.attention.absorb import absorb_queries, bias_scores, row_scores
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import turned, turned_scores, weigh as weigh_heads
from slimjax.attention.x import Absorbed
from slimjax.axes import Block, Inputs, Queries, Scores, typed
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
def queries(q: Queries, positions: Int[Array, "B T"], weights: DecodeWeights, spec: DecodeSpec) -> Absorbed:
    """Option 1: rotated, to meet keys. Option 2: q W_VK^T, to meet values, and q b^T, what a key bias adds."""
    if spec.scheme.option == 1:
        return Absorbed(q=turned(q, positions, spec), bias=None)
    exact = q.astype(spec.accumulation)
    bias = None if weights.k_bias is None else bias_scores(exact, weights.k_bias)
    return Absorbed(q=absorb_queries(exact, _map(weights, spec)), bias=bias)


@typed
def scores(
    ready: Absorbed, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Scores:
    """Option 1: against K = V W_VK, rotated. Option 2: against the values themselves."""
    v = cached["v"]
    flat = v.reshape(*v.shape[:2], spec.key_width)
    if spec.scheme.option == 1:
        keys = einsum("bse,ekh->bskh", flat, _map(weights, spec).astype(flat.dtype))
        if weights.k_bias is not None:
            keys = keys + weights.k_bias.astype(keys.dtype)[None, None]
        return turned_scores(ready.q, keys, positions, spec)
    raw = row_scores(ready.q, flat)
    return raw if ready.bias is None else raw + ready.bias


@typed
def weigh(
    p: Scores, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Queries:
    """P V."""
    return weigh_heads(p, cached["v"])


@typed
def finish(mixed: Queries, weights: DecodeWeights, spec: DecodeSpec) -> Queries:
    """Nothing is left to do."""
    return mixed


def _map(weights: DecodeWeights, spec: DecodeSpec) -> Float[Array, "E K H"]:
    if weights.w_vk is None:
        raise ValueError(f"scheme {spec.scheme} needs weights.w_vk, [E, K, H]; got None")
    return weights.w_vk
