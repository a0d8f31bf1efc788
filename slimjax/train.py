"""Training: AdamW on a pure loss. State is (parameters, optimizer state, step); a batch is a function of the step.

So training that stops and goes on from its state takes the same steps, bit for bit, as training that does not.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping

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
from slimjax.optimizer import Numbers, adamw, initial, numbers, schedule
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
        opt_state: the moments of AdamW.
        step: [], steps taken.
        loss_sum: [], nats per token, over the steps since the last report (or the start).
        loss_count: [], those steps.
    """

    params: nnx.State
    opt_state: optax.ScaleByAdamState
    step: Int[Array, ""]
    loss_sum: Float[Array, ""]
    loss_count: Int[Array, ""]


def initial_state(model_config: ModelConfig, train_config: TrainConfig) -> TrainState:
    """Fresh parameters from ``train_config.seed``, no steps taken."""
    params = nnx.state(DecoderLM(model_config, rngs=nnx.Rngs(train_config.seed)), nnx.Param)
    return TrainState(
        params=params,
        opt_state=initial(params),
        step=jnp.zeros((), jnp.int32),
        loss_sum=jnp.zeros(()),
        loss_count=jnp.zeros((), jnp.int32),
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
    step, given = compiled_step(model_config, train_config, corpus.masked), numbers(train_config)
    first, last = int(state.step), train_config.steps if until is None else until
    begun, pending = time.perf_counter(), None

    def told(step: int, loss: Array) -> None:
        value = _finite(step, loss)
        if on_loss is not None:
            on_loss(step, value)

    for index in range(first, last):
        tokens = corpus.batch(train_config.seed, index, train_config.batch, train_config.length)
        state, loss = step(state, jnp.asarray(tokens), given)
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
        "loss": float(state.loss_sum) / int(state.loss_count),
        "learning_rate": schedule(config)(step - 1),
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


def _graph(config: ModelConfig) -> nnx.GraphDef:
    """The model without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))))


Step = Callable[[TrainState, Int[Array, "B T"], Numbers], tuple[TrainState, Array]]
"""A state, a batch of tokens [B, T+1] and a config's numbers to the next state and the loss before it."""


def compiled_step(model_config: ModelConfig, config: TrainConfig, masked: bool = False) -> Step:
    """``train_step`` compiled, once for all configs of a shape; the state that it is given is consumed."""
    plain = TrainConfig(steps=0, warmup=0, batch=config.accumulation, accumulation=config.accumulation)
    shape = dataclasses.replace(
        plain,
        dtype=config.dtype,
        clip=config.clip and 1.0,
        conditioning_penalty=float(config.conditioning_penalty > 0),
    )
    return _compiled_step(dataclasses.replace(model_config, key_init="default"), shape, masked)


@functools.lru_cache(maxsize=4)  # going on from a state compiles nothing anew
def _compiled_step(model_config: ModelConfig, shape: TrainConfig, masked: bool) -> Step:
    return jax.jit(train_step(model_config, shape, masked), donate_argnums=0)


def train_step(model_config: ModelConfig, config: TrainConfig, masked: bool = False) -> Step:
    """One step, not compiled.

    Of the config it has the compute dtype, the parts of a batch, and whether there is a penalty and clipping at
    all; how much of these, and all else, is in the ``Numbers`` that it is called with. masked: see ``Corpus``.
    """
    graph = _graph(model_config)

    def objective(params: nnx.State, tokens: Int[Array, "B T"], given: Numbers) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        loss = _loss(model, tokens, config.dtype, masked)
        if not config.conditioning_penalty:
            return loss, loss
        penalties = [conditioning_penalty(block.attention.key.kernel[...]) for block in model.blocks]
        return loss + given.penalty * sum(penalties[1:], penalties[0]) / len(penalties), loss

    def step(state: TrainState, tokens: Int[Array, "B T"], given: Numbers) -> tuple[TrainState, Array]:
        gradient, loss = _mean_gradient(
            functools.partial(objective, given=given), state.params, tokens, config.accumulation
        )
        params, opt_state = adamw(
            given, gradient, state.opt_state, state.params, step=state.step, clipped=config.clip is not None
        )
        # Part of the state, or a report after a restart would be the mean of fewer steps.
        first = state.step % given.log_every == 0
        return TrainState(
            params=params,
            opt_state=opt_state,
            step=state.step + 1,
            loss_sum=jnp.where(first, jnp.zeros_like(loss), state.loss_sum) + loss,
            loss_count=jnp.where(first, jnp.zeros_like(state.loss_count), state.loss_count) + 1,
        ), loss

    return step


def _loss(model: DecoderLM, tokens: Int[Array, "B T"], dtype: str, masked: bool) -> Float[Array, ""]:
    """Nats per token; masked: of the targets that are to be learnt, tokens below 0 being given."""
    if not masked:
        return cross_entropy(model(tokens[:, :-1], dtype), tokens[:, 1:])
    known = jnp.where(tokens < 0, ~tokens, tokens)
    logits, targets = model(known[:, :-1], dtype), known[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    learnt = (tokens[:, 1:] >= 0).astype(logits.dtype)
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * learnt) / jnp.sum(learnt)


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
