"""In which arithmetic rows may meet the map M = W_KV, and what each costs: M amplifies its operands' rounding.

On TPU jax's default float32 product rounds both operands to bfloat16, on recent GPUs to TF32 (10 bits of
mantissa); a CPU never shows it. These are those products emulated, for a table and for tests.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.axes import typed
from slimjax.numerics import einsum

Rows = Float[Array, "S M"]
Map = Float[Array, "M F"]


@typed
def split_bf16(x: Float[Array, "*S"], parts: int = 2) -> tuple[Float[Array, "*S"], ...]:
    """float32 as a sum of bfloat16 arrays, the largest first; two hold 16 bits of mantissa, three all 24."""
    found = []
    for _ in range(parts):
        # Not a plain cast there and back, which XLA is free to leave out.
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(high.astype(jnp.bfloat16))
        x = x - high
    return tuple(found)


def full(rows: Rows, weight: Map) -> Rows:
    """float32 operands at full precision: what decoding does."""
    return einsum("sm,mf->sf", rows, weight)


def split(rows: Rows, weight: Map) -> Rows:
    """The map as two bfloat16 arrays (as many bytes as float32), the rows as three: six bfloat16 products."""
    return sum(
        (einsum("sm,mf->sf", a, b) for a in split_bf16(rows, 3) for b in split_bf16(weight, 2)),
        start=jnp.zeros((rows.shape[0], weight.shape[1]), jnp.float32),
    )


def rounded_map(rows: Rows, weight: Map) -> Rows:
    """The map kept in bfloat16, the product exact."""
    return full(rows, _keep(weight, 7))


def default_tpu(rows: Rows, weight: Map) -> Rows:
    """A float32 map at jax's default precision on TPU: both operands rounded to bfloat16."""
    return full(_keep(rows, 7), _keep(weight, 7))


def default_gpu(rows: Rows, weight: Map) -> Rows:
    """A float32 map at jax's default precision on GPUs with TF32: both operands rounded to 10 bits."""
    return full(_keep(rows, 10), _keep(weight, 10))


def _keep(x: Array, mantissa: int) -> Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mantissa)


PRODUCTS: dict[str, Callable[[Rows, Map], Rows]] = {
    "float32": full,
    "bf16 pair": split,
    "bf16 map": rounded_map,
    "default on TPU": default_tpu,
    "default on GPU (TF32)": default_gpu,
}
