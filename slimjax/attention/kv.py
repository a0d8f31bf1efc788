"""Basis kv: the ordinary cache of keys (rotated) and values."""

from jaxtyping import Array, Float, Int

from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import scores as head_scores, turned, weigh as weigh_heads
from slimjax.axes import Block, Inputs, Queries, Scores, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec


def refusal(spec: DecodeSpec) -> str | None:
    """Nothing is refused."""
    return None


def streams(spec: DecodeSpec) -> Streams:
    """k and v, [K, H] each: 2*E values per token."""
    return {"k": (spec.kv_heads, spec.head_dim), "v": (spec.kv_heads, spec.head_dim)}


@typed
def rows(
    x: Inputs,
    projections: Projections,
    weights: DecodeWeights,
    positions: Int[Array, "B T"],
    spec: DecodeSpec,
) -> dict[str, Float[Array, "B T K H"]]:
    """What is cached of new tokens: their rotated keys and their values, unrounded."""
    k = project(x, projections.wk, projections.bk, spec.accumulation)
    v = project(x, projections.wv, projections.bv, spec.accumulation)
    return {"k": rotate(k, positions, spec.position), "v": v}


@typed
def queries(q: Queries, positions: Int[Array, "B T"], weights: DecodeWeights, spec: DecodeSpec) -> Queries:
    """Rotated as the cached keys are."""
    return turned(q, positions, spec)


@typed
def scores(
    ready: Queries, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
) -> Scores:
    """Against the keys as they are."""
    return head_scores(ready, cached["k"])


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
