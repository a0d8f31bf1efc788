"""Largest and least values that are NaN where a value is NaN, on every backend.

XLA's reductions by maximum and minimum lose NaN on CPU (jaxlib 0.10, for arrays of 4,096 values or more, while smaller
ones keep it), so that a scale taken with ``jnp.max`` would hide a broken row behind ordinary codes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Axes = int | tuple[int, ...]


def _with_nan(found: Array, values: Array, axis: Axes, keepdims: bool) -> Array:
    # No NaN is made here, only passed on: jax_debug_nans stays quiet about rows that are whole.
    broken = jnp.where(jnp.isnan(values), values, jnp.zeros_like(values))
    return found + jnp.sum(broken, axis=axis, keepdims=keepdims)


def largest(values: Float[Array, "..."], axis: Axes, keepdims: bool = False) -> Float[Array, "..."]:
    """The maximum along the axes, NaN where there is one among the values."""
    return _with_nan(jnp.max(values, axis=axis, keepdims=keepdims), values, axis, keepdims)


def least(values: Float[Array, "..."], axis: Axes, keepdims: bool = False) -> Float[Array, "..."]:
    """The minimum along the axes, NaN where there is one among the values."""
    return _with_nan(jnp.min(values, axis=axis, keepdims=keepdims), values, axis, keepdims)
