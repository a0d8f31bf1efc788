"""AdamW with clipping, warm-up and a cosine, all of its numbers arguments of the program and not part of it.

So models of one shape that differ in learning rate, betas, weight decay, clipping, length of the schedule or penalty
are trained by one compiled program.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from slimjax.config import TrainConfig
from slimjax.pytree import pytree

EPSILON = 1e-8  # beside the root of the second moment


@pytree
class Numbers:
    """What a training step computes with; every one is a scalar, float32 where not said otherwise.

    Attributes:
        peak, minus_peak: the highest learning rate, and its negative.
        floor, rest: the share of it that is left at the end, and 1 less that.
        warmup: int32, steps.
        per_warmup: 1 over those.
        decay, turn: steps from the peak to the end; half a turn, in radians, over those.
        beta1, beta2: of the two moments.
        rest1, rest2: 1 less those, rounded once.
        weight_decay, clip, penalty: as in ``TrainConfig``; clip 0 where nothing is clipped.
        log_every: int32, steps.
    """

    peak: Float[Array, ""]
    minus_peak: Float[Array, ""]
    floor: Float[Array, ""]
    rest: Float[Array, ""]
    warmup: Int[Array, ""]
    per_warmup: Float[Array, ""]
    decay: Float[Array, ""]
    turn: Float[Array, ""]
    beta1: Float[Array, ""]
    beta2: Float[Array, ""]
    rest1: Float[Array, ""]
    rest2: Float[Array, ""]
    weight_decay: Float[Array, ""]
    clip: Float[Array, ""]
    penalty: Float[Array, ""]
    log_every: Int[Array, ""]


def numbers(config: TrainConfig) -> Numbers:
    """The numbers of a config, on the device."""
    one = np.float32(1)
    decay = max(config.steps, config.warmup + 1) - config.warmup
    floats = {
        "peak": config.learning_rate,
        "minus_peak": -config.learning_rate,
        "floor": config.final_fraction,
        "rest": 1 - config.final_fraction,
        "per_warmup": one / np.float32(max(config.warmup, 1)),
        "decay": decay,
        "turn": np.float32(math.pi) * (one / np.float32(decay)),
        "beta1": config.beta1,
        "beta2": config.beta2,
        "rest1": 1 - config.beta1,
        "rest2": 1 - config.beta2,
        "weight_decay": config.weight_decay,
        "clip": config.clip or 0.0,
        "penalty": config.conditioning_penalty,
    }
    integers = {"warmup": config.warmup, "log_every": config.log_every}
    return Numbers(
        **{name: jnp.asarray(value, jnp.float32) for name, value in floats.items()},
        **{name: jnp.asarray(value, jnp.int32) for name, value in integers.items()},
    )


def learning_rate(given: Numbers, step: Int[Array, ""]) -> Float[Array, ""]:
    """Of a step, from 0: a line from 0 to the peak, then half a cosine to its share ``floor`` at the last step."""
    taken = jnp.minimum(step, given.warmup).astype(jnp.float32)
    rising = given.minus_peak * (1 - taken * given.per_warmup) + given.peak
    since = jnp.minimum((step - given.warmup).astype(jnp.float32), given.decay)
    falling = given.peak * (given.rest * (0.5 * (1 + jnp.cos(since * given.turn))) + given.floor)
    return jnp.where(step < given.warmup, rising, falling)


_learning_rate = jax.jit(learning_rate)


def schedule(config: TrainConfig) -> Callable[[int], float]:
    """Linear warm-up from 0 to ``learning_rate``, then a cosine to ``final_fraction`` of it at the last step."""
    given = numbers(config)
    return lambda step: float(_learning_rate(given, jnp.asarray(step, jnp.int32)))


def initial(params: nnx.State) -> optax.ScaleByAdamState:
    """Moments of nothing seen."""
    state = optax.scale_by_adam().init(params)
    assert isinstance(state, optax.ScaleByAdamState)
    return state


def adamw(
    given: Numbers,
    gradient: nnx.State,
    state: optax.ScaleByAdamState,
    params: nnx.State,
    *,
    step: Int[Array, ""],
    clipped: bool,
) -> tuple[nnx.State, optax.ScaleByAdamState]:
    """One update (Loshchilov & Hutter, Decoupled weight decay regularization, algorithm 2), clipped before.

    Kernels and embeddings are decayed, biases and norms are not.

    Args:
        given: see there.
        gradient, params: float32, of one structure.
        state: the moments.
        step: [], from 0: where the schedule is.
        clipped: whether the gradient's global norm is held to ``given.clip``.

    Returns:
        The next parameters and moments.
    """
    if clipped:
        norm = optax.tree.norm(gradient)
        within = norm < given.clip
        gradient = jax.tree.map(lambda g: jnp.where(within, g, (g / norm) * given.clip), gradient)
    first = jax.tree.map(lambda g, m: given.rest1 * g + given.beta1 * m, gradient, state.mu)
    second = jax.tree.map(lambda g, v: given.rest2 * (g * g) + given.beta2 * v, gradient, state.nu)
    count = jnp.asarray(state.count) + 1
    power = count.astype(jnp.float32)
    unbias1, unbias2 = 1 - given.beta1**power, 1 - given.beta2**power
    minus_rate = -learning_rate(given, step)

    def updated(path: jax.tree_util.KeyPath, p: Array, m: Array, v: Array) -> Array:
        change = (m / unbias1) / (jnp.sqrt(v / unbias2) + EPSILON)
        if any(name in jax.tree_util.keystr(path) for name in ("kernel", "embedding")):
            change = change + given.weight_decay * p
        return p + minus_rate * change

    params = jax.tree_util.tree_map_with_path(updated, params, first, second)
    return params, optax.ScaleByAdamState(count=count, mu=first, nu=second)
