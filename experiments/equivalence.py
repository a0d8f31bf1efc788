"""Which caches are exact on a given, trained model: every scheme, compute dtype and position scheme.

Under its own position scheme the model is measured whole; under the others each of its layers by itself, with the
same weights and the same inputs, since the model was not trained to read under them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments import checks, schemes
from experiments.directory import Refused, RunDirectory
from experiments.schemes import IDENTITY, measuring, scheme_cells
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax import evaluate, pretrained
from slimjax.config import (
    ELSEWHERE,
    Config,
    ConfigError,
    DataConfig,
    EquivalenceConfig,
    ModelConfig,
    PositionKind,
)

TITLE = "Which attention caches are exact on this model?"


@dataclass(frozen=True, kw_only=True)
class Equivalence(Config):
    """The whole run. The checkpoint counts by its contents (`digest`), wherever it lies (`folder`)."""

    folder: str = dataclasses.field(metadata=ELSEWHERE)
    name: str
    step: int
    digest: str
    model: ModelConfig
    data: DataConfig
    positions: tuple[PositionKind, ...]
    seed: int
    equivalence: EquivalenceConfig

    def validate(self) -> None:
        longest = max(self.equivalence.length, self.equivalence.prompt_length + self.equivalence.generated)
        if self.model.position == "learned" and self.model.max_length < longest:
            raise ConfigError(
                f"{self.name}: learned positions end at max_length = {self.model.max_length}, "
                f"the run needs {longest}",
                ("length", "prompt_length", "generated"),
                "Equivalence",
            )


def resolve(build: Build) -> Equivalence:
    """The run from its sections and the description of the model."""
    section = build("Pretrained")
    try:
        found = pretrained.find(section.checkpoint)
    except ValueError as error:
        raise ConfigError(str(error), "checkpoint", "Pretrained") from None
    own = found.model.position
    return Equivalence(
        folder=str(found.folder),
        name=found.folder.name,
        step=found.step,
        digest=found.digest,
        model=found.model,
        data=found.data if section.path is None else dataclasses.replace(found.data, path=section.path),
        positions=(own, *(kind for kind in section.positions if kind != own)),
        seed=section.seed,
        equivalence=build("Equivalence"),
    )


def units(config: Equivalence) -> list[Unit]:
    """A position scheme each, the model's own first."""
    shared = {"experiment": "equivalence", "model": config.name, "steps": config.step, "seed": config.seed}
    return [
        Unit(
            f"{config.name}, position {kind}",
            scheme_cells({**shared, "position": kind}, config.model, config.equivalence),
            kind,
        )
        for kind in config.positions
    ]


def forecast(unit: Unit, config: Equivalence) -> Forecast:
    """Of every scheme; the model is there."""
    return schemes.forecast(unit.cells, config.model, config.equivalence)


def check(config: Equivalence) -> Mapping[str, str]:
    """Of the model, all of it, and of the text."""
    try:
        pretrained.restore(pretrained.find(config.folder))
    except ValueError as error:
        raise ConfigError(str(error), "checkpoint", "Pretrained") from None
    corpus = checks.text(config.data, section="Pretrained")
    if corpus.vocab > config.model.vocab:
        problem = f"the text has {corpus.vocab} tokens, the model's vocabulary {config.model.vocab}"
        raise ConfigError(problem, "path", "Pretrained")
    checks.measurable(corpus, config.equivalence)
    return checks.named(config.data, corpus)


def prepare(unit: Unit, config: Equivalence, directory: RunDirectory) -> Measure:
    """Read the model and measure it, or its layers, without a cache."""
    found = pretrained.find(config.folder)
    if found.digest != config.digest:
        raise Refused(f"{config.folder}: changed since the run began; the same command starts another run")
    try:
        model = pretrained.restore(found)
    except ValueError as error:
        raise Refused(str(error)) from error
    reference = evaluate.prepare(model, checks.loaded(config.data, directory), config.equivalence)
    if unit.data == config.model.position:
        return measuring(reference, config.equivalence)
    position = schemes.position_as(config.model, unit.data)
    layers = evaluate.at_position(reference, position, seed=config.seed)

    def measure(cell: Cell) -> dict[str, Any]:
        scheme, dtype = str(cell["scheme"]), str(cell["dtype"])
        if dtype == IDENTITY:
            return evaluate.layer_identity(layers, scheme)
        return evaluate.layer_errors(layers, scheme, dtype)

    return measure
