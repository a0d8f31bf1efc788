"""What the loader of ``slim`` does with FlashQ's codes: it brings packed bytes, and makes bfloat16 rows of them.

A code c of channel e in tile t stands for scale[t, head of e] (low[t, e] + step[t, e] c), arXiv 2412.08585, section 3.
Weighed as whole rows, keys cannot keep their codes in the products, whose columns have steps of their own. Rows are
exact in float32 and rounded to bfloat16 once: scorer and mixers find what they find of a bfloat16 cache, 64 tokens at
a time, those of one part of 64 rows of bytes (``packed``). For other parts the same bytes are brought again, from L2.

Bytes a token from memory: E (bits + 16/G) / 8 and 4 K / G, for tiles of G tokens. To shared memory E, whatever the
bits. Some 8 operations a value to expand it, by one warpgroup: for a block's W columns 4 W a thread and block of
tokens, which for 4 bits is estimated to take twice as long as the bytes' way from memory. Not run on a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from slimjax.kernels.gpu import mosaic, ring
from slimjax.kernels.gpu.packed import expanded
from slimjax.kernels.gpu.ring import BLOCK, Place
from slimjax.kernels.gpu.share import BYTES, PACKED, Share
from slimjax.kernels.gpu.slim_steps import Refs

REGISTERS = (104, 136, 136)  # of a thread of the loader, the scorer and a mixer


def shared_of(part: Share) -> dict[str, Any]:
    """Shared memory for bytes on their way, and barriers; ``Share`` counts them."""
    packing = part.packing
    assert packing is not None
    byte = jnp.int8 if packing.bits == 8 else jnp.uint8
    held = {
        "bytes": mosaic.tiled((BYTES, BLOCK, part.piece), byte, columns=PACKED),
        "marks": plgpu.SMEM((BYTES, packing.brought(4 * part.heads), part.heads), jnp.float32),
    }
    for name in ("step", "low") if packing.bits < 8 else ():
        held[name] = plgpu.SMEM((BYTES, packing.brought(part.piece), part.piece), jnp.int8)
    return held | {f"{name}_ready": plgpu.Barrier(num_barriers=BYTES) for name in held}


def begin(arrays: Refs, shared: Refs, place: Place, part: Share) -> None:
    """Ask for the first pieces."""
    for number in range(BYTES):
        _ask(jnp.int32(number), arrays, shared, place, part)


def bring(j: Any, arrays: Refs, shared: Refs, place: Place, part: Share, interpreted: bool) -> None:
    """A block of tokens, piece by piece, each as soon as its slot is free; and ask for pieces to come."""

    @pl.loop(0, part.pieces)
    def piece(index: Any) -> None:
        number = j * part.pieces + index
        held = {name: ring.take(shared, name, number) for name in _wanted(shared)}
        part.wait_free(shared, j, index)
        slot = part.slot(j, index)
        for start in range(0, part.piece, PACKED):
            rows = _rows(held, start, place.start + j, index, place, part, interpreted)
            shared["keys"].at[slot, :, pl.ds(start, PACKED)][...] = rows
        plgpu.commit_smem()  # and all warps have read the bytes
        plgpu.barrier_arrive(shared["keys_ready"].at[slot])
        _ask(number + BYTES, arrays, shared, place, part)


def _wanted(shared: Refs) -> list[str]:
    return [name for name in ("bytes", "marks", "step", "low") if name in shared]


def _ask(number: Any, arrays: Refs, shared: Refs, place: Place, part: Share) -> None:
    """For the bytes of a piece, and for steps, lows and scales of its tiles, unless there are no more."""
    packing = part.packing
    assert packing is not None
    j, slot = jax.lax.div(number, jnp.int32(part.pieces)), jax.lax.rem(number, jnp.int32(BYTES))
    index, (step, _) = number - j * part.pieces, packing.split(place.start + j)
    columns = pl.ds(place.column * part.width + index * part.piece, part.piece)

    def tiles(width: int) -> Any:
        return pl.ds(step * packing.count, packing.brought(width))

    @pl.when(j < place.count)
    def ask() -> None:
        mine = {"bytes": arrays["keys"].at[place.sequence, ring.rows_of(step), columns]}
        mine["marks"] = arrays["keys_scale"].at[place.sequence, tiles(4 * part.heads)]
        for name in ("step", "low") if packing.bits < 8 else ():
            mine[name] = arrays[f"keys_{name}"].at[place.sequence, tiles(part.piece), columns]
        for name, source in mine.items():
            plgpu.copy_gmem_to_smem(source, shared[name].at[slot], shared[f"{name}_ready"].at[slot])


def _rows(
    held: dict[str, Any], start: int, block: Any, index: Any, place: Place, part: Share, interpreted: bool
) -> BFloat16[Array, "64 32"]:
    """Some columns of a piece; zeros of a tile that is not there, whose scale may be anything."""
    packing = part.packing
    assert packing is not None
    step, of_byte = packing.split(block)
    named = {"": held["bytes"]} | {name: held[name] for name in ("step", "low") if name in held}
    codes = expanded(named, pl.ds(start, PACKED), of_byte, packing, interpreted=interpreted)
    first = place.column * part.width + index * part.piece + start
    head = jax.lax.div(first, jnp.int32(part.size))
    tile = packing.tile_of(mosaic.iota(codes.shape, 0, interpreted=interpreted))
    scale = jnp.zeros(codes.shape, jnp.float32)
    for number in range(packing.count):
        there = (step * packing.count + number) * packing.tile < place.length
        mine = jnp.where(there, held["marks"][number, head], 0.0)
        scale = jnp.where(tile == number, mine, scale)
    return (codes.astype(jnp.float32) * scale).astype(jnp.bfloat16)
