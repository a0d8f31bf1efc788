"""What every experiment shares: the sections a config may bind and the shape of an experiment module.

An experiment is a module with `TITLE`, `resolve`, `units`, `forecast` and `prepare` (see `Experiment`); adding one is
a module, a section and a line in `EXPERIMENTS`. Everything else, from resuming to the report, is done for it by
`experiments.launch`.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from experiments.bench_settings import DecodeBenchConfig, LayerBenchConfig, TrainBenchConfig, check_models
from experiments.compare_settings import CompareConfig, SyntheticConfig
from experiments.directory import RunDirectory
from experiments.gpu_settings import BreakdownConfig, CeilingsConfig, ParityConfig
from experiments.slim_settings import SlimErrorConfig, SlimRowsConfig, SlimWhisperConfig
from slimjax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    Count,
    DataConfig,
    EquivalenceConfig,
    ModelConfig,
    PositionKind,
    TrackingConfig,
    TrainConfig,
    Whole,
    digest,
)
from slimjax.scheme import suggest

EXPERIMENTS = {
    "quickstart": "experiments.quickstart",
    "train": "experiments.train",
    "equivalence": "experiments.equivalence",
    "ablate": "experiments.ablate",
    "paper": "experiments.paper",
    "train_bench": "experiments.train_bench",
    "decode_bench": "experiments.decode_bench",
    "layer_bench": "experiments.layer_bench",
    "ceilings": "experiments.ceilings",
    "parity": "experiments.parity",
    "breakdown": "experiments.breakdown",
    "slim_whisper": "experiments.slim_whisper",
    "slim_error": "experiments.slim_error",
    "slim_rows": "experiments.slim_rows",
    "reasoning": "experiments.reasoning",
    "compare": "experiments.compare",
    "synthetic": "experiments.synthetic",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Which program reads the other sections."""

    experiment: str = ""

    def validate(self) -> None:
        if not self.experiment:
            names = ", ".join(map(repr, EXPERIMENTS))
            raise ConfigError(
                f"experiment is not bound: expected Run.experiment = one of {names}", "experiment"
            )
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
        check_models(self.models)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(QuickstartConfig):
    """The models that are trained, named as in `Quickstart`, and how much they are asked when they are done."""

    held_out_tokens: Count = 16384


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig(QuickstartConfig):
    """The models that learn `Data.task`, named as in `Quickstart`, and the caches that they answer through."""

    schemes: tuple[str, ...] = ("kv:float32", "kv:int8", "kv:int4", "kv:int2")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # compute dtype
    problems: Count = 500  # none of them trained on
    context: Count = 4096  # tokens of the cache whose bytes are reported, as in `Compare`
    seed: Whole = 0  # of the problems

    def validate(self) -> None:
        super().validate()
        EquivalenceConfig(schemes=self.schemes)


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig(Config):
    """A trained model, and the position schemes that its attention layers are tried under."""

    checkpoint: str = ""  # a folder that training has written
    positions: tuple[PositionKind, ...] = ("none", "rope", "alibi", "t5", "fire", "kerple")  # beside its own
    seed: Whole = 0  # of the position biases it has not trained
    path: str | None = None  # the text it is measured on; None: held out from the one it was trained on

    def validate(self) -> None:
        if not self.checkpoint:
            raise ConfigError(
                "checkpoint is not given: add --set \"Pretrained.checkpoint = 'PATH'\", PATH a folder that "
                "training has written, such as results/train/ID or ID/models/NAME",
                "checkpoint",
            )
        if len(set(self.positions)) < len(self.positions):
            raise ConfigError(f"positions = {self.positions}: expected distinct values", "positions")


@dataclass(frozen=True, kw_only=True)
class AblateConfig(Config):
    """A grid: every combination of the axes' values is a model, trained and measured.

    An axis is `('Section.field', (value, ...))` of the sections Model, Train and Data. The schemes and dtypes of
    Equivalence are measured on each. Several `Train.seed` are one model, with mean and spread.
    """

    axes: tuple[tuple[Any, ...], ...] = ()

    def validate(self) -> None:
        for axis in self.axes:
            values = axis[1] if len(axis) == 2 else None
            if not isinstance(axis[0] if axis else None, str) or not isinstance(values, tuple) or not values:
                raise ConfigError(
                    f"axes: {axis!r}: expected ('Section.field', (value, ...)) with at least one value",
                    "axes",
                )
            if any(value == other for value, other in itertools.combinations(values, 2)):
                raise ConfigError(f"axes: {axis[0]} = {values}: expected distinct values", "axes")
        names = [axis[0] for axis in self.axes]
        if len(set(names)) < len(names):
            raise ConfigError(f"axes: {', '.join(names)}: expected distinct fields", "axes")


@dataclass(frozen=True, kw_only=True)
class PaperConfig(Config):
    """A table of arXiv 2503.05840, and the schemes and chips it is extended by."""

    table: Literal["1", "2", "3", "4-5", "6", "7", "8-9", "10"] = "7"
    models: tuple[str, ...] = ()  # names in `slimjax.cost.architectures`; (): the table's own
    schemes: tuple[str, ...] = ()  # of models without an encoder
    encoder_schemes: tuple[str, ...] = ()  # of models with one: 'cross,self'
    chips: tuple[str, ...] = ()  # names in `slimjax.cost.chips`
    batches: tuple[Count, ...] = (1,)  # sequences decoded together
    context: Count | None = None  # tokens; None: each model's longest

    def validate(self) -> None:
        for name in ("models", "schemes", "encoder_schemes", "chips", "batches"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} = {values}: expected distinct values", name)
        if not self.batches:
            raise ConfigError("batches = (): expected at least one", "batches")


SECTIONS: dict[str, type[Config]] = {
    "Run": RunConfig,
    "Model": ModelConfig,
    "Train": TrainConfig,
    "Data": DataConfig,
    "Equivalence": EquivalenceConfig,
    "Quickstart": QuickstartConfig,
    "Training": TrainingConfig,
    "Checkpoint": CheckpointConfig,
    "Reasoning": ReasoningConfig,
    "Pretrained": PretrainedConfig,
    "Ablate": AblateConfig,
    "Paper": PaperConfig,
    "TrainBench": TrainBenchConfig,
    "DecodeBench": DecodeBenchConfig,
    "LayerBench": LayerBenchConfig,
    "Ceilings": CeilingsConfig,
    "Parity": ParityConfig,
    "Breakdown": BreakdownConfig,
    "SlimWhisper": SlimWhisperConfig,
    "SlimError": SlimErrorConfig,
    "SlimRows": SlimRowsConfig,
    "Compare": CompareConfig,
    "Synthetic": SyntheticConfig,
    "Tracking": TrackingConfig,
}


class Build(Protocol):
    """What a config gives: its sections, checked."""

    bound: Collection[str]
    """What it binds, as 'Section.field' or 'scope/Section.field'."""

    def __call__(self, section: str, scope: str = "") -> Any:
        """The config of a section, with the bindings of a scope over the plain ones."""
        ...


Cell = Mapping[str, str | int | float | bool | None]
"""Coordinates of a record; names from `slimjax.records.CELL`."""

Measure = Callable[[Cell], Mapping[str, Any]]
"""A cell of the unit to its metrics (names from `slimjax.records.METRICS`).

What it raises becomes a row with the reason: NotImplementedError a refused one; a MemoryError, or XLA's
RESOURCE_EXHAUSTED, an out-of-memory one; anything else a failed one, with the traceback in log.txt.
`Refused` alone ends the run: what can be mended (a full disk, a damaged file) is no result.
"""


@dataclass(frozen=True)
class Unit:
    """Cells that share expensive work, such as one trained model. Units do not depend on each other.

    Attributes:
        name: for the eye; unique in the run.
        cells: at least one.
        data: what `prepare` and `forecast` want to know of the unit: frozen and picklable, or None.
        divisible: preparing costs so little beside the cells that under `--jobs` every process takes its share of them.
    """

    name: str
    cells: tuple[Cell, ...]
    data: Any = None
    divisible: bool = False


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is known of a unit before it runs.

    Attributes:
        flops: a lower bound of its work, shared and of all cells (training: 6 per parameter and token).
        bytes: the most that its parameters, optimizer state and caches hold at one time.
        refused: the cells known to be refused, index in `Unit.cells` -> reason.
    """

    flops: float = 0.0
    bytes: int = 0
    refused: Mapping[int, str] = dataclasses.field(default_factory=dict)


class Experiment(Protocol):
    """What an experiment module offers. Its functions run in processes of their own under `--jobs`.

    Beside these it may have `report(config, directory, records)` in place of the general report (called after a
    unit and at the end, with the records in the order of the cells); `ALONE = True` where units at work side
    by side would disturb each other (timings): `--jobs` above 1 is refused then; `PACKAGES`, whose versions its records
    name beside those of every run, where installed; `TABLE`, the metrics of a table that is printed at the end;
    `FITS = True` where a cell that runs out of memory is a result, not a failure; and `check(config)`, called before
    the first unit and by `--dry-run`: it looks at what the run will read, raises ConfigError where that will not do,
    and returns the digests of it by name, for no result to be taken for one of other data; and
    `measured_elsewhere(config, cells, directory)`, the records of those of the cells that another run has measured,
    which are not measured again.
    """

    TITLE: str
    """Of the report."""

    def resolve(self, build: Build) -> Any:
        """The frozen, picklable config of the whole run, from its sections."""
        ...

    def units(self, config: Any) -> Sequence[Unit]:
        """Every cell the run will record, in the order of the report."""
        ...

    def forecast(self, unit: Unit, config: Any) -> Forecast:
        """Build the unit in the abstract (`jax.eval_shape`): no arrays, no training, no data.

        Called for every unit before the first runs; what it raises refuses the run in one line.
        """
        ...

    def prepare(self, unit: Unit, config: Any, directory: RunDirectory) -> Measure:
        """Do the unit's shared work; what it returns is called with each cell that has no record yet, in order.

        What it raises is the row of each of those cells, as if every one had raised it.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """A config read and checked. `config` is the experiment's own; resolved, it is the run's identity."""

    experiment: Experiment
    name: str
    config: Any
    source: str
    operative: str
    fault: Callable[[ConfigError], Exception] = lambda error: error  # with its place in the config

    def checked(self) -> Mapping[str, str]:
        """Digests of what the run will read, by name. Raises `fault` where that will not do."""
        check = getattr(self.experiment, "check", None)
        try:
            return {} if check is None else check(self.config)
        except ConfigError as error:
            raise self.fault(error) from None

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
