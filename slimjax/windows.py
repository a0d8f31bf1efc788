"""Windows of text: what a model makes of them without a cache, and the same windows read on through one.

The first tokens of a window are a prompt: its rows, of the exact model's layer inputs, are written to the cache as
prefill writes them. The tokens behind it go through the cache, as in decoding token by token, and they alone count.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slimjax.attention.layer import CachedAttention, append_rows, attend_cached, init_cache
from slimjax.axes import Inputs
from slimjax.cache import Cache
from slimjax.models.decoder import Block, DecoderLM, full_attention
from slimjax.numerics import cross_entropy
from slimjax.scheme import Scheme
from slimjax.solve.calibrate import Calibration, collect
from slimjax.solve.mixing import head_order

BATCH_TOKENS = 1024  # tokens read at once, about
HEAD_TOKENS = 4096  # calibration tokens that heads are chosen on, at most


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Windows that are read together, and what the exact model makes of them; P tokens of each are its prompt.

    Attributes:
        tokens: [B, T+1].
        logits: [B, T-P, V], float32, on the host.
        prompts, inputs: what attention is given of the prompt, [B, P, D], and behind it, [B, T-P, D]; every layer.
        outputs: of every layer, what attention answers to ``inputs``, [B, T-P, D], on the host.
    """

    tokens: Int[Array, "B T"]
    logits: np.ndarray
    prompts: tuple[Inputs, ...]
    inputs: tuple[Inputs, ...]
    outputs: tuple[np.ndarray, ...]

    @property
    def prompt(self) -> int:
        """P."""
        return self.prompts[0].shape[1]

    @property
    def targets(self) -> Int[Array, "B T"]:
        """The tokens that are scored, [B, T-P]."""
        return self.tokens[:, self.prompt + 1 :]

    def alone(self) -> "list[Part]":
        """Its windows, each a part of its own."""
        if len(self.tokens) == 1:
            return [self]

        def window(index: int) -> Part:
            parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            return Part(**jax.tree.map(lambda array: array[index : index + 1], parts))

        return [window(index) for index in range(len(self.tokens))]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Exact:
    """The model without a cache.

    Attributes:
        model: its weights.
        parts: the scored windows.
        calibration: [C, T], tokens that are not scored; maps and heads are chosen on them.
        bytes_per_token: of the text.
        bits_per_byte: of this model on the scored targets.
    """

    model: DecoderLM
    parts: tuple[Part, ...]
    calibration: np.ndarray
    bytes_per_token: float
    bits_per_byte: float

    @functools.cached_property
    def _calibrated(self) -> list[tuple[np.ndarray, ...]]:
        return []

    def calibration_inputs(self, count: int | None = None) -> list[tuple[np.ndarray, ...]]:
        """Of the first ``count`` calibration windows, or all, what attention is given in every layer, [1, T, D] each.

        A window is read once, and only when asked for: heads are chosen on a part of them.
        """
        found = self._calibrated
        graph, params = nnx.split(self.model)
        for window in self.calibration[len(found) : count]:
            layers = _inputs(graph, params, jnp.asarray(window[None]))
            found.append(tuple(np.asarray(layer) for layer in layers))
        return found[:count]

    @functools.cached_property
    def calibrations(self) -> tuple[Calibration, ...]:
        """Of every layer, from the calibration tokens. Raises ValueError where those are fewer than five windows."""
        windows = self.calibration_inputs()
        return collect(([x[0] for x in layers] for layers in windows), len(self.model.blocks))

    @functools.cached_property
    def _orders(self) -> dict[Any, np.ndarray]:
        return {}

    def order(self, index: int, scheme: Scheme, selector: str, seed: int) -> np.ndarray:
        """Of layer ``index`` its heads as ``solve.mixing.head_order`` has them on calibration tokens; found once."""
        if selector != "calibrated":  # which alone looks at more than the cached rows
            scheme = dataclasses.replace(scheme, softmax="exact", compute="")
        key = (index, scheme, selector, seed)
        if key not in self._orders:
            attention = self.model.blocks[index].attention
            spec = attention.decode_spec(scheme, "float32")
            count = max(1, HEAD_TOKENS // self.calibration.shape[1])
            x = jnp.concatenate([layers[index] for layers in self.calibration_inputs(count)])
            self._orders[key] = head_order(x, attention.projections(), spec, selector, seed=(seed, index))
        return self._orders[key]


def overlapping(tokens: np.ndarray, count: int, length: int, prompt: int = 0) -> np.ndarray:
    """Windows spread evenly over a text; no target behind a prompt of ``prompt`` tokens is in two of them.

    Where the text is short a window's prompt is text that the window before it has scored.

    Returns:
        int32 [count, length + 1].

    Raises:
        ValueError: no windows, a prompt that leaves nothing to score, or a text that is too short.
    """
    if count < 1 or not 0 <= prompt < length:
        raise ValueError(
            f"{count=} windows of {length=}, {prompt=}: expected one or more, longer than a prompt"
        )
    scored = length - prompt
    needed = count * scored + prompt + 1
    if len(tokens) < needed:
        raise ValueError(
            f"text of {len(tokens)} tokens has no {count} windows of {length}, of which {scored} each are scored: "
            f"these need {needed}"
        )
    stride = scored + (len(tokens) - needed) // max(count - 1, 1)
    starts = np.arange(count) * stride
    return np.asarray(tokens)[starts[:, None] + np.arange(length + 1)[None]].astype(np.int32)


def prepare(
    model: DecoderLM,
    windows: np.ndarray,
    calibration: np.ndarray,
    *,
    prompt: int = 0,
    bytes_per_token: float = 1.0,
) -> Exact:
    """The exact model, in float32, on windows of held-out text, as many at a time as ``BATCH_TOKENS`` say.

    Args:
        model: its parameters are float32.
        windows: int32 [W, T+1].
        calibration: int32 [C, T'], of other text.
        prompt: P, so many first tokens of every window are its prompt; the targets behind them are scored.
        bytes_per_token: as in ``Exact``.

    Raises:
        ValueError: no windows, or none of their targets is scored.
    """
    count, length = windows.shape[0], windows.shape[1] - 1
    if count < 1 or not 0 <= prompt < length:
        raise ValueError(
            f"{windows.shape=}, {prompt=}: expected at least one window with a target that is scored"
        )
    together = _together(count, max(1, BATCH_TOKENS // length))
    parts, nats = [], []
    for start in range(0, count, together):
        part = _exact_part(model, jnp.asarray(windows[start : start + together], jnp.int32), prompt)
        parts.append(part)
        nats.append(float(_nats(jnp.asarray(part.logits), part.targets)))
    return Exact(
        model=model,
        parts=tuple(parts),
        calibration=calibration,
        bytes_per_token=bytes_per_token,
        bits_per_byte=math.fsum(nats) / len(nats) / math.log(2) / bytes_per_token,
    )


def _together(count: int, most: int) -> int:
    """The largest number up to ``most`` that divides the windows: batches of one shape, one compilation."""
    return max(size for size in range(1, min(most, count) + 1) if count % size == 0)


def _exact_part(model: DecoderLM, tokens: Int[Array, "B T"], prompt: int) -> Part:
    h, prompts, inputs, outputs = model.embed(tokens[:, :-1], "float32"), [], [], []
    for block in model.blocks:
        h, first, x, y = _exact_block(*nnx.split(block), h, prompt)
        prompts.append(first)
        inputs.append(x)
        outputs.append(np.asarray(y))
    logits = np.asarray(_head(*nnx.split(model), h[:, prompt:]))
    return Part(
        tokens=tokens, logits=logits, prompts=tuple(prompts), inputs=tuple(inputs), outputs=tuple(outputs)
    )


def continued(
    model: DecoderLM, layers: Sequence[CachedAttention], part: Part
) -> tuple[Float[Array, "B T V"], list[Inputs]]:
    """The tokens behind the prompt read through caches that hold the exact model's rows of the prompt.

    Layer by layer rather than as one program: layers of one shape and spec share one compilation. ``part.inputs``
    ride in the batch, behind the same prompt, as what the exact model would go on with.

    Returns:
        Logits, [B, T-P, V], and each layer's answers to ``part.inputs``, [B, T-P, D].
    """
    dtype = layers[0].spec.accumulation.name
    start = jnp.full((len(part.tokens),), part.prompt, jnp.int32)
    h, outputs = model.embed(part.tokens[:, part.prompt : -1], dtype, start), []
    for block, layer, prompt, probe in zip(model.blocks, layers, part.prompts, part.inputs, strict=True):
        h, output = _block(*nnx.split(block), layer, prompt, h, probe)
        outputs.append(output)
    return _head(*nnx.split(model), h), outputs


# Compiled once for all layers of one shape -------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="graph")
def _block(
    graph: nnx.GraphDef, params: nnx.State, layer: CachedAttention, prompt: Inputs, h: Inputs, probe: Inputs
) -> tuple[Inputs, Inputs]:
    outputs: list[Inputs] = []
    cache = _twice(_prompted(prompt, layer, prompt.shape[1] + h.shape[1]))

    def attend(x: Inputs) -> Inputs:
        both, _ = attend_cached(jnp.concatenate([x, probe]), layer, cache)
        outputs.append(both[len(x) :])
        return both[: len(x)]

    return nnx.merge(graph, params)(h, attend, layer.spec.accumulation.name), outputs[0]


def _prompted(prompt: Inputs, layer: CachedAttention, capacity: int) -> Cache:
    """A cache with the rows of a prompt, as prefill leaves it."""
    cache = init_cache(layer.spec, batch=len(prompt), capacity=capacity)
    return append_rows(prompt, layer, cache, None, prompt=True) if prompt.shape[1] else cache


def _twice(cache: Cache) -> Cache:
    """The sequences of a cache, and all of them again."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), cache)


@functools.partial(jax.jit, static_argnames=("graph", "prompt"))
def _exact_block(
    graph: nnx.GraphDef, params: nnx.State, h: Inputs, prompt: int
) -> tuple[Inputs, Inputs, Inputs, Inputs]:
    """A block without a cache; what attention was given of the prompt and behind it, and what it answered there."""
    block, kept = nnx.merge(graph, params), []
    assert isinstance(block, Block)
    plain = full_attention(block, "float32")

    def attend(x: Inputs) -> Inputs:
        y = plain(x)
        kept.append((x[:, :prompt], x[:, prompt:], y[:, prompt:]))
        return y

    return block(h, attend, "float32"), *kept[0]


@functools.partial(jax.jit, static_argnames="graph")
def _head(graph: nnx.GraphDef, params: nnx.State, h: Inputs) -> Float[Array, "B T V"]:
    return nnx.merge(graph, params).head(h, h.dtype.name)


@functools.partial(jax.jit, static_argnames="graph")
def _inputs(graph: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "B T"]) -> tuple[Inputs, ...]:
    return nnx.merge(graph, params).attention_inputs(tokens)


_nats = jax.jit(cross_entropy)
