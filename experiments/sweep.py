"""The cells of a run, one after the other: measured once each, recorded whatever happens, reported on the way."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.compilation import compile_seconds
from experiments.directory import Refused, RunDirectory
from experiments.progress import clock, steps_once
from experiments.settings import Cell, Experiment, Unit
from slimjax.config import resolved
from slimjax.records import (
    Record,
    RecordLog,
    Status,
    append_line,
    cell_key,
    provenance,
    read,
    read_lines,
    write_records,
)
from slimjax.report import write_report

RETRIED = "retried.jsonl"  # the rows that --retry took out of the records
EVERY = 10.0  # seconds between two progress lines


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: the part of its record that only the process that measured it knows."""

    cell: Cell
    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    status: Status = "ok"
    reason: str = ""
    compile_seconds: float = 0.0  # since the outcome before it


def outcomes(
    experiment: Experiment,
    unit: Unit,
    config: Any,
    directory: RunDirectory,
    opened: Callable[[], object] = lambda: None,
) -> Iterator[Outcome]:
    """Open the unit and measure its cells in order. A failure costs its own cell, one of `prepare` all of them.

    `opened` is called in between. Raises Refused, KeyboardInterrupt, Terminated, and BrokenPipeError where nobody
    reads the progress any more: no result, the same command goes on.
    """
    measure, failure, start = None, None, time.monotonic()
    compiled = compile_seconds()
    try:
        measure = experiment.prepare(unit, config, directory)
    except (Refused, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001  recorded, logged, and the run's exit status
        failure = _failure(error, f"{unit.name}: {describe_cell(unit.cells[0])} and later", directory)
    opened()
    for cell in unit.cells:
        if failure is not None or measure is None:
            status, reason = failure or ("failed", "not opened")
            yield Outcome(cell, time.monotonic() - start, status=status, reason=reason)
            continue
        start = time.monotonic()
        try:
            metrics = measure(cell)
            Record(cell, metrics)  # a name or a number that no record takes is this cell's failure
            outcome = Outcome(cell, time.monotonic() - start, metrics=dict(metrics))
        except (Refused, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001  as above
            status, reason = _failure(error, f"{unit.name}: {describe_cell(cell)}", directory)
            outcome = Outcome(cell, time.monotonic() - start, status=status, reason=reason)
        spent = compile_seconds() - compiled
        compiled += spent
        yield replace(outcome, compile_seconds=spent)


def _failure(error: Exception, where: str, directory: RunDirectory) -> tuple[Status, str]:
    """Status and reason of what an exception cost; anything but a refusal goes to the log."""
    reason = " ".join(str(error).split())
    if isinstance(error, NotImplementedError):
        return "refused", reason or "not implemented"
    directory.log(f"{where}\n{''.join(traceback.format_exception(error))}")
    memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason
    return "out-of-memory" if memory else "failed", f"{type(error).__name__}: {reason}".rstrip(": ")


def describe_cell(cell: Cell) -> str:
    """Coordinates in a line."""
    return "  ".join(f"{name}={value}" for name, value in cell.items())


def cells(count: int) -> str:
    """So many of them."""
    return f"{count} cell{'' if count == 1 else 's'}"


def set_aside(folder: Path) -> int:
    """Take what failed or ran out of memory out of a run's records, to be measured again; how many those are.

    They are kept in retried.jsonl, and the rows that replace them name them.
    """
    path = folder / "records.jsonl"
    records = read(path)
    again = [record for record in records if record.status in ("failed", "out-of-memory")]
    if again:
        for record in again:
            append_line(folder / RETRIED, record.to_json())
        (folder / "result.json").unlink(missing_ok=True)
        write_records(path, [record for record in records if record not in again])
    return len(again)


def retried(folder: Path) -> dict[str, list[dict[str, str]]]:
    """What became of each cell the times before, by its key."""
    found: dict[str, list[dict[str, str]]] = {}
    for line in read_lines(folder / RETRIED):
        before = {
            "status": line["status"],
            "reason": line["reason"],
            "date": line["provenance"].get("date", ""),
        }
        found.setdefault(cell_key(line["cell"]), []).append(before)
    return found


class Sweep:
    """The bookkeeping of a run, in the one process that writes its records."""

    def __init__(
        self,
        experiment: Experiment,
        config: Any,
        units: Sequence[Unit],
        directory: RunDirectory,
        jobs: int = 0,
    ):
        self.experiment, self.config, self.directory, self.jobs = experiment, config, directory, jobs
        self.cells = [cell for unit in units for cell in unit.cells]
        self.log = RecordLog(directory.path / "records.jsonl")
        self.retried = retried(directory.path)
        self.begun = self.newest = self._shown = time.monotonic()  # the second: when the last cell was added
        self.measured = 0  # cells, by this process and its workers
        self.compiling = 0.0  # seconds of theirs together
        self._reported, self._cost = -1, 0.0  # records in the last report, and the seconds it took

    def missing(self, unit: Unit) -> Unit | None:
        """The unit with the cells that have no record yet; None where all have."""
        left = tuple(cell for cell in unit.cells if cell not in self.log)
        return replace(unit, cells=left) if left else None

    def take_over(self) -> int:
        """Record the cells that other runs have measured, as the experiment finds them; how many those are."""
        find = getattr(self.experiment, "measured_elsewhere", None)
        missing = [cell for cell in self.cells if cell not in self.log]
        found = find(self.config, missing, self.directory) if find and missing else []
        for record in found:
            self.log.add(record)
        return len(found)

    def add(self, outcome: Outcome) -> None:
        """Record a cell; it is safe on the disk when this returns."""
        seed = outcome.cell.get("seed")
        source = provenance(
            config=self.directory.run,
            seed=seed if isinstance(seed, int) else None,
            seconds=outcome.seconds,
            packages=getattr(self.experiment, "PACKAGES", ()),
        )
        made = {"source": self.directory.source, "inputs": dict(self.directory.inputs), **source}
        if before := self.retried.get(cell_key(outcome.cell)):
            made["retried"] = before
        self.log.add(Record(outcome.cell, outcome.metrics, outcome.status, outcome.reason, made))
        self.measured += 1
        self.compiling += outcome.compile_seconds
        self.newest = time.monotonic()
        self._progress()

    def _progress(self) -> None:
        now, done, total = time.monotonic(), len(self.log.records), len(self.cells)
        if now - self._shown < EVERY and done < total:
            return
        self._shown, spent = now, now - self.begun
        left = spent / self.measured * (total - done)
        print(
            f"cells {done}/{total}  {60 * self.measured / spent:.3g} a minute  {clock(left)} left", flush=True
        )

    def report(self, *, last: bool = False) -> None:
        """Write the report of what is recorded; not the last, where reporting would take over a tenth of the time."""
        start = time.monotonic()
        if not last and (len(self.log.records) == self._reported or start - self.begun < 10 * self._cost):
            return
        records = self.log.ordered(self.cells)
        custom = getattr(self.experiment, "report", None)
        if custom is not None:
            custom(self.config, self.directory, records)
        else:
            write_report(
                self.directory.path,
                records,
                title=self.experiment.TITLE,
                config=resolved(self.config),
                metrics=steps_once(self.directory.metrics()),
                planned=self.cells,
                sweep=self.summary() or (self.directory.result or {}).get("sweep", {}),
            )
        self._reported = len(records)
        self._cost += time.monotonic() - start

    def summary(self) -> dict[str, Any]:
        """How fast this process and its workers went, for result.json; empty where nothing was left to measure."""
        if not self.measured:
            return {}
        seconds = self.newest - self.begun
        return {
            "cells": self.measured,
            "seconds": round(seconds, 3),
            "cells_per_minute": round(60 * self.measured / seconds, 3),
            "compile_seconds": round(self.compiling, 3),
            "jobs": self.jobs,
        }


def run_here(sweep: Sweep, units: Sequence[Unit]) -> None:
    """Every unit in this process."""
    for unit in units:
        if (left := sweep.missing(unit)) is None:
            continue
        print(f"{unit.name}: {cells(len(left.cells))} to measure", flush=True)
        for outcome in outcomes(sweep.experiment, left, sweep.config, sweep.directory):
            sweep.add(outcome)
        sweep.report()
