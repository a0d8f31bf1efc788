"""Biases that need not be carried through attention (row S10 of the slim-attention feature table)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from slimjax.attention.projections import Projections
from slimjax.kernels.spec import DecodeSpec


def fold_value_bias(projections: Projections, dtype: jax.typing.DTypeLike) -> Projections:
    """Move the value bias into the output bias: weights sum to 1, so P (V + b_V) W_O = P V W_O + b_V W_O.

    Summed in float64 on the host and kept in ``dtype``, an accumulation dtype: in the weights' own dtype
    the folded bias would be rounded where the two apart were not.
    """
    if projections.bv is None:
        return projections
    heads, kv_heads = projections.wo.shape[0], projections.bv.shape[0]
    bias, wo = (np.asarray(array).astype(np.float64) for array in (projections.bv, projections.wo))
    folded = np.einsum("nh,nhd->d", np.repeat(bias, heads // kv_heads, axis=0), wo)
    if projections.bo is not None:
        folded = folded + np.asarray(projections.bo).astype(np.float64)
    return dataclasses.replace(projections, bv=None, bo=jnp.asarray(folded, dtype))


def key_bias_matters(spec: DecodeSpec) -> bool:
    """Without RoPE a key bias adds one constant to all scores of a query, which a plain softmax cancels."""
    return spec.position.rotary or spec.softcap is not None
