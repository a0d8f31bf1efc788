"""Biases that need not be carried through attention (row S10 of the slim-attention feature table)."""

import dataclasses

import jax.numpy as jnp

from slimjax.attention.projections import Projections
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import einsum


def fold_value_bias(projections: Projections) -> Projections:
    """Move the value bias into the output bias: weights sum to 1, so P (V + b_V) W_O = P V W_O + b_V W_O."""
    if projections.bv is None:
        return projections
    heads, kv_heads = projections.wo.shape[0], projections.bv.shape[0]
    bias = jnp.repeat(projections.bv, heads // kv_heads, axis=0)
    folded = einsum("nh,nhd->d", bias, projections.wo).astype(projections.wo.dtype)
    if projections.bo is not None:
        folded = folded + projections.bo
    return dataclasses.replace(projections, bv=None, bo=folded)


def key_bias_matters(spec: DecodeSpec) -> bool:
    """Without RoPE a key bias adds one constant to all scores of a query, which a plain softmax cancels."""
    return spec.position.rotary or spec.softcap is not None
