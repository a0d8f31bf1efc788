"""In which arithmetic rows may meet the map M = W_KV, and what each costs: M amplifies its operands' rounding.

On TPU jax's default float32 product rounds both operands to bfloat16, on recent GPUs to TF32 (10 bits of
mantissa); a CPU never shows it. These are those products emulated, for a table and for tests.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from slimjax.attention.pair import Pair, through
from slimjax.numerics import einsum

Rows = Float[Array, "S M"]
Map = Float[Array, "M F"]


def full(rows: Rows, weight: Map) -> Rows:
    """float32 operands at full precision: what decoding does."""
    return einsum("sm,mf->sf", rows, weight)


def split(rows: Rows, weight: Map) -> Rows:
    """The map as two bfloat16 arrays (as many bytes as float32), the rows as three: six bfloat16 products."""
    return through("sm,mf->sf", rows, Pair.of(weight))


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
