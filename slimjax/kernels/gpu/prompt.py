"""Attention of a prompt on itself in INT8 tiles on Hopper (FlashQ prefill, arXiv 2412.08585, section 3), SAS or exact.

Of every head, tiles of 64 queries meet tiles of 64 keys, in order:

    S = s_q s_k (Q K^T) scale        P = exp(S - m), m the maximum so far        O = f O + s_p s_v (P / s_p) V

with Q, K, V and P / s_p in INT8, both products in INT32 and f the factor between two maxima. It is what
``attention.integer`` computes; the choices that the paper leaves open are those of its ``Integer``.

A block of threads takes two tiles of queries of a head, one for each reader; a loader brings tiles of keys and values,
which both read, and none that no query of the two sees. Queries are rows. Products of 8 bits read both operands along
the axis that is summed: values come by channel, turned by XLA while they are floats, and P's codes go through shared
memory, as the layout that products leave is not the one that they take. Maxima of a tile of P go from warp to warp.

2 T^2 N H multiplications and additions, half of them skipped as nobody sees them, twice the rate of bfloat16; bytes
3 T N H + 2 T K H and the scales. Per weight some 20 operations of float32 (exp2 or SAS, maximum, sum, rounding), which
for heads of 64 are more time than the products: SAS saves the one exponential, and takes 3 + 2 operations for it.

Compiled for sm_90a (jax 0.12.0.1, CUDA 13.0, 2026-11-23): 168 registers, none spilled; heads of 64, 96 and 128 take
71,824, 100,496 and 129,168 bytes of shared memory. Not run on a GPU. Limits: tiles of 64 tokens, causal, no bias.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8

from slimjax.attention.integer import Integer
from slimjax.attention.softmax import sas_of
from slimjax.axes import Keys, Lengths, Queries, Values, typed
from slimjax.cache.codecs.flashq import LIMIT
from slimjax.kernels import flashq
from slimjax.kernels.gpu import mosaic, ring
from slimjax.kernels.gpu.ring import BLOCK, READERS, ROWS, Rules, exponential
from slimjax.kernels.gpu.tile_steps import NONE, Static, factor_of
from slimjax.kernels.spec import DecodeSpec

SIZES = (64, 96, 128)  # of heads
SLOTS = 4  # tiles of keys, and of values, on their way or read
QUERIES = READERS * ROWS  # of a block of threads
Codes = tuple[Array, Float[Array, "B _ n"]]  # and their scales, of each tile


def refusal(spec: DecodeSpec, tile: int) -> str | None:
    """Why prompts in such tiles are not served, or None."""
    if mosaic.OLD:
        return "jax 0.10; it wants 0.11 or newer"
    if tile != BLOCK:
        return f"tiles of {tile} tokens; it has {BLOCK}"
    if spec.head_dim not in SIZES:
        return f"heads of {spec.head_dim}; it has {', '.join(map(str, SIZES))}"
    if (cut := sas_of(spec.scheme.softmax)) and not cut[0]:
        return f"softmax {spec.scheme.softmax}; it has exact, and SAS with a cut"
    return flashq.prompt_refusal(spec)


@typed
def attend_prompt(
    q: Queries,
    k: Keys,
    v: Values,
    spec: DecodeSpec,
    length: Lengths,
    integer: Integer,
    tile: int,
    *,
    interpret: Any = False,
) -> Queries:
    """A prompt of T tokens on itself.

    Args:
        q: [B, T, N, H] before any rotation.
        k, v: [B, T, K, H], keys rotated.
        spec: heads, positions, softmax, window, softcap, scale.
        length: [B], tokens of each right-padded sequence; what lies behind may be anything.
        integer: the compute mode.
        tile: tokens of a tile of queries, and of keys.
        interpret: False, or ``mosaic.interpreter()``.

    Returns:
        [B, T, N, H] in ``spec.dtype``; rows at ``length`` and behind are 0.

    Raises:
        NotImplementedError: as ``refusal``.
        RuntimeError: interpreted with too few threads.
    """
    if reason := refusal(spec, tile):
        raise NotImplementedError(f"the kernel of prompts in INT8 does not serve {reason}")
    mosaic.enough_threads(mosaic.THREADS, "on a prompt in INT8", interpret)
    rows = flashq.prompt_rows(q, k, v, length, spec)
    queries, keys = (flashq.prompt_codes(each, QUERIES, tile) for each in rows[:2])
    values = flashq.prompt_codes(rows[2], QUERIES, tile, turned=True)
    fixed = Static(
        rules=Rules(
            group=spec.group,
            tokens=1,
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            softcap=spec.softcap,
            window=spec.window,
            causal=True,
        ),
        integer=integer,
        sas=sas_of(spec.scheme.softmax),
        bits=8,
        tile=tile,
        interpreted=interpret is not False,
    )
    out = attend_codes(length, queries, keys, values, fixed, spec.dtype, interpret)
    return jnp.transpose(out, (0, 2, 1, 3))[:, : q.shape[1]]


def attend_codes(
    length: Lengths, queries: Codes, keys: Codes, values: Codes, fixed: Static, dtype: str, interpret: Any
) -> Float[Array, "B N S H"]:
    """The kernel on codes, of queries and keys [B, N, S, H] and [B, K, S, H], of values [B, K, H, S]."""
    batch, heads, slots, size = queries[0].shape
    held: Int8[Array, "B N S H"] = queries[0]
    shared = {
        "q": mosaic.tiled((READERS, ROWS, size), jnp.int8),
        "q_ready": plgpu.Barrier(num_barriers=READERS),
        "out": mosaic.tiled((READERS, ROWS, size), dtype),
        "p": mosaic.tiled((READERS, ROWS, BLOCK), jnp.int8),
        "scratch": plgpu.SMEM((READERS, mosaic.SCRATCH), jnp.float32),
        **ring.slot("keys", mosaic.tiled((SLOTS, BLOCK, size), jnp.int8), SLOTS, readers=READERS),
        **ring.slot("values", mosaic.tiled((SLOTS, size, BLOCK), jnp.int8), SLOTS, readers=READERS),
    }
    (out,) = mosaic.call(
        functools.partial(_kernel, fixed=fixed),
        out=(jax.ShapeDtypeStruct((batch, heads, slots, size), dtype),),
        scratch=shared,
        grid={"query": slots // QUERIES, "head": heads, "sequence": batch},
        groups=READERS + 1,
        interpret=interpret,
        name="slimjax_prompt",
    )(length, held.reshape(batch, heads, -1, ROWS, size), keys[0], values[0], queries[1], keys[1], values[1])
    return out


def _kernel(
    # inputs, all in global memory: [B]; codes [B, N, n, 64, H], [B, K, S, H], [B, K, H, S]; scales [B, _, n]
    length: Any,
    q: Any,
    keys: Any,
    values: Any,
    q_scale: Any,
    k_scale: Any,
    v_scale: Any,
    # output: [B, N, S, H]
    out: Any,
    # shared memory and barriers, by name
    shared: dict[str, Any],
    # static
    *,
    fixed: Static,
) -> None:
    sequence, head, group = (jax.lax.axis_index(name) for name in ("sequence", "head", "group"))
    # The last queries, who see most, are begun first.
    block = out.shape[2] // QUERIES - 1 - jax.lax.axis_index("query")
    held, kv_head = length[sequence], jax.lax.div(head, jnp.int32(fixed.rules.group))
    first, start = block * QUERIES, jnp.int32(0)
    if fixed.rules.window is not None:
        start = jax.lax.div(jnp.maximum(first - (fixed.rules.window - 1), 0), jnp.int32(BLOCK))
    count = _tiles(start, first, QUERIES, held)

    @pl.when(group == READERS)
    def load() -> None:
        plgpu.set_max_registers(ring.LOADING, action="decrease")
        for index in range(READERS):
            mine = q.at[sequence, head, block * READERS + index]
            plgpu.copy_gmem_to_smem(mine, shared["q"].at[index], shared["q_ready"].at[index])

        @pl.loop(0, count)
        def each(j: Any) -> None:
            tokens = ring.rows_of(start + j)
            ring.bring(shared, "keys", j, keys.at[sequence, kv_head, tokens])
            ring.bring(shared, "values", j, values.at[sequence, kv_head, :, tokens])

    @pl.when(group < READERS)
    def read() -> None:
        plgpu.set_max_registers(ring.READING, action="increase")
        plgpu.barrier_wait(shared["q_ready"].at[group])
        mine = first + group * ROWS
        own, asked = _tiles(start, mine, ROWS, held), q_scale[sequence, head, block * READERS + group]

        def take(j: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tile = start + j
            scales = (asked * k_scale[sequence, kv_head, tile], v_scale[sequence, kv_head, tile])
            return _step(j, state, shared, scales, group, (mine, tile * BLOCK, held), fixed)

        state = jax.lax.fori_loop(0, own, take, _begin(q.shape[4], fixed))

        @pl.loop(own, count)
        def leave(j: Any) -> None:  # what the other reader alone sees
            for name in ("keys", "values"):
                ring.take(shared, name, j)
                ring.give(shared, name, j)

        mixed, _, total = state
        whole = jnp.where(total == 0.0, 1.0, total)
        found = (mixed / mosaic.across(whole, mixed)).astype(out.dtype)
        shared["out"][group] = found
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared["out"].at[group], out.at[sequence, head, pl.ds(mine, ROWS)])
        plgpu.wait_smem_to_gmem(0)


def _tiles(start: Any, first: Any, queries: int, length: Any) -> Any:
    """Tiles of keys from ``start`` on that so many queries from ``first`` on see."""
    last = jax.lax.div(jnp.minimum(first + queries, length) + (BLOCK - 1), jnp.int32(BLOCK))
    return jnp.where(first < length, jnp.maximum(last - start, 0), 0)


def _begin(size: int, fixed: Static) -> tuple[Array, Array, Array]:
    """Weighed values [64, H], maxima and sums of the softmax [64], of no token."""
    none = mosaic.full((ROWS, size), 0.0, interpreted=fixed.interpreted)
    peak, total = (mosaic.full((ROWS,), value, interpreted=fixed.interpreted) for value in (NONE, 0.0))
    return none, peak, total


def _step(
    j: Any,
    state: tuple[Array, Array, Array],
    shared: dict[str, Any],
    scales: tuple[Any, Any],
    group: Any,
    at: tuple[Any, Any, Any],
    fixed: Static,
) -> tuple[Array, Array, Array]:
    """One tile of keys. ``scales``: of scores, and of values; ``at``: the first query, the first key, the length."""
    (mixed, peak, total), interpreted = state, fixed.interpreted

    keys = ring.take(shared, "keys", j)
    met = mosaic.whole_product(shared["q"].at[group], keys, interpreted=interpreted)
    ring.give(shared, "keys", j)
    scores = _masked(met.astype(jnp.float32) * (scales[0] * fixed.rules.scale), *at, fixed)

    now = jnp.maximum(peak, scores.max(axis=1))
    factor = factor_of(now - peak, fixed)
    p = exponential(mosaic.across(jnp.maximum(now, NONE / 2), scores) - scores, fixed.sas)
    codes, scale = _codes(p, shared["scratch"].at[group], fixed)
    summed = p.sum(axis=1) if fixed.integer.denominator == "before" else codes.sum(axis=1) * scale

    held = shared["p"].at[group]
    plgpu.commit_smem()  # all warps have read what was there
    held[...] = codes.astype(jnp.int32).astype(jnp.int8)
    plgpu.commit_smem()
    values = ring.take(shared, "values", j)
    new = mosaic.whole_product(held, values, interpreted=interpreted).astype(jnp.float32)
    ring.give(shared, "values", j)
    by_row = mosaic.across(scale * scales[1], new)
    return mixed * mosaic.across(factor, mixed) + new * by_row, now, total * factor + summed


def _masked(scores: Array, first: Any, token: Any, length: Any, fixed: Static) -> Array:
    """Scores of queries from ``first`` on for keys from ``token`` on; ``NONE`` where a query does not see."""
    rules, interpreted = fixed.rules, fixed.interpreted
    if rules.softcap is not None:
        scores = mosaic.tanh(scores * (1 / rules.softcap)) * rules.softcap

    def mask(scores: Array) -> Array:
        row, column = (mosaic.iota(scores.shape, axis, interpreted=interpreted) for axis in (0, 1))
        query = first + row
        seen = rules.sees(token + column, query, length) & (query < length)
        return jnp.where(seen, scores, NONE)

    hidden = (token + (BLOCK - 1) > first) | (first + ROWS > length)
    if rules.window is not None:
        hidden |= token <= first + (ROWS - 1) - rules.window
    return jax.lax.cond(hidden, mask, lambda scores: scores, scores)


def _codes(p: Array, scratch: Any, fixed: Static) -> tuple[Array, Array]:
    """P of a tile in whole numbers within INT8, and the scale of every query, [64]."""
    if fixed.integer.p == "static":
        scale = mosaic.full((ROWS,), 1 / 127, interpreted=fixed.interpreted)
    else:
        top = p.max(axis=1)
        if fixed.integer.p == "tile":
            # The largest of all is so in every row.
            top = jnp.maximum(top, mosaic.over_rows(top, "max", scratch, interpreted=fixed.interpreted))
        scale = jnp.where(top == 0.0, 1.0, top * (1 / LIMIT))
    return jnp.round(p / mosaic.across(scale, p)), scale
