"""A map kept as two bfloat16 arrays, high + low, and the one product with a layer's maps.

The pair takes as many bytes as float32 and holds 16 bits of mantissa. Against rows in three parts it is six products
of bfloat16 with sums in float32, which is full precision whatever a backend makes of float32 operands.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from slimjax.axes import typed
from slimjax.numerics import einsum
from slimjax.pytree import pytree


@pytree
class Pair:
    """high + low; ``low`` is what rounding to bfloat16 took from ``high``, rounded likewise: to 2^-17 of the value."""

    high: BFloat16[Array, "*S"]
    low: BFloat16[Array, "*S"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the map."""
        return self.high.shape

    @classmethod
    def of(cls, weight: Float[Array, "*S"]) -> "Pair":
        """The pair nearest to a float32 map."""
        high, low = split_bf16(weight.astype(jnp.float32))
        return cls(high=high, low=low)


@typed
def split_bf16(x: Float[Array, "*S"], parts: int = 2) -> tuple[BFloat16[Array, "*S"], ...]:
    """float32 as a sum of bfloat16 arrays, the largest first; two hold 16 bits of mantissa, three all 24."""
    found = []
    for _ in range(parts):
        # Not a plain cast there and back, which XLA is free to leave out.
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(high.astype(jnp.bfloat16))
        x = x - high
    return tuple(found)


def through(subscripts: str, rows: Array, weight: Array | Pair) -> Array:
    """Rows times a map at full precision: an einsum in the rows' dtype, or the six products of a pair.

    Raises ValueError for a pair under float64 rows, of which it would keep less than float32 does.
    """
    if not isinstance(weight, Pair):
        return einsum(subscripts, rows, weight.astype(rows.dtype))
    if rows.dtype != jnp.float32:
        raise ValueError(f"a map in two bfloat16 parts meets float32 rows, not {rows.dtype}")
    # The smallest products first: they would be lost in the largest one's last bits.
    products = [
        einsum(subscripts, row, part)
        for row in reversed(split_bf16(rows, 3))
        for part in (weight.low, weight.high)
    ]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total
