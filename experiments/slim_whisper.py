"""Slim attention on a real model and real speech: Whisper's layers one by one, then its transcripts.

Layers: the error of V through each cache on held-out speech, exact and noise-aware, and in which arithmetic; what
a thresholded softmax spares and costs.
Transcripts: words that are wrong, and whether the text stays that of an ordinary bf16 KV cache.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.directory import Refused, RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from experiments.slim_sparse import attention_error, skipped
from slimjax.attention.layer import CachedAttention
from slimjax.audio import read_sound
from slimjax.config import ELSEWHERE, Config, ConfigError
from slimjax.models.load import LoadedWhisper, load_whisper
from slimjax.models.opened import open_model
from slimjax.models.whisper_caches import WhisperLayers, begin
from slimjax.models.whisper_convert import convert_whisper, layer_names
from slimjax.numerics import logit_kl
from slimjax.scheme import Scheme, parse_scheme, parse_schemes
from slimjax.solve import convert
from slimjax.solve.augment import Solution
from slimjax.solve.calibrate import TURN, Calibration, collect
from slimjax.solve.fit import fit, value_error
from slimjax.solve.linear import condition_number
from slimjax.solve.options import Layer, Option, option
from slimjax.solve.plan import Plan, choose, measure as menus_of
from slimjax.text import word_errors, words
from slimjax.transcribe import Heard, Transcript, listen, prepare as prepare_transcriber

TITLE = "Slim attention on Whisper"
EXACT = "kv:float32"
BASELINE = "kv:bf16"


@dataclass(frozen=True, kw_only=True)
class SlimWhisper(Config):
    """The whole run. The model counts by its contents (`digest`), wherever it lies."""

    model: str = field(metadata=ELSEWHERE)
    speech: str = field(metadata=ELSEWHERE)
    digest: str
    layers: int
    layer_schemes: tuple[str, ...]
    product_scheme: str
    products: tuple[str, ...]
    sparse_schemes: tuple[str, ...]
    schemes: tuple[str, ...]
    max_errors: tuple[float, ...]


def resolve(build: Build) -> SlimWhisper:
    """The run from its section; the model is looked at, not loaded."""
    section = build("SlimWhisper")
    try:
        digest, layers = _looked_at(section.model)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{error}; `make models` fetches tiny.en", "model", "SlimWhisper") from None
    if not (Path(section.speech) / "transcription").is_file():
        raise ConfigError(
            f"{section.speech}: no file 'transcription' there; `make models` fetches five clips",
            "speech",
            "SlimWhisper",
        )
    return SlimWhisper(
        model=section.model,
        speech=section.speech,
        digest=digest,
        layers=layers,
        layer_schemes=section.layer_schemes,
        product_scheme=section.product_scheme,
        products=section.products,
        sparse_schemes=section.sparse_schemes,
        schemes=section.schemes,
        max_errors=section.max_errors,
    )


@functools.lru_cache(maxsize=1)
def _looked_at(model: str) -> tuple[str, int]:
    """The digest of a Whisper model's weights, and its decoder layers. Once a process: all weights are read."""
    opened = open_model(model)
    if opened.kind != "whisper":
        raise ValueError(f"{model}: not a Whisper model")
    return opened.digest, opened.sizes.decoder_layers


def units(config: SlimWhisper) -> list[Unit]:
    """Each attention layer, then all transcripts."""
    layers = [
        Unit(name, _layer_cells(config, index, name.rpartition(".")[2]), name)
        for index, pair in enumerate(layer_names(config.layers))
        for name in pair
    ]
    return [*layers, Unit("transcripts", _transcript_cells(config))]


def _layer_cells(config: SlimWhisper, index: int, kind: str) -> tuple[Cell, ...]:
    place = {"model": Path(config.model).name, "layer": index, "attention": kind}
    schemes = [
        {"experiment": "whisper_layers", **place, **coordinates(parse_scheme(text))}
        for text in config.layer_schemes
    ]
    chosen = coordinates(parse_scheme(config.product_scheme))
    products = [
        {"experiment": "whisper_products", **place, **chosen, "compute": product}
        for product in config.products
    ]
    sparse = [
        {"experiment": "whisper_sparse", **place, **coordinates(scheme), "option": scheme.option}
        for scheme in map(parse_scheme, config.sparse_schemes)
    ]
    return (*schemes, *products, *sparse)


def coordinates(scheme: Scheme) -> dict[str, Any]:
    """A scheme as a record's coordinates."""
    return {"scheme": str(scheme), "basis": scheme.basis, "codec": scheme.codec, "extra": scheme.extra}


def _transcript_cells(config: SlimWhisper) -> tuple[Cell, ...]:
    base = {"experiment": "whisper_transcripts", "model": Path(config.model).name}
    plans = [f"plan with errors of at most {limit:g}" for limit in config.max_errors]
    return tuple({**base, "scheme": scheme} for scheme in (*config.schemes, *plans))


def forecast(unit: Unit, config: SlimWhisper) -> Forecast:
    """Nothing is trained."""
    return Forecast()


# Shared by all units of one process ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """The model, the clips with what is said in them, and what its layers are given when it hears them."""

    loaded: LoadedWhisper
    sounds: tuple[np.ndarray, ...]
    said: tuple[str, ...]
    heard: tuple[Heard, ...]
    layers: tuple[Layer, ...]
    calibrations: tuple[Calibration, ...]


@functools.lru_cache(maxsize=1)
def material(model: str, speech: str) -> Material:
    """Load, transcribe with exact caches, and gather the calibration of every layer."""
    loaded = load_whisper(model)
    clips = sorted(Path(speech).glob("*.wav"))
    lines = [line.split() for line in (Path(speech) / "transcription").read_text().splitlines()]
    texts = {words[-1].strip("()"): " ".join(words[:-1]) for words in lines if words}
    said = tuple(texts[clip.stem].replace("<s>", "").replace("</s>", "").strip() for clip in clips)
    sounds = tuple(read_sound(clip) for clip in clips)
    exact, _ = convert_whisper(loaded.model, EXACT, EXACT)
    heard = listen(prepare_transcriber(loaded, exact), sounds)
    layers = tuple(
        layer
        for block, (own, cross) in zip(
            loaded.model.decoder, layer_names(len(loaded.model.decoder)), strict=True
        )
        for layer in (
            Layer(name=own, projections=block.self_attention.projections(), spec=block.self_spec()),
            Layer(name=cross, projections=block.cross_attention.projections(), spec=block.cross_spec()),
        )
    )
    batches = [
        [
            np.asarray(inputs)[0]
            for own in each.inputs.self_inputs
            for inputs in (own, each.inputs.memory)  # all cross layers are given the encoder's output
        ]
        for each in heard
    ]
    return Material(
        loaded=loaded,
        sounds=sounds,
        said=said,
        heard=heard,
        layers=layers,
        calibrations=collect(batches, len(layers)),
    )


def prepare(unit: Unit, config: SlimWhisper, directory: RunDirectory) -> Measure:
    """Everything is in memory after the first unit."""
    try:
        shared = material(config.model, config.speech)
    except OSError as error:
        raise Refused(str(error)) from error
    if unit.data is None:
        return _transcripts(shared, config)
    return _layer(shared, [layer.name for layer in shared.layers].index(unit.data))


# Layers ----------------------------------------------------------------------------------------------------


def _layer(shared: Material, index: int) -> Measure:
    """Measures one scheme, one product or one thresholded softmax on one layer and held-out speech."""
    layer, calibration = shared.layers[index], shared.calibrations[index]

    @functools.cache
    def fitted(scheme: Scheme) -> Solution:
        return fit(layer.keys, layer.values, layer.under(scheme), calibration).solution

    def measure(cell: Cell) -> dict[str, Any]:
        scheme = parse_scheme(str(cell["scheme"]))
        spec = layer.under(scheme)
        if cell["experiment"] == "whisper_sparse":
            # The map knows rows alone: not how they are weighed, nor when they are multiplied.
            plain = dataclasses.replace(scheme, option=0, softmax="exact")
            solution = fitted(plain) if scheme.basis in ("k", "kr") else None
            done = convert(layer.projections, spec, layer=layer.name, solution=solution)
            return _spared(shared, index, done.layer)
        if "compute" in cell:
            product, rows = str(cell["compute"]), calibration.held_out
            error = value_error(rows, layer.keys, layer.values, fitted(scheme), spec, product)
            return {"value_error": error}
        found = option(layer, scheme, calibration)
        if found.refused:
            raise NotImplementedError(found.refused)
        return _figures(layer, found)

    return measure


def _spared(shared: Material, index: int, converted: CachedAttention) -> dict[str, Any]:
    """The error on the clips that no map has seen; the skip rates, which nothing is fitted for, on all."""
    trained, spec = shared.layers[index].projections, converted.spec
    inputs = [_inputs(heard, index // 2, own=spec.causal) for heard in shared.heard]
    unseen = [each for number, each in enumerate(inputs) if TURN[number % len(TURN)] == "held_out"]
    error = attention_error(converted, trained, unseen)
    rates = skipped(trained, spec, inputs) if spec.scheme.softmax != "exact" else {}
    return {"attention_error": error, **rates}


def _inputs(heard: Heard, block: int, *, own: bool) -> tuple[np.ndarray, np.ndarray]:
    """What a block's queries and keys are made of, float32 [1, T, D] and [1, S, D]."""
    if own:
        both = np.asarray(heard.inputs.self_inputs[block])
        return both, both
    return np.asarray(heard.inputs.cross_inputs[block]), np.asarray(heard.inputs.memory)


def _figures(layer: Layer, found: Option) -> dict[str, Any]:
    plain = 4 * layer.spec.key_width
    optional = {"calibration_error": found.calibration_error, "exact_error": found.exact_error}
    return {
        "value_error": found.error,
        **{name: value for name, value in optional.items() if value is not None},
        "condition_number": condition_number(layer.keys),
        "bytes_per_token": found.bytes_per_token,
        "compression": plain / found.bytes_per_token,
    }


# Transcripts -----------------------------------------------------------------------------------------------


def _transcripts(shared: Material, config: SlimWhisper) -> Measure:
    """Measures a scheme, "cross,self" or one for both, or a plan, on all clips."""
    model = shared.loaded.model
    exact, _ = convert_whisper(model, EXACT, EXACT)
    baseline, _ = convert_whisper(model, BASELINE, BASELINE)
    plain = _transcribed(shared, baseline)
    logits = [_teacher_forced(shared.loaded, exact, each) for each in shared.heard]
    plans: dict[str, Plan] = {}
    if config.max_errors:
        menus = menus_of(shared.layers, shared.calibrations, enough=min(config.max_errors))
        for limit in config.max_errors:
            name = f"plan with errors of at most {limit:g}"
            plans[name] = choose(shared.layers, menus, max_error=limit)

    def measure(cell: Cell) -> dict[str, Any]:
        text = str(cell["scheme"])
        layers = _planned(shared, plans[text]) if text in plans else _converted(shared, text)
        found = _transcribed(shared, layers)
        kl = [
            jnp.mean(logit_kl(_teacher_forced(shared.loaded, layers, each), reference))
            for each, reference in zip(shared.heard, logits, strict=True)
        ]
        bytes_now, bytes_then = (one[0].self_bytes + one[0].cross_bytes for one in (found, plain))
        left_out = _encoder_bytes(shared, layers)
        without = {"compression_without_e": bytes_then / (bytes_now - left_out)} if left_out else {}
        worst = {"value_error": max(c.error for c in plans[text].layers)} if text in plans else {}
        return {
            **worst,
            "word_errors": _errors(shared, found) / sum(len(words(said)) for said in shared.said),
            "equal_texts": sum(a.text == b.text for a, b in zip(found, plain, strict=True)) / len(plain),
            "sequences": len(plain),
            "logit_kl": max(0.0, float(np.mean(kl))),
            "self_cache_bytes": found[0].self_bytes,
            "cross_cache_bytes": found[0].cross_bytes,
            "cache_bytes": bytes_now,
            "compression": bytes_then / bytes_now,
            **without,
            "tokens_per_second": sum(t.generated for t in found) / sum(t.decode_seconds for t in found),
            "cross_milliseconds": 1e3 * float(np.median([t.cross_seconds for t in found])),
        }

    return measure


def _encoder_bytes(shared: Material, layers: WhisperLayers) -> int:
    """Bytes of the caches that hold the encoder's output itself, measured from their leaves."""
    memory = jnp.asarray(shared.heard[0].inputs.memory)
    caches = begin(layers, memory, capacity=shared.loaded.model.config.text_positions)
    bases = [layer.spec.scheme.basis for layer in layers.cross_layers]
    read = {number for number, name in zip(caches.reads, bases, strict=True) if name == "e"}
    return sum(caches.cross_caches[number].nbytes for number in read)


def _errors(shared: Material, found: Sequence[Transcript]) -> int:
    return sum(word_errors(one.text, said) for one, said in zip(found, shared.said, strict=True))


def _transcribed(shared: Material, layers: WhisperLayers) -> list[Transcript]:
    transcriber = prepare_transcriber(shared.loaded, layers)
    return [transcriber(sound) for sound in shared.sounds]


def _converted(shared: Material, text: str) -> WhisperLayers:
    """The model under one scheme for both, or "cross,self", with maps from calibration where there are any."""
    both = parse_schemes(text)
    cross, own = both if len(both) == 2 else (both[0], both[0])
    solutions = {}
    for layer, calibration in zip(shared.layers, shared.calibrations, strict=True):
        scheme = cross if layer.name.endswith("cross") else own
        if scheme.basis == "k" and (scheme.extra or scheme.codec == "fixed16"):
            solutions[layer.name] = fit(layer.keys, layer.values, layer.under(scheme), calibration).solution
    return convert_whisper(shared.loaded.model, cross, own, solutions=solutions)[0]


def _planned(shared: Material, plan: Plan) -> WhisperLayers:
    schemes = plan.schemes
    names = layer_names(len(shared.loaded.model.decoder))
    return convert_whisper(
        shared.loaded.model,
        [schemes[cross] for _, cross in names],
        [schemes[own] for own, _ in names],
        solutions=dict(plan.solutions),
    )[0]


def _teacher_forced(loaded: LoadedWhisper, layers: WhisperLayers, heard: Heard) -> jax.Array:
    """Logits [T, V] of the exact model's own text, every token read through the caches."""
    graph, params = nnx.split(loaded.model)
    width = -(-heard.tokens.shape[1] // 16) * 16  # few shapes, few compilations
    padded = np.pad(heard.tokens, ((0, 0), (0, width - heard.tokens.shape[1])))
    logits = _through(graph, params, layers, jnp.asarray(padded), jnp.asarray(heard.inputs.memory))
    return logits[0, : heard.tokens.shape[1]]


@functools.partial(jax.jit, static_argnames="graph")
def _through(
    graph: nnx.GraphDef, params: nnx.State, layers: WhisperLayers, tokens: jax.Array, memory: jax.Array
) -> jax.Array:
    caches = begin(layers, memory, capacity=tokens.shape[1])
    return nnx.merge(graph, params).with_cache(tokens, layers, caches)[0]
