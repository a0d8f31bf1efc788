"""The layers of a model besides attention: normalisation, MLP, dense products. Modules hold, functions compute.

Operands of a product are in the compute dtype, its sum and the residual stream in the accumulation dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slimjax.config import ModelConfig
from slimjax.numerics import accumulation_dtype, einsum

EPSILON = 1e-6  # added to the variance by both normalisations, unless a model says otherwise


def value(parameter: nnx.Variable | None) -> Array | None:
    """The array of a parameter that may be absent."""
    return None if parameter is None else parameter[...]


def dense(
    x: Float[Array, "B T D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None, dtype: str
) -> Float[Array, "B T F"]:
    """x kernel + bias with operands in ``dtype``; the result is in the accumulation dtype."""
    out = einsum("btd,df->btf", x.astype(dtype), kernel.astype(dtype))
    return out if bias is None else out + bias.astype(out.dtype)[None, None]


def normalise(
    x: Float[Array, "B T D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    *,
    centre: bool,
    epsilon: float = EPSILON,
) -> Float[Array, "B T D"]:
    """LayerNorm (``centre``) or RMSNorm (arXiv 1910.07467) over the last axis, in the dtype of x."""
    if centre:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(epsilon, x.dtype))
    x = x * scale.astype(x.dtype)[None, None]
    return x if bias is None else x + bias.astype(x.dtype)[None, None]


class Norm(nnx.Module):
    """RMSNorm or LayerNorm, in the accumulation dtype."""

    def __init__(self, config: ModelConfig):
        self.centre, self.epsilon = config.norm == "layernorm", config.norm_epsilon
        self.scale = nnx.Param(jnp.ones((config.width,)))
        self.bias = nnx.Param(jnp.zeros((config.width,))) if config.bias and self.centre else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return normalise(x, self.scale[...], value(self.bias), centre=self.centre, epsilon=self.epsilon)


class Dense(nnx.Module):
    """Kernel [in, out], normal with variance ``gain``^2/in, and an optional zero bias."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, gain: float = 1.0, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * (gain * inputs**-0.5))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: Float[Array, "B T D"], dtype: str) -> Float[Array, "B T F"]:
        return dense(x, self.kernel[...], value(self.bias), dtype)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202) or GELU (tanh form)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, hidden, bias = config.width, config.F, config.bias
        self.gate = Dense(width, hidden, bias=bias, rngs=rngs) if config.mlp == "swiglu" else None
        self.up = Dense(width, hidden, bias=bias, rngs=rngs)
        self.down = Dense(hidden, width, bias=bias, gain=(2 * config.layers) ** -0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], dtype: str) -> Float[Array, "B T D"]:
        up = self.up(x, dtype)
        hidden = jax.nn.gelu(up) if self.gate is None else jax.nn.silu(self.gate(x, dtype)) * up
        return self.down(hidden.astype(accumulation_dtype(dtype)), dtype)
