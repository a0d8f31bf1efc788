"""The bases by the names of the scheme grammar. A new basis is one module with these functions."""

from collections.abc import Mapping
from typing import Any, Protocol

from jaxtyping import Array, Int

from slimjax.attention import e, h, k, kr, kv, v, x
from slimjax.attention.projections import DecodeWeights, Projections
from slimjax.axes import Block, Inputs, Queries, Scores
from slimjax.cache import Streams, codec_of
from slimjax.kernels.spec import DecodeSpec


class Basis(Protocol):
    """What is cached, and how attention works on it."""

    def refusal(self, spec: DecodeSpec) -> str | None:
        """Why ``spec`` cannot use the basis (what to use instead included), or None."""
        ...

    def streams(self, spec: DecodeSpec) -> Streams:
        """The cached streams: name -> (heads, size) of a token's row."""
        ...

    def rows(
        self,
        x: Inputs,
        projections: Projections,
        weights: DecodeWeights,
        positions: Int[Array, "B T"],
        spec: DecodeSpec,
    ) -> Mapping[str, Array]:
        """What is cached of new tokens at ``positions``, [B, T, heads, size] per stream, unrounded."""
        ...

    def queries(
        self, q: Queries, positions: Int[Array, "B T"], weights: DecodeWeights, spec: DecodeSpec
    ) -> Any:
        """Unrotated queries in the compute dtype made ready to meet any block of rows."""
        ...

    def scores(
        self, ready: Any, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
    ) -> Scores:
        """Raw scores against decoded rows at ``positions``, in the dtype of sums."""
        ...

    def weigh(
        self, p: Scores, cached: Block, positions: Int[Array, "S"], weights: DecodeWeights, spec: DecodeSpec
    ) -> Array:
        """What weighs rows (zero past each length), [B, T, N, *]; sums over blocks, in the dtype of sums."""
        ...

    def finish(self, mixed: Array, weights: DecodeWeights, spec: DecodeSpec) -> Queries:
        """The sum over all blocks to the output of every head, in the dtype of sums."""
        ...


BASES: dict[str, Basis] = {"kv": kv, "k": k, "kr": kr, "v": v, "x": x, "e": e, "h": h}


def basis(spec: DecodeSpec) -> Basis:
    """The basis of a spec. Raises NotImplementedError with the reason where the spec cannot use it."""
    name = spec.scheme.basis
    if name not in BASES:
        raise NotImplementedError(f"scheme {spec.scheme}: basis {name!r} is not implemented for this layer")
    method = BASES[name]
    reason = method.refusal(spec) or codec_of(spec.scheme).refusal(
        name, method.streams(spec), 2 * spec.key_width
    )
    if reason:
        raise NotImplementedError(f"scheme {spec.scheme}: {reason}")
    return method
