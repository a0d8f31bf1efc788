"""int16 codes as two planes of INT8, and numbers of 15 bits as two digits: their products are summed as integers.

    code = 256 high + low + 128        number = scale (128 high + low)

A product of digits and a plane is one INT8 product of twice the rows, which a matrix unit has to spare in decoding. So
no code becomes a float before it is summed; keys in bfloat16 halves take v5e 1.4 times their bytes' time, without RoPE.
Only rows that no RoPE turns can be met so. Queries have their 15 bits each, weights those of a block of tokens: they
err by 2^-15 of the largest, where bfloat16 errs by 2^-9 of each.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, Int16

DIGITS = 2
LARGEST = 127 * 128  # of a number in two digits
SHIFT = 128  # what a code is above its planes


@dataclasses.dataclass(frozen=True)
class Digits:
    """Rows of numbers: scale times (128 high + low), all high digits first.

    Attributes:
        offset: what ``SHIFT`` in every code adds to a product: that many times the sum of a row's integers.
    """

    codes: Int8[Array, "*B dM n"]
    scale: Float[Array, "*B M 1"]
    offset: Float[Array, "*B M 1"]

    def whole(self, products: Float[Array, "*B dM m"]) -> Float[Array, "*B M m"]:
        """What the numbers have in common with codes, of the digits' products with ``planes``."""
        return whole(products, self.scale, self.offset)


def whole(
    products: Float[Array, "*B dM m"], scale: Float[Array, "*B M 1"], offset: Float[Array, "*B M 1"]
) -> Float[Array, "*B M m"]:
    """As of ``Digits``."""
    rows = scale.shape[-2]
    return (128.0 * products[..., :rows, :] + products[..., rows:, :] + offset) * scale


def digits(x: Float[Array, "*B M n"]) -> Digits:
    """Each row by its own largest magnitude."""
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(peak > 0, peak, 1.0) * (1.0 / LARGEST)
    codes = jnp.round(x / scale).astype(jnp.int32)
    high = (codes + 64) >> 7
    both = jnp.concatenate([high, codes - 128 * high], axis=-2)
    offset = SHIFT * jnp.sum(codes.astype(jnp.float32), axis=-1, keepdims=True)
    return Digits(codes=both.astype(jnp.int8), scale=scale, offset=offset)


def planes(codes: Int16[Array, "C w"]) -> tuple[Int8[Array, "C w"], Int8[Array, "C w"]]:
    """The high and the low plane."""
    words = pltpu.bitcast(codes, jnp.int32)  # two codes each
    high, low = (pltpu.bitcast(each, jnp.int16).astype(jnp.int8) for each in (words >> 8, words ^ 0x00800080))
    return high, low


def multiplied(a: Int8[Array, "M k"], b: Int8[Array, "_ _"], over: int) -> Float[Array, "M n"]:
    """a with axis ``over`` of b, summed exactly and then rounded to float32."""
    sums = jax.lax.dot_general(a, b, (((1,), (over,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32)
