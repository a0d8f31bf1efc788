"""Decode attention over whole cached rows on TPU: one pass, every row read once (kv: a key and a value row).

For every query row m (a head of a query token) and cached row c of W numbers:

    s[m] = (q[m] . c) scale_c * scale       p = softmax(s)       mixed[m] = sum p[m] (scale_c c, further rows)

* Queries of heads are block-diagonal, zero outside of their head's columns, so that one product serves all heads:
  slim attention's option 2 weighs whole rows anyway, and a matrix unit has more rows than a token has heads.
* RoPE on rows cached unrotated: R(n0 + j) = R(n0) R(j), so one table of angles serves every block, and the queries are
  turned back by the block's start n0. q . R(j) c = (q cos) . c + (q' sin) . c with q' the other of each pair: the
  tables are multiplied into the rows, twice: moving lanes by half a head takes longer (v5e 63 to 89 cycles, not 57).
* int16 codes are two bytes: two exact products, in INT8 of keys that are weighed, too (``planes``), else in bfloat16.
  FlashQ's tiles: ``tiled_rows``. Such keys are converted once: their operands wait in fast memory.

* SAS in place of the exponential cuts what is small against the maximum so far, not against the last one.

Bytes per token: those of the rows and their scales. FLOPs per token: 4 M W (6 M W under RoPE), M = N T.
Grid: (sequence, part, block); blocks past a sequence's length, or before its window, cost no copy.

Of a grid step: rows [block, W] as stored, scales [K or 1, block]; queries [M, W], M in multiples of 16, block-diagonal;
scores [M, block], sums [M, W], maxima [M, 128], float32; 1,024 columns of all these at work (``online.COLUMNS``). The
block is the longest of 1024, 512, 256 and 128 tokens that ``room.memory`` has room for. Scheduled cycles of a 128x128
tile of cached values / those in which its bytes come from HBM, without waits, and not timed on any TPU (jax 0.12.0.1,
libtpu 0.0.52, 2026-11-22, of int16 -23; batch 16, 8,192 tokens; experiments/records/tpu_matrix.jsonl has all rows):

                                     v4        v5e       v5p       v6e       v7x
    kv:bf16     llama-2-7b           29 / 56   19 / 60   22 / 41   15 / 35   22 / 17
    kv:int8     llama-2-7b           204 / 29  19 / 31   23 / 21   16 / 18   23 / 9
    k2:bf16     llama-2-7b, RoPE     132 / 56  57 / 60   63 / 41   44 / 35   56 / 17
    k2:int16+16 llama-2-7b, RoPE     254 / 56  84 / 60   104 / 41  70 / 35   134 / 17
    k2:int16+16 whisper-large-self   164 / 56  51 / 60   65 / 42   37 / 35   75 / 17
    e2:bf16     whisper-large-cross  49 / 56   32 / 60   34 / 41   31 / 35   41 / 17

Limits: where the first number is the larger, arithmetic decides, as on v7x throughout; without INT8 products (v4, v7x)
int16 is met in halves. Not served: what ``operands.refusal`` names, a key bias that does not cancel (RoPE, softcap) of
scaled keys and of latent rows, and widths of which 128 tokens do not fit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from slimjax.kernels.tiles import Tiles
from slimjax.kernels.tpu import room
from slimjax.kernels.tpu.online import (
    LANES,
    Held,
    Reader,
    Rules,
    by_row,
    dot,
    keep,
    kv_head,
    locate,
    over_columns,
    query_token,
    readers,
    visible,
    weigh,
)
from slimjax.kernels.tpu.operands import Angles, Operands
from slimjax.kernels.tpu.planes import whole
from slimjax.kernels.tpu.tiled_rows import Tiled
from slimjax.numerics import MASK


def attend_rows(
    operands: Operands, rules: Rules, tiles: Tiles, *, interpret: Any = False
) -> tuple[Float[Array, "P B M A"], Float[Array, "P B M"]]:
    """Answers and log-sums of the parts of ``tiles.splits``, float32; a row that sees no key: 0 and ``MASK``.

    A is what is weighed: the widths of the keys and the further rows, or H where every head keeps its own columns.
    """
    batch, rows = operands.q.shape[0], operands.rows
    block = tiles.block
    blocks = math.ceil(operands.keys.tokens / block)
    most = blocks
    if rules.window is not None and rules.causal:  # blocks that T windows, one behind the other, can touch
        most = min(blocks, math.ceil((rules.window + rules.tokens) / block) + 1)
    steps = math.ceil(most / tiles.splits)
    place = functools.partial(locate, rules=rules, block=block, blocks=blocks, steps=steps)
    arrays, specs = _inputs(operands, block, lambda *at: place(*at)[1])
    answer = sum(room.answers(operands, rules))

    def part(last: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, last), lambda b, s, j, *_: (s, b, 0, 0))

    out, log_sums = pl.pallas_call(
        functools.partial(_kernel, rules=rules, place=place, block=block, steps=steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, tiles.splits, steps),
            in_specs=[specs],
            out_specs=[part(answer), part(LANES)],
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                [pltpu.VMEM((rows, w), jnp.float32) for w in room.widths(operands, rules)],
                [pltpu.VMEM((block, operands.keys.width), operands.kept) for _ in room.kept(operands, rules)],
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tiles.splits, batch, rows, answer), jnp.float32),
            jax.ShapeDtypeStruct((tiles.splits, batch, rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        interpret=interpret,
        name="slimjax_rows",
    )(operands.length, operands.first, arrays)
    return out, log_sums[..., 0]


def _inputs(operands: Operands, block: int, at: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that the kernel reads, by name, and the block of each in a grid step.

    at: of the grid's indices and what is prefetched, the block of tokens that is copied.
    """

    def fixed(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda b, s, j, *_: (0,) * array.ndim)

    def per_sequence(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *array.shape[1:]), lambda b, s, j, *_: (b, *(0,) * (array.ndim - 1)))

    def tokens_last(height: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, height, block), lambda *i: (i[0], 0, at(*i)))

    def held(each: Held | Tiled) -> Held | Tiled:
        if isinstance(each, Tiled):
            return each.specs(block, at)
        rows = pl.BlockSpec((None, block, each.width), lambda *i: (i[0], at(*i), 0))
        specs: Any = {"codes": tokens_last(each.width) if each.tokens_last else rows}
        if each.scale is not None:
            specs["scale"] = tokens_last(each.scale.shape[1])
        return Held(**specs, tokens_last=each.tokens_last)

    moving, still = ("q", "q_scale", "q_offset", "turned", "limit"), ("key_bias", "slopes")
    arrays: dict[str, Any] = {
        name: array for name in moving + still if (array := getattr(operands, name)) is not None
    }
    specs: dict[str, Any] = {
        name: (per_sequence if name in moving else fixed)(array) for name, array in arrays.items()
    }
    if operands.bias is not None:
        arrays["bias"], specs["bias"] = operands.bias, tokens_last(operands.bias.shape[1])
    arrays["held"] = (operands.keys, *operands.further)
    specs["held"] = tuple(map(held, arrays["held"]))
    if operands.angles is not None:
        arrays["angles"] = operands.angles
        starts: Any = pl.BlockSpec((None, 1, operands.q.shape[2]), lambda *i: (at(*i), 0, 0))
        within: Any = fixed(operands.angles.cos)
        specs["angles"] = Angles(cos=within, sin=within, start_cos=starts, start_sin=starts)
    return arrays, specs


def _kernel(
    # prefetched: [B] each
    length: Any,
    first: Any,
    # inputs: by name, each its block
    inputs: dict[str, Any],
    # outputs: [M, A], [M, 128]
    out: Any,
    log_sums: Any,
    # scratch: running maximum and sum, [M, 128] each with one number a row; weighed rows, [M, W] each; and the keys'
    # operands, [block, W] each, where these are made of codes and needed twice
    peak: Any,
    total: Any,
    sums: list[Any],
    kept: list[Any],
    # static
    *,
    rules: Rules,
    place: Any,
    block: int,
    steps: int,
) -> None:
    b, s, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    at, copied = place(b, s, j, length, first)
    left = length[b] - at * block  # tokens from this block's start on

    @pl.when(j == 0)
    def init() -> None:
        peak[...] = jnp.full_like(peak, MASK)
        total[...] = jnp.zeros_like(total)
        for each in sums:
            each[...] = jnp.zeros_like(each)

    for ragged in (False, True):

        @pl.when((at == copied) & ((left > 0) & (left < block) if ragged else left >= block))
        def step(ragged: bool = ragged) -> None:
            of_keys, reader = readers(inputs["q"].dtype, kept, left if ragged else None)
            raw = _scores(inputs, of_keys, kept, at * block - first[b], rules)
            limit = inputs["limit"][...] if "limit" in inputs else length[b]
            seen = visible(raw.shape, at * block, limit, first[b], rules)
            keys, *further = inputs["held"]
            weighed = (keep(keys, kept), *further) if rules.keys_weigh else further
            weigh(raw, seen, weighed, reader, (peak, total, sums), rules)

    @pl.when(j == steps - 1)
    def finish() -> None:
        sees = total[...] > 0
        log_sums[...] = jnp.where(sees, peak[...] + jnp.log(jnp.where(sees, total[...], 1.0)), MASK)
        whole = jnp.where(sees, total[...], 1.0)[:, :1]
        _answer(out, [each[...] / whole for each in sums], rules)


def _scores(inputs: dict[str, Any], reader: Reader, kept: list[Any], ahead: Any, rules: Rules) -> Array:
    """q . key of every query row and token, [M, block], with its bias. ``ahead``: of the block, of the first query."""
    keys, angles = inputs["held"][0], inputs.get("angles")
    period = LANES if angles is None else angles.cos.shape[1]
    raw = over_columns(
        keys.width,
        lambda columns, sum_: sum_ + _part(inputs, reader, kept, columns),
        jnp.zeros((inputs["q"].shape[0], keys.tokens), jnp.float32),
        period,
    )
    if "q_scale" in inputs:
        raw = whole(raw, inputs["q_scale"][...], inputs["q_offset"][...])
    if (scale := reader.scale(keys)) is not None:
        raw = raw * by_row(scale, raw.shape[0], rules)
    raw = raw * rules.scale
    if rules.softcap is not None:
        raw = rules.softcap * jnp.tanh(raw / rules.softcap)
    if "slopes" in inputs:
        row, token = (jax.lax.broadcasted_iota(jnp.int32, raw.shape, axis) for axis in (0, 1))
        behind = jnp.abs(query_token(row, rules) - token - ahead)
        raw = raw - inputs["slopes"][...] * behind.astype(jnp.float32)
    return raw + inputs["bias"][...] if "bias" in inputs else raw


def _part(inputs: dict[str, Any], reader: Reader, kept: list[Any], columns: Any) -> Array:
    """What some columns add to the scores, [M, block].

    Under RoPE the rows' places within the block turn them, and its start turns the queries back.
    """
    q, keys = inputs["q"][:, columns], reader.load(inputs["held"][0], columns)
    for ref, (_, operand) in zip(kept, keys.parts, strict=bool(kept)):
        ref[:, columns] = operand
    bias = inputs["key_bias"][:, columns] if "key_bias" in inputs else None
    if "angles" not in inputs and bias is None:
        return keys.total(lambda part: dot(q, part, 1))
    rows = keys.rows if bias is None else keys.rows + bias
    if "angles" not in inputs:
        return dot(q, rows.astype(q.dtype), 1)
    angles = inputs["angles"]
    first, other = q.astype(jnp.float32), inputs["turned"][:, columns].astype(jnp.float32)
    cos, sin = angles.start_cos[:, columns], angles.start_sin[:, columns]

    def met(query: Array, table: Any) -> Array:
        wide = jnp.concatenate([table[...]] * (rows.shape[1] // table.shape[1]), axis=1)
        return dot(query.astype(q.dtype), (rows * wide).astype(q.dtype), 1)

    return met(first * cos + other * sin, angles.cos) + met(other * cos - first * sin, angles.sin)


def _answer(out: Any, mixed: list[Array], rules: Rules) -> None:
    """Write what was weighed side by side, or of values every head's own columns."""
    if rules.keys_weigh:
        start = 0
        for each in mixed:
            out[:, start : start + each.shape[1]] = each
            start += each.shape[1]
        return
    (values,) = mixed
    size = values.shape[1] // rules.kv_heads
    row = jax.lax.broadcasted_iota(jnp.int32, (values.shape[0], 1), 0)
    head = kv_head(row, rules)
    parts = (
        jnp.where(head == index, values[:, index * size : (index + 1) * size], 0.0)
        for index in range(rules.kv_heads)
    )
    out[...] = functools.reduce(jnp.add, parts)
