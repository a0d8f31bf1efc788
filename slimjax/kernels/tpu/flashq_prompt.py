"""Attention of a prompt on itself in INT8 tiles on TPU (FlashQ prefill, arXiv 2412.08585, section 3), SAS or exact.

Of every head, tiles of G queries meet tiles of G keys, in order:

    S = s_q s_k (Q K^T) / sqrt(H)        P = exp(S - m), m the maximum so far        O = f O + s_p s_v (P / s_p) V

with Q, K, V and P / s_p in INT8, both products in INT32 and f the factor between two maxima. It is what
``attention.integer`` computes; the choices that the paper leaves open are those of its ``Integer``. Tiles of fewer keys
than there are lanes go through the softmax beside each other, each with the maximum up to it; in the second product
each has a scale of its own, and so a product of its own.

2 T^2 N H multiplications and additions, and 3 T N H + T K H bytes read and written beside the scales. Grid: (sequence,
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
from jaxtyping import Array, Float, Int8

from slimjax.attention.integer import Integer
from slimjax.attention.positions import rotate
from slimjax.attention.softmax import exponential_of
from slimjax.axes import Keys, Lengths, Queries, Values, typed
from slimjax.cache.codecs.flashq import LIMIT, quantise
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tpu.online import LANES
from slimjax.numerics import MASK

TILES = (32, 64, 128)  # tokens
QUERIES, KEYS = 512, 512  # of a block, at most
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
    if not spec.causal:
        return "attention that looks ahead"
    if spec.position.kind not in ("none", "learned", "rope"):
        return f"position scheme {spec.position.kind!r}, which adds to the scores"
    return None


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
    tokens = q.shape[1]
    positions = jnp.arange(tokens, dtype=jnp.int32)
    there = (positions[None] < length[:, None])[:, :, None, None]
    q, k, v = (jnp.where(there, rows, jnp.zeros_like(rows)) for rows in (q, k, v))
    fixed = static(spec, tokens, integer, tile, int8=int8)
    turned = rotate(q, jnp.broadcast_to(positions[None], q.shape[:2]), spec.position)
    out = attend_codes(
        length, _queries(turned, fixed), _keys(k, fixed), _keys(v, fixed), fixed, spec.dtype, interpret
    )
    return jnp.swapaxes(out, 1, 2)[:, :tokens]


def static(spec: DecodeSpec, tokens: int, integer: Integer, tile: int, *, int8: bool) -> Static:
    """Of a prompt of T tokens; the other arguments are those of ``attend_prompt``."""
    whole = math.ceil(tokens / tile) * tile
    return Static(
        tile=tile,
        rows=min(QUERIES, whole),
        columns=min(KEYS, math.ceil(whole / LANES) * LANES),
        integer=integer,
        softmax=spec.scheme.softmax,
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        softcap=spec.softcap,
        window=spec.window,
        dtype="int8" if int8 else "bfloat16",
    )


def _quantised(
    rows: Queries, whole: int, fixed: Static
) -> tuple[Int8[Array, "B N S H"], Float[Array, "B N tiles"]]:
    """Codes and scales by head, of as many tiles as fill blocks of ``whole`` tokens."""
    batch, _, heads, size = rows.shape
    # Turned while they are floats: XLA takes minutes to compile the same for INT8.
    turned = jnp.swapaxes(rows, 1, 2)
    padded = jnp.pad(turned, ((0, 0), (0, 0), (0, -rows.shape[1] % whole), (0, 0)))
    codes, scale = quantise(padded.reshape(batch, heads, -1, fixed.tile, 1, size))
    return codes.reshape(padded.shape), scale[..., 0]


def _queries(q: Queries, fixed: Static) -> tuple[Int8[Array, "B N R H"], Float[Array, "B N blocks 1 128"]]:
    """Codes, and the scales of a block's tiles on lanes."""
    codes, scale = _quantised(q, fixed.rows, fixed)
    each = fixed.rows // fixed.tile
    scales = scale.reshape(*scale.shape[:2], -1, 1, each)
    return codes, jnp.pad(scales, ((0, 0),) * 4 + ((0, LANES - each),))


def _keys(rows: Keys, fixed: Static) -> tuple[Int8[Array, "B K S H"], Float[Array, "B K 1 S"]]:
    """Codes, and of every token its tile's scale."""
    codes, scale = _quantised(rows, fixed.columns, fixed)
    return codes, jnp.repeat(scale, fixed.tile, axis=2)[:, :, None]


def attend_codes(
    length: Lengths, queries: _Codes, keys: _Codes, values: _Codes, fixed: Static, dtype: str, interpret: Any
) -> Float[Array, "B N R H"]:
    """The kernel on codes and their scales."""
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

    own = pl.BlockSpec((None, None, rows, size), lambda b, n, i, j, length: (b, n, i, 0))
    marks = pl.BlockSpec((None, None, None, 1, LANES), lambda b, n, i, j, length: (b, n, i, 0, 0))
    codes = pl.BlockSpec(
        (None, None, columns, size), lambda b, n, i, j, length: (b, head(n), block(b, i, j, length), 0)
    )
    scales = pl.BlockSpec(
        (None, None, 1, columns), lambda b, n, i, j, length: (b, head(n), 0, block(b, i, j, length))
    )
    return pl.pallas_call(
        functools.partial(_kernel, block=block, fixed=fixed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[own, marks, codes, scales, codes, scales],
            out_specs=own,
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, size), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, slots, size), dtype),
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

    @pl.when((block(b, i, j, length) == j) & (length[b] > 0))
    def step() -> None:
        marks = [
            jnp.broadcast_to(q_scale[:, t : t + 1], (fixed.tile, 1)) for t in range(fixed.rows // fixed.tile)
        ]
        scale = marks[0] if len(marks) == 1 else jnp.concatenate(marks)

        def some(trip: Any, carry: None) -> None:
            at = pl.multiple_of(trip * LANES, LANES)
            here = pl.ds(at, LANES)
            met = _product(q[...], k[here, :], fixed, turned=True) * scale * k_scale[:, here]
            places = (i * fixed.rows, j * fixed.columns + at, length[b])
            _take(met, v[here, :], v_scale[:, here], places, state, fixed)

        # A loop: written out, its trips would not overlap either, and take minutes to compile.
        jax.lax.fori_loop(0, fixed.columns // LANES, some, None)

    @pl.when(j == pl.num_programs(3) - 1)
    def end() -> None:
        found = total[:, :1]
        out[...] = (sums[...] / jnp.where(found == 0, jnp.ones_like(found), found)).astype(out.dtype)


def _take(
    met: Float[Array, "R 128"],
    values: Int8[Array, "128 H"],
    v_scale: Float[Array, "1 128"],
    places: tuple[Any, Any, Any],
    state: list[Any],
    fixed: Static,
) -> None:
    """Tiles of keys beside each other, in order, taken into the online softmax."""
    (peak, total, sums), exponential = state, exponential_of(fixed.softmax)
    assert exponential is not None  # `Integer` refuses softmaxes without one
    scores = met * fixed.scale
    if fixed.softcap is not None:
        scores = fixed.softcap * jnp.tanh(scores / fixed.softcap)
    seen, column = _seen(places, scores.shape, fixed)
    masked = jnp.where(seen, scores, jnp.full_like(scores, MASK))
    edges = range(0, LANES, fixed.tile)
    tiles = [(column >= edge) & (column < edge + fixed.tile) for edge in edges]
    peaks = [peak[:, :1]]
    for mine in tiles:
        highest = jnp.max(jnp.where(mine, masked, jnp.full_like(masked, MASK)), axis=1, keepdims=True)
        peaks.append(jnp.maximum(peaks[-1], highest))
    level = peaks[-1]
    for mine, own in zip(reversed(tiles), reversed(peaks[1:]), strict=True):
        level = jnp.where(mine, own, level)
    p = jnp.where(seen, exponential(level - masked), jnp.zeros_like(scores))
    summed, added = total[:, :1], sums[...]
    for t, mine in enumerate(tiles):
        fall = peaks[t + 1] - peaks[t]
        exact = fixed.integer.rescale == "exact"
        factor = jnp.exp(-fall) if exact else jnp.where(fall == 0, jnp.ones_like(fall), exponential(fall))
        own = jnp.where(mine, p, jnp.zeros_like(p))
        scale = _p_scale(own, fixed)
        codes = jnp.round(own / scale)
        told = own if fixed.integer.denominator == "before" else codes * scale
        summed = factor * summed + jnp.sum(told, axis=1, keepdims=True)
        weighed = _product(codes, values, fixed, turned=False)
        added = factor * added + weighed * scale * v_scale[:, t * fixed.tile : t * fixed.tile + 1]
    peak[...] = jnp.broadcast_to(peaks[-1], peak.shape)
    total[...] = jnp.broadcast_to(summed, total.shape)
    sums[...] = added


def _seen(places: tuple[Any, Any, Any], shape: tuple[int, ...], fixed: Static) -> tuple[Array, Array]:
    """Which keys each query sees, and the columns' numbers."""
    first, start, length = places
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    query, token = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0), start + column
    seen = (token <= query) & (query < length)  # so that the token is there, too
    if fixed.window is not None:
        seen = seen & (token > query - fixed.window)
    return seen, column


def _p_scale(p: Float[Array, "R 128"], fixed: Static) -> Float[Array, "R 1"]:
    """What the weights of a tile of keys are divided by, for every query."""
    if fixed.integer.p == "static":
        return jnp.full((p.shape[0], 1), 1 / 127, jnp.float32)
    highest = jnp.max(p, axis=1, keepdims=True)
    if fixed.integer.p == "tile":
        tiles = highest.reshape(-1, fixed.tile, 1)
        highest = jnp.broadcast_to(jnp.max(tiles, axis=1, keepdims=True), tiles.shape).reshape(highest.shape)
    return jnp.where(highest == 0, jnp.ones_like(highest), highest / LIMIT)


def _product(a: Array, b: Array, fixed: Static, *, turned: bool) -> Float[Array, "R C"]:
    """Of codes; the sums are whole numbers in either arithmetic."""
    whole = jnp.int32 if fixed.dtype == "int8" else jnp.float32
    if a.dtype == jnp.float32 and fixed.dtype == "int8":
        a = a.astype(jnp.int32)
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))
    found = jax.lax.dot_general(
        a.astype(fixed.dtype), b.astype(fixed.dtype), dimensions, preferred_element_type=whole
    )
    return found.astype(jnp.float32)
