"""Attention in plain einsums: the specification that every basis, kernel and test is held against.

Operands of a product share one dtype; sums are in its accumulation dtype (``numerics.einsum``).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slimjax.attention import masks, positions
from slimjax.attention.positions import BiasParameters, rotate
from slimjax.attention.softmax import softmax_of
from slimjax.axes import Keys, Lengths, Queries, Scores, Values, typed
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import einsum
from slimjax.pytree import pytree


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

    def restrict(self, mask: Bool[Array, "B #N T S"]) -> "Geometry":
        """With fewer visible keys."""
        return dataclasses.replace(self, mask=self.mask & mask)


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


@typed
def scores(q: Queries, k: Keys) -> Scores:
    """q k^T for every query head; head n reads key head n // (N/K)."""
    batch, tokens, heads, size = q.shape
    grouped = q.reshape(batch, tokens, k.shape[2], heads // k.shape[2], size)
    return einsum("btkgh,bskh->bkgts", grouped, k).reshape(batch, heads, tokens, k.shape[1])


@typed
def weights(raw: Scores, where: Geometry, spec: DecodeSpec) -> Scores:
    """Scores to weights P: scale, softcap, position bias, softmax; rounded to the compute dtype."""
    value = raw * (spec.head_dim**-0.5 if spec.scale is None else spec.scale)
    if spec.softcap is not None:
        value = spec.softcap * jnp.tanh(value / spec.softcap)
    if where.bias is not None:
        value = value + where.bias
    return softmax_of(spec.scheme.softmax)(value, where.mask).astype(spec.dtype)


@typed
def weigh(p: Scores, v: Values) -> Queries:
    """p v for every query head, in the accumulation dtype of v; p is brought to v's dtype, exactly."""
    batch, heads, tokens, slots = p.shape
    grouped = p.astype(v.dtype).reshape(batch, v.shape[2], heads // v.shape[2], tokens, slots)
    out = einsum("bkgts,bskh->btkgh", grouped, v)
    return out.reshape(batch, tokens, heads, v.shape[3])


@typed
def attend(q: Queries, k: Keys, v: Values, where: Geometry, spec: DecodeSpec) -> Queries:
    """Scaled dot-product attention on keys that are already rotated; rotates q; output in ``spec.dtype``."""
    turned = rotate(q, where.query_positions, spec.position).astype(spec.dtype).astype(k.dtype)
    p = weights(scores(turned, k), where, spec)
    return weigh(p, v).astype(spec.dtype)
