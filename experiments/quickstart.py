"""Train small models on real text, convert their caches, and report which schemes are exact and which are not."""

from collections.abc import Mapping
from dataclasses import dataclass

from experiments import checks, schemes
from experiments.directory import RunDirectory
from experiments.schemes import LENGTHS, measuring, scheme_cells
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from experiments.train import Variant, trained
from slimjax import evaluate
from slimjax.config import Config, ConfigError, DataConfig, EquivalenceConfig
from slimjax.train import trained_model

TITLE = "Which attention caches are exact?"


@dataclass(frozen=True, kw_only=True)
class Quickstart(Config):
    """The whole run."""

    data: DataConfig
    equivalence: EquivalenceConfig
    variants: tuple[Variant, ...]

    def validate(self) -> None:
        measured = max(self.equivalence.length, self.equivalence.prompt_length + self.equivalence.generated)
        for variant in self.variants:
            longest = max(measured, variant.train.length)
            if variant.model.position == "learned" and variant.model.max_length < longest:
                raise ConfigError(
                    f"{variant.name}: learned positions end at max_length = {variant.model.max_length}, "
                    f"the run needs {longest}",
                    ("max_length", "position"),
                    "Model",
                    variant.name,
                    ("Train.length", *LENGTHS),
                )


def resolve(build: Build) -> Quickstart:
    """The run from its sections; a model's name is the scope of its bindings."""
    variants = tuple(
        Variant(name=name, model=build("Model", name), train=build("Train", name))
        for name in build("Quickstart").models
    )
    return Quickstart(data=build("Data"), equivalence=build("Equivalence"), variants=variants)


def units(config: Quickstart) -> list[Unit]:
    """A model each; in it scheme by scheme."""
    return [
        Unit(variant.name, scheme_cells(_shared(variant), variant.model, config.equivalence), variant)
        for variant in config.variants
    ]


def _shared(variant: Variant) -> Cell:
    return {
        "experiment": "quickstart",
        "model": variant.name,
        "position": variant.model.position,
        "steps": variant.train.steps,
        "seed": variant.train.seed,
    }


def forecast(unit: Unit, config: Quickstart) -> Forecast:
    """Of training and of every scheme."""
    return schemes.forecast(unit.cells, unit.data.model, config.equivalence, unit.data.train)


def check(config: Quickstart) -> Mapping[str, str]:
    """Of the text, for every model."""
    corpus = checks.text(config.data)
    for variant in config.variants:
        checks.trainable(corpus, variant.model, variant.train, variant.name)
    checks.measurable(corpus, config.equivalence)
    return checks.named(config.data, corpus)


def prepare(unit: Unit, config: Quickstart, directory: RunDirectory) -> Measure:
    """Train the model and measure it without a cache."""
    corpus = checks.loaded(config.data, directory)
    state = trained(unit.data, corpus, config.data, directory)
    reference = evaluate.prepare(trained_model(unit.data.model, state), corpus, config.equivalence)
    return measuring(reference, config.equivalence)
