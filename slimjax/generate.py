"""Text from a model: one jitted prefill, then one jitted ``lax.scan`` over the new tokens.

Prompt length and number of new tokens are padded to buckets, so lengths within a bucket, like the tokens themselves,
never compile anything anew.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slimjax.attention.layer import CachedAttention
from slimjax.axes import Lengths, typed
from slimjax.cache import Cache
from slimjax.models.decoder import DecoderLM, init_caches
from slimjax.numerics import MASK

SMALLEST_BUCKET = 16
SLOTS = 128  # what a longer cache's length is a multiple of: kernels read it in blocks
_Caches = tuple[Cache, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Filters apply in the order temperature, top-k, top-p.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k most likely tokens; None: all.
        top_p: only the fewest most likely tokens whose probabilities sum to at least p; None: all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        # Below that, logits divided by it overflow float32; who wants the likeliest token says 0.
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(f"{self.temperature=}: expected 0 (greedy) or a finite number >= 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{self.top_k=}: expected >= 1 or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{self.top_p=}: expected 0 < top_p <= 1 or None")


@typed
def filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature (> 0), top-k and top-p; what is not to be drawn is ``MASK``.

    Tokens that tie with the last one let in by top-k stay.
    """
    logits = logits / sampling.temperature
    masked = jnp.full_like(logits, MASK)
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, masked)
    if sampling.top_p is not None:
        order = jnp.argsort(-logits, axis=-1)
        sorted_p = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(sorted_p, axis=-1) - sorted_p
        kept = jnp.take_along_axis(before < sampling.top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, masked)
    return logits


@typed
def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, "B"]:
    """One token for each row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filtered(logits, sampling), axis=-1).astype(jnp.int32)


def bucket(length: int) -> int:
    """The power of two, at least ``SMALLEST_BUCKET``, that ``length`` is padded to."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def slots_of(model: DecoderLM, prompt: int, new: int) -> int:
    """Slots of the caches that ``generate`` makes for prompts and new tokens of these lengths."""
    tokens = _width(model, prompt) + bucket(new)
    unit = SLOTS if tokens > SLOTS else SMALLEST_BUCKET
    return -(-tokens // unit) * unit


def _width(model: DecoderLM, prompt: int) -> int:
    """What prompts are padded to. A bucket may be longer than learned positions; its padding is not."""
    return bucket(prompt) if model.positions is None else min(bucket(prompt), model.max_length)


def generate(
    model: DecoderLM,
    prompts: Int[Array, "B P"] | np.ndarray,
    lengths: Int[Array, "B"] | np.ndarray | None = None,
    *,
    layers: Sequence[CachedAttention],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
    eos: int | None = None,
    dtype: str | None = None,
) -> Int[Array, "B T"]:
    """Continue every prompt through the caches of ``layers``.

    Prefill attends to the prompt's exact keys and values; every new token attends through the cache.

    Args:
        model: the model.
        prompts: right-padded; what the padding holds does not matter.
        lengths: tokens of each prompt, 1..P; None: all P.
        layers: from ``convert_model``.
        max_new_tokens: T, how many to generate.
        sampling: greedy by default.
        key: a ``jax.random.key``; needed unless greedy.
        eos: a token that ends a sequence; what follows it is filled with it.
        dtype: compute dtype of all but attention, as in ``DecoderLM.with_cache``.

    Returns:
        [B, max_new_tokens].

    Raises:
        ValueError: no prompts, tokens outside the vocabulary, lengths outside 1..P, no tokens asked for, no
            key to sample with, or learned positions that do not reach as far.
    """
    prompts = np.asarray(prompts, np.int32)
    counts = np.full(len(prompts), prompts.shape[1]) if lengths is None else np.asarray(lengths)
    _check(model, prompts, counts, max_new_tokens, sampling, key)
    steps, slots = bucket(max_new_tokens), slots_of(model, prompts.shape[1], max_new_tokens)
    padded = np.pad(prompts, ((0, 0), (0, _width(model, prompts.shape[1]) - prompts.shape[1])))
    graph, params = nnx.split(model)
    layers = tuple(layers)
    key = jax.random.key(0) if key is None else key
    count = jnp.asarray(counts, jnp.int32)
    logits, caches = _prefill(graph, params, layers, jnp.asarray(padded), count, capacity=slots, dtype=dtype)
    limit = jnp.asarray(max_new_tokens, jnp.int32)
    tokens, _ = _continue(
        graph,
        params,
        layers,
        logits,
        caches,
        limit,
        key,
        steps=steps,
        sampling=sampling,
        eos=eos,
        dtype=dtype,
    )
    # Cut on the host: a slice on the device, or jnp.asarray, compiles a program for every new shape.
    return jax.device_put(np.asarray(tokens)[:, :max_new_tokens])


def _check(
    model: DecoderLM, prompts: np.ndarray, counts: np.ndarray, new: int, sampling: Sampling, key: Array | None
) -> None:
    """Raise ValueError for arguments of ``generate`` that do not fit together."""
    batch, width = prompts.shape
    if not batch or not width:
        raise ValueError(
            f"prompts of shape {prompts.shape}: expected at least one prompt of at least one token"
        )
    vocab = model.embedding.shape[0]
    given = prompts[np.arange(width) < counts[:, None]] if counts.shape == (batch,) else prompts
    if given.size and (given.min() < 0 or given.max() >= vocab):
        raise ValueError(
            f"prompts hold the tokens {given.min()}..{given.max()}, the vocabulary is 0..{vocab - 1}"
        )
    if counts.shape != (batch,) or counts.min() < 1 or counts.max() > width:
        raise ValueError(f"lengths = {counts}: expected one of 1..{width} for each of {batch} prompts")
    if new < 1:
        raise ValueError(f"max_new_tokens = {new}: expected >= 1")
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"{sampling} draws at random and needs a key")
    reach = model.max_length
    if model.positions is not None and counts.max() + new > reach:
        raise ValueError(f"{counts.max()} + {new} tokens are more than {reach} learned positions")


@functools.partial(jax.jit, static_argnames=("graph", "capacity", "dtype"))
def _prefill(
    graph: nnx.GraphDef,
    params: nnx.State,
    layers: tuple[CachedAttention, ...],
    prompts: Int[Array, "B P"],
    lengths: Lengths,
    *,
    capacity: int,
    dtype: str | None,
) -> tuple[Float[Array, "B V"], _Caches]:
    """Logits after each prompt's last token, and the filled caches."""
    caches = init_caches(layers, len(prompts), capacity)
    model = nnx.merge(graph, params)
    logits, caches = model.with_cache(
        prompts, layers, caches, count=lengths, fresh=True, dtype=dtype, last=True
    )
    return logits[:, 0], caches


@functools.partial(
    jax.jit, static_argnames=("graph", "steps", "sampling", "eos", "dtype"), donate_argnames=("caches",)
)
def _continue(
    graph: nnx.GraphDef,
    params: nnx.State,
    layers: tuple[CachedAttention, ...],
    logits: Float[Array, "B V"],
    caches: _Caches,
    limit: Int[Array, ""],
    key: Array,
    *,
    steps: int,
    sampling: Sampling,
    eos: int | None,
    dtype: str | None,
) -> tuple[Int[Array, "B T"], _Caches]:
    """``limit`` new tokens, of ``steps`` places; steps past the limit or after every eos cost nothing.

    The caches are given away, and come back longer in the same memory: there is room for them once.
    """
    model = nnx.merge(graph, params)
    end = jnp.asarray(0 if eos is None else eos, jnp.int32)

    def advance(
        carry: tuple[Array, _Caches, Array], step: Array
    ) -> tuple[tuple[Array, _Caches, Array], Array]:
        last, held, done = carry
        drawn = sample(last, jax.random.fold_in(key, step), sampling)
        token = jnp.where(done, jnp.full_like(drawn, end), drawn)
        done = done if eos is None else done | (token == end)
        after, held = model.with_cache(token[:, None], layers, held, dtype=dtype)
        return (after[:, 0], held, done), token

    def step(carry: tuple[Array, _Caches, Array], index: Array) -> tuple[tuple[Array, _Caches, Array], Array]:
        active = (index < limit) & ~jnp.all(carry[2])
        fill = jnp.full(logits.shape[:1], end)
        return jax.lax.cond(active, lambda: advance(carry, index), lambda: (carry, fill))

    start = (logits, caches, jnp.zeros(logits.shape[:1], bool))
    (_, longer, _), tokens = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return tokens.T, longer
