"""Attention over parts of a sequence put together: each part's answer weighs as much as its share of the softmax."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.axes import typed


@typed
def combine(
    parts: Float[Array, "P *rows A"], log_sums: Float[Array, "P *rows"]
) -> tuple[Float[Array, "*rows A"], Float[Array, "*rows"]]:
    """Answers of P parts and the logarithms of their softmax sums to those of all of it.

    A part that saw no key has a log-sum of ``numerics.MASK`` (or minus infinity), and an answer of 0. The result has
    the log-sums' dtype: float32, or float64.
    """
    peak = jnp.max(log_sums, axis=0)
    # Where no part saw a key all of them are as small: exp(0), times answers of 0.
    share = jnp.exp(log_sums - jnp.where(jnp.isfinite(peak), peak, 0.0)[None])
    total = jnp.sum(share, axis=0)
    whole = (
        jnp.sum(parts.astype(share.dtype) * share[..., None], axis=0)
        / jnp.where(total == 0, 1.0, total)[..., None]
    )
    return whole, peak + jnp.log(jnp.where(total == 0, 1.0, total))
