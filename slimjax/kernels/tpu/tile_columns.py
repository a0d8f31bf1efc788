"""Some heads' columns of a block of FlashQ's tiles taken into an online softmax: what ``flashq`` does at every step.

Arrays of weights have a row for each of n queries (of every head its own) and each of the block's m tiles, and a column
for each token: [n*m, C]. A row sees its own tile's tokens. Tiles are taken in order, as the reference takes them: a
tile's weights are relative to the maximum up to it. All heads of a batch go through a step together: their steps wait
long, and not for each other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from slimjax.attention.softmax import exponential_of
from slimjax.cache.codecs.flashq import LIMIT
from slimjax.kernels.tpu.tile_rows import (
    Block,
    Work,
    across,
    along,
    divide,
    every,
    moved,
    of_all,
    of_rows,
    place_of,
    repeated,
    spread,
    stacked,
    summed,
)
from slimjax.kernels.tpu.tiled_rows import unpacked
from slimjax.numerics import MASK

HALF = 128  # q * step = HALF * high + low, both INT8


def take(section: Any, state: tuple[Any, Any, Any], works: list[Work], block: Block, fixed: Any) -> None:
    """Bring the state up to date. All is read before anything is stored: a store holds up every load behind it.

    A batch's queries meet keys before the batch ahead of it is weighed, so that products and softmax overlap.
    """
    befores = [
        _State(
            peak=_of_groups(state[0], work),
            total=_of_groups(state[1], work),
            out=[state[2][:, columns] for columns in work.columns],
        )
        for work in works
    ]
    met = [_met(section, works[0], block, fixed)]
    afters = []
    for place, (work, before) in enumerate(zip(works, befores, strict=True)):
        met += [_met(section, each, block, fixed) for each in works[place + 1 : place + 2]]
        afters.append(_after(section, before, work, met[place], block, fixed))
    for work, after in zip(works, afters, strict=True):
        for place, (group, columns) in enumerate(zip(work.groups, work.columns, strict=True)):
            rows = slice(place * work.rows, (place + 1) * work.rows)
            state[0][group], state[1][group] = after.peak[rows], after.total[rows]
            state[2][:, columns] = after.out[place]


@dataclasses.dataclass(frozen=True)
class _State:
    """Of the heads at work: maxima and denominators, [n, 128], and a group's sums, [R, W] each."""

    peak: Array
    total: Array
    out: list[Array]


def _of_groups(ref: Any, work: Work) -> Float[Array, "n 128"]:
    """Numbers of all heads at work and their queries."""
    return stacked([ref[group] for group in work.groups])


def _met(section: Any, work: Work, block: Block, fixed: Any) -> Float[Array, "n*m C"]:
    found = []
    for columns in work.columns:
        k = _Columns(section.k, columns, section.bits, fixed.dtype)
        found.append(_scores(section.q[:, columns], k, _mine(work), block.count))
    return stacked(found)


def _mine(work: Work) -> list[Bool[Array, "1 W"]]:
    """The columns of each head of a group."""
    width = work.columns[0].size
    head = divide(jax.lax.broadcasted_iota(jnp.int32, (1, width), 1), width // work.heads)[0]
    return [head == i for i in range(work.heads)]


def _after(section: Any, before: _State, work: Work, met: Array, block: Block, fixed: Any) -> _State:
    """The state with a batch of heads."""
    mine = _mine(work)
    scores = _biased(met, section, work, block, fixed)
    weights = _weights(scores, [before.peak, before.total], block, work, fixed)
    values = [_Columns(section.v, columns, section.bits, fixed.dtype) for columns in work.columns]
    fresh = _weighed(weights, values, _scales(section.v, work, block), mine, work, block.count)
    out = []
    for place, (old, new) in enumerate(zip(before.out, fresh, strict=True)):
        rows = slice(place * work.rows, (place + 1) * work.rows)
        out.append(old * spread(across(weights.kept[rows], old), mine, work.queries) + new)
    return _State(peak=weights.peak, total=weights.total, out=out)


class _Columns:
    """Columns of a block of tiles: codes, part by part, and what they are scaled and shifted by."""

    def __init__(self, stream: Any, columns: Any, bits: int, dtype: str) -> None:
        count = stream.scale.shape[0]
        self.parts = [each.astype(jnp.int8) for each in _unpacked(stream.packed[:, columns], bits, count)]
        if dtype != "int8":
            self.parts = [each.astype(jnp.float32).astype(dtype) for each in self.parts]
        self.dtype = dtype
        self.step, self.low = (
            None if each is None else each[:, columns].astype(jnp.float32)
            for each in (stream.step, stream.low)
        )

    def dot(self, a: Array, part: int, over: int) -> Array:
        """a [rows, k] with axis ``over`` of a part of the codes; whole numbers, int32 or float32."""
        sums = jnp.int32 if self.dtype == "int8" else jnp.float32
        whole = a.astype(jnp.int32).astype(jnp.int8) if self.dtype == "int8" else a.astype(self.dtype)
        dims = (((1,), (over,)), ((), ()))
        return jax.lax.dot_general(whole, self.parts[part], dims, preferred_element_type=sums)


def _unpacked(packed: Array, bits: int, count: int) -> list[Array]:
    if bits == 8:
        return [packed]
    if bits == 3:
        return [unpacked(packed, bits, count).reshape(-1, packed.shape[1])]
    mask = jnp.int32(int.from_bytes(bytes([2**bits - 1] * 4)))
    words = pltpu.bitcast(packed, jnp.int32)
    return [pltpu.bitcast((words >> shift) & mask, jnp.uint8) for shift in range(0, 8, bits)]


def _scores(q: Array, k: _Columns, mine: list[Array], count: int) -> Float[Array, "hR*m C"]:
    """q . k of the codes of a group: whole numbers."""
    rows, lows = [], []
    for own in mine:
        for query in range(q.shape[0]):
            here = jnp.where(own, q[query : query + 1], 0.0)
            rows.append(jnp.broadcast_to(here, (count, q.shape[1])) if k.step is None else here * k.step)
            lows.append(None if k.low is None else here * k.low)
    whole, size = stacked(rows), len(rows) * count
    if k.step is None:
        met = jnp.concatenate([k.dot(whole, part, 1) for part in range(len(k.parts))], axis=1)
        return met.astype(jnp.float32)
    high = jnp.floor((whole + HALF // 2) * (1 / HALF))
    whole = jnp.concatenate([high, whole - HALF * high], axis=0)
    met = jnp.concatenate([k.dot(whole, part, 1) for part in range(len(k.parts))], axis=1)
    codes = (HALF * met[:size] + met[size:]).astype(jnp.float32)
    return codes + jnp.sum(stacked(lows), axis=1, keepdims=True)


def _scales(stream: Any, work: Work, block: Block) -> Float[Array, "n*m 1"]:
    """Every row's scale; 0 of tiles that are not there, which may hold anything."""
    lane = jax.lax.broadcasted_iota(jnp.int32, stream.scale.shape, 1)
    scale = jnp.where(block.there, stream.scale[...], 0.0)
    heads = [group * work.heads + i for group in work.groups for i in range(work.heads)]
    rows = [jnp.where(lane == head, scale, 0.0) for head in heads for _ in range(work.queries)]
    return jnp.sum(stacked(rows), axis=1, keepdims=True)


def _biased(met: Array, section: Any, work: Work, block: Block, fixed: Any) -> Float[Array, "n*m C"]:
    """Scores from sums of codes: scaled, capped and biased."""

    def rows(ref: Any) -> Array:
        return repeated(_of_groups(ref, work), block.count)

    factor = rows(section.q_scale) * (_scales(section.k, work, block) * fixed.rules.scale)
    score = met * across(factor, met)
    if fixed.rules.softcap is not None:
        score = fixed.rules.softcap * jnp.tanh(score / fixed.rules.softcap)
    if section.slopes is not None:
        far = jnp.abs(of_all(block.ahead, work)).astype(jnp.float32)
        score = score - across(rows(section.slopes), far) * far
    return score if section.bias is None else score + rows(section.bias)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """P's codes and their scales (what comes later counted in) and sums; the factor of what was summed before; and the
    new maximum and denominator.
    """

    codes: Float[Array, "n*m C"]
    scale: Float[Array, "n*m 1"]
    counted: Float[Array, "n*m 1"]
    kept: Float[Array, "n 128"]
    peak: Float[Array, "n 128"]
    total: Float[Array, "n 128"]


def _weights(score: Array, befores: list[Array], block: Block, work: Work, fixed: Any) -> _Weights:
    """One step of the online softmax."""
    integer, count, exponential = fixed.integer, block.count, exponential_of(fixed.softmax)
    assert exponential is not None  # refused before
    seen = of_all(block.seen.astype(jnp.int32), work) != 0
    masked = jnp.where(seen, score, MASK)
    before = repeated(befores[0], count)
    tops = jnp.broadcast_to(jnp.max(masked, axis=1, keepdims=True), before.shape)
    peaks = jnp.maximum(along(tops, jnp.maximum, MASK, count), before)
    fall = peaks - jnp.where(place_of(peaks, count) == 0, before, moved(peaks, 1, MASK, count))
    factor = jnp.exp(-fall) if integer.rescale == "exact" else jnp.where(fall == 0, 1.0, exponential(fall))
    later = along(moved(factor, -1, 1.0, count), jnp.multiply, 1.0, count, backwards=True)
    # Far above what is masked, even where nothing is seen yet, so that its weights are zero.
    p = exponential(across(jnp.maximum(peaks, MASK / 2), masked) - masked)
    codes, scale = _codes(p, integer.p)
    counted = jnp.sum(codes, axis=1, keepdims=True)
    sums = jnp.sum(p, axis=1, keepdims=True) if integer.denominator == "before" else counted * scale
    kept = every(factor * later, 0, count)
    return _Weights(
        codes=codes,
        scale=scale * across(later, scale),
        counted=counted,
        kept=kept,
        peak=every(peaks, count - 1, count),
        total=kept * befores[1] + summed(later * sums, count),
    )


def _codes(p: Array, chosen: str) -> tuple[Array, Array]:
    """P in whole numbers within INT8, a scale for every row."""
    if chosen == "static":
        scale = jnp.full((p.shape[0], 1), 1 / 127, jnp.float32)
    else:
        top = jnp.max(p, axis=1, keepdims=True)
        scale = jnp.where(top == 0, 1.0, top / LIMIT)
    return jnp.round(p * (1 / scale)), scale


def _weighed(
    weights: _Weights, values: list[_Columns], v_scale: Array, mine: list[Array], work: Work, count: int
) -> list[Float[Array, "R W"]]:
    """The weighted values of every group, each head's own columns."""
    size, found = work.rows * count, []
    factor = weights.scale * v_scale
    for place, v in enumerate(values):
        rows = slice(place * size, (place + 1) * size)
        codes, tokens = weights.codes[rows], v.parts[0].shape[0]
        met = [v.dot(codes[:, i * tokens : (i + 1) * tokens], i, 0) for i in range(len(v.parts))]
        weighed = sum(met[1:], met[0]).astype(jnp.float32)
        if v.step is not None and v.low is not None:
            step, low = (of_rows(each, work.rows) for each in (v.step, v.low))
            weighed = weighed * step + weights.counted[rows] * low
        found.append(spread(summed(weighed * factor[rows], count), mine, work.queries))
    return found
