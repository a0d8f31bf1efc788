"""What a mixer of ``slim`` does: it adds up rows by their weights, out^T += k^T p^T, columns by columns."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from slimjax.kernels.gpu import mosaic, ring
from slimjax.kernels.gpu.ring import BLOCK, Place
from slimjax.kernels.gpu.share import MIXERS, Share
from slimjax.kernels.gpu.slim_steps import Refs, numbers, parts

Sums = tuple[Array, ...]  # by product [W, M]; of extra coordinates [64, M] comes last


def mix(out: Any, shared: Refs, place: Place, group: Any, part: Share, interpreted: bool) -> None:
    """The weighed sums of its columns; the first mixer of all has those of extra coordinates, too."""
    mine, half = (place.column == 0) & (group == 0), part.pieces // MIXERS
    rows = [part.product] * part.sums + ([BLOCK] if part.extra else [])
    none = tuple(mosaic.full((count, part.queries), 0.0, interpreted=interpreted) for count in rows)

    def step(j: Any, mixed: Sums) -> Sums:
        plgpu.barrier_wait(shared["p_ready"])

        # All pieces, though half of them are the other's: who waits for some turns of a slot only loses count of them.
        @pl.loop(0, part.pieces)
        def wait(index: Any) -> None:
            slot = part.slot(j, index)
            plgpu.barrier_wait(shared["keys_ready"].at[slot])

            @pl.when(jax.lax.div(index, jnp.int32(half)) != group)
            def other() -> None:
                plgpu.barrier_arrive(shared["keys_free"].at[slot])

        found = _added(mixed[: part.sums], shared, j, group, part, interpreted)
        if part.extra:

            def more(sums: Array) -> Array:
                return _extra(sums, shared, j, place, part, interpreted)

            found = (*found, jax.lax.cond(mine, more, lambda sums: sums, mixed[-1]))
        plgpu.barrier_arrive(shared["p_free"])
        return found

    mixed = jax.lax.fori_loop(0, place.count, step, none)
    plgpu.barrier_wait(shared["p_ready"])  # what sums are divided by
    _store(mixed, out.at[place.part, place.sequence], shared, place, group, mine, part, interpreted)


def _factored(sums: Array, shared: Refs, interpreted: bool) -> Array:
    """Sums less what they shrink by."""
    return sums * mosaic.down(mosaic.by_column(shared["factor"], interpreted=interpreted), sums)


def _added(mixed: Sums, shared: Refs, j: Any, group: Any, part: Share, interpreted: bool) -> Sums:
    """With a block of tokens, of the mixer's columns."""
    first, found = group * (part.pieces // MIXERS), []
    for index, sums in enumerate(mixed):
        piece, start = divmod(index * part.product, part.piece)
        keys = shared["keys"].at[part.slot(j, first + piece)]
        onto = _factored(sums, shared, interpreted)
        if part.codes:
            codes = mosaic.load_turned(keys.at[:, pl.ds(start, BLOCK)], interpreted=interpreted)
            pairs = [(each, shared["p"]) for each in parts(numbers(codes), part)]
            onto = mosaic.added(onto, pairs, interpreted=interpreted)
        else:
            onto = mosaic.turned_product(keys, shared["p"], onto=onto, interpreted=interpreted)
        found.append(onto)
        if start + part.product == part.piece:
            plgpu.barrier_arrive(shared["keys_free"].at[part.slot(j, first + piece)])
    return tuple(found)


def _extra(sums: Array, shared: Refs, j: Any, place: Place, part: Share, interpreted: bool) -> Array:
    """With a block of tokens, of extra coordinates; those behind the sequence's end may be NaN."""
    rows = mosaic.load(ring.take(shared, "extra", j), interpreted=interpreted)
    _, first = part.begin(place.start + j)
    at = first + part.offset(mosaic.iota(rows.shape, 1, interpreted=interpreted))
    seen = jnp.where(at < place.length, rows, jnp.zeros_like(rows))
    split = parts(numbers(seen), part) if part.codes else [seen]
    weights = shared["p_extra" if part.codes else "p"]
    pairs = [(each, weights) for each in split]
    sums = mosaic.added(_factored(sums, shared, interpreted), pairs, interpreted=interpreted)
    ring.give(shared, "extra", j)
    return sums


def _store(
    mixed: Sums,
    out: Any,
    shared: Refs,
    place: Place,
    group: Any,
    mine: Any,
    part: Share,
    interpreted: bool,
) -> None:
    """Answers [E+64, M], straight to global memory: the registers that addresses take are free by now."""
    first = place.column * part.width + group * (part.width // MIXERS)
    for index, sums in enumerate(mixed[: part.sums]):
        rows = pl.ds(first + index * part.product, part.product)
        out.at[rows][...] = _factored(sums, shared, interpreted)
    if part.extra:

        @pl.when(mine)
        def end() -> None:
            rows = pl.ds(part.blocks * part.width, BLOCK)
            out.at[rows][...] = _factored(mixed[-1], shared, interpreted)
