"""Records: the only source of numbers in tables and plots. One JSON object a line in `records.jsonl`.

A `Record` is one cell of an experiment's grid: its coordinates, what was measured there, whether it worked,
and where it comes from. Names of coordinates and metrics come from ``slimjax.record_names``.
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from slimjax.record_names import CELL, METRICS
from slimjax.scheme import suggest

Status = Literal["ok", "refused", "failed", "out-of-memory"]
STATUSES: tuple[Status, ...] = get_args(Status)


def _check_names(kind: str, names: Iterable[str], registry: Mapping[str, str]) -> None:
    for name in names:
        if name not in registry:
            raise ValueError(f"unknown {kind} {name!r}{suggest(name, registry)}")


def _check_metric(name: str, value: Any) -> None:
    numbers = value if isinstance(value, list | tuple) else [value]
    for number in numbers:
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"metric {name} = {value!r}: expected a finite number or a list of them")


@dataclass(frozen=True)
class Record:
    """One cell of a grid.

    Raises ValueError for a name outside the registries, a metric that is not a finite number (a cell that
    gives one has failed), an unknown status, or a cell that is not ok without a reason.
    """

    cell: Mapping[str, str | int | float | bool | None]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    status: Status = "ok"
    reason: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names("cell coordinate", self.cell, CELL)
        _check_names("metric", self.metrics, METRICS)
        for name, value in self.metrics.items():
            _check_metric(name, value)
        if self.status not in STATUSES:
            raise ValueError(f"status = {self.status!r}: expected one of {', '.join(STATUSES)}")
        if (self.status == "ok") == bool(self.reason):
            raise ValueError(
                f"status = {self.status!r} with reason = {self.reason!r}: ok has none, the others one"
            )

    @property
    def key(self) -> str:
        """Equal for equal cells, whatever the order of their coordinates."""
        return cell_key(self.cell)

    def to_json(self) -> str:
        """One line, without the newline."""
        return json.dumps(asdict(self), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        return cls(**json.loads(line))


def cell_key(cell: Mapping[str, Any]) -> str:
    """The cell as text, equal for equal cells."""
    return json.dumps(dict(cell), sort_keys=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; a torn last line, left by a killed process, is passed over.

    Raises ValueError, with file and line, for any other line that is not JSON.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {line[:60]!r}") from error
    del torn  # what follows the last newline was never finished
    return objects


def read(path: Path) -> list[Record]:
    """The records of a file, in order. Raises ValueError for equal cells and bad lines."""
    records: dict[str, Record] = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            record = Record(**line)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if record.key in records:
            raise ValueError(f"{path}:{number}: a second record of cell {record.key}")
        records[record.key] = record
    return list(records.values())


def append_line(path: Path, text: str, *, sync: bool = True) -> None:
    """Append one line and flush it, over a torn last line if there is one; with ``sync``, to the disk itself.

    Several processes may append to one file: a lock keeps one from taking another's unfinished line for a torn one.
    """
    path.touch()
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.truncate(_whole_lines(file))
        file.seek(0, os.SEEK_END)
        file.write(text.encode() + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _whole_lines(file: BinaryIO) -> int:
    """Where the last whole line ends; looked for from the end, so that a long file costs no more than a short one."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a file of records by rename: it is whole, or as it was."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class RecordLog:
    """The records of a run on disk: refuses equal cells, each record is safe once `add` returns."""

    def __init__(self, path: Path):
        self.path = path
        self.records = read(path)
        self._keys = {record.key for record in self.records}

    def __contains__(self, cell: Mapping[str, Any]) -> bool:
        return cell_key(cell) in self._keys

    def ordered(self, cells: Iterable[Mapping[str, Any]]) -> list[Record]:
        """The records in the order of the cells, whatever the order they were made in."""
        place = {cell_key(cell): number for number, cell in enumerate(cells)}
        return sorted(self.records, key=lambda record: place.get(record.key, len(place)))

    def add(self, record: Record) -> None:
        if record.key in self._keys:
            raise ValueError(f"{self.path}: a second record of cell {record.key}")
        append_line(self.path, record.to_json())
        self._keys.add(record.key)
        self.records.append(record)


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"python": platform.python_version(), **packages}


def _installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or no git: the source hash still identifies the code
    return done.stdout.strip()


def _processor() -> str:
    """The CPU's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


@functools.cache
def _machine() -> dict[str, Any]:
    """What stays the same while this process lives."""
    import jax  # late: reading records must not start an accelerator

    device = jax.devices()[0]
    return {
        "git": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": versions(),
        "platform": platform.platform(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "cpus": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def provenance(
    *, config: str, seed: int | None = None, seconds: float | None = None, packages: Iterable[str] = ()
) -> dict[str, Any]:
    """Where a record comes from.

    config: the run id; seconds: wall time of the cell; packages: those whose versions count beside `versions()`,
    where they are installed.
    """
    machine = _machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine,
        "versions": machine["versions"] | _installed(packages),
        "config": config,
        "seed": seed,
        "seconds": None if seconds is None else round(seconds, 3),
    }
