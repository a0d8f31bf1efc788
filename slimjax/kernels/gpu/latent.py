"""Attention on rows that every head meets, of bases x, e and h, by kernels for Hopper (as MLA's absorbed decode).

For each query row n, N*T of them, a[n] = q[n] W_K of its head made beforehand, and each row x[c] of D columns:

    s[n, c] = a[n] . x[c] * scale       p = softmax(s)       out[n] = sum_c p[n, c] x[c]       (then W_V, by XLA)

The kernel is ``slim``'s. Bytes a token: 2*D, of codes 4 more, once for every cluster that the query rows are cut into
(of 128 heads on rows of 1,024 three). FLOPs a token: 4*N*T*D, so that 64 heads are some 128 a byte.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.axes import Lengths, LogSums
from slimjax.cache import Cache, codec_of
from slimjax.cache.codecs.integers import IntegerCodec
from slimjax.kernels.gpu import mosaic
from slimjax.kernels.gpu.ring import Rules
from slimjax.kernels.gpu.share import GROUPS, Share, share_latent
from slimjax.kernels.gpu.slim import Held, attend_keys
from slimjax.kernels.spec import DecodeSpec

BASES = ("x", "e", "h")
MOST = 16  # clusters that query rows are cut into, each of which reads all rows


def plan(spec: DecodeSpec, tokens: int) -> Share | None:
    """How clusters share rows, or None."""
    coded = isinstance(codec_of(spec.scheme).stream(spec.scheme.basis), IntegerCodec)
    part = share_latent(row_width(spec), tokens * spec.heads, codes=coded)
    return None if part is None or part.groups > MOST else part


def row_width(spec: DecodeSpec) -> int:
    """Columns of a cached row."""
    return spec.key_width if spec.scheme.basis == "h" else spec.width


def refusal(spec: DecodeSpec, tokens: int, *, biased: bool) -> str | None:
    """Why such rows are not served, or None."""
    scheme = spec.scheme
    if scheme.option == 1:
        return f"option 1 rebuilds rows, which takes more time than reading them; use {scheme.basis}2"
    if mosaic.OLD:
        return f"basis {scheme.basis} has no kernel for GPUs under jax 0.10; use 0.11 or newer"
    if biased and spec.softcap is not None:
        return "a key bias under a softcap has no kernel for GPUs"
    if plan(spec, tokens) is None:
        return (
            f"rows of {row_width(spec)} columns for {tokens} query tokens of {spec.heads} heads have no kernel for "
            f"GPUs: it wants a multiple of 128 columns, some 6,000 at most, and no more query rows than {MOST} "
            "clusters hold the sums of"
        )
    return None


def attend(
    q: Float[Array, "B T N D"],
    cache: Cache,
    length: Lengths,
    start: Lengths,
    rules: Rules,
    spec: DecodeSpec,
    *,
    splits: int | None,
    interpret: Any,
) -> tuple[Float[Array, "B T N D"], LogSums]:
    """Rows weighed by queries that were made for them, and log-sums. A bias of the keys is left out, as it cancels.

    Raises RuntimeError interpreted with too few threads.
    """
    batch, tokens, heads, width = q.shape
    part = plan(spec, tokens)
    assert part is not None  # or it is refused
    mosaic.enough_threads(part.blocks * GROUPS, "on rows that every head meets", interpret)
    rows = q.reshape(batch, tokens * heads, width)
    rows = jnp.pad(rows, ((0, 0), (0, part.groups * part.rows - tokens * heads), (0, 0)))
    rows = rows.reshape(batch * part.groups, part.rows, part.blocks, part.width)
    held = Held(*cache.streams[spec.scheme.basis].leaves)
    found = attend_keys(
        jnp.swapaxes(rows, 1, 2),
        held,
        None,
        length,
        start,
        rules,
        spec.position,
        part,
        splits=splits,
        interpret=interpret,
    )

    def by_token(each: Float[Array, "c M *A"]) -> Float[Array, "B T N *A"]:
        each = each.reshape(batch, part.groups * part.rows, *each.shape[2:])
        return each[:, : tokens * heads].reshape(batch, tokens, heads, *each.shape[2:])

    return by_token(found[0]), by_token(found[1])
