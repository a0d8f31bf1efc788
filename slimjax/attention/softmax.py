"""How scores become weights: one entry per name of the scheme grammar's ``@softmax`` part."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool

from slimjax.axes import Scores, typed
from slimjax.numerics import MASK


@typed
def exact(scores: Scores, mask: Bool[Array, "B #N T S"]) -> Scores:
    """softmax over the visible keys, in the scores' dtype; a query that sees no key gets weights of 0."""
    masked = jnp.where(mask, scores, jnp.full_like(scores, MASK))
    peak = jnp.max(masked, axis=-1, keepdims=True)
    weight = jnp.where(mask, jnp.exp(masked - peak), jnp.zeros_like(scores))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total == 0, jnp.ones_like(total), total)


SOFTMAXES: dict[str, Callable[..., Scores]] = {"exact": exact}
