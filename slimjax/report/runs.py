"""Runs on disk, as reports read them: a run directory, or a file of records alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimjax.records import Record, read, read_lines
from slimjax.report.samples import join, with_planned


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    planned: its cells, where known; sweep: how fast they were measured; config, metrics, stamp: empty where not kept.
    """

    name: str
    records: Sequence[Record]
    metrics: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    planned: Sequence[Mapping[str, Any]] = ()
    stamp: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Any] = field(default_factory=dict)


def load(path: Path) -> Run:
    """A run directory or a file of records. A run still at work can be read: a torn last line is passed over.

    Raises ValueError, naming the file, if there are no records or if a line is no record.
    """
    folder, file = (path, path / "records.jsonl") if path.is_dir() else (None, path)
    if not file.is_file():
        missing = "not a run directory, it has no records.jsonl" if folder else "no such file or directory"
        raise ValueError(f"{path}: {missing}")
    records, name = read(file), str(path)
    if not records:
        raise ValueError(f"{file}: no records")
    if folder is None:
        return Run(name, records)
    plan = _json(folder / "resolved.json")
    return Run(
        name,
        records,
        metrics=read_lines(folder / "metrics.jsonl"),
        config=plan.get("config", plan),
        planned=read_lines(folder / "cells.jsonl"),
        stamp=_json(folder / "stamp.json"),
        sweep=_json(folder / "result.json").get("sweep", {}),
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def pace(sweep: Mapping[str, Any]) -> str:
    """How fast the cells of a run were measured, `sweep` of its result.json; empty where that is not known."""
    if not sweep:
        return ""
    cells = f"{sweep['cells']} cell{'' if sweep['cells'] == 1 else 's'}"
    jobs = f" with {sweep['jobs']} processes" if sweep["jobs"] > 1 else ""
    compiling = f" ({sweep['compile_seconds']:.0f} s of it compiling)" if "compile_seconds" in sweep else ""
    return f"{cells} in {sweep['seconds']:.0f} s{jobs}{compiling}, {sweep['cells_per_minute']:.3g} a minute"


def joined(runs: Sequence[Run]) -> Run:
    """Several runs as one, its config and loss lines told apart by the run's name. Raises ValueError, as `join`."""
    if len(runs) == 1:
        return runs[0]
    names = short_names([run.name for run in runs])
    named = list(zip(names, runs, strict=True))
    return Run(
        " + ".join(names),
        join([(run.name, run.records) for run in runs]),
        metrics=[{**line, "run": name} for name, run in named for line in run.metrics],
        config={name: dict(run.config) for name, run in named if run.config},
        planned=[
            cell for run in runs for cell in (run.planned or [dict(record.cell) for record in run.records])
        ],
    )


def all_records(run: Run) -> list[Record]:
    """The run's records and, empty, the cells it has not come to."""
    return with_planned(run.records, run.planned) if run.planned else list(run.records)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested JSON value as {"a.b[0].c": leaf}; an item that has a name goes by it: "variants.base.width"."""
    if isinstance(value, Mapping):
        items = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        items = [
            (f"{prefix}.{item['name']}" if "name" in item else f"{prefix}[{i}]", item)
            for i, item in enumerate(value)
        ]
    else:
        return {prefix: value}
    return {name: leaf for key, item in items for name, leaf in flatten(item, key).items()}
