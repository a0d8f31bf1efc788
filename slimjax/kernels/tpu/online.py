"""What decode kernels on TPU share: rows brought into products, who sees whom, and the running softmax."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from slimjax.attention.softmax import exponential_of
from slimjax.kernels.tpu import planes
from slimjax.kernels.tpu.tiled_rows import Tiled
from slimjax.numerics import MASK
from slimjax.pytree import pytree, static

LANES = 128
HALVES = (256.0, 1.0)  # what the bytes of an int16 code stand for


@pytree
class Held:
    """Rows as cached, and what they are multiplied by: nothing, or a number per token and head (or token).

    Attributes:
        codes: [B, C, W], or [B, W, C] where tokens come last (``slimjax.cache.layout``).
    """

    codes: Num[Array, "B _ _"]
    scale: Float[Array, "B #K C"] | None = None
    tokens_last: bool = static(default=False)

    @property
    def width(self) -> int:
        """W."""
        return self.codes.shape[-2 if self.tokens_last else -1]

    @property
    def tokens(self) -> int:
        """C, or the tokens of a block."""
        return self.codes.shape[-1 if self.tokens_last else -2]

    @property
    def stored(self) -> int:
        """Bytes of a value."""
        return self.codes.dtype.itemsize

    def operands(self, dtype: Any) -> tuple[float, ...]:
        """Factors of the operands that codes are made into, where that is more than a cast; see ``Reader.load``."""
        return HALVES if self.codes.dtype == jnp.int16 and dtype in (jnp.bfloat16, jnp.int8) else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The static half of a call.

    Attributes:
        heads, tokens, kv_heads: N, T, K.
        keys_weigh: the keys are weighed, too (slim and latent rows); else the further rows alone, and every head keeps
            its own columns of them (keys and values).
        scale, softcap, window, causal: as in ``DecodeSpec``.
        softmax: exact, or SAS, which cuts what is small against the maximum so far.
    """

    heads: int
    tokens: int
    kv_heads: int
    keys_weigh: bool
    scale: float
    softcap: float | None
    window: int | None
    causal: bool
    softmax: str = "exact"


COLUMNS = 1024  # of a row that are worked on at a time


def over_columns(width: int, visit: Callable[[Any, Any], Any], state: Any, period: int = LANES) -> Any:
    """``state = visit(columns, state)`` for parts of a row of about ``COLUMNS``, whole periods each.

    A loop, and of few trips: one long program takes libtpu minutes to schedule, and every trip waits for its products.
    Where periods do not divide the width, all columns are one part.
    """
    step = at_once(width, period)
    count = width // step
    if count > 1:
        state = jax.lax.fori_loop(
            0, count, lambda i, held: visit(pl.ds(pl.multiple_of(i * step, LANES), step), held), state
        )
    else:
        state = visit(pl.ds(0, step), state)
    rest = width - count * step
    return visit(pl.ds(count * step, rest), state) if rest else state


def trips(width: int, period: int = LANES) -> int:
    """How often the loop of ``over_columns`` runs, 1 where there is none."""
    return max(1, width // at_once(width, period))


def at_once(width: int, period: int = LANES) -> int:
    """Columns that ``over_columns`` works on at a time."""
    return width if width % period else min(width, period * max(1, COLUMNS // period))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Columns of a block of rows as operands of products: the sum of ``factor * array``."""

    parts: tuple[tuple[float, Array], ...]
    unrounded: Array | None = None  # float32, where operands are rounded

    def total(self, of: Callable[[Array], Array]) -> Array:
        """The sum of something linear in the rows over the parts that they are given in."""
        return functools.reduce(jnp.add, (factor * of(part) for factor, part in self.parts))

    @property
    def rows(self) -> Array:
        """Unscaled, float32."""
        if self.unrounded is not None:
            return self.unrounded
        return self.total(lambda part: part.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Kept:
    """Keys whose operands were kept when they met the queries."""

    parts: tuple[tuple[float, Any], ...]
    scale: Any
    tokens_last: bool = False

    @property
    def in_planes(self) -> bool:
        """Whether they are INT8, for digits."""
        return self.parts[0][1].dtype == jnp.int8


Rows = Held | Tiled | Kept


def keep(keys: Held | Tiled, refs: Sequence[Any]) -> Rows:
    """The keys as kept in ``refs``, or as they are where nothing was kept."""
    if not refs:
        return keys
    return Kept(parts=tuple(zip(keys.operands(refs[0].dtype), refs, strict=True)), scale=keys.scale)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Brings blocks into the dtype of products. What lies behind ``left`` tokens of a block is zero, but in planes."""

    dtype: Any
    left: Any  # None: the block is full
    in_planes: bool = False  # of INT8, see ``planes``

    def load(self, each: Rows, columns: Any) -> Loaded:
        """int16 codes under bfloat16 products as 256 high + low, with each in a byte, which bfloat16 holds exactly."""
        if isinstance(each, Kept):
            return Loaded(tuple((factor, ref[:, columns]) for factor, ref in each.parts))
        if isinstance(each, Tiled):
            rows = each.rows(columns, self.left)
            return Loaded(((1.0, rows.astype(self.dtype)),), unrounded=rows)
        codes = each.codes[columns, :] if each.tokens_last else each.codes[:, columns]
        if self.in_planes:  # whatever is behind the length is a number
            parts = tuple(zip(HALVES, planes.planes(codes), strict=True))
            return Loaded(parts, unrounded=codes.astype(jnp.int32).astype(jnp.float32))
        if self.left is not None:  # anything may be there, NaN included, and 0 * NaN is NaN
            wide = jnp.int32 if jnp.issubdtype(codes.dtype, jnp.integer) else jnp.float32
            tokens = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1 if each.tokens_last else 0)
            inside = tokens < self.left
            codes = jnp.where(inside, codes.astype(wide), jnp.zeros(codes.shape, wide))
        if each.codes.dtype == jnp.int16 and self.dtype == jnp.bfloat16:
            whole = codes.astype(jnp.int32)
            high = (whole + 128) >> 8
            split = zip(HALVES, (high, whole - 256 * high), strict=True)
            return Loaded(tuple((f, part.astype(jnp.float32).astype(self.dtype)) for f, part in split))
        if codes.dtype != self.dtype:
            codes = codes.astype(jnp.float32).astype(self.dtype)
        return Loaded(((1.0, codes),))

    def scale(self, each: Rows) -> Array | None:
        """[K or 1, block], or None."""
        if each.scale is None:
            return None
        scale = each.scale[...].astype(jnp.float32)
        if self.left is None:
            return scale
        inside = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 1) < self.left
        return jnp.where(inside, scale, jnp.zeros_like(scale))


def readers(dtype: Any, kept: Sequence[Any], left: Any) -> tuple[Reader, Reader]:
    """Of the keys, which planes are kept of where ``kept`` is INT8, and of what is weighed; ``dtype``: of queries."""
    in_planes = bool(kept) and kept[0].dtype == jnp.int8
    reader = Reader(jnp.bfloat16 if in_planes else dtype, left)
    return dataclasses.replace(reader, in_planes=in_planes), reader


def locate(
    b: Any, s: Any, j: Any, length: Any, first: Any, *, rules: Rules, block: int, blocks: int, steps: int
) -> tuple[Any, Any]:
    """The block that a grid step stands for, and the one that it copies: past the last, that one again."""
    begin = jnp.int32(0)
    if rules.window is not None:
        begin = jax.lax.div(jnp.maximum(first[b] - (rules.window - 1), 0), jnp.int32(block))
    at = begin + s * steps + j
    last = jnp.clip(jax.lax.div(length[b] + (block - 1), jnp.int32(block)) - 1, 0, blocks - 1)
    return at, jnp.minimum(at, last)


def padded(width: int) -> int:
    """Whole lanes."""
    return math.ceil(width / LANES) * LANES


def dot(a: Array, b: Array, over: int) -> Array:
    """a [M, k] with axis ``over`` of b, summed in float32; float32 operands are not rounded to bfloat16."""
    if a.dtype == jnp.int8:
        return planes.multiplied(a, b, over)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((1,), (over,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def query_token(row: Array, rules: Rules) -> Array:
    """Which of the T query tokens a query row is of. Rows are never negative, so the quotient needs no sign."""
    return jax.lax.div(row, jnp.full_like(row, rules.heads))


def kv_head(row: Array, rules: Rules) -> Array:
    """Which key/value head a query row reads."""
    group = rules.heads // rules.kv_heads
    return jax.lax.div(jax.lax.rem(row, jnp.full_like(row, rules.heads)), jnp.full_like(row, group))


def by_row(scale: Array, rows: int, rules: Rules) -> Array:
    """Numbers of key/value heads as those of the query rows, [M, block]; one for all heads stays one."""
    if scale.shape[0] == 1:
        return scale
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, scale.shape[0]), 0)
    head = jax.lax.broadcasted_iota(jnp.int32, (rows, scale.shape[0]), 1)
    mine = kv_head(row, rules) == head
    return dot(mine.astype(jnp.float32), scale, 0)


def visible(shape: tuple[int, ...], start: Any, length: Any, first: Any, rules: Rules) -> Array:
    """True where a query row may see a token, [M, block]. ``length``: one, or of each row, [M, 1]."""
    token = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    query = first + query_token(jax.lax.broadcasted_iota(jnp.int32, shape, 0), rules)
    seen = token < length
    if rules.causal:
        seen = seen & (token <= query)
    if rules.window is not None:
        seen = seen & (token > query - rules.window)
    return seen


def weigh(
    raw: Array,
    seen: Array,
    weighed: Sequence[Rows],
    reader: Reader,
    state: tuple[Any, Any, list[Any]],
    rules: Rules,
) -> None:
    """One step of the online softmax."""
    peak, total, sums = state
    before = peak[:, :1]
    now = jnp.maximum(before, jnp.max(jnp.where(seen, raw, MASK), axis=1, keepdims=True))
    exponential = exponential_of(rules.softmax)
    assert exponential is not None  # others are refused
    p = jnp.where(seen, exponential(now - raw), 0.0)
    shrunk = jnp.exp(before - now)
    peak[...] = jnp.broadcast_to(now, peak.shape)
    total[...] = total[...] * shrunk + jnp.sum(p, axis=1, keepdims=True)
    for mixed, each in zip(sums, weighed, strict=True):
        scale = reader.scale(each)
        weights = p if scale is None else p * by_row(scale, p.shape[0], rules)
        _add(mixed, each, weights, shrunk, reader)


def _add(mixed: Any, each: Rows, weights: Array, shrunk: Array, reader: Reader) -> None:
    """mixed = mixed * shrunk + weights rows."""
    parted = planes.digits(weights) if isinstance(each, Kept) and each.in_planes else None
    operand = weights.astype(reader.dtype) if parted is None else parted.codes

    def visit(columns: Any, state: None) -> None:
        over = 1 if each.tokens_last else 0
        new = reader.load(each, columns).total(lambda part: dot(operand, part, over))
        new = new if parted is None else parted.whole(new)
        mixed[:, columns] = mixed[:, columns] * shrunk + new

    over_columns(mixed.shape[1], visit, None)
