"""A language model through a cache against the same model without one, token by token.

``prepare`` keeps the exact model's logits, and what its attention layers are given and answer; ``choose`` makes the
layers of one way to cache, ``measure`` holds them against it. Everything goes through ``evaluate.cached_logits``:
every key and value that a token sees comes out of the cache.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slimjax.attention.bases import basis
from slimjax.attention.layer import CachedAttention
from slimjax.axes import Inputs
from slimjax.evaluate import cached_logits
from slimjax.kernels.spec import DecodeSpec
from slimjax.models.decoder import Block, DecoderLM, convert_model, full_attention, init_caches
from slimjax.numerics import cosine, logit_kl, relative_l1, relative_l2, rmse
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve.calibrate import Calibration, collect
from slimjax.solve.convert import convert
from slimjax.solve.fit import fit
from slimjax.solve.mixing import head_orders, protected
from slimjax.statistics import blocks, mean_interval

SOLVED = ("k", "kr")  # bases whose values come from a map that calibration chooses
BLOCK = 64  # tokens whose mean KL is one sample
BATCH_TOKENS = 1024  # tokens read at once, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to cache a model's keys and values.

    Attributes:
        scheme: of the layers that are not protected.
        selector: how the heads with fewer bits are chosen (``slimjax.solve.mixing``); "none": in their order.
        protected: so many first, and so many last, layers are under ``protection`` instead.
        seed: of the random selector.
        dtype: compute dtype.
    """

    scheme: Scheme
    selector: str = "none"
    protected: int = 0
    protection: Scheme | None = None
    seed: int = 0
    dtype: str = "float32"

    def schemes(self, layers: int) -> tuple[Scheme, ...]:
        """Of every layer. Raises NotImplementedError where all layers would be protected."""
        if not self.protected or self.protection is None:
            return (self.scheme,) * layers
        if 2 * self.protected >= layers:
            raise NotImplementedError(
                f"{self.protected} protected layers at either end leave none of {layers}; protect fewer"
            )
        return protected(self.scheme, self.protection, layers, self.protected, self.protected)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Windows that are read together, and what the exact model makes of them.

    Attributes:
        tokens: [B, T+1].
        logits: [B, T, V], float32, on the host.
        inputs, outputs: of every layer, what attention is given and answers in the first window, [1, T, D].
    """

    tokens: Int[Array, "B T"]
    logits: np.ndarray
    inputs: tuple[Inputs, ...]
    outputs: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Exact:
    """The model without a cache.

    Attributes:
        model: its weights.
        parts: the scored windows.
        calibration: [C, T], tokens that are not scored; maps and heads are chosen on them.
        bytes_per_token: of the text.
        skip: so many first targets of every window are not scored: what no model can know, a task's question.
        bits_per_byte: of this model on the scored targets.
    """

    model: DecoderLM
    parts: tuple[Part, ...]
    calibration: np.ndarray
    bytes_per_token: float
    skip: int
    bits_per_byte: float

    @functools.cached_property
    def calibrations(self) -> tuple[Calibration, ...]:
        """Of every layer, from the calibration tokens. Raises ValueError where those are fewer than five windows."""
        graph, params = nnx.split(self.model)
        batches = [
            [np.asarray(x)[0] for x in _inputs(graph, params, jnp.asarray(window[None]))]
            for window in self.calibration
        ]
        return collect(batches, len(self.model.blocks))


def prepare(
    model: DecoderLM,
    windows: np.ndarray,
    calibration: np.ndarray,
    *,
    bytes_per_token: float = 1.0,
    skip: int = 0,
) -> Exact:
    """The exact model, in float32, on windows of held-out text, as many at a time as ``BATCH_TOKENS`` say.

    Args:
        model: its parameters are float32.
        windows: int32 [W, T+1].
        calibration: int32 [C, T], of other text.
        bytes_per_token, skip: as in ``Exact``.

    Raises:
        ValueError: no windows, or none of their targets is scored.
    """
    count, length = windows.shape[0], windows.shape[1] - 1
    if count < 1 or length <= skip:
        raise ValueError(
            f"{windows.shape=}, {skip=}: expected at least one window with a target that is scored"
        )
    together = _together(count, max(1, BATCH_TOKENS // length))
    parts, nats = [], []
    for start in range(0, count, together):
        tokens = jnp.asarray(windows[start : start + together], jnp.int32)
        part = _exact_part(model, tokens)
        parts.append(part)
        nats.append(np.asarray(_nats(jnp.asarray(part.logits), tokens[:, 1:]), np.float64)[:, skip:])
    bits = float(np.concatenate(nats).mean()) / math.log(2)
    return Exact(
        model=model,
        parts=tuple(parts),
        calibration=calibration,
        bytes_per_token=bytes_per_token,
        skip=skip,
        bits_per_byte=bits / bytes_per_token,
    )


def _together(count: int, most: int) -> int:
    """The largest number up to ``most`` that divides the windows: batches of one shape, one compilation."""
    return max(size for size in range(1, min(most, count) + 1) if count % size == 0)


def _exact_part(model: DecoderLM, tokens: Int[Array, "B T"]) -> Part:
    h, inputs, outputs = model.embed(tokens[:, :-1], "float32"), [], []
    for block in model.blocks:
        h, x, y = _exact_block(*nnx.split(block), h)
        inputs.append(x)
        outputs.append(np.asarray(y))
    logits = np.asarray(_exact_head(*nnx.split(model), h))
    return Part(tokens=tokens, logits=logits, inputs=tuple(inputs), outputs=tuple(outputs))


def choose(exact: Exact, choice: Choice) -> tuple[CachedAttention, ...]:
    """The layers of a choice. Of bases k and kr the maps are the best on the calibration tokens.

    Raises NotImplementedError, with the reason, where the model cannot be cached so.
    """
    schemes = choice.schemes(len(exact.model.blocks))
    if choice.selector != "none":
        return _ordered(exact, choice, schemes)
    if not any(scheme.basis in SOLVED for scheme in schemes):
        return convert_model(exact.model, schemes, choice.dtype)[0]
    layers = []
    for index, (block, scheme) in enumerate(zip(exact.model.blocks, schemes, strict=True)):
        weights, spec = block.attention.projections(), block.attention.decode_spec(scheme, choice.dtype)
        name, solution = f"layer {index}", None
        if scheme.basis in SOLVED:
            _refuse(spec, name)  # before anything is fitted
            wk, wv = (np.asarray(w, np.float64).reshape(spec.width, -1) for w in (weights.wk, weights.wv))
            solution = fit(wk, wv, spec, exact.calibrations[index]).solution
        layers.append(convert(weights, spec, layer=name, solution=solution).layer)
    return tuple(layers)


def _refuse(spec: DecodeSpec, layer: str) -> None:
    """Raise NotImplementedError, naming the layer, where its scheme cannot be had."""
    try:
        basis(spec)
    except NotImplementedError as refusal:
        raise NotImplementedError(f"{layer}: {refusal}") from None


def _ordered(exact: Exact, choice: Choice, schemes: Sequence[Scheme]) -> tuple[CachedAttention, ...]:
    """With the heads in the order that the selector gives them, those of fewer bits first."""
    if choice.scheme.basis != "kv":
        raise NotImplementedError(
            f"selector {choice.selector} orders heads of keys and values; basis {choice.scheme.basis} has one row"
        )
    if "-" not in (choice.scheme.bits or ""):
        raise NotImplementedError(f"selector {choice.selector}: {choice.scheme} has one width for all heads")
    orders = head_orders(exact.model, exact.calibration, schemes, choice.selector, seed=choice.seed)
    return convert_model(exact.model, schemes, choice.dtype, orders=orders)[0]


def measure(exact: Exact, layers: Sequence[CachedAttention], *, context: int) -> dict[str, float | list]:
    """What the caches of these layers change.

    Returns:
        perplexity, bits_per_byte, bits_per_byte_change; logit_kl with its 95 % interval (over blocks of 64 tokens,
        which are logit_kl_blocks) and by position; top1_agreement; count; of attention's output on exact inputs,
        worst and mean layer: cosine, relative L1, RMSE, relative L2 (attention_error), the last by position, too;
        bytes_per_token (all layers, one sequence of ``context`` tokens) and compression over bf16 KV.
    """
    scores, outputs = [], [[] for _ in layers]
    for part in exact.parts:
        logits, probes = cached_logits(exact.model, layers, part.tokens[:, :-1], part.inputs)
        scores.append(np.asarray(_scores(logits, jnp.asarray(part.logits), part.tokens[:, 1:]), np.float64))
        for found, probe in zip(outputs, probes, strict=True):
            found.append(np.asarray(probe, np.float64)[0])
    whole, nats, same = np.concatenate(scores, axis=1)
    kl, nats, same = (each[:, exact.skip :] for each in (whole, nats, same))
    bits = float(nats.mean()) / math.log(2) / exact.bytes_per_token
    samples = blocks(kl, BLOCK)
    found = {
        "perplexity": math.exp(float(nats.mean())),
        "bits_per_byte": bits,
        "bits_per_byte_change": bits - exact.bits_per_byte,
        "logit_kl": max(0.0, float(kl.mean())),  # rounding can leave -1e-10
        "logit_kl_blocks": samples.tolist(),
        "top1_agreement": float(same.mean()),
        "count": int(kl.size),
    }
    if samples.size > 1:
        interval = mean_interval(samples)
        found |= {"logit_kl_low": interval.low, "logit_kl_high": interval.high}
    wanted = [
        [np.asarray(part.outputs[index], np.float64)[0] for part in exact.parts]
        for index in range(len(layers))
    ]
    errors = attention_errors([np.stack(each) for each in outputs], [np.stack(each) for each in wanted])
    return found | errors | _by_position(whole, outputs, wanted) | stored(layers, context)


def attention_errors(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> dict[str, float]:
    """Of arrays of each layer, the four measures of 01-methods 2.4 of the worst layer and their means over layers."""
    each = {
        "attention_cosine": [cosine(a, b) for a, b in zip(found, wanted, strict=True)],
        "attention_l1": [relative_l1(a, b) for a, b in zip(found, wanted, strict=True)],
        "attention_rmse": [rmse(a, b) for a, b in zip(found, wanted, strict=True)],
        "attention_error": [relative_l2(a, b) for a, b in zip(found, wanted, strict=True)],
    }
    worst = {
        name: min(values) if name == "attention_cosine" else max(values) for name, values in each.items()
    }
    return worst | {f"{name}_mean": math.fsum(values) / len(values) for name, values in each.items()}


def edges(length: int) -> list[int]:
    """Ends of ranges of positions that double: 64, 128, 256 ... and the length itself."""
    found = [BLOCK]
    while 2 * found[-1] <= length:
        found.append(2 * found[-1])
    return found if found[-1] == length else [*[edge for edge in found if edge < length], length]


def _by_position(
    kl: np.ndarray, outputs: Sequence[Sequence[np.ndarray]], wanted: Sequence[Sequence[np.ndarray]]
) -> dict[str, list[float]]:
    """KL and mean relative L2 of attention's output over the layers, by ranges of positions; none of a short window."""
    ends = edges(kl.shape[1])
    if len(ends) < 2:
        return {}
    ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    layers = [(np.stack(a), np.stack(b)) for a, b in zip(outputs, wanted, strict=True)]
    return {
        "positions": [float(end) for end in ends],
        "logit_kl_by_position": [max(0.0, float(kl[:, a:b].mean())) for a, b in ranges],
        "attention_error_by_position": [
            math.fsum(relative_l2(x[:, a:b], y[:, a:b]) for x, y in layers) / len(layers) for a, b in ranges
        ],
    }


def stored(layers: Sequence[CachedAttention], context: int) -> dict[str, float]:
    """Cache bytes per token of all layers, scales, windows and buffers included, and how many times less than bf16 KV.

    Of one sequence of ``context`` tokens (rounded up to whole buffers): a buffer does not grow with the sequence.
    """
    caches = jax.eval_shape(lambda: init_caches(layers, 1, context))
    size = sum(cache.bytes_per_token for cache in caches)
    return {
        "bytes_per_token": size,
        "compression": sum(4 * layer.spec.key_width for layer in layers) / size,  # K and V, 2 bytes each
    }


def named(scheme: str, fraction: float | None) -> Scheme:
    """The scheme, with another share of its heads in fewer bits where one is given."""
    chosen = parse_scheme(scheme)
    if fraction is None or "-" not in (chosen.bits or ""):
        return chosen
    options = tuple(sorted({**dict(chosen.options), "share": fraction}.items()))
    return dataclasses.replace(chosen, options=options)


# Compiled once for all layers of one shape -------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="graph")
def _exact_block(graph: nnx.GraphDef, params: nnx.State, h: Inputs) -> tuple[Inputs, Inputs, Inputs]:
    """A block without a cache; what attention was given and answered in the first window."""
    block, kept = nnx.merge(graph, params), []
    assert isinstance(block, Block)
    plain = full_attention(block, "float32")

    def attend(x: Inputs) -> Inputs:
        y = plain(x)
        kept.append((x[:1], y[:1]))
        return y

    return block(h, attend, "float32"), *kept[0]


@functools.partial(jax.jit, static_argnames="graph")
def _exact_head(graph: nnx.GraphDef, params: nnx.State, h: Inputs) -> Float[Array, "B T V"]:
    return nnx.merge(graph, params).head(h, "float32")


@functools.partial(jax.jit, static_argnames="graph")
def _inputs(graph: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "B T"]) -> tuple[Inputs, ...]:
    return nnx.merge(graph, params).attention_inputs(tokens)


def _negative(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target, nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


_nats = jax.jit(_negative)


@jax.jit
def _scores(
    logits: Float[Array, "B T V"], exact: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "3 B T"]:
    """KL to the exact model, nats of the target, and whether the likeliest token is the same, of every token."""
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(exact, axis=-1)
    return jnp.stack([logit_kl(logits, exact), _negative(logits, targets), same.astype(logits.dtype)])
