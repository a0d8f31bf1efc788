"""``decode`` by Pallas kernels for Hopper GPUs, ``implementation="pallas_gpu"``; on other backends only interpreted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.attention.bases import basis
from slimjax.attention.blocks import Part
from slimjax.attention.compute import compute_text
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.softmax import sas_of
from slimjax.axes import Lengths, LogSums, Queries, typed
from slimjax.cache import Cache, Codec, TiledCodec, codec_of
from slimjax.cache.codecs.floats import FloatCodec
from slimjax.cache.codecs.integers import IntegerCodec
from slimjax.kernels import flashq
from slimjax.kernels.buffer import attend_buffer
from slimjax.kernels.combine import combine
from slimjax.kernels.gpu import flashq_decode, keys, latent
from slimjax.kernels.gpu.grid import ALIGNED, by_key_head, foreign, parts
from slimjax.kernels.gpu.heads import attend_heads
from slimjax.kernels.gpu.mosaic import interpreter
from slimjax.kernels.gpu.ring import ROWS, Rules
from slimjax.kernels.spec import DecodeSpec

SIZES = (64, 96, 128)  # of heads


@typed
def decode(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    *,
    splits: int | None = None,
    passes: int | None = None,
    interpret: Any = None,
) -> Queries:
    """As ``slimjax.decode``.

    Args:
        q, cache, weights, spec, start: as there; ``start`` is the position of each sequence's first query.
        splits: parts that a sequence is cut into; None: see ``grid.parts``. SAS cuts what is small against a part's
            own maximum, and so depends on them.
        passes: how often keys alone are read, 1 or 2; None: see ``keys.plan``. Other bases are read once.
        interpret: False, or ``mosaic.interpreter()``; None: interpreted where there is no GPU.

    Raises:
        NotImplementedError: what the kernels, or the GPU in use, do not serve, with the reason.
        ValueError: fewer than one part, or passes other than 1 and 2.
        RuntimeError: interpreted with too few threads.
    """
    return decode_part(q, cache, weights, spec, start, splits=splits, passes=passes, interpret=interpret)[0]


@typed
def decode_part(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    *,
    splits: int | None = None,
    passes: int | None = None,
    interpret: Any = None,
) -> Part:
    """As ``slimjax.decode_part``, with the arguments of ``decode``; of two passes log-sums are not known."""
    if passes not in (None, 1, 2):
        raise ValueError(f"{passes=}: expected 1, 2 or None")
    reason = refusal(spec, q.shape[1], cache.capacity, biased=weights.k_bias is not None, passes=passes)
    if reason := reason or (None if interpret is not None else foreign()):
        raise NotImplementedError(f"scheme {spec.scheme}: {reason}")
    if splits is not None and splits < 1:
        raise ValueError(f"{splits=}: expected at least one part")
    if interpret is None:
        interpret = False if jax.default_backend() == "gpu" else interpreter()
    rules = Rules(
        group=spec.group,
        tokens=q.shape[1],
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        softcap=spec.softcap,
        window=spec.window,
        causal=spec.causal,
        sas=sas_of(spec.scheme.softmax),
    )
    if flashq.serves(spec):
        out, log_sums = flashq_decode.decode_tiles(
            q, cache, weights, spec, start, rules, splits=splits, interpret=interpret
        )
    else:
        out, log_sums = _rows(q, cache, weights, spec, start, rules, splits, passes, interpret)
    overfull = (cache.length > cache.capacity)[:, None, None, None]
    return jnp.where(overfull, jnp.full_like(out, jnp.nan), out), log_sums


def _rows(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    rules: Rules,
    splits: int | None,
    passes: int | None,
    interpret: Any,
) -> Part:
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    ready = basis(spec).queries(q.astype(spec.dtype), positions, weights, spec)
    held = jnp.minimum(cache.length, cache.capacity)  # an overfull cache is NaN: nothing to wait for
    if spec.scheme.basis == "kv":
        mixed, log_sums = _plain(ready.astype(spec.dtype), cache, held, start, rules, splits, interpret)
    elif spec.scheme.basis == "k":
        rows = ready.astype(spec.dtype)
        mixed, log_sums = keys.attend(
            rows, cache, held, start, rules, spec, splits=splits, passes=passes, interpret=interpret
        )
        if isinstance(codec := codec_of(spec.scheme), TiledCodec):
            assert log_sums is not None  # of one pass
            newest = attend_buffer(q, cache, weights, spec, codec, start)
            both = (jnp.stack(each) for each in zip((mixed, log_sums), newest, strict=True))
            mixed, log_sums = combine(*both)
    else:
        absorbed, whole = ready.q.astype(spec.dtype), dataclasses.replace(rules, group=spec.heads)
        mixed, log_sums = latent.attend(
            absorbed, cache, held, start, whole, spec, splits=splits, interpret=interpret
        )
    return basis(spec).finish(mixed, weights, spec).astype(spec.dtype), log_sums


def _plain(
    q: Queries,
    cache: Cache,
    length: Lengths,
    start: Lengths,
    rules: Rules,
    splits: int | None,
    interpret: Any,
) -> tuple[Float[Array, "B T N H"], LogSums]:
    """Keys and values."""
    rows = by_key_head(q, rules)
    splits = parts(rows.shape[0] * rows.shape[1], cache.capacity) if splits is None else splits
    rows_of_keys, values = (cache.streams[name].leaves[0] for name in ("k", "v"))
    answers, log_sums = attend_heads(
        rows, rows_of_keys, values, length, start, rules, splits=splits, interpret=interpret
    )

    def by_token(found: Float[Array, "B K R *A"]) -> Float[Array, "B T N *A"]:
        found = found[:, :, : rules.tokens * rules.group]
        found = found.reshape(*found.shape[:2], rules.tokens, rules.group, *found.shape[3:])
        return found.swapaxes(1, 2).reshape(*q.shape[:3], *found.shape[4:])

    mixed, sums = combine(answers, log_sums[..., : rows.shape[2]])
    return by_token(mixed), by_token(sums)


def refusal(
    spec: DecodeSpec, tokens: int, capacity: int, *, biased: bool = False, passes: int | None = None
) -> str | None:
    """Why no kernel serves this spec, so many query tokens and slots, or None.

    biased: keys have a bias. passes: as in ``decode``.
    """
    scheme = spec.scheme
    if flashq.serves(spec):
        return flashq_decode.refusal(spec, tokens) or _shape_refusal(spec, capacity)
    if scheme.basis not in ("kv", "k", *latent.BASES):
        return f"basis {scheme.basis} has no kernel for GPUs; it has kv, k, x, e and h"
    if (mode := compute_text(scheme)) != "float":
        return f"compute mode {mode} has no kernel for GPUs"
    if scheme.softmax != "exact" and (scheme.basis == "kv" or not (sas_of(scheme.softmax) or (0,))[0]):
        more = "" if scheme.basis == "kv" else ", and SAS with a cut"
        return f"softmax {scheme.softmax} has no kernel for GPUs; it has exact{more}"
    codec = codec_of(scheme)
    tiled = scheme.basis == "k" and keys.packing_of(spec) is not None
    if not (tiled or all(_stored(codec.stream(name), scheme.basis) for name in basis(spec).streams(spec))):
        return (
            f"codec {scheme.codec} has no kernel for GPUs; it has bf16, of kv flashq, of keys alone flashq of one "
            "width, and of bases without values int16"
        )
    if reason := _shape_refusal(spec, capacity):
        return reason
    if scheme.basis == "kv":
        few = f"{tokens} query tokens of {spec.group} heads a key head are more than {ROWS} rows; decode at most"
        return None if tokens * spec.group <= ROWS else f"{few} {ROWS // spec.group} at a time"
    if scheme.basis == "k":
        return keys.refusal(spec, tokens, capacity, biased=biased, passes=passes)
    return latent.refusal(spec, tokens, biased=biased)


def _stored(stream: Codec, basis_: str) -> bool:
    """Whether a stream is bfloat16, or, not of keys beside values, int16 with a scale for each token."""
    if isinstance(stream, FloatCodec):
        return stream.kind == "bf16"
    return isinstance(stream, IntegerCodec) and basis_ != "kv" and stream.bits == 16 and not stream.per_head


def _shape_refusal(spec: DecodeSpec, capacity: int) -> str | None:
    """Why sizes and positions are not served, or None."""
    if spec.dtype != "bfloat16":
        return f"compute dtype {spec.dtype} has no kernel for GPUs; use bfloat16"
    if spec.position.kind not in ("none", "learned", "rope"):
        return f"position scheme {spec.position.kind!r} has no kernel for GPUs"
    if spec.scheme.basis not in latent.BASES and spec.head_dim not in SIZES:
        return f"{spec.head_dim=} has no kernel for GPUs; it has {', '.join(map(str, SIZES))}"
    if capacity % ALIGNED:
        return f"a cache of {capacity} slots has no kernel for GPUs; take a multiple of {ALIGNED}"
    return None
