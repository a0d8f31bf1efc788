"""The run directory: what a run leaves behind, and how a second run knows what is done.

config.gin      source config, includes in place, overrides below      resolved.json   every value, sorted
operative.gin   what was read, defaults included                       stamp.json      run id, source, versions
metrics.jsonl   a line per logged training step                        records.jsonl   a line per cell
cells.jsonl     a line per cell to be recorded                         models/         trained parameters
log.txt         tracebacks of failed cells
report.html, tables/, plots/                                           result.json     last, by rename: it is done
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import slimjax
from slimjax.records import append_line, read_lines, versions


class Refused(Exception):
    """The run cannot start here; the text is the one line the user sees."""


def source_hash() -> str:
    """sha256 (12 hex) of every Python file of slimjax and experiments."""
    total = hashlib.sha256()
    for folder in (Path(slimjax.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            total.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def write_json(path: Path, data: Any) -> None:
    """Write by rename: the file is whole or absent."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@dataclass(frozen=True)
class RunDirectory:
    """A directory claimed by this process. `run`: the run id."""

    path: Path
    run: str

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is unfinished."""
        path = self.path / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def metric(self, line: Mapping[str, Any]) -> None:
        append_line(self.path / "metrics.jsonl", json.dumps(dict(line)))

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    def log(self, text: str) -> None:
        append_line(self.path / "log.txt", f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}")

    def finish(self, result: Mapping[str, Any]) -> None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.path / "result.json", {"run": self.run, "date": date, **result})


@contextlib.contextmanager
def claim(path: Path, run: str, *, resume: bool, texts: Mapping[str, str]) -> Iterator[RunDirectory]:
    """The directory for this run, locked against a second process while the context is open.

    A run made by other code or other versions, or any run with resume=False, is moved aside to PATH~1, PATH~2, ...:
    nothing is deleted and no result of other code is taken for one of this. texts: files to write, by name.
    Raises Refused if another process holds the directory or if it holds something else than this run.
    """
    stamp = {"run": run, "source": source_hash(), "versions": versions()}
    _check_ours(path)
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"{path}: another process is at work on this run") from None
        _clear(path, stamp, resume)
        write_json(path / "stamp.json", stamp)
        for name, text in texts.items():
            (path / name).write_text(text, encoding="utf-8")
        yield RunDirectory(path, run)


def _check_ours(path: Path) -> None:
    """Raise Refused for a place that holds something else than a run, before anything is written there."""
    if path.exists() and not path.is_dir():
        raise Refused(f"{path}: not a directory")
    others = [child for child in path.iterdir() if child.name != ".lock"] if path.exists() else []
    if others and not (path / "stamp.json").exists():
        raise Refused(f"{path}: not empty and not a run directory")


def _clear(path: Path, stamp: Mapping[str, Any], resume: bool) -> None:
    """Leave in `path` only what this run may go on from."""
    found = [child for child in path.iterdir() if child.name != ".lock"]
    if not found:
        return
    old = json.loads((path / "stamp.json").read_text(encoding="utf-8"))
    if old["run"] != stamp["run"]:
        raise Refused(f"{path}: holds run {old['run']}, this is run {stamp['run']}")
    if resume and old == stamp:
        return
    aside = next(
        place for n in range(1, 10_000) if not (place := path.with_name(f"{path.name}~{n}")).exists()
    )
    aside.mkdir()
    for child in found:
        child.rename(aside / child.name)
    why = "other code or versions made it" if resume else "--no-resume"
    print(f"moved the run found there to {aside} ({why})")
