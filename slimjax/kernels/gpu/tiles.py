"""Decode attention over FlashQ's tiles on Hopper (arXiv 2412.08585): codes come packed, and are expanded on the way.

For the R query rows m of a key head, in INT8 codes, and each tile t of tokens j, codes c with a channel's step and low:

    k[j] = low_k[t] + step_k[t] c_k[j]         s[m, j] = (q[m] . k[j]) q_scale[m] k_scale[t] * scale
    p = exp(s - max s)    p8 = round(p 119 / max over t of p)     out[m] += sum_j p8[m, j] v[j] v_scale[t] max_t / 119

* Expanded codes and p8 are integers below 128, which bfloat16 holds exactly, and so are their sums in float32: the
  integers of the reference, without INT8 products, which would need values by channel (B operands of 8 bits are read
  along k only).
* Tokens are the 64 rows of every product, queries its columns: s^T = k q^T and out^T = v^T p8^T. So a decoded token of
  one head costs 8 columns rather than 64 rows, and few registers.
* A step takes 64 rows of packed bytes (``packed``). Keys go from registers into their product, values through shared
  memory, where they are read transposed.

A block of threads works on one sequence, key head and part of the tokens (``ring``); each of its readers has a softmax
of its own, put together outside by exact exponentials. SAS's weights are relative to each reader's own maximum.

Bytes a token: K H (bits + 16/G) / 8 and 4 K / G, twice. FLOPs a token: 2 K H R (1 + 8/bits), and some 8 integer
operations a value to expand it. Not 3 bits, whose planes are other parts.

Compiled for sm_90a (jax 0.12.0.1, CUDA 13.0, 2026-11-24), 168 registers, none spilled, bytes of shared memory:

    Llama-2-7B    4 bits 155,024               2 bits 224,656
    Phi-3-mini    4 bits, 2 tokens 142,736
    SmolLM2-1.7B  4 bits 84,368                8 bits, 8 tokens 63,632

Not run on a GPU. More query rows than there is room for (2 bits of heads of 128: 8) are further calls, which read all
tiles again (``flashq_decode``).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from slimjax.axes import Lengths
from slimjax.cache.codecs.flashq import FlashQTiles
from slimjax.kernels.gpu import mosaic, ring
from slimjax.kernels.gpu.packed import Packing
from slimjax.kernels.gpu.ring import BLOCK, READERS, ROWS
from slimjax.kernels.gpu.tile_steps import COLUMNS, Static, begin, step

SLOTS = 2 * READERS
OTHER = 8192  # bytes of shared memory that the compiler was seen to take besides, 5,136 at most


def attend_tiles(
    q: BFloat16[Array, "B K R H"],
    q_scale: Float[Array, "B K 64"],
    keys: FlashQTiles,
    values: FlashQTiles,
    length: Lengths,
    first: Lengths,
    limit: Int32[Array, "B T"],
    fixed: Static,
    *,
    splits: int,
    interpret: Any = False,
) -> tuple[Float[Array, "P B K R"], Float[Array, "P B K R"], Float[Array, "P B K H R"]]:
    """Maxima, denominators and sums of P = 2*splits parts of each sequence.

    q: INT8 codes, each query's; q_scale: theirs, R of them. Tiles as they are cached, rows of bytes [B, n*g, K*H].
    length: tokens in tiles that some query sees; limit: that each of T query tokens sees; first: position of each
    sequence's first. R is a multiple of 8, at most 64.
    """
    batch, kv_heads, rows, size = q.shape
    parts, arrays = splits * READERS, {**_named("keys", keys), **_named("values", values)}
    names = tuple(arrays)

    def body(length: Any, first: Any, limit: Any, q: Any, q_scale: Any, *rest: Any) -> None:
        inputs = dict(zip(names, rest, strict=False))
        _kernel(length, first, limit, q, q_scale, inputs, *rest[len(names) :], fixed=fixed, splits=splits)

    shape = (parts, batch, kv_heads)
    return mosaic.call(
        body,
        out=(
            jax.ShapeDtypeStruct((*shape, rows), jnp.float32),
            jax.ShapeDtypeStruct((*shape, rows), jnp.float32),
            jax.ShapeDtypeStruct((*shape, size, rows), jnp.float32),
        ),
        scratch=_shared(rows, size, fixed),
        grid=ring.grid(kv_heads, splits, batch),
        groups=READERS + 1,
        interpret=interpret,
        name="slimjax_tiles",
    )(length, first, limit, q, q_scale, *arrays.values())


def _named(name: str, tiles: FlashQTiles) -> dict[str, Array]:
    """Arrays of keys or values by name; INT8 codes have no step and low."""
    found = {"": tiles.packed, "_step": tiles.step, "_low": tiles.low, "_scale": tiles.scale}
    return {f"{name}{suffix}": array for suffix, array in found.items() if array is not None}


def _filled(size: int) -> int:
    """W, channels of values with those that fill up the 64 rows of a product; the sums of these go nowhere."""
    return -(-size // ROWS) * ROWS


def _shared(rows: int, size: int, fixed: Static) -> dict[str, Any]:
    """Shared memory and barriers; ``memory`` counts their bytes."""
    width, columns = _filled(size), COLUMNS[size]
    shared = {
        "q": mosaic.tiled((rows, size), jnp.bfloat16, columns=columns),
        "q_scale": plgpu.SMEM((ROWS,), jnp.float32),
        "out": mosaic.tiled((READERS, width, rows), jnp.float32),
        "peak": plgpu.SMEM((READERS, rows), jnp.float32),
        "total": plgpu.SMEM((READERS, rows), jnp.float32),
        "scratch": plgpu.SMEM((READERS, mosaic.SCRATCH), jnp.float32),
        "p": mosaic.tiled((READERS, rows, BLOCK), jnp.bfloat16, columns=columns),
        "wide": mosaic.tiled((READERS, fixed.parts, BLOCK, width), jnp.bfloat16, columns=columns),
        "q_ready": plgpu.Barrier(num_barriers=2),
    }
    byte = jnp.int8 if fixed.bits == 8 else jnp.uint8
    for name in ("keys", "values"):
        shared |= ring.slot(name, mosaic.tiled((SLOTS, BLOCK, size), byte, columns=columns), SLOTS)
        for each in ("step", "low") if fixed.bits < 8 else ():
            held = plgpu.SMEM((SLOTS, fixed.brought(size), size), jnp.int8)
            shared |= ring.slot(f"{name}_{each}", held, SLOTS)
    return shared


def memory(rows: int, size: int, bits: int, tile: int) -> int:
    """Bytes of shared memory for R query rows of H; what reductions and barriers take is counted from above."""
    packing, width = Packing(bits=bits, tile=tile), _filled(size)
    queries = rows * (2 * size + READERS * (4 * width + 2 * 4 + 2 * BLOCK)) + 4 * ROWS
    codes = SLOTS * size * (BLOCK + (2 * packing.brought(size) if bits < 8 else 0))
    return queries + 2 * codes + READERS * (2 * packing.parts * BLOCK * width + 4 * mosaic.SCRATCH) + OTHER


def _kernel(
    # inputs, all in global memory: [B], [B], [B, T], [B, K, R, H], [B, K, 64], and tiles by name
    length: Any,
    first: Any,
    limit: Any,
    q: Any,
    q_scale: Any,
    inputs: dict[str, Any],
    # outputs: [P, B, K, R], [P, B, K, R], [P, B, K, H, R]
    peak: Any,
    total: Any,
    out: Any,
    # shared memory and barriers, by name
    shared: dict[str, Any],
    # static
    *,
    fixed: Static,
    splits: int,
) -> None:
    place = ring.place(length, first, fixed.rules, splits, fixed.span)
    group, size = jax.lax.axis_index("group"), q.shape[3]
    columns = pl.ds(place.column * size, size)

    def source(name: str) -> Any:
        codes = name in ("keys", "values")
        stride, rows = (BLOCK, BLOCK) if codes else (fixed.count, fixed.brought(size))
        return lambda block: inputs[name].at[place.sequence, pl.ds(block * stride, rows), columns]

    @pl.when(group == READERS)
    def load() -> None:
        plgpu.set_max_registers(ring.LOADING, action="decrease")
        mine = (place.sequence, place.column)
        plgpu.copy_gmem_to_smem(q.at[mine], shared["q"], shared["q_ready"].at[0])
        plgpu.copy_gmem_to_smem(q_scale.at[mine], shared["q_scale"], shared["q_ready"].at[1])
        wanted = [name for name in inputs if not name.endswith("_scale")]
        ring.load(shared, place, {name: source(name) for name in wanted})

    @pl.when(group < READERS)
    def read() -> None:
        plgpu.set_max_registers(ring.READING, action="increase")
        for index in range(2):
            plgpu.barrier_wait(shared["q_ready"].at[index])
        take = functools.partial(
            step, shared=shared, inputs=inputs, limit=limit, place=place, group=group, fixed=fixed
        )
        state = jax.lax.fori_loop(0, place.steps(group), take, begin(shared, fixed))
        shared["peak"][group], shared["total"][group], shared["out"][group] = state
        plgpu.commit_smem()
        at = (place.part * READERS + group, place.sequence, place.column)
        for name, target in (("peak", peak), ("total", total)):
            plgpu.copy_smem_to_gmem(shared[name].at[group], target.at[at])
        plgpu.copy_smem_to_gmem(shared["out"].at[group, pl.ds(0, size)], out.at[at])
        plgpu.wait_smem_to_gmem(0)
