"""Cells of the comparison that another run has measured, for another table: they are recorded as that run did.

A cell but for its study, of the same source, versions and machine, the same model, text and settings, has the same
metrics bit by bit, so that measuring it again would only take time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.compare_settings import CompareConfig
from experiments.directory import RunDirectory, read_json
from experiments.settings import Cell
from slimjax.config import ConfigError, resolved
from slimjax.records import Record, cell_key, provenance, read

MACHINE = ("versions", "platform", "device", "cpus", "xla_flags")


def check_known(grid: CompareConfig) -> None:
    """Raise ConfigError for a folder of `Compare.known` that holds no finished run."""
    for place in grid.known:
        if not (Path(place) / "result.json").is_file():
            raise ConfigError(f"known: {place}: no finished run there", "known", "Compare")


def known_records(config: Any, cells: Sequence[Cell], directory: RunDirectory) -> list[Record]:
    """Of the cells those that the runs of `Compare.known` have measured.

    Provenance is that run's, which `config` names there; `measured_for` is its study.
    """
    here, ours = provenance(config=directory.run), _asked(resolved(config))
    made = {"source": directory.source} | {name: here[name] for name in MACHINE}
    found: dict[str, Record] = {}
    for place in map(Path, config.grid.known):
        theirs = _asked(read_json(place / "resolved.json")["config"])
        for record in read(place / "records.jsonl"):
            model, source = str(record.cell.get("model")), record.provenance
            text = f"text of {model}"
            if (
                record.status == "ok"
                and model in ours
                and ours[model] == theirs.get(model)
                and {name: source.get(name) for name in made} == made
                and source.get("inputs", {}).get(text) == directory.inputs.get(text)
            ):
                found.setdefault(_but_its_study(record.cell), record)
    return [_taken(cell, found[key]) for cell in cells if (key := _but_its_study(cell)) in found]


def _asked(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What decides a model's figures beside the coordinates of its cells, by the model's name."""
    grid = config["grid"]
    return {
        subject["name"]: {
            "subject": subject,
            "tokens": grid["tokens"],
            "calibration": grid["calibration"],
            "problems": grid["problems"] if subject["data"].get("task") else 0,
        }
        for subject in config["subjects"]
    }


def _but_its_study(cell: Cell) -> str:
    return cell_key({name: value for name, value in cell.items() if name != "study"})


def _taken(cell: Cell, record: Record) -> Record:
    return Record(
        cell, record.metrics, provenance={"measured_for": record.cell["study"], **record.provenance}
    )
