"""What decode kernels on TPU share: rows brought into products, who sees whom, and the running softmax."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from slimjax.numerics import MASK
from slimjax.pytree import pytree


@pytree
class Held:
    """Rows as cached, and what they are multiplied by: nothing, or a number per token and head (or token)."""

    codes: Num[Array, "B C W"]
    scale: Float[Array, "B #K C"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The static half of a call.

    Attributes:
        heads, tokens, kv_heads: N, T, K.
        keys_weigh: the keys are weighed, too (slim and latent rows); else the further rows alone, and every head keeps
            its own columns of them (keys and values).
        scale, softcap, window, causal: as in ``DecodeSpec``.
    """

    heads: int
    tokens: int
    kv_heads: int
    keys_weigh: bool
    scale: float
    softcap: float | None
    window: int | None
    causal: bool


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A block of rows as operands of products: the sum of ``factor * array``, times ``scale``."""

    parts: tuple[tuple[float, Array], ...]
    scale: Array | None

    def total(self, of: Callable[[Array], Array]) -> Array:
        """The sum of something linear in the rows over the parts that they are given in."""
        return functools.reduce(jnp.add, (factor * of(part) for factor, part in self.parts))

    @property
    def rows(self) -> Array:
        """Unscaled, float32."""
        return self.total(lambda part: part.astype(jnp.float32))


def load(each: Held, left: Any, dtype: Any) -> Loaded:
    """A block in the dtype of products; of one that the sequence ends in, what lies behind ``left`` tokens is zero."""
    codes, scale = each.codes[...], None if each.scale is None else each.scale[...].astype(jnp.float32)
    if left is not None:  # anything may be there, NaN included, and 0 * NaN is NaN
        inside = jax.lax.broadcasted_iota(jnp.int32, (codes.shape[0], 1), 0) < left
        if jnp.issubdtype(codes.dtype, jnp.integer):
            codes = jnp.where(inside, codes.astype(jnp.int32), 0)
        else:
            codes = jnp.where(inside, codes.astype(jnp.float32), 0.0)
        if scale is not None:
            tokens = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 1)
            scale = jnp.where(tokens < left, scale, 0.0)
    if each.codes.dtype == jnp.int16 and dtype == jnp.bfloat16:
        whole = codes.astype(jnp.int32)
        high = (whole + 128) >> 8
        split = ((256.0, high), (1.0, whole - 256 * high))
        return Loaded(tuple((f, part.astype(jnp.float32).astype(dtype)) for f, part in split), scale)
    return Loaded(((1.0, codes.astype(jnp.float32).astype(dtype)),), scale)


def dot(a: Array, b: Array, over: int) -> Array:
    """a [M, k] with axis ``over`` of b, summed in float32; float32 operands are not rounded to bfloat16."""
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
    """True where a query row may see a token, [M, block]."""
    token = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    query = first + query_token(jax.lax.broadcasted_iota(jnp.int32, shape, 0), rules)
    seen = token < length
    if rules.causal:
        seen = seen & (token <= query)
    if rules.window is not None:
        seen = seen & (token > query - rules.window)
    return seen


def weigh(
    raw: Array, seen: Array, weighed: list[Loaded], state: tuple[Any, Any, list[Any]], rules: Rules
) -> None:
    """One step of the online softmax."""
    peak, total, sums = state
    before = peak[:, :1]
    now = jnp.maximum(before, jnp.max(jnp.where(seen, raw, MASK), axis=1, keepdims=True))
    p = jnp.where(seen, jnp.exp(raw - now), 0.0)
    shrunk = jnp.exp(before - now)
    peak[...] = jnp.broadcast_to(now, peak.shape)
    total[...] = total[...] * shrunk + jnp.sum(p, axis=1, keepdims=True)
    for each, held in zip(sums, weighed, strict=True):
        scaled = p if held.scale is None else p * by_row(held.scale, p.shape[0], rules)
        mixed = held.total(lambda part, scaled=scaled: dot(scaled.astype(part.dtype), part, 0))
        each[...] = each[...] * shrunk + mixed
