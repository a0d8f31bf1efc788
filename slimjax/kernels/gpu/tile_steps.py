"""What a reader of ``tiles`` does with 64 rows of packed bytes: expand them, multiply, and take them into its softmax.

Arrays of scores and weights are [64, R], one for each part of a byte: a row is a row of bytes, whose parts are other
tokens of one tile, and a column a query.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from slimjax.attention.integer import Integer
from slimjax.cache.codecs.flashq import LIMIT
from slimjax.kernels.gpu import mosaic, ring
from slimjax.kernels.gpu.mosaic import LOG2E
from slimjax.kernels.gpu.packed import Packing, expanded
from slimjax.kernels.gpu.ring import READERS, Place, Rules, exponential

NONE = -1e30  # of a row that has seen nothing: finite, so that differences are
COLUMNS = {64: 64, 96: 32, 128: 64}  # expanded at a time, by the size of a head: more take too many registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Packing):
    """The static half of a call.

    Attributes:
        rules: as of other kernels; row m of a key head is query token m % T.
        integer: the compute mode, whose choices of P's scale, denominator and rescaling hold.
        sas: threshold and degree, or None for an exact softmax.
        interpreted: whether there is no GPU.
    """

    rules: Rules
    integer: Integer
    sas: tuple[float, int] | None
    interpreted: bool


def begin(shared: dict[str, Any], fixed: Static) -> tuple[Array, Array, Array]:
    """Maxima and sums of the softmax [R], and weighed values [W, R], of no token."""
    _, size, rows = shared["out"].shape
    none = mosaic.full((size, rows), 0.0, interpreted=fixed.interpreted)
    peak, total = (mosaic.full_columns(rows, value, interpreted=fixed.interpreted) for value in (NONE, 0.0))
    return peak, total, none


def step(
    i: Any,
    state: tuple[Array, Array, Array],
    *,
    shared: dict[str, Any],
    inputs: dict[str, Any],
    limit: Any,
    place: Place,
    group: Any,
    fixed: Static,
) -> tuple[Array, Array, Array]:
    """The tiles of a step, one after the other, as the reference takes them."""
    j = group + READERS * i
    block = place.start + j
    scores = _scores(shared, inputs["keys_scale"], limit, block, j, place, fixed)
    wide = shared["wide"].at[group]
    _widen(shared, wide, j, fixed)
    shape, highest = scores[0].shape, functools.reduce(jnp.maximum, scores)
    over_rows = functools.partial(
        mosaic.over_rows, scratch=shared["scratch"].at[group], interpreted=fixed.interpreted
    )

    def take(index: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, mixed = state
        mine = _tile_of(shape, fixed) == index
        now = jnp.maximum(peak, over_rows(jnp.where(mine, highest, NONE), "max"))
        factor = factor_of(now - peak, fixed)
        level = _down(jnp.maximum(now, NONE / 2), shape)
        p = [jnp.where(mine, exponential(level - each, fixed.sas), 0.0) for each in scores]
        codes, scale = _codes(p, over_rows, fixed)
        summed = (
            p if fixed.integer.denominator == "before" else [each * _down(scale, shape) for each in codes]
        )
        total = total * factor + over_rows(functools.reduce(jnp.add, summed), "add")
        new, across = _weighed(codes, shared["p"].at[group], wide, fixed), mixed.shape
        v_scale = _scale(inputs["values_scale"], block * fixed.count + index, place, fixed)
        return now, total, mixed * _down(factor, across) + new * _down(scale * v_scale, across)

    return jax.lax.fori_loop(0, fixed.count, take, state)


def _scale(scales: Any, tile: Any, place: Place, fixed: Static) -> Any:
    """Of a tile; 0 of one that is not there, which may hold anything."""
    scale = scales[place.sequence, jnp.minimum(tile, scales.shape[1] - 1), place.column]
    return jnp.where(tile * fixed.tile < place.length, scale, 0.0)


def _tile_of(shape: tuple[int, ...], fixed: Static) -> Array:
    """Which of the step's tiles a row is of."""
    return fixed.tile_of(mosaic.iota(shape, 0, interpreted=fixed.interpreted))


def _widen(shared: dict[str, Any], wide: Any, j: Any, fixed: Static) -> None:
    """Values' codes in shared memory, [64, H] for each part of a byte; columns behind H stay what they were."""
    held = _take(shared, "values", j, fixed)
    plgpu.commit_smem()  # all warps have read what was there

    def widen(part: Any, _: None) -> None:
        width = COLUMNS[held[""].shape[1]]
        for start in range(0, held[""].shape[1], width):
            columns = pl.ds(start, width)
            wide.at[part, :, columns][...] = _expanded(held, columns, part, fixed)

    jax.lax.fori_loop(0, fixed.parts, widen, None)
    _give(shared, "values", j, fixed)


def _names(name: str, fixed: Static) -> dict[str, str]:
    return {"": name} if fixed.bits == 8 else {"": name, "step": f"{name}_step", "low": f"{name}_low"}


def _take(shared: dict[str, Any], name: str, j: Any, fixed: Static) -> dict[str, Any]:
    return {kind: ring.take(shared, each, j) for kind, each in _names(name, fixed).items()}


def _give(shared: dict[str, Any], name: str, j: Any, fixed: Static) -> None:
    for each in _names(name, fixed).values():
        ring.give(shared, each, j)


def _expanded(held: dict[str, Any], columns: Any, part: Any, fixed: Static) -> BFloat16[Array, "64 w"]:
    """The INT8 codes of a part of a byte, which bfloat16 holds."""
    codes = expanded(held, columns, part, fixed, interpreted=fixed.interpreted)
    return codes.astype(jnp.float32).astype(jnp.bfloat16)


def _met(shared: dict[str, Any], j: Any, fixed: Static) -> list[Array]:
    """k q^T of every part, [64, R]: whole numbers."""
    held, q = _take(shared, "keys", j, fixed), shared["q"]

    def met(part: int) -> Array:
        sums = None
        width = COLUMNS[q.shape[1]]
        for start in range(0, q.shape[1], width):
            columns = pl.ds(start, width)
            rows = _expanded(held, columns, jnp.int32(part), fixed)
            new = mosaic.product(rows, q.at[:, columns], turned=True, interpreted=fixed.interpreted)
            sums = new if sums is None else sums + new
        assert sums is not None  # there are columns
        return sums

    found = [met(part) for part in range(fixed.parts)]
    _give(shared, "keys", j, fixed)
    return found


def _scores(
    shared: dict[str, Any], k_scale: Any, limit: Any, block: Any, j: Any, place: Place, fixed: Static
) -> list[Array]:
    """Scores of every part, [64, R]; ``NONE`` where a query does not see."""
    rules, interpreted = fixed.rules, fixed.interpreted
    met = _met(shared, j, fixed)
    shape = met[0].shape
    tile, scale = _tile_of(shape, fixed), jnp.zeros_like(met[0])
    for index in range(fixed.count):
        mine = _scale(k_scale, block * fixed.count + index, place, fixed)
        scale = jnp.where(tile == index, mine, scale)
    by_query = mosaic.by_column(shared["q_scale"].at[pl.ds(0, shape[1])], interpreted=interpreted)
    scale = scale * _down(by_query, shape) * rules.scale
    met = [each * scale for each in met]
    if rules.softcap is not None:
        met = [mosaic.tanh(each * (1 / rules.softcap)) * rules.softcap for each in met]
    row, column = (mosaic.iota(shape, axis, interpreted=interpreted) for axis in (0, 1))
    token = jax.lax.rem(column, jnp.int32(rules.tokens))  # of the query
    sees = jnp.zeros_like(row)
    for index in range(rules.tokens):
        sees = jnp.where(token == index, limit[place.sequence, index], sees)
    first, query = block * fixed.span + fixed.offset(row), place.first + token
    found = []
    for part, each in enumerate(met):
        at = first + part * fixed.rows
        seen = at < sees
        if rules.causal:
            seen &= at <= query
        if rules.window is not None:
            seen &= at > query - rules.window
        found.append(jnp.where(seen, each, NONE))
    return found


def _codes(p: list[Array], over_rows: Callable[..., Array], fixed: Static) -> tuple[list[Array], Array]:
    """P of a tile in whole numbers within INT8, and the scale of every query, [R]."""
    if fixed.integer.p == "static":
        scale = mosaic.full_columns(p[0].shape[1], 1 / 127, interpreted=fixed.interpreted)
    else:
        top = over_rows(functools.reduce(jnp.maximum, p), "max")
        scale = jnp.where(top == 0.0, 1.0, top * (1 / LIMIT))
    across = _down(scale, p[0].shape)
    return [jnp.round(each / across) for each in p], scale


def _weighed(codes: list[Array], held: Any, wide: Any, fixed: Static) -> Array:
    """v^T p8^T of all parts, [W, R]: whole numbers."""
    sums = None
    for part, each in enumerate(codes):
        plgpu.commit_smem()  # all warps have read what was there
        mosaic.store_turned(held, each.astype(jnp.bfloat16), interpreted=fixed.interpreted)
        plgpu.commit_smem()
        new = mosaic.turned_product(wide.at[part], held, interpreted=fixed.interpreted)
        sums = new if sums is None else sums + new
    assert sums is not None  # there is a part
    return sums


def factor_of(fall: Array, fixed: Static) -> Array:
    """Of what was summed under a lower maximum."""
    if fixed.integer.rescale == "exact" or fixed.sas is None:
        return jnp.exp2(fall * -LOG2E)
    return jnp.where(fall == 0.0, 1.0, exponential(fall, fixed.sas))


def _down(by_column: Array, shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcast_in_dim(by_column, shape, (1,))
