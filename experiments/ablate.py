"""A grid as data: every combination of the axes' values is a model, trained once, and every scheme measured on it."""

import dataclasses
import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import checks, schemes
from experiments.directory import RunDirectory
from experiments.schemes import LENGTHS, measuring, scheme_cells
from experiments.settings import SECTIONS, Build, Cell, Forecast, Measure, Unit
from experiments.train import Variant, trained
from slimjax import evaluate
from slimjax.config import ASIDE, CheckpointConfig, Config, ConfigError, DataConfig, EquivalenceConfig
from slimjax.data import Corpus
from slimjax.scheme import suggest
from slimjax.train import trained_model

TITLE = "Ablation"
VARIED = ("Model", "Train", "Data")  # sections that a model comes from
SEED = "Train.seed"  # not part of a model's name: its values are samples of one number


@dataclass(frozen=True, kw_only=True)
class Point(Config):
    """A combination of values, by its `label` and, with the seed, its own name; the model and the text it means."""

    label: str
    variant: Variant
    data: DataConfig


@dataclass(frozen=True, kw_only=True)
class Ablation(Config):
    """The whole run."""

    checkpoint: CheckpointConfig = dataclasses.field(metadata=ASIDE)
    equivalence: EquivalenceConfig
    points: tuple[Point, ...]

    def validate(self) -> None:
        longest = max(self.equivalence.length, self.equivalence.prompt_length + self.equivalence.generated)
        for point in self.points:
            model = point.variant.model
            if model.position == "learned" and model.max_length < longest:
                raise ConfigError(
                    f"{point.label}: learned positions end at max_length = {model.max_length}, "
                    f"the run needs {longest}",
                    ("max_length", "position"),
                    "Model",
                    others=("Ablate.axes", *LENGTHS),
                )


def resolve(build: Build) -> Ablation:
    """The grid spelt out. Raises ConfigError, at the axes, for a field or a value that its section would refuse."""
    axes = build("Ablate").axes
    for name, _ in axes:
        _check_field(name, build)
    base = {section: build(section) for section in VARIED}
    names = [name for name, _ in axes]
    points = [
        _point(base, dict(zip(names, values, strict=True)))
        for values in itertools.product(*(values for _, values in axes))
    ]
    _check_distinct(points)
    return Ablation(checkpoint=build("Checkpoint"), equivalence=build("Equivalence"), points=tuple(points))


def _check_field(name: str, build: Build) -> None:
    section, _, field = name.partition(".")
    if section not in VARIED:
        why = "; its schemes and dtypes are axes as they are" if section == "Equivalence" else ""
        raise _fault(f"{name!r}: expected a field of {', '.join(VARIED)}{why}")
    fields = list(inspect.signature(SECTIONS[section]).parameters)
    if field not in fields:
        raise _fault(f"unknown field {name}{suggest(field, fields)}")
    if name in build.bound:
        raise _fault(f"{name} is bound to one value, too, which no model would have")


def _check_distinct(points: Sequence[Point]) -> None:
    """Two models may not be one that is written in two ways."""
    seen: dict[Any, Point] = {}
    for point in points:
        model, train = point.variant.model, point.variant.train
        spelt_out = dataclasses.replace(model, kv_heads=model.K, head_dim=model.H, mlp_width=model.F)
        other = seen.setdefault((spelt_out, train, point.data), point)
        if other is not point:
            raise _fault(f"{other.variant.name} and {point.variant.name} are the same model")


def _fault(problem: str) -> ConfigError:
    return ConfigError(f"axes: {problem}", "axes", "Ablate")


def _point(base: Mapping[str, Any], values: Mapping[str, Any]) -> Point:
    """One combination, by the rules of the sections its values belong to."""
    named = {name: value for name, value in values.items() if name != SEED}
    short = [name.partition(".")[2] for name in named]
    label = ", ".join(
        f"{field if short.count(field) == 1 else name}={value}"
        for (name, value), field in zip(named.items(), short, strict=True)
    )
    label = label or "base"
    folder = label + (f",seed={values[SEED]}" if SEED in values else "")
    try:
        sections = {
            section: dataclasses.replace(base[section], **_fields(values, section)) for section in VARIED
        }
        variant = Variant(
            name=re.sub(r"[^\w.,=+-]+", "_", folder.replace(", ", ",")),
            model=sections["Model"],
            train=sections["Train"],
        )
    except ConfigError as error:
        where = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        raise _fault(f"with {where}: {error.problem}") from None
    return Point(label=label, variant=variant, data=sections["Data"])


def _fields(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}


def units(config: Ablation) -> list[Unit]:
    """A trained model each."""
    return [
        Unit(point.variant.name, scheme_cells(_shared(point), point.variant.model, config.equivalence), point)
        for point in config.points
    ]


def _shared(point: Point) -> Cell:
    return {
        "experiment": "ablate",
        "model": point.label,
        "position": point.variant.model.position,
        "steps": point.variant.train.steps,
        "seed": point.variant.train.seed,
    }


def forecast(unit: Unit, config: Ablation) -> Forecast:
    """Of training and of every scheme."""
    variant = unit.data.variant
    return schemes.forecast(unit.cells, variant.model, config.equivalence, variant.train)


def check(config: Ablation) -> Mapping[str, str]:
    """Of the text, or texts. A field that is an axis is at fault there."""
    texts: dict[DataConfig, Corpus] = {}
    digests: dict[str, str] = {}
    for point in config.points:
        try:
            if point.data not in texts:
                texts[point.data] = checks.text(point.data)
                digests |= checks.named(point.data, texts[point.data])
            checks.trainable(texts[point.data], point.variant.model, point.variant.train)
            checks.measurable(texts[point.data], config.equivalence)
        except ConfigError as error:
            if any(re.search(rf"\b{field}=", point.label) for _, field in error.places):
                raise _fault(f"with {point.label}: {error.problem}") from None
            raise
    return digests


def prepare(unit: Unit, config: Ablation, directory: RunDirectory) -> Measure:
    """Train the model and measure it without a cache."""
    point: Point = unit.data
    corpus = checks.loaded(point.data, directory)
    state = trained(point.variant, corpus, point.data, directory, config.checkpoint)
    model = trained_model(point.variant.model, state)
    return measuring(evaluate.prepare(model, corpus, config.equivalence), config.equivalence)
