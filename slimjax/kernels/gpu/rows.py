"""Decode attention on Hopper that weighs whole rows, as slim attention's option 2 does: two passes over the keys.

    s[n, c] = q[n] . k[c, head of n] * scale       p = softmax(s)       out[n] = sum_c p[n, c] k[c]

The sum has E = K*H columns for every query row n, N*T of them, so no block of threads can hold it, and parts of the
columns need the scores of all heads first. The first pass writes scores, XLA makes weights of them, and the second
pass reads the keys again. Both work on one sequence, part of the tokens (``ring``) and key head, or 64 to 128 columns.
``slim`` reads keys once: this is what it is held against, and what serves more query tokens where there is no RoPE.

Bytes a token: 4*E of keys, as an ordinary cache of keys and values: half the memory, not half the time. And for R
query rows a key head (a multiple of 8), M in all: 4*K*R of scores written, 4*N*T read, 2*M of weights written, 2*M a
part of the columns read, mostly from L2. FLOPs a token: 256*E.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from slimjax.axes import Lengths
from slimjax.kernels.gpu import mosaic, ring
from slimjax.kernels.gpu.ring import BLOCK, READERS, ROWS, Rules

WIDTHS = (128, 96, 64)  # columns of the second pass


def column_width(width: int) -> int:
    """Columns that a block of threads of the second pass takes, of rows so wide. Raises ValueError if none do."""
    for columns in WIDTHS:
        if width % columns == 0:
            return columns
    raise ValueError(f"{width=}: expected a multiple of one of {', '.join(map(str, WIDTHS))}")


def score_rows(
    q: BFloat16[Array, "B K R H"],
    keys: BFloat16[Array, "B C E"],
    length: Lengths,
    first: Lengths,
    rules: Rules,
    *,
    splits: int,
    interpret: Any = False,
) -> Float[Array, "B K R S"]:
    """q . k, neither scaled nor masked, float32; S: C in whole blocks. Blocks that no row sees hold anything.

    R is a multiple of 8, at most 64; H a multiple of 32, C of 8. Otherwise as ``heads.attend_heads``.
    """
    batch, kv_heads, rows, size = q.shape
    shared = {
        "q": mosaic.tiled((ROWS, size), q.dtype),
        "q_ready": plgpu.Barrier(),
        "scores": mosaic.tiled((READERS, ROWS, BLOCK), jnp.float32),
        **ring.slots(ring.depth(2 * BLOCK * size), keys=size),
    }
    slots = math.ceil(keys.shape[1] / BLOCK) * BLOCK
    (scores,) = mosaic.call(
        functools.partial(_score, rules=rules, splits=splits, interpreted=interpret is not False),
        out=(jax.ShapeDtypeStruct((batch, kv_heads, rows, slots), jnp.float32),),
        scratch=shared,
        grid=ring.grid(kv_heads, splits, batch),
        groups=READERS + 1,
        interpret=interpret,
        name="slimjax_score_rows",
    )(length, first, q, keys)
    return scores


def _score(
    # inputs, all in global memory: [B], [B], [B, K, R, H], [B, C, E]
    length: Any,
    first: Any,
    q: Any,
    keys: Any,
    # output: [B, K, R, S]
    scores: Any,
    # shared memory and barriers, by name
    shared: dict[str, Any],
    # static
    *,
    rules: Rules,
    splits: int,
    interpreted: bool,
) -> None:
    place = ring.place(length, first, rules, splits)
    group, (rows, size) = jax.lax.axis_index("group"), q.shape[2:]

    @pl.when(group == READERS)
    def load() -> None:
        plgpu.set_max_registers(ring.LOADING, action="decrease")
        mine, columns = q.at[place.sequence, place.column], pl.ds(place.column * size, size)
        plgpu.copy_gmem_to_smem(mine, shared["q"].at[pl.ds(0, rows)], shared["q_ready"])
        ring.load(
            shared, place, {"keys": lambda block: keys.at[place.sequence, ring.rows_of(block), columns]}
        )

    @pl.when(group < READERS)
    def read() -> None:
        plgpu.set_max_registers(ring.READING, action="increase")
        plgpu.barrier_wait(shared["q_ready"])

        @pl.loop(0, place.steps(group))
        def step(i: Any) -> None:
            j = group + READERS * i
            block = ring.take(shared, "keys", j)
            raw = mosaic.product(shared["q"], block, turned=True, interpreted=interpreted)
            ring.give(shared, "keys", j)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the block before
            shared["scores"][group] = raw
            plgpu.commit_smem()
            tokens = pl.ds((place.start + j) * BLOCK, BLOCK)
            target = scores.at[place.sequence, place.column, pl.ds(0, rows), tokens]
            plgpu.copy_smem_to_gmem(shared["scores"].at[group, pl.ds(0, rows)], target)

        plgpu.wait_smem_to_gmem(0)


def weigh_rows(
    p: BFloat16[Array, "B M S"],
    keys: BFloat16[Array, "B C E"],
    length: Lengths,
    first: Lengths,
    rules: Rules,
    *,
    splits: int,
    interpret: Any = False,
) -> Float[Array, "P B M E"]:
    """p k of P = 2*splits parts of each sequence, to be added; float32.

    p: zero where a row does not see; M is a multiple of 8, at most 64. E is a multiple of one of ``WIDTHS``.
    """
    batch, rows, _ = p.shape
    width = column_width(keys.shape[2])
    shared = {
        "out": mosaic.tiled((READERS, ROWS, width), jnp.float32),
        **ring.slots(ring.depth(2 * BLOCK * (width + BLOCK)), p=BLOCK, keys=width),
    }
    (out,) = mosaic.call(
        functools.partial(
            _weigh, rules=rules, splits=splits, width=width, interpreted=interpret is not False
        ),
        out=(jax.ShapeDtypeStruct((splits * READERS, batch, rows, keys.shape[2]), jnp.float32),),
        scratch=shared,
        grid=ring.grid(keys.shape[2] // width, splits, batch),
        groups=READERS + 1,
        interpret=interpret,
        name="slimjax_weigh_rows",
    )(length, first, p, keys)
    return out


def _weigh(
    # inputs, all in global memory: [B], [B], [B, M, S], [B, C, E]
    length: Any,
    first: Any,
    p: Any,
    keys: Any,
    # output: [P, B, M, E]
    out: Any,
    # shared memory and barriers, by name
    shared: dict[str, Any],
    # static
    *,
    rules: Rules,
    splits: int,
    width: int,
    interpreted: bool,
) -> None:
    place = ring.place(length, first, rules, splits)
    group, rows = jax.lax.axis_index("group"), pl.ds(0, p.shape[1])
    columns = pl.ds(place.column * width, width)

    @pl.when(group == READERS)
    def load() -> None:
        plgpu.set_max_registers(ring.LOADING, action="decrease")
        sources = {
            "p": lambda block: p.at[place.sequence, rows, ring.rows_of(block)],
            "keys": lambda block: keys.at[place.sequence, ring.rows_of(block), columns],
        }
        ring.load(shared, place, sources)

    @pl.when(group < READERS)
    def read() -> None:
        plgpu.set_max_registers(ring.READING, action="increase")

        def step(i: Any, mixed: Array) -> Array:
            j = group + READERS * i
            weights, block = ring.take(shared, "p", j), ring.take(shared, "keys", j)
            ring.clear(block, (place.start + j) * BLOCK, place.length, interpreted=interpreted)
            new = mosaic.product(weights, block, interpreted=interpreted)
            ring.give(shared, "p", j)
            ring.give(shared, "keys", j)
            return mixed + new

        none = mosaic.full((ROWS, width), 0.0, interpreted=interpreted)
        shared["out"][group] = jax.lax.fori_loop(0, place.steps(group), step, none)
        plgpu.commit_smem()
        target = out.at[place.part * READERS + group, place.sequence, rows, columns]
        plgpu.copy_smem_to_gmem(shared["out"].at[group, rows], target)
        plgpu.wait_smem_to_gmem(0)
