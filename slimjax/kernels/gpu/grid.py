"""How a call is cut for the processors of a GPU, parts of sequences and queries by key head; and for which GPUs."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.axes import Queries
from slimjax.kernels.gpu.ring import BLOCK, Rules

PROCESSORS = 132  # of a H100 or H200; each works on one part of one key head at a time
# Clusters that run at a time by their size: 8 are within a group of 16 or 18 processors, of which there are 8 or so.
CLUSTERS = {1: PROCESSORS, 2: 66, 4: 32, 8: 16}
START = 4  # blocks of tokens that could be read while a part begins and ends; a guess, not measured
ALIGNED = 8  # rows: the least that operands of products are cut into


def parts(heads: int, capacity: int, block: int = BLOCK, processors: int = PROCESSORS) -> int:
    """Parts for so many sequences x key heads and slots: those that the last processor is soonest done with.

    Each processor takes one part at a time, and as long as ``START`` blocks of tokens to begin and end it. Clusters of
    blocks of threads take several processors each, of which there are fewer then.
    """
    blocks = math.ceil(capacity / block)

    def time(splits: int) -> int:
        return math.ceil(heads * splits / processors) * (math.ceil(blocks / splits) + START)

    return min(range(1, min(blocks, processors) + 1), key=time)


def by_key_head(q: Queries, rules: Rules) -> Float[Array, "B K R H"]:
    """Queries as rows of the key heads that they meet, token by token, filled up."""
    batch, tokens, heads, size = q.shape
    rows = q.reshape(batch, tokens, heads // rules.group, rules.group, size).swapaxes(1, 2)
    return padded(rows.reshape(batch, heads // rules.group, tokens * rules.group, size))


def padded(rows: Float[Array, "*B M W"]) -> Float[Array, "*B R W"]:
    """Rows filled up to a multiple of 8."""
    return jnp.pad(rows, (*[(0, 0)] * (rows.ndim - 2), (0, -rows.shape[-2] % ALIGNED), (0, 0)))


def foreign() -> str | None:
    """Why the kernels do not run on the GPU in use, or None; also None where there is none."""
    if jax.default_backend() != "gpu":
        return None
    found = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    return None if found == "9.0" else f"compute capability {found}: the kernels are for 9.0 (Hopper)"
