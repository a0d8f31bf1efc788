"""Basis kv: the ordinary cache of keys (rotated) and values."""

from collections.abc import Mapping

from jaxtyping import Array, Float, Int

from slimjax.attention.positions import rotate
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.reference import Geometry, attend as attend_keys_values
from slimjax.axes import Inputs, Queries, typed
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
def attend(
    q: Queries, cached: Mapping[str, Array], weights: DecodeWeights, spec: DecodeSpec, where: Geometry
) -> Queries:
    """Attention on the cached keys and values."""
    return attend_keys_values(q, cached["k"], cached["v"], where, spec)
