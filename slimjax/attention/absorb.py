"""Working on whole cached rows: every head weighs the same row [E] (or [D]), weights come before or after.

This is the associativity of slim attention's option 2 (arXiv 2503.05840, section 2) and of MLA's absorbed
decode: (P C) W = P (C W), and (q W^T) C^T = q (C W)^T.
"""

from jaxtyping import Array, Float

from slimjax.attention.pair import Pair, through
from slimjax.axes import Queries, Scores, typed
from slimjax.numerics import einsum


@typed
def weigh_rows(p: Scores, rows: Float[Array, "B S E"]) -> Float[Array, "B T N E"]:
    """P C: each head's weighted mean of whole rows, summed in the rows' dtype (float32 or wider)."""
    return einsum("bnts,bse->btne", p.astype(rows.dtype), rows)


@typed
def apply_heads(mixed: Float[Array, "B T N E"], weight: Float[Array, "E K H"] | Pair) -> Queries:
    """(P C) W_n for every query head n, which uses the weight of key/value head n // (N/K)."""
    batch, tokens, heads, width = mixed.shape
    kv_heads, size = weight.shape[1:]
    grouped = mixed.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    out = through("btkge,ekh->btkgh", grouped, weight)
    return out.reshape(batch, tokens, heads, size)


@typed
def absorb_queries(q: Queries, weight: Float[Array, "E K H"]) -> Float[Array, "B T N E"]:
    """q_n W_n^T: queries that meet cached rows instead of keys."""
    batch, tokens, heads, size = q.shape
    grouped = q.reshape(batch, tokens, weight.shape[1], heads // weight.shape[1], size)
    out = einsum("btkgh,ekh->btkge", grouped, weight.astype(q.dtype))
    return out.reshape(batch, tokens, heads, weight.shape[0])


@typed
def row_scores(absorbed: Float[Array, "B T N E"], rows: Float[Array, "B S E"]) -> Scores:
    """The scores of absorbed queries against whole rows."""
    return einsum("btne,bse->bnts", absorbed, rows)


@typed
def bias_scores(q: Queries, k_bias: Float[Array, "K H"]) -> Float[Array, "B N T 1"]:
    """q_n . b_n: what a key bias adds to every score of a query. Softmax cancels it; a softcap does not."""
    batch, tokens, heads, size = q.shape
    grouped = q.reshape(batch, tokens, k_bias.shape[0], heads // k_bias.shape[0], size)
    out = einsum("btkgh,kh->bkgt", grouped, k_bias.astype(q.dtype))
    return out.reshape(batch, heads, tokens)[..., None]
