"""Decode attention over cached keys and values on Hopper: one pass, every row read once.

For the R query rows m (query tokens x query heads of one key head) and each token c that they see:

    s[m, c] = q[m] . k[c] * scale       p = softmax(s)       out[m] = sum_c p[m, c] v[c]

A block of threads works on one sequence, key head and part of the tokens. Its last warpgroup brings blocks of 64 tokens
to shared memory by TMA, straight from [B, C, K*H] rows as cached; the others take every other block, multiply it on
tensor cores (q k^T, p v) and keep a softmax of their own. All their answers are combined outside, by log-sums.

* Products have 64 rows, of which R are queries. The others hold what was in shared memory and are not written out: a
  row never mixes with another. At R = 1 that is 64 FLOP a byte read; the memory of a H100 allows 239.
* Tokens past a sequence's length may hold anything, NaN included: their scores are replaced, and their values are
  cleared in shared memory, because 0 * NaN is NaN. Past the capacity TMA itself gives zeros.
* Blocks that all rows see whole, which are nearly all, skip the masks.

Bytes: 4*K*H a token; for every part 260*K*R*H + 256*K written, and 2*K*R*H read. FLOPs: 256*K*H a token.
float32 softmax and sums; p is rounded to bfloat16.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from slimjax.axes import Lengths
from slimjax.kernels.gpu import mosaic
from slimjax.numerics import MASK

ROWS = 64  # of a product
BLOCK = 64  # tokens
READERS = 2  # warpgroups that multiply
BUFFERS = 144 * 1024  # bytes of shared memory for rows on their way; queries and answers take 40 to 80 KiB
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The static half of a call.

    Attributes:
        group, tokens: G, T; row m is query head m % G of query token m // G.
        scale, softcap, window, causal: as in ``DecodeSpec``.
    """

    group: int
    tokens: int
    scale: float
    softcap: float | None
    window: int | None
    causal: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What a block of threads works on: its indices, its sequence, and ``count`` blocks of tokens from ``start`` on."""

    sequence: Any
    head: Any
    part: Any
    length: Any
    first: Any
    start: Any
    count: Any


def depth(size: int) -> int:
    """Blocks of keys, and as many of values, that shared memory holds; each belongs to one reader."""
    return BUFFERS // (2 * 2 * BLOCK * size) // READERS * READERS


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
    parts, slots = splits * READERS, depth(size)
    shared = {
        "q": mosaic.tiled((ROWS, size), q.dtype),
        "keys": mosaic.tiled((slots, BLOCK, size), keys.dtype),
        "values": mosaic.tiled((slots, BLOCK, size), values.dtype),
        "out": mosaic.tiled((READERS, ROWS, size), jnp.float32),
        "log_sums": plgpu.SMEM((READERS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(),
        # Of every slot: its rows have come, its rows are no longer needed.
        **{
            f"{name}_{state}": plgpu.Barrier(num_barriers=slots)
            for name in ("keys", "values")
            for state in ("ready", "free")
        },
    }
    return mosaic.call(
        functools.partial(_kernel, rules=rules, splits=splits, interpreted=interpret is not False),
        out=(
            jax.ShapeDtypeStruct((parts, batch, kv_heads, rows, size), jnp.float32),
            jax.ShapeDtypeStruct((parts, batch, kv_heads, ROWS), jnp.float32),
        ),
        scratch=shared,
        # Heads first: neighbours read the same rows at the same time.
        grid={"head": kv_heads, "part": splits, "sequence": batch},
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
    place = _place(length, first, rules, splits)
    group = jax.lax.axis_index("group")

    @pl.when(group == READERS)
    def load() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _load(q, keys, values, shared, place)

    @pl.when(group < READERS)
    def read() -> None:
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(shared["q_ready"])
        step = functools.partial(
            _step, shared=shared, place=place, group=group, rules=rules, interpreted=interpreted
        )
        mine = jax.lax.div(place.count + (READERS - 1) - group, jnp.int32(READERS))
        state = jax.lax.fori_loop(0, mine, step, _begin(q.shape[-1], interpreted))
        _finish(state, out, log_sums, shared, place, group)


def _place(length: Any, first: Any, rules: Rules, splits: int) -> Place:
    """Of the blocks that any row sees, an even share: a short sequence is cut as finely as a long one."""
    sequence, head, part = (jax.lax.axis_index(name) for name in ("sequence", "head", "part"))
    held, position, block = length[sequence], first[sequence], jnp.int32(BLOCK)
    end = jnp.minimum(held, position + rules.tokens) if rules.causal else held
    begin = jnp.int32(0)
    if rules.window is not None:
        begin = jax.lax.div(jnp.maximum(position - (rules.window - 1), 0), block)
    last = jax.lax.div(jnp.maximum(end, 0) + (BLOCK - 1), block)
    share = jax.lax.div(jnp.maximum(last - begin, 0) + (splits - 1), jnp.int32(splits))
    start = begin + part * share
    count = jnp.maximum(jnp.minimum(last, start + share) - start, 0)
    return Place(
        sequence=sequence, head=head, part=part, length=held, first=position, start=start, count=count
    )


def _load(q: Any, keys: Any, values: Any, shared: dict[str, Any], place: Place) -> None:
    """Bring the queries, then each block as soon as its slot is free."""
    rows, size = q.shape[2:]
    slots = shared["keys"].shape[0]
    mine = q.at[place.sequence, place.head]
    plgpu.copy_gmem_to_smem(mine, shared["q"].at[pl.ds(0, rows)], shared["q_ready"])

    @pl.loop(0, place.count)
    def bring(j: Any) -> None:
        slot = jax.lax.rem(j, jnp.int32(slots))
        tokens = pl.ds((place.start + j) * BLOCK, BLOCK)
        for name, cached in (("keys", keys), ("values", values)):

            @pl.when(j >= slots)
            def wait(name: str = name) -> None:
                plgpu.barrier_wait(shared[f"{name}_free"].at[slot])

            source = cached.at[place.sequence, tokens, pl.ds(place.head * size, size)]
            plgpu.copy_gmem_to_smem(source, shared[name].at[slot], shared[f"{name}_ready"].at[slot])


def _begin(size: int, interpreted: bool) -> tuple[Array, Array, Array]:
    """Weighed values [64, H], peaks and sums of the softmax [64], of no token."""

    def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        return mosaic.laid(jnp.full(shape, value, jnp.float32), layout, interpreted=interpreted)

    by_row = plgpu.Layout.WGMMA.reduce(1)
    peaks, sums = full((ROWS,), -jnp.inf, by_row), full((ROWS,), 0.0, by_row)
    return full((ROWS, size), 0.0, plgpu.Layout.WGMMA), peaks, sums


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
    slot = jax.lax.rem(j, jnp.int32(shared["keys"].shape[0]))
    token = (place.start + j) * BLOCK

    plgpu.barrier_wait(shared["keys_ready"].at[slot])
    raw = mosaic.product(shared["q"], shared["keys"].at[slot], turned=True, interpreted=interpreted)
    plgpu.barrier_arrive(shared["keys_free"].at[slot])
    raw = _masked(_capped(raw, rules), token, place, rules, interpreted)

    now = jnp.maximum(peak, raw.max(axis=1))
    level = jnp.where(now == -jnp.inf, 0.0, now)  # of rows that have seen nothing: not inf - inf
    shrunk = jnp.exp2(peak - level)
    p = jnp.exp2(raw - _across(level, raw))
    total = total * shrunk + p.sum(axis=1)

    plgpu.barrier_wait(shared["values_ready"].at[slot])
    values = shared["values"].at[slot]

    @pl.when(token + BLOCK > place.length)
    def clear() -> None:
        inside = token + mosaic.iota(values.shape, 0, interpreted=interpreted) < place.length
        rows = values[...]
        values[...] = jnp.where(inside, rows, jnp.zeros_like(rows))
        plgpu.commit_smem()

    new = mosaic.product(p.astype(values.dtype), values, interpreted=interpreted)
    plgpu.barrier_arrive(shared["values_free"].at[slot])
    return mixed * _across(shrunk, mixed) + new, now, total


def _across(by_row: Array, like: Array) -> Array:
    return jax.lax.broadcast_in_dim(by_row, like.shape, (0,))


def _capped(raw: Array, rules: Rules) -> Array:
    """Scores times log2(e)."""
    if rules.softcap is None:
        return raw * (rules.scale * LOG2E)
    return jnp.tanh(raw * (rules.scale / rules.softcap)) * (rules.softcap * LOG2E)


def _masked(raw: Array, token: Any, place: Place, rules: Rules, interpreted: bool) -> Array:
    """Scores from ``token`` on, minus infinity where a row does not see."""
    partly = token + BLOCK > place.length
    if rules.causal:
        partly |= token + (BLOCK - 1) > place.first
    if rules.window is not None:
        partly |= token <= place.first + (rules.tokens - 1 - rules.window)

    def mask(raw: Array) -> Array:
        at = token + mosaic.iota(raw.shape, 1, interpreted=interpreted)
        query = place.first
        if rules.tokens > 1:
            query += jax.lax.div(mosaic.iota(raw.shape, 0, interpreted=interpreted), jnp.int32(rules.group))
        seen = at < place.length
        if rules.causal:
            seen &= at <= query
        if rules.window is not None:
            seen &= at > query - rules.window
        return jnp.where(seen, raw, -jnp.inf)

    return jax.lax.cond(partly, mask, lambda raw: raw, raw)


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
    shared["out"][group] = mixed / _across(whole, mixed)
    shared["log_sums"][group] = jnp.where(sees, peak / LOG2E + jnp.log(whole), MASK)
    plgpu.commit_smem()
    at = (place.part * READERS + group, place.sequence, place.head)
    rows = pl.ds(0, out.shape[3])
    plgpu.copy_smem_to_gmem(shared["out"].at[group, rows], out.at[at])
    plgpu.copy_smem_to_gmem(shared["log_sums"].at[group], log_sums.at[at])
    plgpu.wait_smem_to_gmem(0)
