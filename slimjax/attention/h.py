"""Basis h: the first cross-attention layer's keys, cached once for all layers (arXiv 2503.05840, hybrid).

With K_1 = E W_K1 every other layer's projections become W_K1^-1 W_K and W_K1^-1 W_V, absorbed into queries
and outputs as basis x does with its own. The cache is written by the first layer.
"""

from jaxtyping import Array, Float, Int

from slimjax.attention.e import not_shared
from slimjax.attention.projections import DecodeWeights, Projections, project
from slimjax.attention.x import finish, queries, scores, weigh
from slimjax.axes import Inputs, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec, too_narrow

__all__ = ["finish", "queries", "refusal", "rows", "scores", "streams", "weigh"]


def refusal(spec: DecodeSpec) -> str | None:
    """Why this spec cannot use the basis, or None."""
    return not_shared(spec) or too_narrow(spec, "keys of the first layer", "those of the others")


def streams(spec: DecodeSpec) -> Streams:
    """h, [1, E]: E values per encoder position, for all layers together."""
    return {"h": (1, spec.key_width)}


@typed
def rows(
    x: Inputs,
    projections: Projections,
    weights: DecodeWeights,
    positions: Int[Array, "B T"],
    spec: DecodeSpec,
) -> dict[str, Float[Array, "B T 1 E"]]:
    """What is cached of the encoder's output: x W_K of the layer asked, which must be the first."""
    keys = project(x, projections.wk, None, spec.accumulation)
    return {"h": keys.reshape(*x.shape[:2], 1, spec.key_width)}
