"""What the scorer of ``slim`` does with a block of 64 tokens: it turns and meets its rows, and weighs them.

Arrays of scores and weights are [64, M]: a row is a token, a column a query.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from slimjax.kernels.gpu import mosaic, ring
from slimjax.kernels.gpu.heads import capped
from slimjax.kernels.gpu.mosaic import LOG2E
from slimjax.kernels.gpu.ring import BLOCK, Place, Rules
from slimjax.kernels.gpu.share import TURNED, Share
from slimjax.numerics import MASK

COLUMNS, FEW = 32, 16  # of scores that are in registers at a time; where SAS takes some, too

Refs = dict[str, Any]


def score(
    arrays: Refs, log_sums: Any, shared: Refs, place: Place, rules: Rules, part: Share, interpreted: bool
) -> None:
    """The scorer: scores of its own heads, and, while they go round, weights of all heads of the block before."""
    plgpu.barrier_wait(shared["q_ready"])
    for index in range(2 if part.rotary else 0):
        plgpu.barrier_wait(shared["angles_ready"].at[index])
    _begin(shared, part, interpreted)
    limits = [arrays["limit"][place.sequence, index] for index in range(rules.tokens) if "limit" in arrays]

    def weights(j: Any) -> None:
        _weights(j, limits, shared, place, rules, part, interpreted)

    @pl.loop(0, place.count)
    def step(j: Any) -> None:
        shared["sent"][...] = _met(arrays, shared, j, place, part, interpreted)
        plgpu.commit_smem()
        rows = ring.rows_of(jax.lax.rem(j, jnp.int32(part.places)))
        target = arrays["scores"].at[place.sequence, place.part, rows, place.column]
        plgpu.copy_smem_to_gmem(shared["sent"], target)
        pl.when(j > 0)(lambda: weights(j - 1))
        plgpu.wait_smem_to_gmem(0)
        mosaic.order_global(interpreted=interpreted)
        plgpu.barrier_arrive(shared["met"].at[jax.lax.rem(j, jnp.int32(part.ahead))])

    @pl.when(place.count > 0)
    def last() -> None:
        weights(place.count - 1)
        plgpu.barrier_wait(shared["p_free"])

    _end(log_sums, shared, place, part, interpreted)


def _begin(shared: Refs, part: Share, interpreted: bool) -> None:
    for name, value in (("peak", -jnp.inf), ("total", 0.0)):
        shared[name][...] = mosaic.full_columns(part.queries, value, interpreted=interpreted)
    plgpu.commit_smem()


def _end(log_sums: Any, shared: Refs, place: Place, part: Share, interpreted: bool) -> None:
    """What the mixers' sums are divided by, and the log-sums."""
    peak, total = (mosaic.by_column(shared[name], interpreted=interpreted) for name in ("peak", "total"))
    sees = total > 0
    whole = jnp.where(sees, total, 1.0)
    shared["factor"][...] = 1 / whole
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared["p_ready"])

    @pl.when(place.column == 0)
    def once() -> None:
        shared["peak"][...] = jnp.where(sees, peak / LOG2E + jnp.log(whole), MASK)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared["peak"], log_sums.at[place.part, place.sequence])
        plgpu.wait_smem_to_gmem(0)


def _met(arrays: Refs, shared: Refs, j: Any, place: Place, part: Share, interpreted: bool) -> Array:
    """k q^T of the block's own heads, [64, R]."""
    block, sums = place.start + j, mosaic.full((BLOCK, part.rows), 0.0, interpreted=interpreted)

    def held(index: Any) -> tuple[Any, Any]:
        columns = pl.ds(index * part.piece, part.piece)
        return shared["keys"].at[part.slot(j, index)], shared["q"].at[:, columns]

    def wait(index: Any) -> None:
        plgpu.barrier_wait(shared["keys_ready"].at[part.slot(j, index)])
        if not (
            part.codes or part.packing
        ):  # which cannot be NaN. Not by a mixer, whose registers are all taken
            ring.clear(held(index)[0], block * BLOCK, place.length, interpreted=interpreted)

    def met(index: Any, sums: Array) -> Array:
        wait(index)
        return _product(sums, *held(index), part, interpreted)

    if not part.rotary:
        return jax.lax.fori_loop(0, part.pieces, met, sums)
    width = TURNED[part.size]
    starts = [_start(arrays, block, pl.ds(at, width), interpreted) for at in range(0, part.size // 2, width)]
    for index, start in enumerate(starts):
        turn, first = _turn(shared, start, pl.ds(index * width, width), interpreted), index * width

        def turned(index: Any, sums: Array, first: int = first, turn: tuple[Array, Array] = turn) -> Array:
            if first == 0:
                wait(index)
            return _turned(sums, *held(index), first, turn, part, interpreted)

        sums = jax.lax.fori_loop(0, part.pieces, turned, sums)
    return sums


def _product(sums: Array, keys: Any, q: Any, part: Share, interpreted: bool) -> Array:
    """With a piece's columns."""
    if not part.codes:
        return sums + mosaic.product(keys, q, turned=True, interpreted=interpreted)
    for start in range(0, part.piece, BLOCK):
        some = pl.ds(start, BLOCK)
        rows = numbers(mosaic.load(keys.at[:, some], interpreted=interpreted))
        pairs = [(each, q.at[:, some]) for each in parts(rows, part)]
        sums = mosaic.added(sums, pairs, interpreted=interpreted)
    return sums


def _start(arrays: Refs, block: Any, columns: Any, interpreted: bool) -> tuple[Array, Array]:
    """Cosines and sines of a block's first token, [W]: asked for before there are keys, as memory is far."""
    first, second = (
        mosaic.by_column(arrays[name].at[block, columns], far=True, interpreted=interpreted)
        for name in ("start_cos", "start_sin")
    )
    return first, second


def _turn(shared: Refs, start: tuple[Array, Array], columns: Any, interpreted: bool) -> tuple[Array, Array]:
    """Cosines and sines of a block's tokens, [64, W]: a turn by its start, and from there to the token."""
    cos, sin = (mosaic.load(shared[name].at[:, columns], interpreted=interpreted) for name in ("cos", "sin"))
    first, second = (mosaic.down(each, cos) for each in start)
    return cos * first - sin * second, sin * first + cos * second


def _turned(
    sums: Array, keys: Any, q: Any, first: int, turn: tuple[Array, Array], part: Share, interpreted: bool
) -> Array:
    """With some columns of a piece, from ``first`` on of each half of a head, turned by RoPE."""
    (cos, sin), half, width = turn, part.size // 2, TURNED[part.size]
    for head in range(first, part.piece, part.size):
        here, there = pl.ds(head, width), pl.ds(head + half, width)
        low, high = (
            numbers(mosaic.load(keys.at[:, columns], interpreted=interpreted)) for columns in (here, there)
        )
        both = ((here, low * cos - high * sin), (there, high * cos + low * sin))
        pairs = [(each, q.at[:, columns]) for columns, rows in both for each in parts(rows, part)]
        for start in range(0, len(pairs), 2):  # four parts, of codes, take more registers than there are
            sums = mosaic.added(sums, pairs[start : start + 2], interpreted=interpreted)
    return sums


def numbers(rows: Array) -> Array:
    """Codes, or bfloat16 rows, as float32."""
    return (rows.astype(jnp.int32) if rows.dtype == jnp.int16 else rows).astype(jnp.float32)


def parts(rows: Array, part: Share) -> list[Array]:
    """bfloat16 rows that add up to these: of codes, which have twice its bits, two."""
    high = rows.astype(jnp.bfloat16)
    return [high, (rows - high.astype(jnp.float32)).astype(jnp.bfloat16)] if part.codes else [high]


def _weights(
    j: Any, limits: list[Any], shared: Refs, place: Place, rules: Rules, part: Share, interpreted: bool
) -> None:
    """Weights of a block for the mixers, and what sums so far shrink by; peaks are those of scores times log2(e)."""
    plgpu.barrier_wait(shared["scores_ready"])

    @pl.when(j > 0)
    def wait() -> None:
        plgpu.barrier_wait(shared["p_free"])

    names = [name for name in ("keys_scale", "extra_scale") if name in shared]
    scales = [mosaic.by_row(ring.take(shared, name, j), interpreted=interpreted) for name in names]
    most = COLUMNS if rules.sas is None else FEW
    for start in range(0, part.queries, most):
        columns = pl.ds(start, min(most, part.queries - start))
        peak, total = (
            mosaic.by_column(shared[name].at[columns], interpreted=interpreted) for name in ("peak", "total")
        )
        raw = _summed(shared["scores"], columns, part, interpreted)
        if scales:
            raw *= mosaic.across(scales[0], raw)
        raw = _masked(capped(raw, rules), place.start + j, start, limits, place, rules, part, interpreted)
        now = jnp.maximum(peak, raw.max(axis=0))
        level = jnp.where(now == -jnp.inf, 0.0, now)  # of rows that have seen nothing: not inf - inf
        shrunk, p = jnp.exp2(peak - level), _exponential(mosaic.down(level, raw) - raw, rules)
        for name, weights in _weighing(p, scales, part).items():
            mosaic.store_turned(
                shared[name].at[columns], weights.astype(jnp.bfloat16), interpreted=interpreted
            )
        plgpu.commit_smem()  # all warps have read peaks and sums
        shared["factor"].at[columns][...] = shrunk
        shared["peak"].at[columns][...] = now
        shared["total"].at[columns][...] = total * shrunk + p.sum(axis=0)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared["scores_free"])
    plgpu.barrier_arrive(shared["p_ready"])
    for name in names:
        ring.give(shared, name, j)


def _exponential(fall: Array, rules: Rules) -> Array:
    """Of scores times log2(e) below a maximum, of which SAS's cut may be an earlier one's."""
    return jnp.exp2(-fall) if rules.sas is None else ring.exponential(fall * (1 / LOG2E), rules.sas)


def _summed(scores: Any, columns: Any, part: Share, interpreted: bool) -> Array:
    """Scores of some queries, [64, n]; of rows that every query meets, the sum of all blocks'."""
    starts = range(0, part.blocks * part.sent, part.sent) if part.latent else (0,)
    each = (pl.ds(start + columns.start, columns.size) for start in starts)
    found = [mosaic.load_columns(scores, mine, interpreted=interpreted) for mine in each]
    return functools.reduce(jnp.add, found)


def _weighing(p: Array, scales: list[Array], part: Share) -> dict[str, Array]:
    """Weights of the rows as they are cached. What is not seen may have any scale, and NaN."""
    if not part.codes:
        return {"p": p}
    return {
        name: jnp.where(p == 0.0, 0.0, p * mosaic.across(scale, p))
        for name, scale in zip(("p", "p_extra"), scales, strict=False)
    }


def _masked(
    raw: Array,
    block: Any,
    start: int,
    limits: list[Any],
    place: Place,
    rules: Rules,
    part: Share,
    interpreted: bool,
) -> Array:
    """Scores of a block from column ``start`` on, minus infinity where a row does not see.

    limits: tokens that queries of each token see, where that is not the whole sequence.
    """
    span, token = part.begin(block)

    def mask(raw: Array) -> Array:
        at = token + part.offset(mosaic.iota(raw.shape, 0, interpreted=interpreted))
        if rules.tokens == 1:
            return jnp.where(rules.sees(at, place.first, place.length), raw, -jnp.inf)
        column = start + mosaic.iota(raw.shape, 1, interpreted=interpreted)
        own = jax.lax.rem(column, jnp.int32(part.sent))
        own += jax.lax.rem(place.sequence, jnp.int32(part.groups)) * part.sent
        mine = jax.lax.div(own, jnp.int32(rules.group * part.width // part.size))
        seen = rules.sees(at, place.first + mine, place.length)
        for index, limit in enumerate(limits):
            seen &= (mine != index) | (at < limit)
        return jnp.where(seen, raw, -jnp.inf)

    hidden = rules.partly(span, place, part.span)
    for limit in limits:
        hidden |= span + part.span > limit
    return jax.lax.cond(hidden, mask, lambda raw: raw, raw)
