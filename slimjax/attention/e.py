"""Basis e: the encoder's output, cached once for the cross-attention of *all* decoder layers.

Each layer absorbs its own projections, as basis x does, so there is no cross phase at all: nothing is
computed between the encoder and the first token (arXiv 2503.05840, encoder-decoder, option 2).
"""

from jaxtyping import Array, Float, Int

from slimjax.attention import x as inputs
from slimjax.attention.projections import DecodeWeights, Projections
from slimjax.attention.x import finish, queries, scores, weigh
from slimjax.axes import Inputs, typed
from slimjax.cache import Streams
from slimjax.kernels.spec import DecodeSpec

__all__ = ["finish", "not_shared", "queries", "refusal", "rows", "scores", "streams", "weigh"]


def refusal(spec: DecodeSpec) -> str | None:
    """Why this spec cannot use the basis, or None."""
    return not_shared(spec)


def not_shared(spec: DecodeSpec) -> str | None:
    """Why layers with this spec cannot read one cache, or None: only cross-attention has common inputs."""
    if spec.causal:
        return "the layers of causal self-attention have no input in common; use x"
    return inputs.refusal(spec)


def streams(spec: DecodeSpec) -> Streams:
    """e, [1, D]: D values per encoder position, for all layers together."""
    return {"e": (1, spec.width)}


@typed
def rows(
    x: Inputs,
    projections: Projections,
    weights: DecodeWeights,
    positions: Int[Array, "B T"],
    spec: DecodeSpec,
) -> dict[str, Float[Array, "B T 1 D"]]:
    """What is cached: the encoder's output itself."""
    return {"e": x.astype(spec.accumulation)[:, :, None, :]}
