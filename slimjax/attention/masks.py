"""Which cached token each query may see."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from slimjax.axes import Lengths, typed


@typed
def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "S"],
    length: Lengths,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """True where a query may see a key: the key holds a token, and is not ahead or too far behind.

    Args:
        query_positions: absolute position of each query.
        key_positions: absolute position of each key slot.
        length: tokens held by each sequence; slots at and past it are invisible.
        causal: hide keys ahead of the query.
        window: a query at position i sees keys at i - window + 1 .. i (and ahead, if not causal); None: all.
    """
    query, key = query_positions[:, None, :, None], key_positions[None, None, None, :]
    mask = jnp.broadcast_to(key < length[:, None, None, None], (*query.shape[:3], key.shape[-1]))
    if causal:
        mask = mask & (key <= query)
    if window is not None:
        mask = mask & (key > query - window)
    return mask
