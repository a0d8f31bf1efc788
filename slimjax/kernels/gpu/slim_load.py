"""What the loader of ``slim`` does: it brings the block's columns to shared memory, and the scores of all blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slimjax.kernels.gpu import mosaic, ring, slim_packed
from slimjax.kernels.gpu.ring import Place
from slimjax.kernels.gpu.share import Share
from slimjax.kernels.gpu.slim_steps import Refs


def load_rows(arrays: Refs, shared: Refs, place: Place, part: Share, interpreted: bool) -> None:
    """All that the others wait for, block by block, the scores of one behind the columns of the next."""
    plgpu.copy_gmem_to_smem(arrays["q"].at[place.sequence, place.column], shared["q"], shared["q_ready"])
    for index, name in enumerate(("cos", "sin") if part.rotary else ()):
        plgpu.copy_gmem_to_smem(arrays[name], shared[name], shared["angles_ready"].at[index])
    if part.packing:
        slim_packed.begin(arrays, shared, place, part)

    @pl.loop(0, place.count)
    def bring(j: Any) -> None:
        if part.packing:
            slim_packed.bring(j, arrays, shared, place, part, interpreted)
        else:
            _bring(j, arrays, shared, place, part)
        # After the pieces: their places wait for what was weighed, and columns need not.
        _beside(j, arrays, shared, place, part)
        pl.when(j > 0)(lambda: _fetch(j - 1, arrays, shared, place, part, interpreted))

    @pl.when(place.count > 0)
    def last() -> None:
        _fetch(place.count - 1, arrays, shared, place, part, interpreted)


def _fetch(j: Any, arrays: Refs, shared: Refs, place: Place, part: Share, interpreted: bool) -> None:
    """The scores of all heads, once they are there."""
    plgpu.barrier_wait(shared["met"].at[jax.lax.rem(j, jnp.int32(part.ahead))])
    mosaic.order_global(interpreted=interpreted)

    @pl.when(j > 0)
    def wait() -> None:
        plgpu.barrier_wait(shared["scores_free"])

    rows = ring.rows_of(jax.lax.rem(j, jnp.int32(part.places)))
    source = arrays["scores"].at[place.sequence, place.part, rows, :, pl.ds(0, part.sent)]
    plgpu.copy_gmem_to_smem(source, shared["scores"], shared["scores_ready"])


def _bring(j: Any, arrays: Refs, shared: Refs, place: Place, part: Share) -> None:
    """A block of tokens as it is cached."""
    tokens, sequence = ring.rows_of(place.start + j), jax.lax.div(place.sequence, jnp.int32(part.groups))

    @pl.loop(0, part.pieces)
    def piece(index: Any) -> None:
        slot = part.slot(j, index)
        part.wait_free(shared, j, index)
        columns = pl.ds(place.column * part.width + index * part.piece, part.piece)
        source = arrays["keys"].at[sequence, tokens, columns]
        plgpu.copy_gmem_to_smem(source, shared["keys"].at[slot], shared["keys_ready"].at[slot])


def _beside(j: Any, arrays: Refs, shared: Refs, place: Place, part: Share) -> None:
    """Scales and extra coordinates of a block of tokens."""
    tokens, sequence = ring.rows_of(place.start + j), jax.lax.div(place.sequence, jnp.int32(part.groups))
    for name in ("keys_scale", "extra_scale"):
        if name in shared:
            ring.bring(shared, name, j, arrays[name].at[sequence, 0, tokens])
    if part.extra:
        mine = arrays["extra"].at[sequence, :, tokens]
        pl.when(place.column == 0)(lambda: ring.bring(shared, "extra", j, mine))
