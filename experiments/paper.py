"""The tables of arXiv 2503.05840 computed from the cost model, and what slimjax's own schemes need on the same models.

Analytic: no seed, no data, no timing; a cell takes milliseconds. A cell with a `method` (or with neither) is a row
of the paper in its units, values; a cell with a `scheme` is a scheme in bytes, one with a `chip` its bound there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.directory import RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, PaperConfig, Unit
from slimjax.config import Config, ConfigError
from slimjax.cost import architectures, paper
from slimjax.cost.architectures import Architecture, architecture
from slimjax.cost.chips import TABLE_3, chip
from slimjax.cost.workload import Workload, schemes_for

TITLE = "Slim attention's tables from formulas"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper(Config):
    """The whole run."""

    paper: PaperConfig


# Table -> (its models, its methods, a row's metrics); a method of "" is a table without any.
Row = Callable[[Architecture, str, int, int], Mapping[str, float]]
TABLES: dict[str, tuple[tuple[Architecture, ...], tuple[str, ...], Row]] = {
    "1": (architectures.TABLE_1, ("",), lambda a, m, b, s: paper.context_memory(a)),
    "2": ((), tuple(paper.COMPLEXITY), lambda a, m, b, s: paper.complexity(a, m, s)),
    "4-5": (architectures.NON_SQUARE, tuple(paper.NON_SQUARE), lambda a, m, b, s: paper.non_square(a, m, s)),
    "6": ((), tuple(paper.ENCODER), lambda a, m, b, s: paper.encoder_options(a, m)),
    "7": (architectures.WHISPER, tuple(paper.ENCODER), lambda a, m, b, s: paper.encoder_caches(a, m, b)),
    "8-9": ((), tuple(paper.COMPLEXITY), lambda a, m, b, s: paper.head_operations(a, m, s)),
    "10": (architectures.TABLE_10, ("",), lambda a, m, b, s: paper.context_memory(a)),
}
BATCHED = ("7",)  # tables whose rows depend on the batch


def resolve(build: Build) -> Paper:
    """The run from its section. Raises ConfigError for unknown models, chips and schemes, or where a table has none."""
    config: PaperConfig = build("Paper")
    try:
        chosen = _models(config)
        for name in config.chips:
            chip(name)
        for a in chosen:
            for text in _schemes(config, a):
                schemes_for(a, text)
    except ValueError as error:
        raise ConfigError(str(error), ("models", "chips", "schemes", "encoder_schemes"), "Paper") from None
    if not chosen and config.table != "3":
        problem = f"table {config.table} names no models of its own: set Paper.models"
        raise ConfigError(problem, ("table", "models"), "Paper")
    return Paper(paper=config)


def units(config: Paper) -> Sequence[Unit]:
    """The paper's rows, then the schemes', model by model."""
    own = config.paper
    found = [Unit("table", tuple(_rows(own)))]
    return found + [Unit(a.name, cells) for a in _models(own) if (cells := tuple(_scheme_cells(own, a)))]


def forecast(unit: Unit, config: Paper) -> Forecast:
    """Nothing is allocated; a scheme that its model cannot use is known already."""
    refused: dict[int, str] = {}
    for index, cell in enumerate(unit.cells):
        try:
            if "scheme" in cell:
                _workload(cell)
        except NotImplementedError as reason:
            refused[index] = str(reason)
    return Forecast(refused=refused)


def prepare(unit: Unit, config: Paper, directory: RunDirectory) -> Measure:
    """No shared work."""
    return measure


def measure(cell: Cell) -> Mapping[str, Any]:
    """A cell's metrics. Raises NotImplementedError for a scheme that its model cannot use."""
    if "scheme" in cell:
        w = _workload(cell)
        return paper.chip_metrics(w, chip(str(cell["chip"]))) if "chip" in cell else paper.scheme_metrics(w)
    if cell["table"] == "3":
        return paper.chip_balance(chip(str(cell["chip"])))
    a = architecture(str(cell["model"]))
    _, _, row = TABLES[str(cell["table"])]
    return row(a, str(cell.get("method")), _number(cell.get("batch")) or 1, _number(cell.get("context")) or 1)


def _workload(cell: Cell) -> Workload:
    a, batch = architecture(str(cell["model"])), int(cell["batch"] or 1)
    return paper.on(a, str(cell["scheme"]), batch, _number(cell.get("context")))


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def _models(config: PaperConfig) -> tuple[Architecture, ...]:
    if config.models:
        return tuple(map(architecture, config.models))
    return TABLES[config.table][0] if config.table in TABLES else ()


def _schemes(config: PaperConfig, a: Architecture) -> tuple[str, ...]:
    return config.encoder_schemes if a.encoder_decoder else config.schemes


def _place(config: PaperConfig, a: Architecture) -> dict[str, Any]:
    """A model's coordinates: its name and dimensions."""
    place = {
        "experiment": "paper",
        "table": config.table,
        "model": a.name,
        "width": a.width,
        "key_width": a.key_width,
        "layers": a.layers,
        "heads": a.heads,
        "context": config.context if config.context is not None else a.context,
    }
    return place | ({"encoder_tokens": a.encoder_tokens} if a.encoder_decoder else {})


def _rows(config: PaperConfig) -> list[Cell]:
    """The cells of the paper's own table."""
    if config.table == "3":
        shown = tuple(map(chip, config.chips)) or TABLE_3
        return [{"experiment": "paper", "table": "3", "chip": found.name} for found in shown]
    _, methods, _ = TABLES[config.table]
    batches: tuple[int | None, ...] = config.batches if config.table in BATCHED else (None,)
    return [
        _place(config, a)
        | ({"method": method} if method else {})
        | ({"batch": batch} if batch is not None else {})
        for a in _models(config)
        for batch in batches
        for method in methods
    ]


def _scheme_cells(config: PaperConfig, a: Architecture) -> list[Cell]:
    """A scheme's cell, then one per chip."""
    cells = []
    for batch in config.batches:
        for text in _schemes(config, a):
            scheme = ",".join(map(str, schemes_for(a, text)))
            cell = _place(config, a) | {"scheme": scheme, "batch": batch}
            cells += [cell, *(cell | {"chip": chip(name).name} for name in config.chips)]
    return cells
