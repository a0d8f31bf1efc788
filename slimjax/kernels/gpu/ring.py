"""What kernels for Hopper share: which tokens a block of threads works on, and how their rows reach it.

The last warpgroup of a block of threads brings blocks of 64 tokens to slots of shared memory by TMA, the others take
every other block and set its slot free again (those of ``slim`` share them all). Products have 64 rows. Those that hold
no query hold what was in shared memory, and are not written out: a row never mixes with another.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from slimjax.attention.sas import coefficients
from slimjax.kernels.gpu import mosaic
from slimjax.kernels.gpu.mosaic import LOG2E

ROWS = 64  # of a product
BLOCK = 64  # tokens
READERS = 2  # warpgroups that multiply
SHARED_LIMIT = 232_448  # bytes of shared memory that a block of threads may take
BUFFERS = 144 * 1024  # bytes of shared memory for rows on their way; queries and answers take 40 to 80 KiB
LOADING, READING = 40, 232  # registers of a thread
CLEARED = 64  # columns of a block that are in registers at a time while it is cleared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The static half of a call.

    Attributes:
        group, tokens: G, T; row m of a key head is query head m % G of query token m // G.
        scale, softcap, window, causal: as in ``DecodeSpec``.
        sas: threshold and degree, where weights are SAS's; None: the exponential.
    """

    group: int
    tokens: int
    scale: float
    softcap: float | None
    window: int | None
    causal: bool
    sas: tuple[float, int] | None = None

    def sees(self, token: Any, query: Any, length: Any) -> Any:
        """Whether queries at these positions see these tokens."""
        seen = token < length
        if self.causal:
            seen &= token <= query
        if self.window is not None:
            seen &= token > query - self.window
        return seen

    def partly(self, token: Any, place: "Place", size: int = BLOCK) -> Any:
        """Whether some row does not see all of the ``size`` tokens that begin at ``token``."""
        hidden = token + size > place.length
        if self.causal:
            hidden |= token + (size - 1) > place.first
        if self.window is not None:
            hidden |= token <= place.first + (self.tokens - 1 - self.window)
        return hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What a block of threads works on: its indices, its sequence, and ``count`` blocks of tokens from ``start`` on.

    ``column``: its key head, or its part of the columns.
    """

    sequence: Any
    column: Any
    part: Any
    length: Any
    first: Any
    start: Any
    count: Any

    def steps(self, group: Any) -> Any:
        """Blocks that a reader takes."""
        return jax.lax.div(self.count + (READERS - 1) - group, jnp.int32(READERS))


def grid(columns: int, splits: int, batch: int) -> dict[str, int]:
    """Columns first: neighbours read the same rows at the same time."""
    return {"column": columns, "part": splits, "sequence": batch}


def place(length: Any, first: Any, rules: Rules, splits: int, size: int = BLOCK) -> Place:
    """Of the blocks of ``size`` tokens that any row sees, an even share: a short sequence is cut as finely as a long
    one.
    """
    sequence, column, part = (jax.lax.axis_index(name) for name in ("sequence", "column", "part"))
    held, position, block = length[sequence], first[sequence], jnp.int32(size)
    end = jnp.minimum(held, position + rules.tokens) if rules.causal else held
    begin = jnp.int32(0)
    if rules.window is not None:
        begin = jax.lax.div(jnp.maximum(position - (rules.window - 1), 0), block)
    last = jax.lax.div(jnp.maximum(end, 0) + (size - 1), block)
    share = jax.lax.div(jnp.maximum(last - begin, 0) + (splits - 1), jnp.int32(splits))
    start = begin + part * share
    count = jnp.maximum(jnp.minimum(last, start + share) - start, 0)
    return Place(
        sequence=sequence, column=column, part=part, length=held, first=position, start=start, count=count
    )


def depth(size: int) -> int:
    """Slots for blocks of so many bytes. Each belongs to one reader."""
    return BUFFERS // size // READERS * READERS


def slots(count: int, **widths: int) -> dict[str, Any]:
    """Shared memory for blocks of bfloat16 rows by name, [slots, 64, width], and two barriers of every slot."""
    held: dict[str, Any] = {}
    for name, width in widths.items():
        held |= slot(name, mosaic.tiled((count, BLOCK, width), jnp.bfloat16), count)
    return held


def slot(name: str, memory: Any, count: int, *, readers: int = 1) -> dict[str, Any]:
    """So many slots, and their barriers. "ready": what is in them has come; "free": no reader of theirs needs it."""
    ready = plgpu.Barrier(num_barriers=count)
    free = plgpu.Barrier(num_barriers=count, num_arrivals=readers)
    return {name: memory, f"{name}_ready": ready, f"{name}_free": free}


def rows_of(block: Any) -> Any:
    """The rows of a block where they lie one behind the other."""
    return pl.ds(block * BLOCK, BLOCK)


def load(shared: dict[str, Any], place: Place, sources: dict[str, Callable[[Any], Any]]) -> None:
    """Bring each block as soon as its slot is free. ``sources``: by name, of a block's number, what is copied."""

    @pl.loop(0, place.count)
    def each(j: Any) -> None:
        for name, source in sources.items():
            bring(shared, name, j, source(place.start + j))


def bring(shared: dict[str, Any], name: str, j: Any, cached: Any) -> None:
    """Bring the j-th block as soon as its slot is free."""
    count = shared[name].shape[0]
    slot = jax.lax.rem(j, jnp.int32(count))

    @pl.when(j >= count)
    def wait() -> None:
        plgpu.barrier_wait(shared[f"{name}_free"].at[slot])

    held = shared[name].at[slot, pl.ds(0, cached.shape[0])]
    plgpu.copy_gmem_to_smem(cached, held, shared[f"{name}_ready"].at[slot])


def take(shared: dict[str, Any], name: str, j: Any) -> Any:
    """The slot of the j-th block, once its rows have come."""
    slot = jax.lax.rem(j, jnp.int32(shared[name].shape[0]))
    plgpu.barrier_wait(shared[f"{name}_ready"].at[slot])
    return shared[name].at[slot]


def give(shared: dict[str, Any], name: str, j: Any) -> None:
    """Set the slot of the j-th block free."""
    plgpu.barrier_arrive(shared[f"{name}_free"].at[jax.lax.rem(j, jnp.int32(shared[name].shape[0]))])


def clear(rows: Any, token: Any, length: Any, *, interpreted: bool) -> None:
    """Zeros in the place of rows past the length: they may be NaN, and 0 * NaN is NaN. ``token``: the first's."""

    @pl.when(token + BLOCK > length)
    def ragged() -> None:
        width = rows.shape[1]
        step = CLEARED if width % CLEARED == 0 else width
        for start in range(0, width, step):
            part = rows.at[:, pl.ds(start, step)]
            inside = token + mosaic.iota(part.shape, 0, interpreted=interpreted) < length
            held = part[...]
            part[...] = jnp.where(inside, held, jnp.zeros_like(held))
        plgpu.commit_smem()


def exponential(x: Array, sas: tuple[float, int] | None) -> Array:
    """exp(-x) of x >= 0, by SAS where that is chosen (``attention.sas.sas_exp``); 0 far away."""
    if sas is None:
        return jnp.exp2(x * -LOG2E)
    threshold, degree = sas
    inside = jnp.minimum(x, threshold)
    whole = inside.astype(jnp.int32)
    fraction, value = inside - whole.astype(jnp.float32), jnp.zeros_like(x)
    for coefficient in coefficients(degree):
        value = value * fraction + coefficient
    entry = jnp.ones_like(x)
    for n in range(1, math.floor(threshold) + 1):
        entry = jnp.where(whole >= n, math.exp(-n), entry)
    return jnp.where(x > threshold, 0.0, entry * value)
