"""Where slim attention's error comes from: every cache on every layer of a real Whisper and of models trained here.

A cell is one scheme on one layer: the error of keys or values on inputs that nothing was fitted on, that of the
exact inverse, and what predicts it: the rounding of the cached rows, its noise gain, the condition number.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import checks
from experiments.directory import Refused, RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from experiments.slim_whisper import coordinates
from slimjax import pretrained
from slimjax.config import ELSEWHERE, Config, ConfigError
from slimjax.data import load_corpus
from slimjax.material import calibrate, material
from slimjax.models.opened import open_model
from slimjax.numerics import relative_l2
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve.augment import augmented, exact_solution
from slimjax.solve.calibrate import Calibration, collect
from slimjax.solve.convert import stored
from slimjax.solve.fit import value_error
from slimjax.solve.linear import condition_number, noise_gain
from slimjax.solve.measure import first_layer_option
from slimjax.solve.options import Layer, Option, option

TITLE = "Where slim attention's error comes from"
SHARED = ("e", "h")  # bases of one cache for all cross-attention layers
SOLVED = ("k", "kr")  # bases whose values come from an inverse


@dataclass(frozen=True, kw_only=True)
class Subject(Config):
    """A model. It counts by its contents (`digest`), wherever it lies.

    `layers` are its attention layers by name; `speech` is what a Whisper hears, "" for a language model, which
    reads the held-out part of its own text.
    """

    folder: str = field(metadata=ELSEWHERE)
    speech: str = field(metadata=ELSEWHERE)
    name: str
    digest: str
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SlimError(Config):
    """The whole run."""

    subjects: tuple[Subject, ...]
    schemes: tuple[str, ...]
    tokens: int
    length: int


def resolve(build: Build) -> SlimError:
    """The run from its section; of every model the weights are read once, for their digest."""
    section = build("SlimError")
    if not any(Path(section.speech).glob("*.wav")):
        raise ConfigError(
            f"{section.speech}: no wav files; `make models` fetches five", "speech", "SlimError"
        )
    try:
        heard = _subject(section.whisper, Path(section.whisper).name, section.speech)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{error}; `make models` fetches tiny.en", "whisper", "SlimError") from None
    try:
        read = [_subject(str(folder), f"lm-{folder.name}", "") for folder in trained(section.trained)]
    except (OSError, ValueError) as error:
        raise ConfigError(str(error), "trained", "SlimError") from None
    return SlimError(
        subjects=(heard, *read), schemes=section.schemes, tokens=section.tokens, length=section.length
    )


def trained(place: str) -> list[Path]:
    """The folders of the models of a run, or the one of a model. Raises ValueError where there is none."""
    folder = Path(place)
    if (folder / pretrained.FILE).is_file():
        return [folder]
    found = sorted(path.parent for path in (folder / "models").glob(f"*/{pretrained.FILE}"))
    if not found:
        raise ValueError(f"{place}: no trained model there; expected the folder of a run that trained some")
    return found


@functools.lru_cache(maxsize=16)
def _subject(folder: str, name: str, speech: str) -> Subject:
    opened = open_model(folder)
    if (opened.kind == "whisper") != bool(speech):
        raise ValueError(
            f"{folder}: a {opened.kind} model, expected {'a whisper' if speech else 'a decoder'}"
        )
    names = tuple(place.name for place in opened.places)
    return Subject(folder=folder, speech=speech, name=name, digest=opened.digest, layers=names)


def check(config: SlimError) -> Mapping[str, str]:
    """Of the clips, and of the text of every language model, which has to be enough."""
    found: dict[str, str] = {}
    for subject in config.subjects:
        if subject.speech:
            clips = sorted(Path(subject.speech).glob("*.wav"))
            found["speech"] = hashlib.sha256(b"".join(clip.read_bytes() for clip in clips)).hexdigest()[:12]
            continue
        data = pretrained.find(subject.folder).data
        try:
            corpus = load_corpus(data)
            corpus.check_held_out(config.tokens // config.length, config.length)
        except ValueError as error:
            problem = f"tokens = {config.tokens}, {subject.name}: {error}"
            raise ConfigError(
                problem, ("tokens", "length"), "SlimError", others=("SlimError.trained",)
            ) from None
        found |= checks.named(data, corpus)
    return found


def units(config: SlimError) -> list[Unit]:
    """Each attention layer of each model."""
    return [
        Unit(f"{subject.name}, {name}", _cells(config, subject, name), (subject, name))
        for subject in config.subjects
        for name in subject.layers
    ]


def _cells(config: SlimError, subject: Subject, name: str) -> tuple[Cell, ...]:
    attention = "cross" if name.endswith(".cross") else "self"
    index = int(name.split(".")[1])
    place = {"experiment": "slim_error", "model": subject.name, "layer": index, "attention": attention}
    schemes = map(parse_scheme, config.schemes)
    return tuple(
        {**place, **coordinates(scheme)}
        for scheme in schemes
        if attention == "cross" or scheme.basis not in SHARED
    )


def forecast(unit: Unit, config: SlimError) -> Forecast:
    """Nothing is trained."""
    return Forecast()


# Shared by all units of one model --------------------------------------------------------------------------

Studied = tuple[tuple[Layer, ...], tuple[Calibration, ...]]


@functools.lru_cache(maxsize=1)
def studied(subject: Subject, tokens: int, length: int) -> Studied:
    """The layers of a model, and the calibration of each."""
    opened = open_model(subject.folder)
    layers = tuple(opened.layers())
    if subject.speech:
        return layers, calibrate(material(opened, (subject.speech,)))[0]
    return layers, _read(subject.folder, tokens, length)


def _read(folder: str, tokens: int, length: int) -> tuple[Calibration, ...]:
    """Of a language model, from windows of the text that it was not trained on."""
    found = pretrained.find(folder)
    model = pretrained.restore(found)
    windows = load_corpus(found.data).held_out_windows(tokens // length, length)
    graph, params = nnx.split(model)
    batches = [
        [np.asarray(x)[0] for x in _inputs(graph, params, jnp.asarray(window[None, :-1]))]
        for window in windows
    ]
    return collect(batches, found.model.layers)


@functools.partial(jax.jit, static_argnames="graph")
def _inputs(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> tuple[jax.Array, ...]:
    return nnx.merge(graph, params).attention_inputs(tokens)


def prepare(unit: Unit, config: SlimError, directory: RunDirectory) -> Measure:
    """Everything is in memory after a model's first unit."""
    subject, name = unit.data
    try:
        layers, calibrations = studied(subject, config.tokens, config.length)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    index = subject.layers.index(name)
    return measuring(layers, layers[index], calibrations[index])


# One layer -------------------------------------------------------------------------------------------------


def measuring(layers: Sequence[Layer], layer: Layer, calibration: Calibration) -> Measure:
    """Measures one scheme on one layer."""
    first = next((each for each in layers if each.name.endswith(".cross")), layer)

    @functools.cache
    def exact(extra: int) -> Exact:
        return exact_map(layer, extra)

    def measure(cell: Cell) -> dict[str, Any]:
        scheme = parse_scheme(str(cell["scheme"]))
        if scheme.basis == "h":
            found = first_layer_option(layer, scheme, calibration, first)
        else:
            found = option(layer, scheme, calibration)
        if found.refused:
            raise NotImplementedError(found.refused)
        if scheme.basis not in SOLVED:
            return _figures(found)
        return {
            **_figures(found),
            **_chosen(found, layer, scheme, calibration),
            **predictors(exact(scheme.extra), layer, scheme, calibration),
        }

    return measure


def _figures(found: Option) -> dict[str, float]:
    optional = {
        "calibration_error": found.calibration_error,
        "exact_error": found.exact_error,
        "condition_number": found.condition_number,  # of bases k and kr `predictors` has the exact map's
    }
    return {
        "value_error": found.error,
        **{name: value for name, value in optional.items() if value is not None},
        "bytes_per_token": found.bytes_per_token,
    }


def _chosen(found: Option, layer: Layer, scheme: Scheme, calibration: Calibration) -> dict[str, float]:
    """The chosen map's error of V alone: ``value_error`` is of K where K's own rounding is the larger."""
    if found.solution is None:
        return {}
    spec = layer.under(scheme)
    return {"chosen_error": value_error(calibration.held_out, layer.keys, layer.values, found.solution, spec)}


@dataclass(frozen=True, eq=False)
class Exact:
    """What the exact map is of, [W_K, U], [D, E+R], and what it does to errors, whatever the codec."""

    source: np.ndarray
    condition_number: float
    noise_gain: float


def exact_map(layer: Layer, extra: int) -> Exact:
    """Of the weights alone, with R calibration-free coordinates."""
    found = exact_solution(layer.keys, layer.values, extra)
    source = augmented(layer.keys, found.extra)
    return Exact(source, condition_number(source), noise_gain(source, found.weight, layer.values))


def predictors(exact: Exact, layer: Layer, scheme: Scheme, calibration: Calibration) -> dict[str, float]:
    """Condition number and noise gain of the exact map, and the rounding of real cached rows."""
    rows = np.asarray(calibration.held_out, np.float64) @ exact.source
    return {
        "condition_number": exact.condition_number,
        "noise_gain": exact.noise_gain,
        "rounding_error": relative_l2(stored(rows, layer.under(scheme)), rows),
    }
