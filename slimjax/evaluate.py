"""What the equivalence table shows of a cache scheme on a trained model.

``prepare`` measures the exact model once; ``identity`` and ``measure`` hold a scheme against it. Everything
goes through ``attend_cached``, teacher-forced: each token's row is written, rounded by the codec, and read
back by that token and all later ones, as in decoding, but for whole sequences at once: what one token at a time
gives, also under codecs of tiles, none of which is a prompt's then.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from slimjax.attention.layer import CachedAttention, attend_cached, attend_full, init_cache
from slimjax.attention.positions import Position, init_bias
from slimjax.attention.projections import Projections
from slimjax.axes import Inputs
from slimjax.config import EquivalenceConfig
from slimjax.data import Corpus
from slimjax.generate import generate
from slimjax.kernels.api import decode
from slimjax.kernels.spec import DecodeSpec
from slimjax.models.decoder import DecoderLM, convert_model, init_caches
from slimjax.numerics import cross_entropy, greedy_agreement, logit_kl, relative_l2, top1_agreement
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve import Converted, Figures, convert

CONTEXT = 4096  # tokens of the cache whose bytes are reported
PROBED = 4  # sequences on which a single layer's errors are measured


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The exact model: its weights, what it is measured on, and its float32 and float64 results there.

    Attributes:
        model: the model.
        tokens: [B, T+1] the scored windows, then the prompts with their greedy continuation.
        scored, width: tokens[:scored, :width + 1] are the windows; the rest of those rows is padding.
        prompt, generated: tokens of each prompt, and of its continuation.
        logits: [B, T, V], float32, no cache.
        inputs: for each layer [PROBED, T, D], what attention is given in the exact model.
        outputs: for each layer, attention's float64 answer to ``inputs``, [PROBED, T, D].
        values: for each layer, the float64 values of ``inputs``, one for every query head, [PROBED, T, N, H].
        bytes_per_token: bytes of text per token of the corpus.
        bits_per_byte: of the exact float32 model on the scored windows.
    """

    model: DecoderLM
    tokens: Int[Array, "B T"]
    scored: int
    width: int
    prompt: int
    generated: int
    logits: Float[Array, "B T V"]
    inputs: tuple[Inputs, ...]
    outputs: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    bytes_per_token: float
    bits_per_byte: float


def prepare(model: DecoderLM, corpus: Corpus, config: EquivalenceConfig) -> Reference:
    """The exact model on ``config.tokens`` held-out tokens and ``config.prompts`` greedy continuations.

    Raises ValueError where the held-out text is too short for that.
    """
    scored, width = config.tokens // config.length, config.length
    windows = corpus.held_out_windows(scored, width)
    prompts = corpus.held_out_windows(config.prompts, config.prompt_length)[:, :-1]
    layers, _ = convert_model(model, "kv:float32")
    continued = generate(model, prompts, layers=layers, max_new_tokens=config.generated)
    rows = [windows, np.concatenate([prompts, np.asarray(continued)], axis=1)]
    longest = max(row.shape[1] for row in rows)
    # Right padding to one shape: causal attention does not see it, and one shape is one compilation.
    tokens = jnp.asarray(np.concatenate([np.pad(row, ((0, 0), (0, longest - row.shape[1]))) for row in rows]))
    logits = _logits(model, tokens[:, :-1])
    inputs = _attention_inputs(model, tokens[:PROBED, :-1])
    exact = [_exact_layer(model, index, x) for index, x in enumerate(inputs)]
    return Reference(
        model=model,
        tokens=tokens,
        scored=scored,
        width=width,
        prompt=config.prompt_length,
        generated=config.generated,
        logits=logits,
        inputs=inputs,
        outputs=tuple(output for output, _ in exact),
        values=tuple(value for _, value in exact),
        bytes_per_token=corpus.bytes_per_token,
        bits_per_byte=_bits(logits[:scored, :width], tokens[:scored, 1 : width + 1]) / corpus.bytes_per_token,
    )


def identity(reference: Reference, scheme: str | Scheme) -> dict[str, float]:
    """The scheme's algebra alone: float64 everywhere, cached rows unrounded.

    Returns:
        identity_error (relative L2 of attention's output, worst layer) and, where something is solved
        for, condition_number (worst layer).

    Raises:
        NotImplementedError: the scheme is refused for this model.
    """
    chosen = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    exact = _unrounded(chosen)
    with jax.enable_x64(True):
        layers, figures = convert_model(reference.model, exact, "float64")
        found = [
            _attend(layer, x.astype(jnp.float64)) for layer, x in zip(layers, reference.inputs, strict=True)
        ]
    error = _worst(reference, found, reference.outputs)
    return {"identity_error": error} | _conditioning(figures, ("condition_number",))


def _unrounded(scheme: Scheme) -> Scheme:
    """The scheme's algebra: its basis and softmax, with rows stored exactly and floating-point products."""
    return dataclasses.replace(scheme, codec="float64", bits=None, group=None, options=(), compute="")


def measure(reference: Reference, scheme: str | Scheme, dtype: str) -> dict[str, float]:
    """The scheme at a compute dtype: error of single layers, and of the model through the cache.

    Returns:
        attention_error and value_error (worst layer), condition_number and predicted_error (worst layer,
        where something is solved for), bits_per_byte, bits_per_byte_change, logit_kl, top1_agreement,
        greedy_agreement, count (tokens scored), bytes_per_token (all layers), compression (over bf16 KV).

    Raises:
        NotImplementedError: the scheme is refused for this model.
    """
    layers, figures = convert_model(reference.model, scheme, dtype)
    logits, attention = cached_logits(reference.model, layers, reference.tokens[:, :-1], reference.inputs)
    values = [_values(_at_float32(layer), x) for layer, x in zip(layers, reference.inputs, strict=True)]
    metrics = {
        "attention_error": _worst(reference, attention, reference.outputs),
        "value_error": _worst(reference, values, reference.values),
    }
    known = _stored(layers) | _conditioning(figures, ("condition_number", "predicted_error"))
    return metrics | known | _scores(reference, logits)


def _stored(layers: Sequence[CachedAttention]) -> dict[str, float]:
    """Bytes per token of all layers' caches, and how many times smaller that is than bf16 keys and values.

    At ``CONTEXT`` tokens, over which a buffer of newest tokens is spread, where a codec has one.
    """
    caches = jax.eval_shape(lambda: init_caches(layers, 1, CONTEXT))
    stored = sum(cache.bytes_per_token for cache in caches)
    return {
        "bytes_per_token": stored,
        "compression": sum(4 * layer.spec.key_width for layer in layers) / stored,  # K and V, 2 bytes each
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layers:
    """The attention layers of a reference's model under another position scheme, each by itself.

    Attributes:
        projections: each layer's weights; of a trained bias, the model's own or seeded ones.
        spec: of all layers.
        outputs: for each layer, attention's float64 answer to ``reference.inputs``, [PROBED, T, D].
        reference: inputs and values, which do not depend on positions.
    """

    projections: tuple[Projections, ...]
    spec: DecodeSpec
    outputs: tuple[np.ndarray, ...]
    reference: Reference


def at_position(reference: Reference, position: Position, *, seed: int) -> Layers:
    """The model's weights and activations with ``position`` in place of its own position scheme.

    A model trained with one scheme has nothing to say of a text under another, but each of its layers is
    an attention layer with trained weights and real inputs all the same. A bias that the model has not
    trained is drawn from ``seed``, another for each layer.
    """
    attentions = [block.attention for block in reference.model.blocks]
    spec = dataclasses.replace(attentions[0].decode_spec(dtype="float64"), position=position)
    projections = [attention.projections() for attention in attentions]
    if position != attentions[0].position:
        keys = jax.random.split(jax.random.key(seed), len(attentions))
        biases = [init_bias(position, spec.heads, key) if position.trained else None for key in keys]
        projections = [
            dataclasses.replace(weights, position=bias)
            for weights, bias in zip(projections, biases, strict=True)
        ]
    exact = [_exact_output(w, spec, x) for w, x in zip(projections, reference.inputs, strict=True)]
    return Layers(projections=tuple(projections), spec=spec, outputs=tuple(exact), reference=reference)


def layer_identity(layers: Layers, scheme: str | Scheme) -> dict[str, float]:
    """As ``identity``, of single layers. Raises NotImplementedError: the scheme is refused for them."""
    chosen = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    exact = _unrounded(chosen)
    with jax.enable_x64(True):
        converted = _convert(layers, exact, "float64")
        found = [
            _attend(each.layer, x.astype(jnp.float64))
            for each, x in zip(converted, layers.reference.inputs, strict=True)
        ]
    error = _worst(layers.reference, found, layers.outputs)
    return {"identity_error": error} | _conditioning(
        tuple(each.figures for each in converted), ("condition_number",)
    )


def layer_errors(layers: Layers, scheme: str | Scheme, dtype: str) -> dict[str, float]:
    """The part of ``measure`` that single layers have: its errors, figures and bytes; no logits, so no scores.

    Raises NotImplementedError: the scheme is refused for them.
    """
    converted, inputs = _convert(layers, scheme, dtype), layers.reference.inputs
    attention = [_attend(each.layer, x) for each, x in zip(converted, inputs, strict=True)]
    values = [_values(_at_float32(each.layer), x) for each, x in zip(converted, inputs, strict=True)]
    errors = {
        "attention_error": _worst(layers.reference, attention, layers.outputs),
        "value_error": _worst(layers.reference, values, layers.reference.values),
    }
    figures = tuple(each.figures for each in converted)
    known = _stored([each.layer for each in converted])
    return errors | known | _conditioning(figures, ("condition_number", "predicted_error"))


def _convert(layers: Layers, scheme: str | Scheme, dtype: str) -> list[Converted]:
    chosen = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    spec = dataclasses.replace(layers.spec, scheme=chosen, dtype=dtype)
    return [
        convert(weights, spec, layer=f"layer {index}") for index, weights in enumerate(layers.projections)
    ]


def _worst(reference: Reference, found: Sequence[ArrayLike], exact: Sequence[np.ndarray]) -> float:
    """The largest relative L2 error among the layers, padding left out."""
    width = reference.width
    return max(
        relative_l2(a[:, :width], b[:, :width]) for a, b in zip(map(np.asarray, found), exact, strict=True)
    )


def _scores(reference: Reference, logits: Float[Array, "B T V"]) -> dict[str, float]:
    """Metrics of the logits when every layer attends through its cache."""
    scored, width = reference.scored, reference.width
    ours, exact = logits[:scored, :width], reference.logits[:scored, :width]
    bits = _bits(ours, reference.tokens[:scored, 1 : width + 1]) / reference.bytes_per_token
    return {
        "bits_per_byte": bits,
        "bits_per_byte_change": bits - reference.bits_per_byte,
        "logit_kl": max(0.0, float(jnp.mean(_logit_kl(ours, exact)))),  # rounding can leave -1e-10
        "top1_agreement": float(top1_agreement(ours, exact)),
        "greedy_agreement": greedy_length(reference, logits),
        "count": scored * width,
    }


def greedy_length(reference: Reference, logits: Float[Array, "B T V"]) -> float:
    """Tokens that greedy decoding would produce before it first leaves the exact model's text; mean over prompts.

    Read off the teacher-forced logits: up to the first difference both have the same text behind them. The
    prompt, too, is read through the cache, where ``generate`` would attend to its exact keys and values.
    """
    start, end = reference.prompt, reference.prompt + reference.generated
    continued = reference.tokens[reference.scored :, start:end]
    chosen = jnp.argmax(logits[reference.scored :, start - 1 : end - 1], axis=-1).astype(jnp.int32)
    return float(np.mean(np.asarray(greedy_agreement(chosen, continued))))


def cached_logits(
    model: DecoderLM, layers: Sequence[CachedAttention], tokens: Int[Array, "B T"], probes: Sequence[Inputs]
) -> tuple[Float[Array, "B T V"], list[Inputs]]:
    """As ``model.with_cache`` on empty caches, as decoding token by token; and each layer's answer to its probe.

    Layer by layer rather than as one program, because layers of one shape and spec then share one
    compilation; and the probes [P, T, D] ride in the tokens' batch so that they need none of their own.
    """
    dtype = layers[0].spec.accumulation.name
    h, outputs = model.embed(tokens, dtype), []
    for block, layer, probe in zip(model.blocks, layers, probes, strict=True):
        h, output = _block(*nnx.split(block), layer, h, probe)
        outputs.append(output)
    return _head(*nnx.split(model), h), outputs


@functools.partial(jax.jit, static_argnames=("graph",))
def _block(
    graph: nnx.GraphDef, params: nnx.State, layer: CachedAttention, h: Inputs, probe: Inputs
) -> tuple[Inputs, Inputs]:
    outputs: list[Inputs] = []

    def attend(x: Inputs) -> Inputs:
        both = _attend(layer, jnp.concatenate([x, probe]))
        outputs.append(both[len(x) :])
        return both[: len(x)]

    return nnx.merge(graph, params)(h, attend, layer.spec.accumulation.name), outputs[0]


@functools.partial(jax.jit, static_argnames=("graph",))
def _head(graph: nnx.GraphDef, params: nnx.State, h: Inputs) -> Float[Array, "B T V"]:
    return nnx.merge(graph, params).head(h, h.dtype.name)


@jax.jit
def _attend(layer: CachedAttention, x: Inputs) -> Inputs:
    """Attention of x on itself through an empty cache."""
    return attend_cached(x, layer, init_cache(layer.spec, batch=x.shape[0], capacity=x.shape[1]))[0]


@jax.jit
def _values(layer: CachedAttention, x: Inputs) -> Float[Array, "B T N H"]:
    """The values as the decoder sees them: a query whose window is its own token weighs that one by 1."""
    _, cache = attend_cached(x, layer, init_cache(layer.spec, batch=x.shape[0], capacity=x.shape[1]))
    queries = jnp.zeros((*x.shape[:2], layer.spec.heads, layer.spec.head_dim), x.dtype)
    return decode(queries, cache, layer.weights, dataclasses.replace(layer.spec, window=1))


def _at_float32(layer: CachedAttention) -> CachedAttention:
    """The layer with the compute dtype that leaves the cache's own error alone."""
    return dataclasses.replace(layer, spec=dataclasses.replace(layer.spec, dtype="float32"))


_attend_full = jax.jit(attend_full, static_argnums=2)


def _exact_layer(model: DecoderLM, index: int, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Attention's output and values (value bias left out, as it is folded away) in float64."""
    attention = model.blocks[index].attention
    weights, spec = attention.projections(), attention.decode_spec(dtype="float64")
    value = np.einsum("btd,dkh->btkh", np.asarray(x, np.float64), np.asarray(weights.wv, np.float64))
    return _exact_output(weights, spec, x), np.repeat(value, spec.group, axis=2)


def _exact_output(weights: Projections, spec: DecodeSpec, x: Inputs) -> np.ndarray:
    """Attention in float64, without a cache."""
    with jax.enable_x64(True):
        return np.asarray(_attend_full(x.astype(jnp.float64), weights, spec))


@nnx.jit
def _logits(model: DecoderLM, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    return model(tokens)


@nnx.jit
def _attention_inputs(model: DecoderLM, tokens: Int[Array, "B T"]) -> tuple[Inputs, ...]:
    return model.attention_inputs(tokens)


_logit_kl = jax.jit(logit_kl)


_nats = jax.jit(cross_entropy)


def _bits(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> float:
    """Mean bits per token."""
    return float(_nats(logits, targets)) / math.log(2)


def _conditioning(figures: tuple[Figures, ...], names: tuple[str, ...]) -> dict[str, float]:
    """The worst layer's figures, where there are any."""
    found = {
        name: [getattr(each, name) for each in figures if getattr(each, name) is not None] for name in names
    }
    return {name: max(values) for name, values in found.items() if values}
