"""Attention in plain einsums: the specification that every basis, kernel and test is held against.

Operands of a product share one dtype; sums are in its accumulation dtype (``numerics.einsum``).
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slimjax.attention import masks, positions
from slimjax.attention.positions import BiasParameters, rotate, scores_of_one
from slimjax.attention.softmax import softmax_of
from slimjax.axes import Keys, Lengths, LogSums, Queries, Scores, Values, typed
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import MASK, einsum
from slimjax.pytree import pytree

SMALLEST_BLOCK = 64  # queries; shorter ones cost more in the number of products than they spare


@pytree
class Geometry:
    """Where the queries and the keys of one call stand, and what follows from that.

    Attributes:
        query_positions, key_positions: absolute positions.
        mask: True where a query may see a key.
        bias: added to the scaled scores, or None.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "S"]
    mask: Bool[Array, "B #N T S"]
    bias: Float[Array, "B N T S"] | None

    def restrict(self, mask: Bool[Array, "B #N T #S"]) -> "Geometry":
        """With fewer visible keys."""
        return dataclasses.replace(self, mask=self.mask & mask)

    def query(self, index: Int[Array, ""] | int) -> "Geometry":
        """Of one query of each sequence."""

        def part(array: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, index, 1, axis=axis)

        return dataclasses.replace(
            self,
            query_positions=part(self.query_positions, 1),
            mask=part(self.mask, 2),
            bias=None if self.bias is None else part(self.bias, 2),
        )

    def without_padding(self, length: Lengths, spec: DecodeSpec) -> "Geometry":
        """Nothing is visible to queries past each length: padding of a chunk of self-attention."""
        if not spec.causal:
            return self
        return self.restrict((self.query_positions < length[:, None])[:, None, :, None])

    def seeing(self, q: Queries) -> Queries:
        """Queries that see nothing as zeros, for arithmetic in which they share a scale with others."""
        sees = jnp.any(self.mask, axis=(1, 3))[:, :, None, None]
        return jnp.where(sees, q, jnp.zeros_like(q))


@typed
def geometry(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "S"],
    length: Lengths,
    parameters: BiasParameters,
    spec: DecodeSpec,
) -> Geometry:
    """Mask and position bias of one call; ``length`` is the number of keys of each sequence."""
    mask = masks.visible(query_positions, key_positions, length, causal=spec.causal, window=spec.window)
    bias = positions.bias(
        spec.position, parameters, query_positions, key_positions, spec.heads, spec.accumulation
    )
    return Geometry(query_positions=query_positions, key_positions=key_positions, mask=mask, bias=bias)


def causal_blocks(tokens: int, *, causal: bool) -> list[tuple[int, int, int]]:
    """Queries first..last-1 that see keys 0..end-1 at most, block by block, when T tokens attend to themselves.

    Keys ahead of a whole block are left out rather than masked: of four blocks 5/8 of the work is left. Short
    sequences, and attention that looks ahead, are one block.
    """
    count = 4 if causal and tokens >= 4 * SMALLEST_BLOCK else 1
    edges = [tokens * index // count for index in range(count + 1)]
    return [(first, last, last if causal else tokens) for first, last in itertools.pairwise(edges)]


@typed
def turned(q: Queries, positions: Int[Array, "B T"], spec: DecodeSpec) -> Queries:
    """Rotated queries, rounded to the compute dtype and held in the dtype of sums, in which they meet keys."""
    return rotate(q, positions, spec.position).astype(spec.dtype).astype(spec.accumulation)


@typed
def scores(q: Queries, k: Keys) -> Scores:
    """q k^T for every query head; head n reads key head n // (N/K)."""
    batch, tokens, heads, size = q.shape
    # Queries are brought into the order of the scores: else XLA on CPU reorders those, which are many more.
    grouped = jnp.moveaxis(q.reshape(batch, tokens, k.shape[2], heads // k.shape[2], size), 1, 3)
    return einsum("bkgth,bskh->bkgts", grouped, k).reshape(batch, heads, tokens, k.shape[1])


@typed
def turned_scores(q: Queries, k: Keys, key_positions: Int[Array, "S"], spec: DecodeSpec) -> Scores:
    """The same for keys that are cached unrotated, and rotated here."""
    if q.shape[1] == 1 and spec.position.rotary and jax.default_backend() == "cpu":
        return scores_of_one(q, k, key_positions[None], spec.position)
    return scores(q, rotate(k, key_positions[None], spec.position))


@typed
def weights(raw: Scores, where: Geometry, spec: DecodeSpec) -> Scores:
    """Scores to weights P: scale, softcap, position bias, softmax; rounded to the compute dtype."""
    value = scaled(raw, where, spec)
    return softmax_of(spec.scheme.softmax)(value, where.mask).astype(spec.dtype)


@typed
def log_sums(raw: Scores, where: Geometry, spec: DecodeSpec) -> LogSums:
    """Logarithms of the sums of exponentials that an exact softmax divides by; ``MASK`` of a query that sees no key."""
    value = jnp.where(where.mask, scaled(raw, where, spec), MASK)
    peak = jnp.max(value, axis=-1)
    total = jnp.sum(jnp.where(where.mask, jnp.exp(value - peak[..., None]), 0.0), axis=-1)
    return jnp.moveaxis(jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), MASK), 1, 2)


@typed
def scaled(raw: Scores, where: Geometry, spec: DecodeSpec) -> Scores:
    """Scale, softcap and position bias."""
    value = raw * (spec.head_dim**-0.5 if spec.scale is None else spec.scale)
    if spec.softcap is not None:
        value = spec.softcap * jnp.tanh(value / spec.softcap)
    if where.bias is not None:
        value = value + where.bias
    return value


@typed
def weigh(p: Scores, v: Values) -> Queries:
    """p v for every query head, in the accumulation dtype of v; p is brought to v's dtype, exactly."""
    batch, heads, tokens, slots = p.shape
    if tokens == 1 and jax.default_backend() == "cpu":
        return _weigh_one(p.astype(v.dtype), v)
    grouped = p.astype(v.dtype).reshape(batch, v.shape[2], heads // v.shape[2], tokens, slots)
    out = einsum("bkgts,bskh->bkgth", grouped, v)  # in the order of p, as for scores
    return jnp.moveaxis(out, 3, 1).reshape(batch, tokens, heads, v.shape[3])


def _weigh_one(p: Float[Array, "B N 1 S"], v: Values) -> Queries:
    """The same for one token: every head weighs whole rows, and keeps its own columns.

    N times the arithmetic, but rows are read as they lie. On CPU, XLA else copies them head by head at every
    step, which takes longer than the product.
    """
    batch, heads, _, slots = p.shape
    kv_heads, size = v.shape[2:]
    mixed = einsum("bns,bse->bne", p[:, :, 0], v.reshape(batch, slots, kv_heads * size))
    own = mixed.reshape(batch, kv_heads, heads // kv_heads, kv_heads, size)
    columns = jnp.moveaxis(jnp.diagonal(own, axis1=1, axis2=3), -1, 1)
    return columns.reshape(batch, 1, heads, size)


@typed
def attend(q: Queries, k: Keys, v: Values, where: Geometry, spec: DecodeSpec) -> Queries:
    """Scaled dot-product attention on keys that are already rotated; rotates q; output in ``spec.dtype``."""
    ready = turned(q, where.query_positions, spec).astype(k.dtype)
    p = weights(scores(ready, k), where, spec)
    return weigh(p, v).astype(spec.dtype)
