"""Train small models on real text, convert their caches, and report which schemes are exact and which are not."""

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.directory import RunDirectory
from experiments.progress import steps_once
from experiments.settings import Build
from experiments.train import Variant, trained
from slimjax import evaluate
from slimjax.config import (
    Config,
    ConfigError,
    DataConfig,
    EquivalenceConfig,
    resolved,
)
from slimjax.data import load_corpus
from slimjax.records import Record, RecordLog, provenance
from slimjax.report import write_report
from slimjax.scheme import Scheme, parse_scheme
from slimjax.train import trained_model

IDENTITY = "float64"  # the compute dtype whose cells hold the identity error


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
                    f"the run needs {longest}"
                )


def resolve(build: Build) -> Quickstart:
    """The run from its sections; a model's name is the scope of its bindings."""
    variants = tuple(
        Variant(name=name, model=build("Model", name), train=build("Train", name))
        for name in build("Quickstart").models
    )
    return Quickstart(data=build("Data"), equivalence=build("Equivalence"), variants=variants)


def cells(config: Quickstart) -> list[dict[str, Any]]:
    """Model by model, scheme by scheme, float64 (the identity) first."""
    return [cell for variant in config.variants for cell in _cells(variant, config.equivalence)]


def _cells(variant: Variant, equivalence: EquivalenceConfig) -> list[dict[str, Any]]:
    """One cell per scheme and compute dtype."""
    return [
        _cell(variant, parse_scheme(scheme), dtype, equivalence.length)
        for scheme in equivalence.schemes
        for dtype in (IDENTITY, *equivalence.dtypes)
    ]


def _cell(variant: Variant, scheme: Scheme, dtype: str, context: int) -> dict[str, Any]:
    return {
        "experiment": "quickstart",
        "model": variant.name,
        "scheme": str(scheme),
        "basis": scheme.basis,
        "option": scheme.option,
        "extra": scheme.extra,
        "codec": scheme.codec,
        "bits": scheme.bits,
        "group": scheme.group,
        "softmax": scheme.softmax,
        "compute": "float",
        "backend": "reference",
        "position": variant.model.position,
        "heads": variant.model.heads,
        "kv_heads": variant.model.K,
        "head_dim": variant.model.H,
        "width": variant.model.width,
        "steps": variant.train.steps,
        "dtype": dtype,
        "context": context,
        "seed": variant.train.seed,
    }


def run(config: Quickstart, directory: RunDirectory) -> list[Record]:
    """Train what is not trained, measure what is not recorded, write the report; returns all records."""
    log = RecordLog(directory.path / "records.jsonl")
    corpus = load_corpus(config.data)
    for variant in config.variants:
        missing = [cell for cell in _cells(variant, config.equivalence) if cell not in log]
        if missing:
            model = trained_model(variant.model, trained(variant, corpus, directory))
            print(f"{variant.name}: {len(missing)} cells to measure", flush=True)
            reference = evaluate.prepare(model, corpus, config.equivalence)
            for cell in missing:
                log.add(_measured(reference, cell, config.equivalence, directory))
            _report(config, directory, log.records)  # after each model: an interrupted run has a report too
    _report(config, directory, log.records)
    return log.records


def _measured(
    reference: evaluate.Reference,
    cell: dict[str, Any],
    equivalence: EquivalenceConfig,
    directory: RunDirectory,
) -> Record:
    """One cell's record: numbers, or why there are none. A failure must not cost the cells after it."""
    start = time.monotonic()

    def record(**result: Any) -> Record:
        source = provenance(config=directory.run, seed=cell["seed"], seconds=time.monotonic() - start)
        return Record(cell, provenance=source, **result)

    try:
        if cell["dtype"] == IDENTITY:
            return record(metrics=evaluate.identity(reference, cell["scheme"]))
        metrics = evaluate.measure(reference, cell["scheme"], cell["dtype"])
        return record(
            metrics=metrics | {"generated": equivalence.generated, "sequences": equivalence.prompts}
        )
    except NotImplementedError as error:
        return record(status="refused", reason=str(error) or "not implemented")
    except Exception as error:  # noqa: BLE001  recorded, logged, and the run's exit status
        directory.log(f"{cell}\n{traceback.format_exc()}")
        return record(status="failed", reason=" ".join(f"{type(error).__name__}: {error}".split()))


def _report(config: Quickstart, directory: RunDirectory, records: Sequence[Record]) -> None:
    write_report(
        directory.path,
        records,
        title="Which attention caches are exact?",
        config=resolved(config),
        metrics=steps_once(directory.metrics()),
    )
