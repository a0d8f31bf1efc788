"""Attention of a prompt on itself in INT8 tiles on TPU (FlashQ prefill, arXiv 2412.08585, section 3), SAS or exact.

Of every head, tiles of G queries meet tiles of G keys, in order:

    S = s_q s_k (Q K^T) / sqrt(H)        P = exp(S - m), m the maximum so far        O = f O + s_p s_v (P / s_p) V

with Q, K, V and P / s_p in INT8, both products in INT32 and f the factor between two maxima. It is what
``attention.integer`` computes; the choices that the paper leaves open are those of its ``Integer``. Queries lie on
lanes, S^T [keys, queries] and O^T [H, queries], so that maxima and sums over keys need nothing across lanes.

2 T^2 N H multiplications and additions, and 3 T N H + 2 T K H bytes read and written beside scales. Grid: (sequence,
head, block of queries, block of keys); blocks ahead of the queries, behind the window or the end cost no copy.
Limits: tiles of 32, 64 or 128 tokens, causal, no bias of the scores.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int8

from slimjax.attention.integer import Integer
from slimjax.attention.sas import MOST_COMPARED
from slimjax.attention.softmax import compared, exponential_of
from slimjax.axes import Keys, Lengths, Queries, Values, typed
from slimjax.cache.codecs.flashq import LIMIT
from slimjax.kernels import flashq
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tpu.online import LANES
from slimjax.numerics import MASK

TILES = (32, 64, 128)  # tokens
QUERIES, KEYS = 1024, 512  # of a block, at most: many queries, whose steps hide each other's waiting
_Codes = tuple[Array, Array]  # and their scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """The static half of a call: tokens of a tile, of a block of queries and of keys, and how weights are made."""

    tile: int
    rows: int
    columns: int
    integer: Integer
    softmax: str
    scale: float
    softcap: float | None
    window: int | None
    dtype: str


def refusal(spec: DecodeSpec, tile: int) -> str | None:
    """Why prompts in such tiles are not served, or None."""
    if tile not in TILES:
        return f"tiles of {tile} tokens; it has {', '.join(map(str, TILES))}"
    if not compared(spec.scheme.softmax):
        return f"softmax {spec.scheme.softmax}; it has exact, and SAS with a cut of at most {MOST_COMPARED}"
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
    int8: bool = True,
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
        int8: whether products are in INT8, or in bfloat16, which holds the codes and gives the same sums.
        interpret: as of ``pallas_call``.

    Returns:
        [B, T, N, H] in ``spec.dtype``; rows at ``length`` and behind are 0.

    Raises:
        NotImplementedError: as ``refusal``.
    """
    if reason := refusal(spec, tile):
        raise NotImplementedError(f"the kernel of prompts in INT8 does not serve {reason}")
    fixed = static(spec, q.shape[1], integer, tile, int8=int8)
    turned, keys, values = flashq.prompt_rows(q, k, v, length, spec)
    out = attend_codes(
        length,
        _quantised(turned, fixed.rows, fixed),
        _quantised(keys, fixed.columns, fixed),
        _quantised(values, fixed.columns, fixed, turned=True),
        fixed,
        spec.dtype,
        interpret,
    )
    return jnp.transpose(out, (0, 3, 1, 2))[:, : q.shape[1]]


def static(spec: DecodeSpec, tokens: int, integer: Integer, tile: int, *, int8: bool) -> Static:
    """Of a prompt of T tokens; the other arguments are those of ``attend_prompt``."""
    whole = math.ceil(tokens / tile) * tile
    return Static(
        tile=tile,
        rows=min(QUERIES, math.ceil(whole / LANES) * LANES),
        columns=min(KEYS, math.ceil(whole / LANES) * LANES),
        integer=integer,
        softmax=spec.scheme.softmax,
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        softcap=spec.softcap,
        window=spec.window,
        dtype="int8" if int8 else "bfloat16",
    )


def _quantised(
    rows: Queries, whole: int, fixed: Static, *, turned: bool = False
) -> tuple[Int8[Array, "B N ..."], Float[Array, "B N 1 S"]]:
    """Codes of as many tiles as fill blocks of ``whole`` tokens; and of every token its tile's scale."""
    codes, scale = flashq.prompt_codes(rows, whole, fixed.tile, turned=turned)
    return codes, jnp.repeat(scale, fixed.tile, axis=2)[:, :, None]


def attend_codes(
    length: Lengths, queries: _Codes, keys: _Codes, values: _Codes, fixed: Static, dtype: str, interpret: Any
) -> Float[Array, "B N H R"]:
    """The kernel on codes, those of values [B, K, H, S], and their scales, [B, N, 1, S]."""
    batch, heads, slots, size = queries[0].shape
    rows, columns = fixed.rows, fixed.columns
    grid = (batch, heads, slots // rows, keys[0].shape[2] // columns)

    def block(b: Any, i: Any, j: Any, length: Any) -> Any:
        """The block of keys that is copied for a step: the nearest of those that its queries see."""
        last = jnp.minimum((i + 1) * rows, jnp.maximum(length[b], 1)) - 1
        first = 0 if fixed.window is None else jnp.maximum(i * rows - fixed.window + 1, 0)
        lowest, highest = (jax.lax.div(each, columns) for each in (jnp.minimum(first, last), last))
        return jnp.clip(j, lowest, highest)

    def head(n: Any) -> Any:
        return jax.lax.div(n, heads // keys[0].shape[1])

    def keyed(height: int, width: int, axis: int) -> pl.BlockSpec:
        """A block of keys or values, which lie along this axis."""

        def place(b: Any, n: Any, i: Any, j: Any, length: Any) -> tuple[Any, ...]:
            at = block(b, i, j, length)
            return (b, head(n), *((at, 0) if axis == 0 else (0, at)))

        return pl.BlockSpec((None, None, height, width), place)

    return pl.pallas_call(
        functools.partial(_kernel, block=block, fixed=fixed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, None, rows, size), lambda b, n, i, j, length: (b, n, i, 0)),
                pl.BlockSpec((None, None, 1, rows), lambda b, n, i, j, length: (b, n, 0, i)),
                keyed(columns, size, 0),
                keyed(1, columns, 1),
                keyed(size, columns, 1),
                keyed(1, columns, 1),
            ],
            out_specs=pl.BlockSpec((None, None, size, rows), lambda b, n, i, j, length: (b, n, 0, i)),
            scratch_shapes=[pltpu.VMEM((height, rows), jnp.float32) for height in (1, 1, size)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, size, slots), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=interpret,
        name="slimjax_flashq_prompt",
    )(length, *queries, *keys, *values)


def _kernel(length: Any, *given: Any, block: Any, fixed: Static) -> None:
    q, q_scale, k, k_scale, v, v_scale, out, *state = given
    peak, total, sums = state
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def begin() -> None:
        peak[...] = jnp.full_like(peak, MASK)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when((block(b, i, j, length) == j) & (i * fixed.rows < length[b]))
    def step() -> None:
        def some(trip: Any, carry: None) -> None:
            here = pl.ds(pl.multiple_of(trip * LANES, LANES), LANES)
            marks = (k_scale[:, here], v_scale[:, here])
            for edge in range(0, LANES, fixed.tile):
                at = trip * LANES + edge
                keys = k[pl.ds(pl.multiple_of(at, fixed.tile), fixed.tile), :]
                own_k, own_v = (each[:, edge : edge + 1] for each in marks)
                scores = _product(keys, q[...], fixed, turned=True) * q_scale[...] * own_k
                seen = _seen((i * fixed.rows, j * fixed.columns + at, length[b]), scores.shape, fixed)
                codes, scale, factor = _weigh(scores, seen, peak, total, fixed)
                around = [jnp.zeros_like(codes)] * (LANES // fixed.tile)
                around[edge // fixed.tile] = codes  # values are cut where lanes end
                all_codes = codes if len(around) == 1 else jnp.concatenate(around)
                weighed = _product(v[:, here], all_codes, fixed, turned=False)
                sums[...] = factor * sums[...] + weighed * (scale * own_v)

        jax.lax.fori_loop(0, fixed.columns // LANES, some, None)

    @pl.when(j == pl.num_programs(3) - 1)
    def end() -> None:
        found = total[...]
        out[...] = (sums[...] / jnp.where(found == 0, jnp.ones_like(found), found)).astype(out.dtype)


def _weigh(
    raw: Float[Array, "G R"], seen: Bool[Array, "G R"], peak: Any, total: Any, fixed: Static
) -> tuple[Float[Array, "G R"], Float[Array, "1 R"], Float[Array, "1 R"]]:
    """The codes of a tile's weights, their scale, and the factor of what was summed before; state is brought on."""
    exponential = exponential_of(fixed.softmax)
    assert exponential is not None  # `Integer` refuses softmaxes without one
    scores = raw * fixed.scale
    if fixed.softcap is not None:
        scores = fixed.softcap * jnp.tanh(scores / fixed.softcap)
    masked = jnp.where(seen, scores, jnp.full_like(scores, MASK))
    highest = jnp.maximum(peak[...], jnp.max(masked, axis=0, keepdims=True))
    p = jnp.where(seen, exponential(highest - masked), jnp.zeros_like(scores))
    fall = highest - peak[...]
    exact = fixed.integer.rescale == "exact"
    factor = jnp.exp(-fall) if exact else jnp.where(fall == 0, jnp.ones_like(fall), exponential(fall))
    scale = _p_scale(jnp.max(p, axis=0, keepdims=True), fixed)
    codes = jnp.round(p * (1 / scale))
    told = p if fixed.integer.denominator == "before" else codes * scale
    peak[...] = highest
    total[...] = factor * total[...] + jnp.sum(told, axis=0, keepdims=True)
    return codes, scale, factor


def _seen(places: tuple[Any, Any, Any], shape: tuple[int, ...], fixed: Static) -> Bool[Array, "G R"]:
    """Which keys each query sees."""
    first, start, length = places
    query = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    token = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    seen = (token <= query) & (query < length)  # so that the token is there, too
    if fixed.window is not None:
        seen = seen & (token > query - fixed.window)
    return seen


def _p_scale(highest: Float[Array, "1 R"], fixed: Static) -> Float[Array, "1 R"]:
    """What a tile's weights are divided by, for every query, from the largest of each."""
    if fixed.integer.p == "static":
        return jnp.full_like(highest, 1 / 127)
    if fixed.integer.p == "tile":
        lane = jax.lax.broadcasted_iota(jnp.int32, highest.shape, 1)
        each, highest = highest, jnp.zeros_like(highest)
        for edge in range(0, fixed.rows, fixed.tile):
            mine = (lane >= edge) & (lane < edge + fixed.tile)
            own = jnp.max(jnp.where(mine, each, jnp.zeros_like(each)), axis=1, keepdims=True)
            highest = jnp.where(mine, own, highest)
    return jnp.where(highest == 0, jnp.ones_like(highest), highest / LIMIT)


def _product(a: Array, b: Array, fixed: Static, *, turned: bool) -> Float[Array, "M R"]:
    """Of codes; the sums are whole numbers in either arithmetic."""
    whole = jnp.int32 if fixed.dtype == "int8" else jnp.float32
    if b.dtype == jnp.float32 and fixed.dtype == "int8":
        b = b.astype(jnp.int32)
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))
    found = jax.lax.dot_general(
        a.astype(fixed.dtype), b.astype(fixed.dtype), dimensions, preferred_element_type=whole
    )
    return found.astype(jnp.float32)
