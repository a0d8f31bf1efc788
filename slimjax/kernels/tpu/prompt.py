"""Exact attention of a prompt on itself, on TPU: JAX's splash attention, for what it serves.

O = softmax(Q K^T / sqrt(H)) V, causal: 2 T^2 N H multiplications and additions beside 2 (2 N + 2 K) T H bytes read and
written, so that from some hundred tokens on the products bind. A kernel for this exists; slimjax has none of its own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from slimjax.attention.positions import rotate
from slimjax.axes import Keys, Lengths, Queries, Values, typed
from slimjax.kernels.spec import DecodeSpec

BLOCK = 512  # tokens of a tile of queries, and of keys
LEAST = 128  # what tiles are multiples of; shorter prompts are left to XLA


def refusal(spec: DecodeSpec, tokens: int) -> str | None:
    """Why a prompt of so many tokens is not served, or None."""
    if spec.dtype != "bfloat16":
        return f"compute dtype {spec.dtype}: products of a prompt are in bfloat16"  # on TPU float32 would be cut to it
    if not spec.causal:
        return "attention that looks ahead"
    if spec.position.kind not in ("none", "learned", "rope"):
        return f"position scheme {spec.position.kind!r} adds to the scores"
    if tokens < LEAST:
        return f"{tokens} tokens are fewer than {LEAST}"
    return None


@typed
def attend_prompt(
    q: Queries, k: Keys, v: Values, spec: DecodeSpec, length: Lengths, *, interpret: bool = False
) -> Queries:
    """A prompt of T tokens on itself.

    Args:
        q: [B, T, N, H] before any rotation.
        k, v: [B, T, K, H] bfloat16, keys rotated.
        spec: heads, positions, window, softcap, scale; its scheme is not looked at.
        length: [B], tokens of each right-padded sequence; what lies behind may be anything.
        interpret: run without a TPU.

    Returns:
        [B, T, N, H] in ``spec.dtype``; rows at ``length`` and behind are meaningless.

    Raises:
        NotImplementedError: as ``refusal``.
    """
    tokens = q.shape[1]
    if reason := refusal(spec, tokens):
        raise NotImplementedError(f"splash attention does not serve {reason}")
    positions = jnp.arange(tokens, dtype=jnp.int32)
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    # Scaled before the one rounding that they would have anyway.
    turned = (rotate(q.astype(jnp.float32), positions[None], spec.position) * scale).astype(k.dtype)
    there = (positions[None] < length[:, None])[:, :, None, None]
    k, v = (
        jnp.where(there, rows, jnp.zeros_like(rows)) for rows in (k, v)
    )  # a weight of 0 would not hide NaN
    block = min(BLOCK, math.ceil(tokens / LEAST) * LEAST)
    behind = (0, -tokens % block)
    heads_first = [
        jnp.swapaxes(jnp.pad(rows, ((0, 0), behind, (0, 0), (0, 0))), 1, 2) for rows in (turned, k, v)
    ]
    kernel = _kernel(heads_first[0].shape[2], block, spec, interpret)
    out = jax.vmap(kernel)(*heads_first)
    return jnp.swapaxes(out, 1, 2)[:, :tokens].astype(spec.dtype)


def _kernel(slots: int, block: int, spec: DecodeSpec, interpret: bool) -> Callable[..., Any]:
    """Made where it is traced: its tables of blocks are arrays."""
    square = (slots, slots)
    if spec.window is None:
        mask = splash_attention_mask.CausalMask(square)
    else:
        mask = splash_attention_mask.LocalMask(square, (spec.window - 1, 0), 0)
    return splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([mask] * spec.heads),
        block_sizes=splash_attention_kernel.BlockSizes(block_q=block, block_kv=block),
        attn_logits_soft_cap=spec.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
