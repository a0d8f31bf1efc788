"""How much reading a thresholded softmax spares (arXiv 2503.05840, "softmax sparsity")."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slimjax.axes import Scores, typed
from slimjax.pytree import pytree


@pytree
class SkipRates:
    """Shares, in [0, 1], of visible (query, key) pairs whose weight is 0.

    A cache row may be left out only if every head that reads it skips it: with independent heads of
    sparsity s the rates would be s, s^G and s^N.

    Attributes:
        head: for one head, the mean over heads; what kv and option 1 of an MHA layer can save.
        group: jointly for the G query heads that share a key/value head.
        row: jointly for all N heads; what option 2 (whole rows) and basis kr can save.
    """

    head: Float[Array, ""]
    group: Float[Array, ""]
    row: Float[Array, ""]


@typed
def skip_rates(p: Scores, mask: Bool[Array, "B #N T S"], kv_heads: int) -> SkipRates:
    """The skip rates of weights p under the visibility ``mask``; 0 where nothing is visible."""
    batch, heads, tokens, slots = p.shape
    zero = (p == 0) & mask
    grouped = zero.reshape(batch, kv_heads, heads // kv_heads, tokens, slots)
    visible = jnp.broadcast_to(mask, p.shape)
    pairs = jnp.maximum(jnp.sum(visible.astype(jnp.float32)), 1.0)

    def share(skipped: Array, members: int) -> Array:
        return jnp.sum(skipped.astype(jnp.float32)) * members / pairs

    return SkipRates(
        head=share(zero, 1),
        group=share(jnp.all(grouped, axis=2), heads // kv_heads),
        row=share(jnp.all(zero, axis=1), heads),
    )
