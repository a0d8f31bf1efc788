"""What the arrays of ``tile_columns`` have rows and columns of: a block's tiles, the heads at work, rows by the tile.

Of n queries (of every head its own) and the block's m tiles, an array has a row for each pair, [n*m, ...], the tiles of
a query one below the other; "among its m" is among those.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from slimjax.kernels.tpu.online import LANES


@dataclasses.dataclass(frozen=True)
class Block:
    """Of a block of m tiles, for each of the R queries that share a head, one below the other.

    Attributes:
        count: m.
        seen: the tokens of its tile that a row's query sees.
        ahead: tokens by which they are ahead of the query.
        there: tiles that hold anything.
    """

    count: int
    seen: Bool[Array, "R*m C"]
    ahead: Int32[Array, "R*m C"]
    there: Bool[Array, "m 1"]


def parts_of(bits: int) -> int:
    """Parts that a tile's codes are unpacked to. Those of 3 bits, two planes of other parts, are put in order."""
    return {2: 4, 4: 2}.get(bits, 1)


def block_of(
    bits: int, count: int, start: Any, length: Any, first: Any, limits: list[Any], fixed: Any
) -> Block:
    """The block of ``count`` tiles from the token ``start`` on, its columns part by part of the packed bytes.

    length: tokens in tiles; first: the position of the first query; limits: tokens in tiles that each of T queries
    sees.
    """
    tile, rules = fixed.tile, fixed.rules
    within = tile // parts_of(bits)  # tokens of a tile in one part
    column = jax.lax.broadcasted_iota(jnp.int32, (count, count * tile), 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (count, count * tile), 0)
    part, rest = divide(column, count * within)
    index, place = divide(rest, within)
    own, token = index == row, start + index * tile + part * within + place
    seen, ahead = [], []
    for query in range(rules.heads // rules.kv_heads * rules.tokens):
        at = query % rules.tokens
        mask = own & (token < limits[at])
        if rules.causal:
            mask = mask & (token <= first + at)
        if rules.window is not None:
            mask = mask & (token > first + at - rules.window)
        seen.append(mask.astype(jnp.int32))
        ahead.append(token - (first + at))
    there = start + row[:, :1] * tile < length
    return Block(count=count, seen=stacked(seen) != 0, ahead=stacked(ahead), there=there)


@dataclasses.dataclass(frozen=True)
class Work:
    """The heads at work: their groups, h heads of R queries each, and the columns of each group."""

    groups: list[Any]
    columns: list[Any]
    heads: int
    queries: int

    @property
    def rows(self) -> int:
        """h*R, of a group."""
        return self.heads * self.queries


def spread(rows: Float[Array, "hR #W"], mine: list[Array], queries: int) -> Float[Array, "R W"]:
    """Of rows for every head and query, those of each head in its own columns."""
    heads = [rows[i * queries : (i + 1) * queries] for i in range(len(mine))]
    found = heads[0]
    for own, each in zip(mine[1:], heads[1:], strict=True):
        found = jnp.where(own, each, found)
    return found


def stacked(parts: list[Array]) -> Array:
    """One below the other."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def across(x: Float[Array, "n 128"], like: Float[Array, "_ W"]) -> Float[Array, "n W"]:
    """A number a row, the same on all lanes, as wide as another array. Lanes are reused rather than broadcast."""
    width = like.shape[1]
    if width % LANES:
        return x[:, :1]
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def repeated(rows: Float[Array, "n L"], count: int) -> Float[Array, "n*m L"]:
    """Every row m times."""
    return stacked([jnp.broadcast_to(rows[i : i + 1], (count, rows.shape[1])) for i in range(rows.shape[0])])


def of_all(block: Array, work: Work) -> Array:
    """What holds of every head's queries, [R*m, C], of all rows."""
    return stacked([block] * (len(work.groups) * work.heads))


def of_rows(tiles: Float[Array, "m W"], rows: int) -> Float[Array, "hR*m W"]:
    """What holds of tiles, of all rows."""
    return stacked([tiles] * rows)


def every(x: Float[Array, "n*m L"], place: int, count: int) -> Float[Array, "n L"]:
    """One row of every m."""
    return stacked([x[i + place : i + place + 1] for i in range(0, x.shape[0], count)])


def summed(x: Float[Array, "n*m L"], count: int) -> Float[Array, "n L"]:
    """Over every m rows."""
    return stacked([jnp.sum(x[i : i + count], axis=0, keepdims=True) for i in range(0, x.shape[0], count)])


def divide(value: Array, by: int) -> tuple[Array, Array]:
    """Quotient and rest of numbers that are not negative."""
    quotient = jax.lax.div(value, jnp.full_like(value, by))
    return quotient, value - quotient * by


def place_of(x: Array, count: int) -> Array:
    """Of every row among its m."""
    return divide(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0), count)[1]


def moved(x: Array, by: int, neutral: float, count: int) -> Array:
    """Rows moved down by so many (up, if negative) among their m."""
    inside = place_of(x, count) >= by if by > 0 else place_of(x, count) < count + by
    return jnp.where(inside, pltpu.roll(x, by % x.shape[0], 0), neutral)


def along(
    x: Array, combine: Callable[[Array, Array], Array], neutral: float, count: int, *, backwards: bool = False
) -> Array:
    """Every row combined with all before it (behind it, backwards) among its m."""
    by = 1
    while by < count:
        x = combine(x, moved(x, -by if backwards else by, neutral, count))
        by *= 2
    return x
