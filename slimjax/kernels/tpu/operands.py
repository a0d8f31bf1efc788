"""What ``rows.attend_rows`` takes, made of a cache and a layer's weights, or the reason why it cannot be."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Num

from slimjax.attention.bases import basis
from slimjax.attention.compute import compute_text
from slimjax.attention.positions import alibi_slopes, bias, quarter_turn
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.sas import MOST_COMPARED
from slimjax.attention.softmax import compared
from slimjax.axes import Lengths, Queries
from slimjax.cache import Cache, TiledCodec, codec_of
from slimjax.cache.codecs.flashq import FlashQ
from slimjax.cache.codecs.floats import FloatCodec
from slimjax.cache.codecs.fp8 import Fp8Codec
from slimjax.cache.codecs.integers import IntegerCodec
from slimjax.kernels.buffer import tokens_in_tiles
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tpu import planes, tiled_rows
from slimjax.kernels.tpu.online import LANES, Held, Rules
from slimjax.kernels.tpu.tiled_rows import Tiled
from slimjax.pytree import pytree, static

HEADED, LATENT = ("kv", "k"), ("x", "e", "h")  # queries meet keys, or rows that stand for them


@pytree
class Angles:
    """Cosines and sines: of the places within a block, repeated to whole lanes, and of the blocks' starts."""

    cos: Float[Array, "block P"]
    sin: Float[Array, "block P"]
    start_cos: Float[Array, "blocks 1 W"]
    start_sin: Float[Array, "blocks 1 W"]


@pytree
class Operands:
    """Arrays of one call. M = T*N query rows, token by token, filled up to a multiple of 16.

    Attributes:
        length: tokens of each sequence that some query finds in these rows.
        first: position of each sequence's first query.
        q: in the dtype of products, or the two digits of every row, high ones first, that meet planes (``planes``).
        q_scale, q_offset: of digits, what they are multiplied by, and what is added to their products before.
        turned: under RoPE, -J q, where J is a quarter turn of every pair.
        keys: rows that the queries meet.
        further: rows that are weighed: values, or what is weighed beside the keys themselves.
        angles: under RoPE.
        key_bias: what is added to the keys before they are turned.
        slopes: ALiBi's, of every query row.
        bias: of a trained position scheme, what is added to every score: 4*M bytes more a token.
        limit: of tiles, the tokens that each query row finds in them.
        in_planes: keys are int16 codes that are weighed as two planes of INT8, and met so unless RoPE turns them.
    """

    length: Lengths
    first: Lengths
    q: Num[Array, "B dM W"]
    q_scale: Float[Array, "B M 1"] | None
    q_offset: Float[Array, "B M 1"] | None
    turned: Float[Array, "B M W"] | None
    keys: Held | Tiled
    further: tuple[Held | Tiled, ...]
    angles: Angles | None
    key_bias: Float[Array, "1 W"] | None
    slopes: Float[Array, "M 1"] | None
    bias: Float[Array, "B M C"] | None
    limit: Int32[Array, "B M 1"] | None
    in_planes: bool = static(default=False)

    @property
    def rows(self) -> int:
        """M."""
        return self.q.shape[1] // (1 if self.q_scale is None else planes.DIGITS)

    @property
    def kept(self) -> jnp.dtype:
        """The dtype of keys that are kept to be weighed."""
        return jnp.dtype(jnp.int8) if self.in_planes else self.q.dtype


def refusal(spec: DecodeSpec) -> str | None:
    """Why the kernel cannot serve a spec, or None."""
    scheme = spec.scheme
    if scheme.basis not in (*HEADED, *LATENT):
        return f"basis {scheme.basis} has no kernel; it has kv, k, x, e and h"
    if scheme.basis != "kv" and scheme.option == 1:
        return f"option 1 rebuilds rows, which takes more time than reading them; use {scheme.basis}2"
    if (mode := compute_text(scheme)) != "float":
        return f"compute mode {mode} has no kernel"
    if not compared(scheme.softmax):
        return f"softmax {scheme.softmax} has no kernel; it has exact, and SAS with a cut of at most {MOST_COMPARED}"
    if spec.dtype not in ("bfloat16", "float32"):
        return f"compute dtype {spec.dtype} is none of a TPU's; use bfloat16 or float32"
    codec = codec_of(scheme)
    for name, (heads, _) in basis(spec).streams(spec).items():
        if reason := _codec_refusal(codec.stream(name), spec, heads):
            return reason
    return None


def _codec_refusal(codec: object, spec: DecodeSpec, heads: int) -> str | None:
    if isinstance(codec, FloatCodec) and codec.kind in ("bf16", "float32"):
        return None
    if isinstance(codec, FlashQ) and spec.scheme.basis == "k":
        return tiled_rows.refusal(codec)
    by_head = isinstance(codec, IntegerCodec) and codec.per_head
    if isinstance(codec, Fp8Codec):
        by_head = codec.scale == "head"
        if not isinstance(codec.scale, str):
            return "codec fp8 with a known scale has no kernel; use scale head, token or none"
    elif not isinstance(codec, IntegerCodec):
        name = getattr(codec, "name", spec.scheme.codec)
        return f"codec {name} has no kernel; it has bf16, float32, int16, int8, fp8 and, of k, flashq of one width"
    if by_head and heads > 1 and spec.scheme.basis == "k":
        return (
            "keys that are weighed as whole rows need one scale for all heads; use int16, or fp8(scale=token)"
        )
    return None


def operands(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    first: Lengths,
    *,
    int8: bool,
) -> tuple[Operands, Rules]:
    """The arrays of a call and its rules. Raises NotImplementedError with the reason, see ``refusal``.

    int8: whether there are units that multiply INT8, for planes.
    """
    if reason := refusal(spec):
        raise NotImplementedError(f"scheme {spec.scheme}: {reason}")
    tokens = q.shape[1]
    positions = first[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    ready = basis(spec).queries(q.astype(spec.dtype), positions, weights, spec)
    headed, turned = spec.scheme.basis in HEADED, None
    if headed:
        rows = _block_diagonal(ready, spec.kv_heads)
        if spec.scheme.basis == "k" and spec.position.rotary:
            turned = _rows(_block_diagonal(-quarter_turn(ready, spec.position), spec.kv_heads), spec.dtype)
    elif ready.bias is not None and spec.softcap is not None:
        raise NotImplementedError(f"scheme {spec.scheme}: a key bias under a softcap has no kernel")
    else:  # a key bias that no softcap follows cancels
        rows = ready.q
    keys, *further = (_held(cache, name, spec) for name in basis(spec).streams(spec))
    length, limit, codec = cache.length, None, codec_of(spec.scheme)
    if isinstance(codec, TiledCodec):
        found = tokens_in_tiles(cache, codec, positions)
        length = jnp.max(found, axis=1)
        limit = _rows(jnp.broadcast_to(found[:, :, None, None], (*q.shape[:3], 1)), jnp.int32)
    rules = rules_of(spec, tokens)
    in_planes = int8 and rules.keys_weigh and _in_planes(keys, spec)
    parted = planes.digits(_rows(rows, jnp.float32)) if in_planes and turned is None else None
    return Operands(
        length=length,
        first=first,
        q=_rows(rows, spec.dtype) if parted is None else parted.codes,
        q_scale=None if parted is None else parted.scale,
        q_offset=None if parted is None else parted.offset,
        turned=turned,
        keys=keys,
        further=tuple(further),
        angles=None,
        key_bias=_key_bias(weights, keys, spec),
        slopes=_slopes(spec, tokens),
        bias=_bias(weights, positions, cache.capacity, spec),
        limit=limit,
        in_planes=in_planes,
    ), rules


def rules_of(spec: DecodeSpec, tokens: int) -> Rules:
    """The static half of a call of so many query tokens."""
    return Rules(
        heads=spec.heads,
        tokens=tokens,
        kv_heads=spec.kv_heads,
        keys_weigh=spec.scheme.basis != "kv",
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        softcap=spec.softcap,
        window=spec.window,
        causal=spec.causal,
        softmax=spec.scheme.softmax,
    )


def _in_planes(keys: Held | Tiled, spec: DecodeSpec) -> bool:
    """Whether keys are int16 codes, to meet numbers no finer than those of 15 bits."""
    codes = keys.codes.dtype == jnp.int16 if isinstance(keys, Held) else False
    return codes and not keys.tokens_last and spec.dtype == "bfloat16"


def _key_bias(weights: DecodeWeights, keys: Held | Tiled, spec: DecodeSpec) -> Float[Array, "1 W"] | None:
    if spec.scheme.basis != "k" or weights.k_bias is None:
        return None
    turned_or_bent = spec.position.rotary or spec.softcap is not None
    if not turned_or_bent and isinstance(
        keys, Held
    ):  # else it adds one number to all scores of a query, and cancels
        return None  # (of tiles the newest tokens, which another program reads, have it)
    if keys.scale is not None:
        raise NotImplementedError(f"scheme {spec.scheme}: a key bias beside scaled keys has no kernel")
    return weights.k_bias.astype(jnp.float32).reshape(1, -1)


def angles_period(size: int, width: int) -> int:
    """Columns after which RoPE's tables repeat themselves: heads in whole lanes, or all."""
    period = math.lcm(size, LANES)
    return period if width % period == 0 else width


def angles(spec: DecodeSpec, block: int, blocks: int) -> Angles:
    """RoPE's tables for blocks of so many tokens, computed in float64."""
    size, width = spec.head_dim, spec.key_width
    period = angles_period(size, width)
    frequency = spec.position.theta ** (-np.arange(0, size, 2) / size)
    pair = np.repeat(frequency, 2) if spec.position.interleaved else np.tile(frequency, 2)

    def table(function: np.ufunc, places: np.ndarray, columns: int) -> Float[Array, "places columns"]:
        wide = np.tile(pair, columns // size)
        return jnp.asarray(function(places[:, None] * wide), jnp.float32)

    within, starts = np.arange(block), np.arange(blocks) * block
    return Angles(
        cos=table(np.cos, within, period),
        sin=table(np.sin, within, period),
        start_cos=table(np.cos, starts, width)[:, None],
        start_sin=table(np.sin, starts, width)[:, None],
    )


def _block_diagonal(q: Queries, kv_heads: int) -> Float[Array, "B T N E"]:
    """Every head's query in its own columns of a key row, zero elsewhere."""
    batch, tokens, heads, size = q.shape
    own = jnp.eye(kv_heads, dtype=q.dtype).repeat(heads // kv_heads, axis=0)  # [N, K]
    return (q[:, :, :, None] * own[None, None, :, :, None]).reshape(batch, tokens, heads, kv_heads * size)


def _rows(q: Num[Array, "B T N W"], dtype: Any) -> Num[Array, "B M W"]:
    """Query rows token by token, filled up to a multiple of 16."""
    batch, tokens, heads, width = q.shape
    flat = q.reshape(batch, tokens * heads, width).astype(dtype)
    return jnp.pad(flat, ((0, 0), (0, -tokens * heads % 16), (0, 0)))


def _held(cache: Cache, name: str, spec: DecodeSpec) -> Held | Tiled:
    """A stream's codes and scales as they lie: no array of the cache's size is made."""
    stored, codec = cache.streams[name], codec_of(spec.scheme).stream(name)
    if isinstance(codec, TiledCodec):
        laid = stored.tiles
        return tiled_rows.tiled(jax.tree.unflatten(laid.structure, laid.leaves), codec.tile)
    codes, *scale = stored.leaves
    return Held(codes=codes, scale=scale[0] if scale else None, tokens_last=stored.tokens_last[0])


def _bias(
    weights: DecodeWeights, positions: Int[Array, "B T"], slots: int, spec: DecodeSpec
) -> Float[Array, "B M C"] | None:
    """ALiBi's, which is a product, is made where it is added."""
    if not spec.position.trained:
        return None
    keys = jnp.arange(slots, dtype=jnp.int32)
    found = bias(spec.position, weights.position, positions, keys, spec.heads, jnp.float32)
    assert found is not None  # of a trained scheme
    rows = jnp.swapaxes(found, 1, 2).reshape(len(positions), -1, slots)
    return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % 16), (0, 0)))


def _slopes(spec: DecodeSpec, tokens: int) -> Float[Array, "M 1"] | None:
    if spec.position.kind != "alibi":
        return None
    rows = np.tile(alibi_slopes(spec.heads), tokens)
    return jnp.asarray(np.pad(rows, (0, -len(rows) % 16)), jnp.float32)[:, None]
