"""``decode`` by Pallas kernels for Hopper GPUs, ``implementation="pallas_gpu"``; on other backends only interpreted."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from slimjax.attention.bases import basis
from slimjax.attention.compute import compute_text
from slimjax.attention.projections import DecodeWeights
from slimjax.axes import Lengths, Queries, typed
from slimjax.cache import Cache, codec_of
from slimjax.cache.codecs.floats import FloatCodec
from slimjax.kernels.combine import combine
from slimjax.kernels.gpu.heads import attend_heads
from slimjax.kernels.gpu.mosaic import interpreter
from slimjax.kernels.gpu.ring import BLOCK, ROWS, Rules
from slimjax.kernels.spec import DecodeSpec

SIZES = (64, 96, 128)  # of heads
PROCESSORS = 132  # of a H100 or H200; each works on one part of one key head at a time
START = 4  # blocks of tokens that could be read while a part begins and ends; a guess, not measured
ALIGNED = 8  # rows: the least that operands of products are cut into


@typed
def decode(
    q: Queries,
    cache: Cache,
    weights: DecodeWeights,
    spec: DecodeSpec,
    start: Lengths,
    *,
    splits: int | None = None,
    interpret: Any = None,
) -> Queries:
    """As ``slimjax.decode``.

    Args:
        q, cache, weights, spec, start: as there; ``start`` is the position of each sequence's first query.
        splits: parts that a sequence is cut into; None: see ``parts``.
        interpret: False, or ``mosaic.interpreter()``; None: interpreted where there is no GPU.

    Raises:
        NotImplementedError: what the kernels, or the GPU in use, do not serve, with the reason.
        ValueError: fewer than one part.
    """
    batch, tokens, heads, size = q.shape
    if reason := refusal(spec, tokens, cache.capacity) or (None if interpret is not None else _old_gpu()):
        raise NotImplementedError(f"scheme {spec.scheme}: {reason}")
    if interpret is None:
        interpret = False if jax.default_backend() == "gpu" else interpreter()
    splits = parts(batch * spec.kv_heads, cache.capacity) if splits is None else splits
    if splits < 1:
        raise ValueError(f"{splits=}: expected at least one part")
    positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    ready = basis(spec).queries(q.astype(spec.dtype), positions, weights, spec)
    rows = ready.reshape(batch, tokens, spec.kv_heads, spec.group, size).swapaxes(1, 2)
    rows = rows.reshape(batch, spec.kv_heads, tokens * spec.group, size).astype(spec.dtype)
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % ALIGNED), (0, 0)))
    keys, values = (cache.streams[name].leaves[0] for name in ("k", "v"))
    rules = Rules(
        group=spec.group,
        tokens=tokens,
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        softcap=spec.softcap,
        window=spec.window,
        causal=spec.causal,
    )
    held = jnp.minimum(cache.length, cache.capacity)  # an overfull cache is NaN below: nothing to wait for
    answers, log_sums = attend_heads(
        padded, keys, values, held, start, rules, splits=splits, interpret=interpret
    )
    mixed, _ = combine(answers, log_sums[..., : padded.shape[2]])
    out = mixed[:, :, : rows.shape[2]].reshape(batch, spec.kv_heads, tokens, spec.group, size).swapaxes(1, 2)
    out = out.reshape(batch, tokens, heads, size).astype(spec.dtype)
    return jnp.where((cache.length > cache.capacity)[:, None, None, None], jnp.full_like(out, jnp.nan), out)


def refusal(spec: DecodeSpec, tokens: int, capacity: int) -> str | None:
    """Why no kernel serves this spec, so many query tokens and slots, or None."""
    scheme = spec.scheme
    if scheme.basis != "kv":
        return f"basis {scheme.basis} has no kernel for GPUs; kv has one"
    if (mode := compute_text(scheme)) != "float":
        return f"compute mode {mode} has no kernel for GPUs"
    if scheme.softmax != "exact":
        return f"softmax {scheme.softmax} has no kernel for GPUs; it has exact"
    codec = codec_of(scheme)
    for name in basis(spec).streams(spec):
        stream = codec.stream(name)
        if not isinstance(stream, FloatCodec) or stream.kind != "bf16":
            return f"codec {scheme.codec} has no kernel for GPUs; it has bf16"
    if spec.dtype != "bfloat16":
        return f"compute dtype {spec.dtype} has no kernel for GPUs; use bfloat16"
    if spec.position.kind not in ("none", "learned", "rope"):
        return f"position scheme {spec.position.kind!r} has no kernel for GPUs"
    if spec.head_dim not in SIZES:
        return f"{spec.head_dim=} has no kernel for GPUs; it has {', '.join(map(str, SIZES))}"
    if tokens * spec.group > ROWS:
        return (
            f"{tokens} query tokens of {spec.group} heads for every key head are more than {ROWS} rows; "
            f"decode at most {ROWS // spec.group} at a time"
        )
    if capacity % ALIGNED:
        return f"a cache of {capacity} slots has no kernel for GPUs; take a multiple of {ALIGNED}"
    return None


def _old_gpu() -> str | None:
    """Why the kernels do not run on the GPU in use, or None; also None where there is none."""
    if jax.default_backend() != "gpu":
        return None
    found = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    return None if found == "9.0" else f"compute capability {found}: the kernels are for 9.0 (Hopper)"


def parts(heads: int, capacity: int) -> int:
    """Parts for so many sequences x key heads and slots: those that the last processor is soonest done with.

    Each processor takes one part at a time, and as long as ``START`` blocks of tokens to begin and end it.
    """
    blocks = math.ceil(capacity / BLOCK)

    def time(splits: int) -> int:
        return math.ceil(heads * splits / PROCESSORS) * (math.ceil(blocks / splits) + START)

    return min(range(1, min(blocks, PROCESSORS) + 1), key=time)
