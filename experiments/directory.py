"""The run directory: what a run leaves behind, and how a second run knows what is done.

config.gin      source config, includes in place, overrides below      resolved.json   every value, sorted
operative.gin   what was read, defaults included                       stamp.json      run id, source, versions, inputs
metrics.jsonl   a line per training step                               records.jsonl   a line per cell
cells.jsonl     a line per cell to be recorded                         retried.jsonl   rows that --retry made anew
models/         trained parameters
log.txt         tracebacks of failed cells                             .lock, .workers who is at work
report.html, tables/, plots/                                           result.json     last, by rename: it is done

A line of metrics.jsonl is flushed before the next step. Every restart of a model's training writes a line
`{"event": "resume", "model": NAME, "step": N}` there, before its first step: it goes on from the checkpoint of step N,
0 where there was none yet. result.json has the run id, source and versions of stamp.json, too. Where a run goes on from
what other code or versions made (--reuse), `reused` in both names those.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import slimjax
from slimjax.records import append_line, read_lines, versions

LOCK, WORKERS = ".lock", ".workers"  # held by the process that records, shared by those that measure for it
BEGUN = "stamp.part"  # all that is left of a run that was killed as it began
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk, or a quota, makes of a write
PATIENCE = 30.0  # seconds for workers of a run whose parent died to follow it


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


def write_text(path: Path, text: str) -> None:
    """Write by rename: the file is whole, or as it was."""
    part = path.with_suffix(".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write by rename, as `write_text` does."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class RunDirectory:
    """A directory claimed by a process.

    run: the run id; source: the hash of its code; inputs: digests of what it reads, by name; reused: see `claim`.
    """

    path: Path
    run: str
    source: str = ""
    reused: tuple[Mapping[str, Any], ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is unfinished."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None

    def metric(self, line: Mapping[str, Any], *, sync: bool = True) -> None:
        append_line(self.path / "metrics.jsonl", json.dumps(dict(line)), sync=sync)

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    def log(self, text: str) -> None:
        append_line(self.path / "log.txt", f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json: the run is done, by this source and these versions, as stamp.json has them."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        code = {"source": self.source, "versions": versions()}
        reused = {"reused": list(self.reused)} if self.reused else {}
        write_json(self.path / "result.json", {"run": self.run, "date": date, **result, **code, **reused})


@contextlib.contextmanager
def claim(
    path: Path,
    run: str,
    *,
    resume: bool,
    texts: Mapping[str, str],
    reuse: bool = False,
    inputs: Mapping[str, str] = types.MappingProxyType({}),
) -> Iterator[RunDirectory]:
    """The directory for this run, locked against a second process while the context is open.

    A run made by other code or versions or of other inputs, or any run with resume=False, is moved aside to PATH~1,
    PATH~2, ...: nothing is deleted and no result of other code is taken for one of this. With `reuse` it is gone on
    with, and its source hash, versions and inputs are kept in `RunDirectory.reused`. texts: files to write, by name.
    Raises Refused if another process holds the directory, if it holds something else than this run, or if nothing
    can be written there; a full disk remains the OSError it is.
    """
    stamp = {"run": run, "source": source_hash(), "versions": versions(), "inputs": dict(inputs)}
    with contextlib.ExitStack() as held:
        with _refusing(path):
            _check_ours(path)
            path.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((path / LOCK).open("w"))
            workers = held.enter_context((path / WORKERS).open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"{path}: another process is at work on this run") from None
            _await_workers(workers, path)
            reused = _clear(path, stamp, resume, reuse)
            write_json(path / "stamp.json", stamp | ({"reused": reused} if reused else {}))
            for name, text in texts.items():
                if not (path / name).exists() or (path / name).read_bytes() != text.encode():
                    write_text(path / name, text)
        yield RunDirectory(path, run, source_hash(), tuple(reused), dict(inputs))


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Make of a place that cannot be written to a Refused; what is mended without another place stays as it is."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK:
            raise
        where = error.filename or path
        raise Refused(f"{path}: cannot hold a run: {where}: {error.strerror}") from error


def _await_workers(file: IO[str], path: Path) -> None:
    """Wait until no worker of an earlier run is left; they end when its process does."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fcntl.flock(file, fcntl.LOCK_UN)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Refused(f"{path}: processes of an earlier run are still at work there") from None
            time.sleep(0.05)


def _check_ours(path: Path) -> None:
    """Raise Refused for a place that holds something else than a run, before anything is written there."""
    if path.exists() and not path.is_dir():
        raise Refused(f"{path}: not a directory")
    others = _contents(path) if path.exists() else []
    if others and not (path / "stamp.json").exists():
        raise Refused(f"{path}: not empty and not a run directory")


def _contents(path: Path) -> list[Path]:
    return [child for child in path.iterdir() if child.name not in (LOCK, WORKERS, BEGUN)]


def _clear(path: Path, stamp: Mapping[str, Any], resume: bool, reuse: bool) -> list[dict[str, Any]]:
    """Leave in `path` only what this run may go on from; returns whose results, beside its own, it accepts."""
    found = _contents(path)
    if not found:
        return []
    old: dict[str, Any] = {"inputs": {}} | _read_stamp(path / "stamp.json")
    if old["run"] != stamp["run"]:
        raise Refused(f"{path}: holds run {old['run']}, this is run {stamp['run']}")
    reused = old.pop("reused", [])
    if resume and old == stamp:
        return reused
    if resume and reuse:
        other = {name: old[name] for name in ("source", "versions", "inputs")}
        print(f"goes on with what {_others(old, stamp)} made there: source {other['source']}")
        return [*reused, *([other] if other not in reused else [])]
    aside = next(
        place for n in range(1, 10_000) if not (place := path.with_name(f"{path.name}~{n}")).exists()
    )
    aside.mkdir()
    for child in sorted(
        found, key=lambda child: child.name == "stamp.json"
    ):  # last: with it the rest is a run's
        child.rename(aside / child.name)
    why = f"{_others(old, stamp)} made it; --reuse goes on with it" if resume else "--no-resume"
    print(f"moved the run found there to {aside} ({why})")
    return []


def _others(old: Mapping[str, Any], stamp: Mapping[str, Any]) -> str:
    """What made a run, where it is not what would make this one."""
    code = any(old[name] != stamp[name] for name in ("source", "versions"))
    other = [name for name, digest in stamp["inputs"].items() if old["inputs"].get(name) != digest]
    return " and ".join(["other code or versions"] * code + [f"another {name}" for name in other]) or "others"


def _read_stamp(path: Path) -> dict[str, Any]:
    """What is said there of the run. Raises Refused for a file that says something else."""
    try:
        stamp = read_json(path)
    except ValueError:
        stamp = None
    if not isinstance(stamp, dict) or not {"run", "source", "versions"} <= stamp.keys():
        raise Refused(
            f"{path}: damaged, expected run, source and versions; move the directory or name another"
        )
    return stamp
