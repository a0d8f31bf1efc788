"""The arrays of one attention layer: its projections as trained, and what decoding needs instead of W_V."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slimjax.attention.pair import Pair
from slimjax.attention.positions import BiasParameters
from slimjax.numerics import accumulation_dtype, einsum
from slimjax.pytree import pytree


@pytree
class Projections:
    """Weights of one attention layer, laid out as in ``flax.nnx.MultiHeadAttention``; biases may be None.

    ``position`` holds the trained parameters of an additive position bias, where there is one.
    """

    wq: Float[Array, "D N H"]
    wk: Float[Array, "D K H"]
    wv: Float[Array, "D K H"]
    wo: Float[Array, "N H D"]
    bq: Float[Array, "N H"] | None = None
    bk: Float[Array, "K H"] | None = None
    bv: Float[Array, "K H"] | None = None
    bo: Float[Array, "D"] | None = None
    position: BiasParameters = None


@pytree
class DecodeWeights:
    """What stands in for the rows that a basis does not cache; a basis leaves the fields it does not use None.

    Attributes:
        w_kv: bases k and kr: V = [K, X extra] w_kv. float32 or wider, or a pair of bfloat16 arrays: in one it would
            cost as much accuracy as a bfloat16 cache does (tests/test_attention.py rounds it and misses the
            tolerance).
        extra: bases k and kr: the directions U of the R extra cached coordinates.
        w_vk: basis v: K = V w_vk, likewise.
        wk, wv: bases x and e: the projections themselves; basis h: W_K1^-1 times them, [E, K, H].
        k_bias: bias of the keys, where it does not cancel (RoPE or softcap); keys are cached without it.
        position: trained parameters of an additive position bias.
    """

    w_kv: Float[Array, "E+R K H"] | Pair | None = None
    extra: Float[Array, "D R"] | None = None
    w_vk: Float[Array, "E K H"] | None = None
    wk: Float[Array, "D K H"] | None = None
    wv: Float[Array, "D K H"] | None = None
    k_bias: Float[Array, "K H"] | None = None
    position: BiasParameters = None


def project(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D N H"],
    bias: Float[Array, "N H"] | None,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B T N H"]:
    """x weight + bias with operands in ``dtype`` and the sum in its accumulation dtype, which is returned."""
    out = einsum("btd,dnh->btnh", x.astype(dtype), weight.astype(dtype))
    return out if bias is None else out + bias.astype(accumulation_dtype(dtype))[None, None]


def project_out(
    heads: Float[Array, "B T N H"],
    weight: Float[Array, "N H D"],
    bias: Float[Array, "D"] | None,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B T D"]:
    """The output projection, rounded to ``dtype`` at the end."""
    out = einsum("btnh,nhd->btd", heads.astype(dtype), weight.astype(dtype))
    if bias is not None:
        out = out + bias.astype(out.dtype)[None, None]
    return out.astype(jnp.dtype(dtype))
