"""The formulas of one attention layer in the generate phase, for one new token of one sequence.

From arXiv 2503.05840, section 2, extended to any E, to grouped queries and to extra coordinates.

D width, N heads, K key/value heads, H head size, A = N*H, E = K*H, R extra coordinates, S cached tokens. With
multi-head attention A = E = D, and these are the paper's tables 2, 8 and 9. An operation is one multiplication
or one addition; softmax, rotations and biases are left out, as there. A cached row is read once, however many heads
use it.
"""

import dataclasses
import math

from slimjax.cache import codec_of, row_bytes
from slimjax.cost.architectures import Architecture
from slimjax.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Work:
    """operations; reads: values read from memory."""

    operations: float
    reads: float

    @property
    def intensity(self) -> float:
        """Operations per value read."""
        return self.operations / self.reads


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of an attention layer that a step reads: `kept` as trained, `solved` computed and kept in float32."""

    kept: int
    solved: int

    @property
    def count(self) -> int:
        """All of them."""
        return self.kept + self.solved

    def nbytes(self, kept: float = 2, solved: float = 4) -> float:
        """Bytes, at `kept` and `solved` bytes each."""
        return self.kept * kept + self.solved * solved


def refusal(a: Architecture, scheme: Scheme, *, cross: bool = False) -> str | None:
    """Why the scheme cannot serve a self (or cross) attention layer of these sizes, or None."""
    rotary = a.position == "rope" and not cross
    basis, e, d = scheme.basis, a.key_width, a.width
    if basis in ("e", "h") and not cross:
        return f"basis {basis} is for cross attention, which this layer is not"
    if basis == "x" and cross:
        return "cross attention reads the encoder's output: that is basis e"
    if basis == "kr" and not rotary:
        return "there is no RoPE, so keys after it are keys: use k"
    if rotary and (basis, scheme.option) in (("x", 2), ("v", 2)):
        return f"RoPE stands between a query and the absorbed weights: use {basis}1, which rebuilds"
    if basis in ("k", "kr", "v", "h") and e + scheme.extra < d:
        more = "" if basis in ("v", "h") else f", or at least {d - e} extra coordinates"
        row = f"E + R = {e + scheme.extra}"
        return f"rows of width {row} do not determine inputs of width D = {d}: use kv or x{more}"
    if reason := codec_of(scheme).refusal(basis, streams(a, scheme), 2 * e):
        return reason
    try:
        cache_bytes(a, scheme)
    except (ValueError, NotImplementedError) as error:
        return f"codec {scheme.codec}: {error}"
    return None


def streams(a: Architecture, scheme: Scheme) -> dict[str, tuple[int, int]]:
    """What a token's row is made of: name -> (heads, size)."""
    row = (a.kv_heads, a.head_dim)
    if scheme.basis == "kv":
        return {"k": row, "v": row}
    if scheme.basis in ("x", "e"):
        return {"x": (1, a.width)}
    if scheme.basis == "h":
        return {"h": (1, a.key_width)}
    return {
        "v" if scheme.basis == "v" else "row": row,
        **({"r": (1, scheme.extra)} if scheme.extra else {}),
    }


def cached_values(a: Architecture, scheme: Scheme) -> int:
    """Values cached per token and layer: 2E (kv), E + R (k, kr), E (v, h), D (x, e); e and h once for all layers."""
    return sum(heads * size for heads, size in streams(a, scheme).values())


def cache_bytes(a: Architecture, scheme: Scheme, *, batch: int = 1, tokens: int = 1) -> int:
    """Bytes of one layer's cache as the codec stores it, scales included.

    Raises ValueError where the codec cannot store rows of this shape.
    """
    codec = codec_of(scheme)
    return math.ceil(batch * tokens * row_bytes(streams(a, scheme), codec))


def weights(a: Architecture, scheme: Scheme, *, cross: bool = False) -> Weights:
    """Weights read per step: queries and output 2DA, and what the scheme needs of the others.

    Self: kv, x 2DE kept; k, kr DE + DR kept, (E + R)E solved; v DE kept, E^2 solved.
    Cross (keys and values of the encoder's output are made once, before): kv none; k, v E^2 solved; e 2DE kept;
    h, from the second layer on, 2E^2 solved (its first layer is k).
    """
    d, e, r = a.width, a.key_width, scheme.extra
    outer = 2 * d * a.query_width
    if scheme.basis in ("kv", "x", "e"):
        return Weights(outer + (2 * d * e if scheme.basis != "kv" or not cross else 0), 0)
    if scheme.basis == "h":
        return Weights(outer, 2 * e * e)
    return Weights(outer + (0 if cross else d * (e + r)), (e + r) * e)


def projections(a: Architecture, scheme: Scheme, context: int, *, cross: bool = False) -> Work:
    """Products with weights; option 1 multiplies all S cached rows, option 2 each head's query or sum.

    Queries and output 4DA; new rows 2D(2E) for kv, 2D(E + R) for k and kr, 2DE for v, none for x and for cross.
    Then, option 1: k, kr, v 2S(E + R)E, x, e 4SDE, h 4SEE. Option 2: k, kr, v 2(E + R)A, x, e 4DA, h 4EA.
    """
    s, d, e, r, width = context, a.width, a.key_width, scheme.extra, a.query_width
    basis = scheme.basis
    new = {"kv": 4 * d * e, "v": 2 * d * e, "x": 0, "e": 0, "h": 0}.get(basis, 2 * d * (e + r))
    if basis == "kv":
        missing = 0
    elif basis in ("x", "e", "h"):
        row = e if basis == "h" else d
        missing = 4 * s * row * e if scheme.option == 1 else 4 * row * width
    else:
        missing = 2 * s * (e + r) * e if scheme.option == 1 else 2 * (e + r) * width
    operations = 4 * d * width + (0 if cross else new) + missing
    return Work(operations, weights(a, scheme, cross=cross).count)


def score_operations(a: Architecture, scheme: Scheme, context: int) -> int:
    """Of one head, queries with keys: 2SH; with absorbed weights 2S times the cached row (x, e: D; v, h: E)."""
    absorbed = {"x": a.width, "e": a.width, "v": a.key_width, "h": a.key_width}
    row = absorbed.get(scheme.basis, a.head_dim) if scheme.option == 2 else a.head_dim
    return 2 * context * row


def weighing_operations(a: Architecture, scheme: Scheme, context: int) -> int:
    """Of one head, the weighted sum: 2SH; of whole cached rows 2S times the row (k, kr: E + R; x, e: D; h: E)."""
    if scheme.option != 2 or scheme.basis == "v":
        return 2 * context * a.head_dim
    return 2 * context * cached_values(a, scheme)


def attention(a: Architecture, scheme: Scheme, context: int) -> Work:
    """Scores and weighted sum of all N heads over S tokens; reads: the cache, each row once."""
    of_head = score_operations(a, scheme, context) + weighing_operations(a, scheme, context)
    return Work(a.heads * of_head, context * cached_values(a, scheme))


def first_gain(extra: float, saved: float) -> int | None:
    """The least n >= 1 from which on n * saved > extra always holds; None if there is none."""
    if saved <= 0:
        return 1 if saved == 0 and extra < 0 else None
    return max(1, int(extra // saved) + 1)


def break_even(
    a: Architecture, scheme: Scheme, vanilla: Scheme, *, kept: float = 2, solved: float = 4
) -> int | None:
    """Batch x context (B*S) from which a self-attention layer reads less than vanilla's; None: never.

    Weights are read once per step and caches once per sequence: the scheme wins once B*S tokens save more than
    its weights add. Llama-2-7B, k:bf16: E^2 * 4 - D*E * 2 = 33.5 MB against 2E bytes per token: 4097.
    """
    extra = weights(a, scheme).nbytes(kept, solved) - weights(a, vanilla).nbytes(kept, solved)
    return first_gain(extra, per_token(a, vanilla) - per_token(a, scheme))


def per_token(a: Architecture, scheme: Scheme, tokens: int = 1024) -> float:
    """Cache bytes per token of one layer, averaged over `tokens` (codecs may store tokens in groups)."""
    return cache_bytes(a, scheme, tokens=tokens) / tokens


def skipped(sparsity: float, sharing: int = 1) -> float:
    """Share of rows that all of `sharing` heads skip, heads being independent: sparsity^sharing."""
    return sparsity**sharing


def sparse_speedup(sparsity: float) -> float:
    """How much less a weighted sum costs where a share `sparsity` of its rows is skipped: 1 / (1 - sparsity)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"{sparsity=}: expected a share in [0, 1)")
    return 1 / (1 - sparsity)
