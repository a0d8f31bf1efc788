"""From a checked plan to a finished run directory."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experiments.compilation import keep_compiled
from experiments.directory import Refused, RunDirectory, claim
from experiments.memory import keep_memory
from experiments.settings import Cell, Plan, Unit
from experiments.sweep import Sweep, cells, run_here, set_aside
from experiments.worker import run_apart
from slimjax.config import canonical_json
from slimjax.records import STATUSES, Record, cell_key, read, write_records
from slimjax.report.generic import brief_table
from slimjax.report.runs import pace
from slimjax.report.tables import aligned, markdown


def launch(
    plan: Plan,
    path: Path | None,
    *,
    resume: bool = True,
    reuse: bool = False,
    retry: bool = False,
    jobs: int = 0,
    inputs: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run in `path`, or in results/EXPERIMENT/RUN_ID; 0, or 1 if any cell failed.

    retry: measure again what failed or ran out of memory; jobs: processes at work on units at a time, 0: this one
    does it all; inputs: digests of what the run reads, see `Plan.checked`.
    """
    units = checked_units(plan)
    if jobs > 1 and getattr(plan.experiment, "ALONE", False):
        raise Refused(f"{plan.name} takes times, which --jobs {jobs} would disturb; at most --jobs 1")
    texts = {
        "config.gin": plan.source,
        "operative.gin": plan.operative,
        "resolved.json": canonical_json(plan.resolved),
        "cells.jsonl": "".join(cell_key(cell) + "\n" for cell in cells_of(units)),
    }
    path = path or Path("results", plan.name, plan.run)
    with claim(path, plan.run, resume=resume, reuse=reuse, texts=texts, inputs=inputs) as directory:
        if retry and (count := set_aside(directory.path)):
            print(f"{cells(count)} that failed before {'is' if count == 1 else 'are'} measured again")
        return execute(plan, units, directory, jobs)


def cells_of(units: Sequence[Unit]) -> list[Cell]:
    """Every cell, unit by unit."""
    return [cell for unit in units for cell in unit.cells]


def checked_units(plan: Plan) -> list[Unit]:
    """Every unit of the run. Raises Refused if two cells, or the names of two units, are equal."""
    units = list(plan.experiment.units(plan.config))
    keys = Counter(Record(cell).key for cell in cells_of(units))
    for key, count in keys.items():
        if count > 1:
            raise Refused(f"two cells are equal: {key}")
    for name, count in Counter(unit.name for unit in units).items():
        if count > 1:
            raise Refused(f"two units are called {name}")
    return units


def execute(plan: Plan, units: Sequence[Unit], directory: RunDirectory, jobs: int) -> int:
    """Run what is not done yet; 0, or 1 if any cell failed. An experiment with FITS has a full memory for a result."""
    result = directory.result
    sweep = None
    if result is None:
        if not getattr(plan.experiment, "ALONE", False):  # times are taken as any process takes them
            keep_memory()
        print(f"compiled programs: {keep_compiled() or 'not kept'}", flush=True)
        sweep = Sweep(plan.experiment, plan.config, units, directory, jobs)
        if count := sweep.take_over():
            print(f"{cells(count)} taken over as other runs measured {'it' if count == 1 else 'them'}")
        if jobs:
            run_apart(sweep, units, jobs)
        else:
            run_here(sweep, units)
        sweep.report(last=True)
        counts = {s: sum(record.status == s for record in sweep.log.records) for s in STATUSES}
        write_records(sweep.log.path, sweep.log.ordered(sweep.cells))
        result = {"cells": counts, "report": "report.html", "sweep": sweep.summary()}
        if sweep.retried:
            result["retried"] = len(sweep.retried)
        directory.finish(result)
    else:
        _already(plan, units, directory, result)
    failed, large = result["cells"]["failed"], result["cells"].get("out-of-memory", 0)
    if getattr(plan.experiment, "FITS", False):
        if large:
            print(f"{cells(large)} did not fit in memory")
    else:
        failed += large
    if failed:
        print(f"{cells(failed)} failed, see {directory.path / 'log.txt'}", file=sys.stderr)
    if sweep and sweep.measured:
        print(pace(sweep.summary()))
    if shown := getattr(plan.experiment, "TABLE", ()):
        print(aligned(markdown(brief_table(read(directory.path / "records.jsonl"), shown))))
    print(f"report: {directory.path / 'report.html'}")
    return 1 if failed else 0


def _already(plan: Plan, units: Sequence[Unit], directory: RunDirectory, result: dict[str, Any]) -> None:
    """What there is to do for a finished run: nothing, unless other code made it, whose records are reported anew."""
    if directory.reused and result.get("reused") != list(directory.reused):
        Sweep(plan.experiment, plan.config, units, directory).report(last=True)
        directory.finish(result)
        print(
            f"finished on {result['date']} by other code, versions or data, accepted; the report is made anew"
        )
    else:
        print(f"finished on {result['date']} by this code; nothing to do (--no-resume runs it again)")
