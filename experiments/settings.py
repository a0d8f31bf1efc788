"""What every experiment shares: the sections a config may bind and the shape of an experiment module.

An experiment is a module with `resolve`, `cells` and `run`; adding one is a module, a section and a line in
`EXPERIMENTS`.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from experiments.directory import RunDirectory
from slimjax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    Count,
    DataConfig,
    EquivalenceConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
    digest,
)
from slimjax.records import Record
from slimjax.scheme import suggest

EXPERIMENTS = {"quickstart": "experiments.quickstart", "train": "experiments.train"}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Which program reads the other sections."""

    experiment: str = "quickstart"

    def validate(self) -> None:
        if self.experiment not in EXPERIMENTS:
            hint = suggest(self.experiment, EXPERIMENTS)
            raise ConfigError(f"unknown experiment {self.experiment!r}{hint}", "experiment")


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Config):
    """The models that are trained and compared; `NAME/Model.field = ...` and `NAME/Train.field = ...` set one apart.

    The first is the main one: the others are read against it.
    """

    models: tuple[str, ...] = ("default",)

    def validate(self) -> None:
        names = self.models  # they are scopes and folders
        if not names or len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            raise ConfigError(
                f"models = {names}: expected distinct names like 'default', at least one", "models"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(QuickstartConfig):
    """The models that are trained, named as in `Quickstart`, and how much they are asked when they are done."""

    held_out_tokens: Count = 16384


SECTIONS: dict[str, type[Config]] = {
    "Run": RunConfig,
    "Model": ModelConfig,
    "Train": TrainConfig,
    "Data": DataConfig,
    "Equivalence": EquivalenceConfig,
    "Quickstart": QuickstartConfig,
    "Training": TrainingConfig,
    "Checkpoint": CheckpointConfig,
    "Tracking": TrackingConfig,
}

Build = Callable[..., Any]
"""`build(section, scope="")`: the config of a section, with the bindings of a scope over the plain ones."""


class Experiment(Protocol):
    """What an experiment module offers."""

    def resolve(self, build: Build) -> Any:
        """The frozen config of the whole run, from its sections."""
        ...

    def cells(self, config: Any) -> Sequence[dict[str, Any]]:
        """Every cell the run will record."""
        ...

    def run(self, config: Any, directory: RunDirectory) -> Sequence[Record]:
        """Do what is not done yet; returns all records of the run."""
        ...


@dataclass(frozen=True)
class Plan:
    """A config read and checked. `config` is the experiment's own; resolved, it is the run's identity."""

    experiment: Experiment
    name: str
    config: Any
    source: str
    operative: str

    @property
    def run(self) -> str:
        """The run id."""
        return digest(self.resolved)

    @property
    def resolved(self) -> dict[str, Any]:
        return {"experiment": self.name, "config": self.config}


def load_experiment(name: str) -> Experiment:
    """Import the module of an experiment."""
    return cast(Experiment, importlib.import_module(EXPERIMENTS[name]))
