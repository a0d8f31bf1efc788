"""Attention on keys alone (slim attention's option 2) by kernels for Hopper: in one pass by clusters, or in two."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int32

from slimjax.attention.masks import visible
from slimjax.axes import Lengths, Queries
from slimjax.cache import Cache, TiledCodec, codec_of, read
from slimjax.cache.codecs.flashq import FlashQ
from slimjax.cache.codecs.integers import IntegerCodec
from slimjax.kernels.buffer import tokens_in_tiles
from slimjax.kernels.gpu import mosaic, packed
from slimjax.kernels.gpu.grid import by_key_head, padded, parts
from slimjax.kernels.gpu.packed import Packing
from slimjax.kernels.gpu.ring import BLOCK, ROWS, Rules, exponential
from slimjax.kernels.gpu.rows import column_width, score_rows, weigh_rows
from slimjax.kernels.gpu.share import GROUPS, Share, share
from slimjax.kernels.gpu.slim import Held, attend_keys
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import MASK

MOST = 16  # calls of the kernel for one decode

Plan = tuple[tuple[int, Share], ...]  # of each call its query tokens, and how a cluster shares rows for them


def plan(spec: DecodeSpec, tokens: int, passes: int | None) -> Plan | None:
    """How keys are read in one pass, or None: in two, or not at all.

    Of more query tokens than a cluster can hold the sums of, some are decoded after others, each with a pass of its
    own; where two passes serve them all they do so instead, unless one is asked for.
    """
    if mosaic.OLD or passes == 2 or not (most := _together(spec, tokens)):
        return None
    counts = [min(most, tokens - at) for at in range(0, tokens, most)]
    twice = not _only_once(spec) and tokens * spec.heads <= ROWS
    if len(counts) > MOST or (len(counts) > 1 and twice and passes is None):
        return None
    found = tuple((count, part) for count in counts if (part := _shared(spec, count)))
    return found if len(found) == len(counts) else None


def _together(spec: DecodeSpec, tokens: int) -> int:
    """Query tokens that one call can serve, at most ``tokens``."""
    return next((count for count in range(tokens, 0, -1) if _shared(spec, count)), 0)


def _shared(spec: DecodeSpec, tokens: int) -> Share | None:
    return share(
        spec.kv_heads,
        spec.head_dim,
        tokens * spec.group,
        rotary=spec.position.rotary,
        codes=_coded(spec, "k"),
        packing=packing_of(spec),
        extra=spec.scheme.extra,
    )


def _coded(spec: DecodeSpec, name: str) -> bool:
    """Whether a stream's rows are int16 codes."""
    return isinstance(codec_of(spec.scheme).stream(name), IntegerCodec)


def packing_of(spec: DecodeSpec) -> Packing | None:
    """How keys lie in FlashQ's tiles, if they do."""
    codec = codec_of(spec.scheme)
    return Packing(bits=codec.bits, tile=codec.tile) if isinstance(codec, FlashQ) else None


def _only_once(spec: DecodeSpec) -> bool:
    """Whether no two passes serve it."""
    coded = _coded(spec, "k") or packing_of(spec) is not None
    return spec.position.rotary or coded or bool(spec.scheme.extra)


def refusal(spec: DecodeSpec, tokens: int, capacity: int, *, biased: bool, passes: int | None) -> str | None:
    """Why keys alone are not served, or None."""
    if spec.scheme.option == 1:
        return "option 1 rebuilds rows, which takes more time than reading them; use k2"
    if reason := _tiles_refusal(spec, biased=biased):
        return reason
    if spec.scheme.extra % 8 or spec.scheme.extra > BLOCK:
        return f"{spec.scheme.extra} extra coordinates have no kernel for GPUs; it has multiples of 8 up to {BLOCK}"
    as_cached = spec.scheme.extra and packing_of(spec) is None
    if as_cached and _coded(spec, "r") != _coded(spec, "k"):
        return "extra coordinates in another codec than the keys have no kernel for GPUs"
    if as_cached and capacity % BLOCK:
        return f"extra coordinates of {capacity} slots have no kernel for GPUs; take a multiple of {BLOCK}"
    if biased and (spec.position.rotary or spec.softcap is not None):
        return f"a key bias under {'RoPE' if spec.position.rotary else 'a softcap'} has no kernel for GPUs"
    if spec.position.rotary and spec.position.interleaved:
        return "RoPE of neighbouring coordinates, on keys cached before it, has no kernel for GPUs"
    if plan(spec, tokens, passes) is not None:
        return None
    if passes == 1 or _only_once(spec) or tokens * spec.heads > ROWS:
        return _unshared(spec, tokens, passes)
    return None


def _tiles_refusal(spec: DecodeSpec, *, biased: bool) -> str | None:
    """Why FlashQ's tiles are not served, if that is what keys are in; or None."""
    if (packing := packing_of(spec)) is None:
        return None
    if reason := packed.refusal(packing.bits, packing.tile):
        return reason
    if biased:
        return "a key bias beside FlashQ's tiles has no kernel for GPUs"
    if spec.kv_heads % 4:
        return f"FlashQ's tiles of {spec.kv_heads} key heads have no kernel for GPUs; it has multiples of 4"
    return None


def _unshared(spec: DecodeSpec, tokens: int, passes: int | None) -> str:
    """Why one pass does not serve it, and two do not."""
    kind = "keys cached before RoPE" if spec.position.rotary else f"rows of {spec.scheme}"
    if (passes == 2 or mosaic.OLD) and not _only_once(spec) and passes != 1:
        few = ROWS // spec.heads
        hint = f"; decode at most {few} at a time" if few else ""
        return f"{tokens} query tokens of {spec.heads} heads a token are more than {ROWS} rows{hint}"
    if passes == 2:
        return f"{kind} have no kernel for GPUs in two passes"
    if mosaic.OLD:
        return f"{kind} have no kernel for GPUs that reads them once under jax 0.10; use 0.11 or newer"
    if most := _together(spec, tokens):
        return f"{tokens} query tokens are more than {MOST} calls of {most}; decode at most {MOST * most} at a time"
    return (
        f"{kind}, {spec.kv_heads} heads of {spec.head_dim} for {spec.heads} query heads, have no kernel for GPUs: a "
        "cluster of 1, 2, 4 or 8 blocks of threads wants whole heads for each, in multiples of 128 columns (384 of "
        "heads of 96), up to some 600"
    )


def attend(
    q: Queries,
    cache: Cache,
    length: Lengths,
    start: Lengths,
    rules: Rules,
    spec: DecodeSpec,
    *,
    splits: int | None,
    passes: int | None,
    interpret: Any,
) -> tuple[Float[Array, "B T N E+R"], Float[Array, "B T N"] | None]:
    """Keys weighed as whole rows, and the softmax's log-sums; None where they are not known.

    A bias of the keys moves all scores of a query alike, and is left out. Of FlashQ's tiles those alone, without the
    buffer. Raises RuntimeError interpreted with too few threads.
    """
    found, limit = plan(spec, q.shape[1], passes), None
    if (packing := packing_of(spec)) is None:
        held = {name: Held(*stream.leaves) for name, stream in cache.streams.items()}
    else:
        codec, stored = codec_of(spec.scheme), cache.streams["k"].tiles
        assert isinstance(codec, TiledCodec)
        tiles = jax.tree.unflatten(stored.structure, stored.leaves)
        held = {"k": Held(tiles.packed, tiles.scale, tiles.step, tiles.low)}
        if spec.scheme.extra:
            held["r"] = Held(_in_order(cache, codec, packing))
        positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        limit = jnp.minimum(tokens_in_tiles(cache, codec, positions), cache.capacity)
    if found is None:
        return _twice(q, held["k"].rows, length, start, rules, splits, interpret), None
    at, calls = 0, []
    for count, part in found:
        mosaic.enough_threads(part.blocks * GROUPS, "with keys alone in one pass", interpret)
        some = slice(at, at + count)
        own = None if limit is None else limit[:, some]
        seen = length if own is None else jnp.max(own, axis=1)
        these = dataclasses.replace(rules, tokens=count)
        calls.append(
            _once(
                q[:, some], held, seen, own, start + at, these, spec, part, splits=splits, interpret=interpret
            )
        )
        at += count
    mixed, log_sums = (jnp.concatenate(each, axis=1) for each in zip(*calls, strict=True))
    return mixed, log_sums


def _in_order(cache: Cache, codec: TiledCodec, packing: Packing) -> BFloat16[Array, "B R s"]:
    """Extra coordinates, decoded, in the order in which blocks of packed keys have their tokens.

    By XLA: they are a few of a row's numbers, whose codes would take the kernel as long as many.
    """
    rows = read(dataclasses.replace(cache, streams={"r": cache.streams["r"]}), codec, "float32")["r"][:, :, 0]
    blocks = np.arange(-(-cache.capacity // packing.span) * packing.parts)[:, None]
    step, of_byte = packing.split(blocks)
    order = step * packing.span + of_byte * packing.rows + packing.offset(np.arange(BLOCK))
    found = jnp.take(rows, order.reshape(-1), axis=1, mode="fill", fill_value=0)
    return jnp.swapaxes(found, 1, 2).astype(jnp.bfloat16)


def _once(
    q: Queries,
    held: dict[str, Held],
    length: Lengths,
    limit: Int32[Array, "B T"] | None,
    start: Lengths,
    rules: Rules,
    spec: DecodeSpec,
    part: Share,
    *,
    splits: int | None,
    interpret: Any,
) -> tuple[Float[Array, "B T N E+R"], Float[Array, "B T N"]]:
    batch, tokens, _, size = q.shape
    own = part.width // size
    rows = q.reshape(batch, tokens, part.blocks, own, rules.group, 1, size)
    itself = jnp.eye(own, dtype=q.dtype).reshape(1, 1, 1, own, 1, own, 1)
    mine = rows * itself  # in the columns of its own head
    mine = jnp.moveaxis(mine, 2, 1).reshape(batch, part.blocks, -1, part.width)
    count = mine.shape[2]
    mine = jnp.pad(mine, ((0, 0), (0, 0), (0, part.rows - count), (0, 0)))
    mixed, log_sums = attend_keys(
        mine,
        held["k"],
        held.get("r"),
        length,
        start,
        rules,
        spec.position,
        part,
        limit=limit,
        splits=splits,
        interpret=interpret,
    )

    def by_token(found: Float[Array, "B M *A"]) -> Float[Array, "B T N *A"]:
        found = found.reshape(batch, part.blocks, part.sent, *found.shape[2:])[:, :, :count]
        found = found.reshape(batch, part.blocks, tokens, own * rules.group, *found.shape[3:])
        return jnp.swapaxes(found, 1, 2).reshape(batch, tokens, -1, *found.shape[4:])

    return by_token(mixed), by_token(log_sums)


def _twice(
    q: Queries,
    keys: Float[Array, "B S E"],
    length: Lengths,
    start: Lengths,
    rules: Rules,
    splits: int | None,
    interpret: Any,
) -> Float[Array, "B T N E"]:
    """The second pass finds in L2 what there is room for."""
    batch, tokens, heads, _ = q.shape
    rows = by_key_head(q, rules)
    first = parts(batch * rows.shape[1], keys.shape[1]) if splits is None else splits
    raw = score_rows(rows, keys, length, start, rules, splits=first, interpret=interpret)
    raw = raw[:, :, : tokens * rules.group].reshape(batch, -1, tokens, rules.group, raw.shape[-1])
    p = _softmax(raw * rules.scale, length, start, rules).swapaxes(1, 2)
    p = padded(p.reshape(batch, tokens * heads, -1).astype(keys.dtype))
    columns = batch * keys.shape[2] // column_width(keys.shape[2])
    second = parts(columns, keys.shape[1]) if splits is None else splits
    mixed = weigh_rows(p, keys, length, start, rules, splits=second, interpret=interpret).sum(axis=0)
    return mixed[:, : tokens * heads].reshape(batch, tokens, heads, -1)


def _softmax(
    scores: Float[Array, "B K T G S"], length: Lengths, start: Lengths, rules: Rules
) -> Float[Array, "B K T G S"]:
    """Weights; 0 where a query does not see, whatever is there."""
    if rules.softcap is not None:
        scores = rules.softcap * jnp.tanh(scores / rules.softcap)
    positions = start[:, None] + jnp.arange(rules.tokens, dtype=jnp.int32)[None]
    slots = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    seen = visible(positions, slots, length, causal=rules.causal, window=rules.window)[:, :, :, None]
    peak = jnp.max(jnp.where(seen, scores, MASK), axis=-1, keepdims=True)
    p = jnp.where(seen, exponential(peak - scores, rules.sas), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p / jnp.where(total == 0, 1.0, total)
