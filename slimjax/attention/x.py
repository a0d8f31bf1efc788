"""Basis x: the layer's inputs, from which keys and values both follow (arXiv 2503.05840, X-cache).

No inverse, so no conditioning: it works for any E, and for GQA and MQA too, where it may cost more bytes
than kv (D values per token against 2*E).
"""

from jaxtyping import Array, Float, Int

from slimjax.attention.absorb import absorb_queries, apply_heads, bias_scores, row_scores, weigh_rows
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import turned, turned_scores, weigh as weigh_heads
from slimjax.axes import Block, Inputs, Queries, Scores, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec
from slimjax.pytree import pytree


@pytree
class Absorbed:
    """Queries ready to meet rows, and what is added to each of their scores."""

    q: Float[Array, "B T N _"]
    bias: Float[Array, "B N T 1"] | None


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
def queries(q: Queries, positions: Int[Array, "B T"], weights: DecodeWeights, spec: DecodeSpec) -> Absorbed:
    """Option 1: rotated, to meet keys. Option 2: q W_K^T, to meet rows, and q b^T, what a key bias adds."""
    if spec.scheme.option == 1:
        return Absorbed(q=turned(q, positions, spec), bias=None)
    exact = q.astype(spec.accumulation)
    bias = None if weights.k_bias is None else bias_scores(exact, weights.k_bias)
    return Absorbed(q=absorb_queries(exact, _projection(weights.wk, spec)), bias=bias)


@typed
def scores(
    ready: Absorbed, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Scores:
    """Option 1: against keys made of the rows. Option 2: against the rows themselves."""
    row = _row(cached)
    if spec.scheme.option == 1:
        keys = project(row, _projection(weights.wk, spec), weights.k_bias, row.dtype)
        return turned_scores(ready.q, keys, positions, spec)
    raw = row_scores(ready.q, row)
    return raw if ready.bias is None else raw + ready.bias


@typed
def weigh(
    p: Scores, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Float[Array, "B T N _"]:
    """Option 1: P V with V = X W_V. Option 2: P X, and W_V at the end."""
    row = _row(cached)
    if spec.scheme.option == 1:
        return weigh_heads(p, project(row, _projection(weights.wv, spec), None, row.dtype))
    return weigh_rows(p, row)


@typed
def finish(mixed: Float[Array, "B T N _"], weights: DecodeWeights, spec: DecodeSpec) -> Queries:
    """Option 2: (P X) W_V,n of every head n."""
    return mixed if spec.scheme.option == 1 else apply_heads(mixed, _projection(weights.wv, spec))


def _row(cached: Block) -> Float[Array, "B S D"]:
    """The rows of the one stream there is; bases e and h call theirs otherwise."""
    (rows,) = cached.values()
    return rows[:, :, 0]


def _projection(weight: Float[Array, "D K H"] | None, spec: DecodeSpec) -> Float[Array, "D K H"]:
    if weight is None:
        raise ValueError(f"scheme {spec.scheme} needs weights.wk and weights.wv, [D, K, H]; got None")
    return weight
