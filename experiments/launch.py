"""From a checked plan to a finished run directory."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.directory import Refused, RunDirectory, claim
from experiments.settings import Plan
from slimjax.config import canonical_json
from slimjax.records import Record, cell_key


def launch(plan: Plan, path: Path | None, *, resume: bool) -> int:
    """Run in `path`, or in results/EXPERIMENT/RUN_ID; 0, or 1 if any cell failed."""
    texts = {
        "config.gin": plan.source,
        "operative.gin": plan.operative,
        "resolved.json": canonical_json(plan.resolved),
        "cells.jsonl": "".join(cell_key(cell) + "\n" for cell in checked_cells(plan)),
    }
    with claim(
        path or Path("results", plan.name, plan.run), plan.run, resume=resume, texts=texts
    ) as directory:
        return execute(plan, directory)


def checked_cells(plan: Plan) -> list[dict[str, Any]]:
    """Every cell of the run, as records will name them. Raises Refused if two are equal."""
    cells = list(plan.experiment.cells(plan.config))
    keys = [Record(cell).key for cell in cells]
    for cell, key in zip(cells, keys, strict=True):
        if keys.count(key) > 1:
            raise Refused(f"two cells are equal: {cell_key(cell)}")
    return cells


def describe(cells: Sequence[dict[str, Any]]) -> str:
    """The coordinates all cells share, once; then a line per cell with the others."""
    shared = {
        name: value for name, value in cells[0].items() if all(cell.get(name) == value for cell in cells)
    }

    def line(cell: dict[str, Any]) -> str:
        return "  ".join(f"{name}={value}" for name, value in cell.items())

    own = [{name: value for name, value in cell.items() if name not in shared} for cell in cells]
    return "\n".join([f"every cell: {line(shared)}", *map(line, own)])


def execute(plan: Plan, directory: RunDirectory) -> int:
    """Run what is not done yet; 0, or 1 if any cell failed."""
    report = directory.path / "report.html"
    result = directory.result
    if result is None:
        records = plan.experiment.run(plan.config, directory)
        counts = {
            status: sum(record.status == status for record in records)
            for status in ("ok", "refused", "failed")
        }
        result = {"cells": counts, "report": report.name}
        directory.finish(result)
    else:
        print(f"finished on {result['date']} by this code; nothing to do (--no-resume runs it again)")
    failed = result["cells"]["failed"]
    if failed:
        print(f"{failed} cells failed, see {directory.path / 'log.txt'}", file=sys.stderr)
    print(f"report: {report}")
    return 1 if failed else 0
