"""Decode attention over FlashQ's tiles on TPU (arXiv 2412.08585): integer products of codes that are never expanded.

A code c of channel e in tile t stands for low[t, e] + step[t, e] c. So the queries take the steps, and sums the rest:

    q . k = sum_e (q[e] step[t, e]) c[e] + sum_e q[e] low[t, e]
    p V   = (sum_j p[j] c[j, e]) step[t, e] + (sum_j p[j]) low[t, e]

* Every tile has steps of its own, so a query has a row for each of a block's m tiles: products meet all tokens of the
  block, and what a row has of other tiles is dropped. Softmax and sums keep that shape, [rows of queries * m, tokens],
  in which a tile's maximum, scale and sum are its row's.
* q step has 15 bits at most: 128 hi + lo, both INT8, in one product of twice the rows.
* Codes of 4 and 2 bits lie by parts (``cache.pack``): a byte's parts are other tokens of its tile, and a shift and a
  mask of whole words unpack them. Codes of 3 bits, two planes, are put in the order of their tokens.

All sums are the integers of the reference; where no unit multiplies INT8 (v4, v7x), bfloat16 products have them, too.
Bytes per token: K H (bits + 16/G) / 8 and 4 K / G, twice. FLOPs per token: 4 N T H count, 12 m N T H are done.
Grid: (sequence, part, block of tiles); blocks that no query sees cost no copy. The buffer is not read here:
``flashq_decode`` adds it to the state that this returns. Parts are put together by exact exponentials; SAS's weights
are relative to each part's own maximum, so it is given one part unless more are asked for.

Of a grid step: m tiles of G tokens, 8, 16 or 32 of them, so that a byte's parts fill lanes; codes [m G bits/8, K H],
steps and lows [m, K H], scales [m, K]; queries [R, K H], R of those that share a head; 2,048 columns at work. Scheduled
cycles of a 128x128 tile of cached values / those in which its bytes come from HBM, without waits, and not timed on any
TPU (jax 0.12.0.1, libtpu 0.0.52, 2026-11-23; batch 16, 8,192 tokens; experiments/records/tpu_matrix.jsonl):

                                   v4        v5e      v5p      v6e      v7x
    kv:flashq4       llama-2-7b    227 / 15  15 / 16  16 / 11  14 / 9   20 / 4
    kv:flashq4       smollm2-1.7b  248 / 15  24 / 16  27 / 11  25 / 9   31 / 4
    kv:flashq2       smollm2-1.7b  242 / 8   24 / 8   27 / 6   29 / 5   40 / 2
    kv:flashq8       smollm2-1.7b  234 / 28  20 / 30  24 / 21  20 / 18  26 / 8
    kv:flashq2-4@sas smollm2-1.7b  267 / 11  32 / 12  37 / 8   33 / 7   40 / 3

Limits: memory decides on v5e alone, for heads of 128 or codes of 8 bits; v4 and v7x widen codes to bfloat16; two heads
of 64 share 128 columns, half of them zero. 3 bits and trained biases are interpreted, and compiled for no TPU yet.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from slimjax.attention.integer import Integer
from slimjax.kernels.tiles import Tiles
from slimjax.kernels.tpu.online import LANES, Rules, locate
from slimjax.kernels.tpu.tile_columns import take
from slimjax.kernels.tpu.tile_rows import Block, Work, block_of
from slimjax.numerics import MASK
from slimjax.pytree import pytree, static

# In a trip of the loop over heads, at most: columns, queries of all heads, and how many of these go through a step
# together. More hide more waiting (16 heads against 4: half the cycles), and take longer to compile.
COLUMNS, QUERIES, BATCH = 2048, 16, 8


@pytree
class Stream:
    """Tiles of keys or values of some heads, as they are cached: n tiles of g rows (``cache.layout.LaidTiles``).

    Attributes:
        packed: uint8, or int8 of 8-bit codes, which have no step and low.
        scale: of each tile and head.
    """

    packed: Array  # [B, n*g, K*H]
    step: Array | None  # [B, n, K*H], int8
    low: Array | None
    scale: Float[Array, "B n K"]


@pytree
class Section:
    """Heads of one width, and their queries.

    Attributes:
        q: INT8 codes in the columns of their heads; a row for each of the R = G*T queries that share a head.
        q_scale: of each query, R rows for each head of a group of columns, on all lanes.
        slopes: ALiBi's, likewise.
        bias: of a trained position scheme, what is added to every score, a block's tokens in the order in which its
            codes are unpacked: 4 N T bytes more a token.
        bits: 2, 3, 4 or 8.
    """

    q: Float[Array, "B R W"]
    q_scale: Float[Array, "B groups hR 128"]
    slopes: Float[Array, "groups hR 128"] | None
    bias: Float[Array, "B groups hR C"] | None
    k: Stream
    v: Stream
    bits: int = static()

    @property
    def heads(self) -> int:
        """K of them."""
        return self.k.scale.shape[-1]

    @property
    def width(self) -> int:
        """W = K*H."""
        return self.q.shape[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """The static half of a call.

    Attributes:
        rules: as of other kernels.
        integer: the compute mode, whose choices of P's scale, denominator and rescaling hold.
        softmax: which exponential.
        tile: G, tokens.
        dtype: of the operands of products, int8 or bfloat16.
    """

    rules: Rules
    integer: Integer
    softmax: str
    tile: int
    dtype: str


def together(heads: int, size: int) -> int:
    """Heads whose columns are worked on together: whole lanes, or all."""
    some = LANES // math.gcd(size, LANES)
    return some if heads % some == 0 else heads


def at_once(heads: int, size: int, queries: int) -> int:
    """Groups of heads in a trip of the loop."""
    some = together(heads, size)
    return max(1, min(heads // some, COLUMNS // (some * size), QUERIES // (some * queries)))


def trips(heads: int, size: int, queries: int) -> int:
    """How often the loop over heads runs, 1 where there is none."""
    return max(1, heads // together(heads, size) // at_once(heads, size, queries))


def attend_tiles(
    length: Int32[Array, "B"],
    first: Int32[Array, "B"],
    limit: Int32[Array, "B*T"],
    sections: tuple[Section, ...],
    fixed: Static,
    tiles: Tiles,
    *,
    interpret: Any = False,
) -> list[tuple[Array, Array, Array]]:
    """The online softmax over tiles, for every section: peak and total [P, B, groups, hR, 128], out [P, B, R, W].

    length: tokens in tiles that some query sees; first: positions of first queries; limit: tokens in tiles that each of
    the T queries sees.
    """
    count = tiles.block // fixed.tile  # m
    blocks = math.ceil(sections[0].k.scale.shape[1] / count)
    steps = math.ceil(blocks / tiles.splits)
    where = functools.partial(locate, rules=fixed.rules, block=tiles.block, blocks=blocks, steps=steps)

    def block(array: Array, *, own: bool) -> pl.BlockSpec:
        """All of a sequence's, or the rows of a block's tiles."""
        if not own:
            return pl.BlockSpec((None, *array.shape[1:]), lambda b, s, j, *_: (b, *(0,) * (array.ndim - 1)))
        rows = array.shape[1] // sections[0].k.scale.shape[1] * count
        return pl.BlockSpec((None, rows, array.shape[2]), lambda *at: (at[0], where(*at[:5])[1], 0))

    def shared(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda b, s, j, *_: (0,) * array.ndim)

    def scores(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, *array.shape[1:3], tiles.block), lambda *at: (at[0], 0, 0, where(*at[:5])[1])
        )

    def specs(section: Section) -> Section:
        streams = {n: jax.tree.map(functools.partial(block, own=True), getattr(section, n)) for n in "kv"}
        mine: Any = {n: block(getattr(section, n), own=False) for n in ("q", "q_scale")}
        slopes: Any = None if section.slopes is None else shared(section.slopes)
        bias: Any = None if section.bias is None else scores(section.bias)
        return Section(**mine, **streams, slopes=slopes, bias=bias, bits=section.bits)

    def state(section: Section) -> tuple[tuple[int, ...], ...]:
        return (section.q_scale.shape[1:], section.q_scale.shape[1:], section.q.shape[1:])

    def part(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, s, j, *_: (s, b, *(0,) * len(shape)))

    states = [state(section) for section in sections]
    batch = len(length)
    return pl.pallas_call(
        functools.partial(_kernel, fixed=fixed, where=where, block=tiles.block, steps=steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, tiles.splits, steps),
            in_specs=[tuple(map(specs, sections))],
            out_specs=[tuple(map(part, shapes)) for shapes in states],
        ),
        out_shape=[
            tuple(jax.ShapeDtypeStruct((tiles.splits, batch, *shape), jnp.float32) for shape in shapes)
            for shapes in states
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        interpret=interpret,
        name="slimjax_flashq",
    )(length, first, limit, sections)


def _kernel(
    # prefetched: [B], [B], [B*T]
    length: Any,
    first: Any,
    limit: Any,
    # inputs, each its block
    sections: tuple[Section, ...],
    # outputs, which are the running state: peak, total and sums of every section
    *states: tuple[Any, Any, Any],
    # static
    fixed: Static,
    where: Any,
    block: int,
    steps: int,
) -> None:
    b, s, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    at, copied = where(b, s, j, length, first)

    @pl.when(j == 0)
    def init() -> None:
        for peak, total, out in states:
            peak[...] = jnp.full_like(peak, MASK)
            total[...] = jnp.zeros_like(total)
            out[...] = jnp.zeros_like(out)

    @pl.when((at == copied) & (length[b] > at * block))
    def step() -> None:
        limits = [limit[b * fixed.rules.tokens + t] for t in range(fixed.rules.tokens)]
        for section, state in zip(sections, states, strict=True):
            of = block_of(section.bits, block // fixed.tile, at * block, length[b], first[b], limits, fixed)
            _groups(section, state, of, fixed)


def _groups(section: Section, state: tuple[Any, Any, Any], block: Block, fixed: Static) -> None:
    """All groups of heads, some in a trip of a loop."""
    size, queries = section.width // section.heads, section.q.shape[0]
    heads = together(section.heads, size)
    groups, some, width = section.heads // heads, at_once(section.heads, size, queries), heads * size

    def visit(groups: list[Any]) -> None:
        at = [
            pl.ds(pl.multiple_of(each * width, LANES) if width % LANES == 0 else 0, width) for each in groups
        ]
        few = max(1, BATCH // (heads * queries))
        works = [
            Work(groups=groups[i : i + few], columns=at[i : i + few], heads=heads, queries=queries)
            for i in range(0, len(groups), few)
        ]
        take(section, state, works, block, fixed)

    trips = groups // some
    if trips > 1:
        jax.lax.fori_loop(0, trips, lambda trip, _: visit([trip * some + i for i in range(some)]), None)
    else:
        visit(list(range(some)))
    if groups % some:
        visit(list(range(trips * some, groups)))
