"""Decode attention over cached keys and values on Hopper: one pass, every row read once.

For the R query rows m (query tokens x query heads of one key head) and each token c that they see:

    s[m, c] = q[m] . k[c] * scale       p = softmax(s)       out[m] = sum_c p[m, c] v[c]

A block of threads works on one sequence, key head and part of the tokens (``ring``), on rows as they are cached,
[B, C, K*H]. Its readers multiply on tensor cores (q k^T, p v), each with a softmax of its own. All their answers are
combined outside, by log-sums.

* With R = 1 query row in products of 64 that is 64 FLOP a byte read; the memory of a H100 allows 239.
* Tokens past a sequence's length may hold anything, NaN included: their scores are replaced, and their values are
  cleared in shared memory. Past the capacity TMA itself gives zeros.
* Blocks that all rows see whole, which are nearly all, skip the masks.

Bytes: 4*K*H a token; for every part 264*K*R*H and 256*K written, and 2*K*R*H read. FLOPs: 256*K*H a token.
float32 softmax and sums; p is rounded to bfloat16.

Compiled for sm_90a (jax 0.12.0.1, CUDA 13.0, 2026-11-24): 168 registers, none spilled; Llama-2-7B, Phi-3-mini and
SmolLM2-1.7B take 216,200, 212,168 and 175,368 bytes of shared memory. Not run on a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from slimjax.axes import Lengths
from slimjax.kernels.gpu import mosaic, ring
from slimjax.kernels.gpu.mosaic import LOG2E
from slimjax.kernels.gpu.ring import BLOCK, READERS, ROWS, Place, Rules
from slimjax.numerics import MASK


def attend_heads(
    q: BFloat16[Array, "B K R H"],
    keys: BFloat16[Array, "B C E"],
    values: BFloat16[Array, "B C E"],
    length: Lengths,
    first: Lengths,
    rules: Rules,
    *,
    splits: int,
    interpret: Any = False,
) -> tuple[Float[Array, "P B K R H"], Float[Array, "P B K 64"]]:
    """Answers and log-sums of P = 2*splits parts of each sequence, float32; a row that sees no key: 0 and ``MASK``.

    R is a multiple of 8, at most 64; of the log-sums' rows, as of those of q, G*T mean something. H is a multiple of
    32, C of 8. ``first``: position of each sequence's first query. ``interpret``: False, or ``mosaic.interpreter()``.
    """
    batch, kv_heads, rows, size = q.shape
    parts = splits * READERS
    shared = {
        "q": mosaic.tiled((ROWS, size), q.dtype),
        "q_ready": plgpu.Barrier(),
        "out": mosaic.tiled((READERS, ROWS, size), jnp.float32),
        "log_sums": plgpu.SMEM((READERS, ROWS), jnp.float32),
        **ring.slots(ring.depth(4 * BLOCK * size), keys=size, values=size),
    }
    return mosaic.call(
        functools.partial(_kernel, rules=rules, splits=splits, interpreted=interpret is not False),
        out=(
            jax.ShapeDtypeStruct((parts, batch, kv_heads, rows, size), jnp.float32),
            jax.ShapeDtypeStruct((parts, batch, kv_heads, ROWS), jnp.float32),
        ),
        scratch=shared,
        grid=ring.grid(kv_heads, splits, batch),
        groups=READERS + 1,
        interpret=interpret,
        name="slimjax_heads",
    )(length, first, q, keys, values)


def _kernel(
    # inputs, all in global memory: [B], [B], [B, K, R, H], [B, C, K*H], [B, C, K*H]
    length: Any,
    first: Any,
    q: Any,
    keys: Any,
    values: Any,
    # outputs: [P, B, K, R, H], [P, B, K, 64]
    out: Any,
    log_sums: Any,
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
        cached = {"keys": keys, "values": values}
        ring.load(
            shared,
            place,
            {
                name: lambda block, rows=rows: rows.at[place.sequence, ring.rows_of(block), columns]
                for name, rows in cached.items()
            },
        )

    @pl.when(group < READERS)
    def read() -> None:
        plgpu.set_max_registers(ring.READING, action="increase")
        plgpu.barrier_wait(shared["q_ready"])
        step = functools.partial(
            _step, shared=shared, place=place, group=group, rules=rules, interpreted=interpreted
        )
        state = jax.lax.fori_loop(0, place.steps(group), step, _begin(size, interpreted))
        _finish(state, out, log_sums, shared, place, group)


def _begin(size: int, interpreted: bool) -> tuple[Array, Array, Array]:
    """Weighed values [64, H], peaks and sums of the softmax [64], of no token."""
    peaks, sums = (mosaic.full((ROWS,), value, interpreted=interpreted) for value in (-jnp.inf, 0.0))
    return mosaic.full((ROWS, size), 0.0, interpreted=interpreted), peaks, sums


def _step(
    i: Any,
    state: tuple[Array, Array, Array],
    *,
    shared: dict[str, Any],
    place: Place,
    group: Any,
    rules: Rules,
    interpreted: bool,
) -> tuple[Array, Array, Array]:
    """One block of tokens; scores and peaks are those of the softmax times log2(e)."""
    mixed, peak, total = state
    j = group + READERS * i
    token = (place.start + j) * BLOCK

    keys = ring.take(shared, "keys", j)
    raw = mosaic.product(shared["q"], keys, turned=True, interpreted=interpreted)
    ring.give(shared, "keys", j)
    raw = _masked(capped(raw, rules), token, place, rules, interpreted)

    now = jnp.maximum(peak, raw.max(axis=1))
    level = jnp.where(now == -jnp.inf, 0.0, now)  # of rows that have seen nothing: not inf - inf
    shrunk = jnp.exp2(peak - level)
    p = jnp.exp2(raw - mosaic.across(level, raw))
    total = total * shrunk + p.sum(axis=1)

    values = ring.take(shared, "values", j)
    ring.clear(values, token, place.length, interpreted=interpreted)
    new = mosaic.product(p.astype(values.dtype), values, interpreted=interpreted)
    ring.give(shared, "values", j)
    return mixed * mosaic.across(shrunk, mixed) + new, now, total


def capped(raw: Array, rules: Rules) -> Array:
    """Scores times log2(e)."""
    if rules.softcap is None:
        return raw * (rules.scale * LOG2E)
    return mosaic.tanh(raw * (rules.scale / rules.softcap)) * (rules.softcap * LOG2E)


def _masked(raw: Array, token: Any, place: Place, rules: Rules, interpreted: bool) -> Array:
    """Scores from ``token`` on, minus infinity where a row does not see."""

    def mask(raw: Array) -> Array:
        at = token + mosaic.iota(raw.shape, 1, interpreted=interpreted)
        query = place.first
        if rules.tokens > 1:
            query += jax.lax.div(mosaic.iota(raw.shape, 0, interpreted=interpreted), jnp.int32(rules.group))
        return jnp.where(rules.sees(at, query, place.length), raw, -jnp.inf)

    return jax.lax.cond(rules.partly(token, place), mask, lambda raw: raw, raw)


def _finish(
    state: tuple[Array, Array, Array],
    out: Any,
    log_sums: Any,
    shared: dict[str, Any],
    place: Place,
    group: Any,
) -> None:
    """Write the rows of queries, and all log-sums: TMA moves no fewer than 16 bytes."""
    mixed, peak, total = state
    sees = total > 0
    whole = jnp.where(sees, total, 1.0)
    shared["out"][group] = mixed / mosaic.across(whole, mixed)
    shared["log_sums"][group] = jnp.where(sees, peak / LOG2E + jnp.log(whole), MASK)
    plgpu.commit_smem()
    at = (place.part * READERS + group, place.sequence, place.column)
    rows = pl.ds(0, out.shape[3])
    plgpu.copy_smem_to_gmem(shared["out"].at[group, rows], out.at[at])
    plgpu.copy_smem_to_gmem(shared["log_sums"].at[group], log_sums.at[at])
    plgpu.wait_smem_to_gmem(0)
