"""Training: AdamW on a pure loss. State is (parameters, optimizer state, step); a batch is a function of the step.

So training that stops and goes on from its state takes the same steps, bit for bit, as training that does not.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from slimjax.config import ModelConfig, TrainConfig
from slimjax.data import Corpus
from slimjax.models.decoder import DecoderLM
from slimjax.numerics import accumulation_dtype, cross_entropy, einsum
from slimjax.pytree import pytree

# Parameters and a batch to (what is minimised, the loss that is reported).
_Objective = Callable[[nnx.State, Array], tuple[Array, Array]]
# What ``on_step`` is told: step, steps, loss (nats per token, mean since
# the last report), learning_rate, tokens_per_second, seconds_left.
Report = Callable[[Mapping[str, float]], None]


@pytree
class TrainState:
    """Everything that training goes on from.

    Attributes:
        params: the model's parameters, float32.
        opt_state: optax's.
        step: [], steps taken.
        loss_sum: [], nats per token, over the steps since the last report (or the start).
    """

    params: nnx.State
    opt_state: optax.OptState
    step: Int[Array, ""]
    loss_sum: Float[Array, ""]


def initial_state(model_config: ModelConfig, train_config: TrainConfig) -> TrainState:
    """Fresh parameters from ``train_config.seed``, no steps taken."""
    params = nnx.state(DecoderLM(model_config, rngs=nnx.Rngs(train_config.seed)), nnx.Param)
    return TrainState(
        params=params,
        opt_state=_optimizer(train_config).init(params),
        step=jnp.zeros((), jnp.int32),
        loss_sum=jnp.zeros(()),
    )


def state_shapes(model_config: ModelConfig, train_config: TrainConfig) -> TrainState:
    """The structure, shapes and dtypes of a state, no arrays made: what a checkpoint is held against."""
    return jax.eval_shape(lambda: initial_state(model_config, train_config))


def trained_model(model_config: ModelConfig, state: TrainState) -> DecoderLM:
    """The model with the state's parameters."""
    return nnx.merge(_graph(model_config), state.params)


def train(
    model_config: ModelConfig,
    train_config: TrainConfig,
    corpus: Corpus,
    *,
    on_step: Report | None = None,
    on_loss: Callable[[int, float], object] | None = None,
    state: TrainState | None = None,
    until: int | None = None,
    save: Callable[[TrainState], object] | None = None,
    save_every: int | None = None,
    stop: Callable[[], object] | None = None,
) -> TrainState:
    """Train to ``train_config.steps``.

    Args:
        model_config, train_config: see there.
        corpus: its vocabulary must fit the model's.
        on_step: called after every ``log_every`` steps and after the last; its loss is the mean since the last.
        on_loss: called for every step, in order, with its number and its loss, before ``on_step`` and ``save``
            of that step; else one step late, while the device is at work on the next.
        state: goes on from there (it is consumed); None: from ``initial_state``.
        until: stop early, after this many steps in all, with the schedule of the full run.
        save: called after every ``save_every`` steps, after the last, and where ``stop`` stops; never after
            a loss that is not finite. Step and report come first, so what is saved was reported.
        save_every: steps; None: at the end alone.
        stop: asked after every step; where true, training saves and returns early.

    Raises:
        ValueError: a corpus with more tokens than the model's vocabulary.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    if corpus.vocab > model_config.vocab:
        raise ValueError(f"{corpus.vocab=} does not fit the model's {model_config.vocab=}")
    state = initial_state(model_config, train_config) if state is None else state
    step = _compiled_step(model_config, train_config)
    first, last = int(state.step), train_config.steps if until is None else until
    begun, pending = time.perf_counter(), None

    def told(step: int, loss: Array) -> None:
        value = _finite(step, loss)
        if on_loss is not None:
            on_loss(step, value)

    for index in range(first, last):
        tokens = corpus.batch(train_config.seed, index, train_config.batch, train_config.length)
        state, loss = step(state, tokens)
        if index == first:
            loss.block_until_ready()
            begun = time.perf_counter()  # the first step compiled
        if pending is not None:
            told(index, pending)
        pending, done = loss, index + 1
        halt = stop is not None and bool(stop())
        report = done == last or done % train_config.log_every == 0
        keep = halt or done == last or done % (save_every or last) == 0
        if report or keep:
            told(done, loss)
            pending = None
        if report and on_step is not None:
            on_step(_metrics(train_config, state, done, index - first, last, begun))
        if keep and save is not None:
            save(state)
        if halt:
            break
    return state


def _finite(step: int, loss: Array) -> float:
    if not np.isfinite(value := float(loss)):
        raise FloatingPointError(f"step {step}: the loss is {value}; lower the learning rate")
    return value


def _metrics(
    config: TrainConfig, state: TrainState, step: int, timed: int, last: int, begun: float
) -> dict[str, float]:
    seconds = time.perf_counter() - begun
    return {
        "step": step,
        "steps": config.steps,
        "loss": float(state.loss_sum) / ((step - 1) % config.log_every + 1),
        "learning_rate": float(np.asarray(schedule(config)(step - 1))),
        "tokens_per_second": timed * config.batch * config.length / seconds if timed else 0.0,
        "seconds_left": seconds / max(timed, 1) * (last - step),
    }


def held_out(
    model_config: ModelConfig, train_config: TrainConfig, state: TrainState, corpus: Corpus, tokens: int
) -> dict[str, float]:
    """The model on at least ``tokens`` held-out tokens (whole batches), in the compute dtype of training.

    Returns:
        bits_per_byte and count, the tokens scored.

    Raises:
        ValueError: the held-out text is shorter than that.
    """
    batches = -(-tokens // (train_config.batch * train_config.length))
    windows = corpus.held_out_windows(batches * train_config.batch, train_config.length)
    graph, total = _graph(model_config), 0.0
    loss = jax.jit(
        lambda params, tokens: cross_entropy(
            nnx.merge(graph, params)(tokens[:, :-1], train_config.dtype), tokens[:, 1:]
        )
    )
    for part in np.split(windows, batches):
        total += float(loss(state.params, part))
    bits = total / batches / math.log(2) / corpus.bytes_per_token
    return {"bits_per_byte": bits, "count": batches * train_config.batch * train_config.length}


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0 to ``learning_rate``, then a cosine to ``final_fraction`` of it at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=max(config.steps, config.warmup + 1),
        end_value=config.final_fraction * config.learning_rate,
    )


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping; kernels and embeddings are decayed, biases and norms are not."""

    def matrices(params: nnx.State) -> nnx.State:
        def named(path: jax.tree_util.KeyPath, _: Array) -> bool:
            return any(name in jax.tree_util.keystr(path) for name in ("kernel", "embedding"))

        return jax.tree_util.tree_map_with_path(named, params)

    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    adamw = optax.adamw(
        schedule(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=matrices
    )
    return optax.chain(clip, adamw)


def _graph(config: ModelConfig) -> nnx.GraphDef:
    """The model without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))))


@functools.lru_cache(maxsize=4)  # going on from a state compiles nothing anew
def _compiled_step(
    model_config: ModelConfig, config: TrainConfig
) -> Callable[[TrainState, np.ndarray], tuple[TrainState, Array]]:
    return jax.jit(train_step(model_config, config), donate_argnums=0)


def train_step(
    model_config: ModelConfig, config: TrainConfig
) -> Callable[[TrainState, Int[Array, "B T"]], tuple[TrainState, Array]]:
    """One step, not compiled: a state and a batch of tokens [B, T+1] to the next state and the loss before it."""
    graph, optimizer = _graph(model_config), _optimizer(config)

    def objective(params: nnx.State, tokens: Int[Array, "B T"]) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        loss = cross_entropy(model(tokens[:, :-1], config.dtype), tokens[:, 1:])
        if not config.conditioning_penalty:
            return loss, loss
        penalties = [conditioning_penalty(block.attention.key.kernel[...]) for block in model.blocks]
        return loss + config.conditioning_penalty * sum(penalties[1:], penalties[0]) / len(penalties), loss

    def step(state: TrainState, tokens: Int[Array, "B T"]) -> tuple[TrainState, Array]:
        gradient, loss = _mean_gradient(objective, state.params, tokens, config.accumulation)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of an integer count
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = cast(nnx.State, optax.apply_updates(state.params, updates))
        # Part of the state, or a report after a restart would be the mean of fewer steps.
        loss_sum = jnp.where(state.step % config.log_every == 0, jnp.zeros_like(loss), state.loss_sum) + loss
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1, loss_sum=loss_sum), loss

    return step


def _mean_gradient(
    objective: _Objective, params: nnx.State, tokens: Int[Array, "B T"], parts: int
) -> tuple[nnx.State, Array]:
    """Gradient and loss averaged over ``parts`` equal slices of the batch, one slice in memory at a time."""
    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        return gradient(params, tokens)

    def add(total: tuple[nnx.State, Array], part: Int[Array, "B T"]) -> tuple[tuple[nnx.State, Array], None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    slices = tokens.reshape(parts, -1, tokens.shape[1])
    zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    total, _ = jax.lax.scan(add, zero, slices)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def conditioning_penalty(kernel: Float[Array, "D K H"]) -> Float[Array, ""]:
    """|G/g - I|^2 / n for the Gram matrix G [n, n] of W_K [D, E] on its smaller side, g = trace(G)/n.

    The variance of the squared singular values over their squared mean: 0 where W_K is a multiple of an
    orthogonal matrix (condition number 1), whatever its scale, which stays free.
    """
    flat = kernel.astype(accumulation_dtype(kernel.dtype)).reshape(kernel.shape[0], -1)
    gram = (
        einsum("de,df->ef", flat, flat) if flat.shape[0] >= flat.shape[1] else einsum("de,fe->df", flat, flat)
    )
    size = gram.shape[0]
    return size * jnp.sum(gram * gram) / jnp.trace(gram) ** 2 - 1.0
