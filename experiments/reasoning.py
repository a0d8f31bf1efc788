"""Train small models until they solve a task with exact answers, then have them answer through every cache.

A problem is solved or not, and one wrong token of many is enough: what a cache loses shows in answers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from experiments import checks, schemes
from experiments.directory import RunDirectory
from experiments.schemes import IDENTITY, scheme_cells
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from experiments.train import Variant, trained
from slimjax.config import ASIDE, CheckpointConfig, Config, ConfigError, DataConfig, EquivalenceConfig
from slimjax.models.decoder import convert_model, init_caches
from slimjax.tasks import UNQUANTISED, answered, parse_task, problems, solved
from slimjax.tasks.task import Task, row_length
from slimjax.train import trained_model

TITLE = "How many problems does a model still solve through its cache?"


@dataclass(frozen=True, kw_only=True)
class Reasoning(Config):
    """The whole run."""

    data: DataConfig
    checkpoint: CheckpointConfig = dataclasses.field(metadata=ASIDE)
    schemes: tuple[str, ...]
    dtype: Literal["float32", "bfloat16", "float16"]
    problems: int
    context: int
    seed: int
    variants: tuple[Variant, ...]

    @property
    def task(self) -> Task:
        """What the models learn."""
        assert self.data.task is not None
        return parse_task(self.data.task)

    @property
    def measured(self) -> EquivalenceConfig:
        """The cells as those of the other experiments are described: every problem is a row of the task."""
        length = row_length(self.task)
        return EquivalenceConfig(
            schemes=self.schemes,
            dtypes=(self.dtype,),
            tokens=self.problems * length,
            length=length,
            generated=1,
            prompts=1,
            prompt_length=1,
        )


def resolve(build: Build) -> Reasoning:
    """The run from its sections; a model's name is the scope of its bindings."""
    section, data = build("Reasoning"), build("Data")
    if data.task is None:
        raise ConfigError(
            "task is not given: expected one such as Data.task = 'sort(symbols=160,items=128,asked=40)'",
            "task",
            "Data",
        )
    return Reasoning(
        data=data,
        checkpoint=build("Checkpoint"),
        schemes=section.schemes,
        dtype=section.dtype,
        problems=section.problems,
        context=section.context,
        seed=section.seed,
        variants=tuple(
            Variant(name=name, model=build("Model", name), train=build("Train", name))
            for name in section.models
        ),
    )


def units(config: Reasoning) -> list[Unit]:
    """A model each; in it scheme by scheme."""
    return [Unit(variant.name, _cells(variant, config), variant) for variant in config.variants]


def _cells(variant: Variant, config: Reasoning) -> tuple[Cell, ...]:
    shared = {
        "experiment": "reasoning",
        "model": variant.name,
        "position": variant.model.position,
        "steps": variant.train.steps,
        "seed": variant.train.seed,
    }
    cells = scheme_cells(shared, variant.model, config.measured)
    # An identity has no answers; bytes are those of a long context, a row's would be those of its buffers.
    return tuple({**cell, "context": config.context} for cell in cells if cell["dtype"] != IDENTITY)


def forecast(unit: Unit, config: Reasoning) -> Forecast:
    """Of training and of every scheme."""
    return schemes.forecast(unit.cells, unit.data.model, config.measured, unit.data.train)


def check(config: Reasoning) -> Mapping[str, str]:
    """That the models fit the task."""
    corpus = checks.text(config.data)
    for variant in config.variants:
        checks.trainable(corpus, variant.model, variant.train, variant.name)
    return checks.named(config.data, corpus)


def prepare(unit: Unit, config: Reasoning, directory: RunDirectory) -> Measure:
    """Train the model; the problems are of the split that no training or choice has seen."""
    corpus = checks.loaded(config.data, directory)
    state = trained(unit.data, corpus, config.data, directory, config.checkpoint)
    model, task = trained_model(unit.data.model, state), config.task
    asked = problems(task, config.seed, config.problems, "test")

    @functools.cache
    def unquantised() -> np.ndarray:
        return solved(model, convert_model(model, UNQUANTISED)[0], task, asked)

    def measure(cell: Cell) -> dict[str, Any]:
        layers, _ = convert_model(model, str(cell["scheme"]), config.dtype)
        caches = jax.eval_shape(lambda: init_caches(layers, 1, config.context))
        stored = sum(cache.bytes_per_token for cache in caches)
        return {
            **answered(solved(model, layers, task, asked), unquantised()),
            "count": config.problems,
            "bytes_per_token": stored,
            "compression": sum(4 * layer.spec.key_width for layer in layers) / stored,
        }

    return measure
