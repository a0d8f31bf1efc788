"""Units of a run in processes of their own. They measure; the parent alone records.

A worker is handed the frozen config and one unit after the other, never gin's state, and answers with an Outcome a
cell. One that dies, say of memory, costs the cell it was at; the rest of its unit goes on in a new one. Workers
follow their parent into death, and hold a lock that the next run on the directory waits for, so that none
is at work beside it.
"""

import contextlib
import fcntl
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from experiments.compilation import keep_compiled
from experiments.directory import WORKERS, Refused, RunDirectory, source_hash
from experiments.memory import kept_by_children
from experiments.settings import Unit
from experiments.stopping import Terminated, hush_late_writes, withheld
from experiments.sweep import Outcome, Sweep, cells, outcomes
from slimjax.records import Status

TRIES = 3  # times a unit is opened whose process dies of it
PATIENCE = 120.0  # seconds that workers are given to save what they are at
STOPPED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}  # exit codes
CLOSED = 128 + signal.SIGPIPE  # exit code of one that could not say what it had to

OPENED, DONE = "opened", "done"  # what a worker says beside its outcomes; ("refused", reason) ends the run


# In the worker -----------------------------------------------------------------------------------------------


def work(pipe: Connection, module: str, config: Any, directory: RunDirectory) -> None:
    """The whole life of a worker: units in, outcomes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # for what this process starts
    with (directory.path / WORKERS).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        _follow_parent()
        hush_late_writes()
        if source_hash() != directory.source:
            pipe.send(
                ("refused", "the source changed while the run was at work; the same command starts over")
            )
            return
        experiment: Any = importlib.import_module(module)
        keep_compiled()
        try:
            try:
                while (unit := pipe.recv()) is not None:
                    for outcome in outcomes(experiment, unit, config, directory, lambda: pipe.send(OPENED)):
                        pipe.send(outcome)
                    pipe.send(DONE)
            except Refused as error:
                pipe.send(("refused", str(error)))
        except Terminated:
            os._exit(128 + signal.SIGTERM)
        except (EOFError, BrokenPipeError):  # the parent, or who reads the progress, wants nothing more
            os._exit(CLOSED)


def _follow_parent() -> None:
    """End this process the moment its parent ends, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# In the parent -----------------------------------------------------------------------------------------------


class Worker:
    """A process, and what it is at: `left[0]` is its cell, once `opened`."""

    def __init__(
        self, module: str, config: Any, directory: RunDirectory, place: tuple[int, int], *, alone: bool
    ):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, module, config, directory))
        self.place = place  # which of how many workers
        # Ctrl-C is withheld while it starts, too: it cannot ignore one before it has begun.
        keeping = contextlib.nullcontext() if alone else kept_by_children()  # as any process takes times
        with withheld(signal.SIGINT), _on_cores(*place), keeping:
            self.process.start()
        theirs.close()  # so that its death ends the pipe
        self.unit: Unit | None = None
        self.left: list[Any] = []
        self.opened, self.since = False, time.monotonic()

    def take(self, unit: Unit) -> None:
        self.unit, self.left, self.opened, self.since = unit, list(unit.cells), False, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died already: the pipe's end says so
            self.pipe.send(unit)


@contextlib.contextmanager
def _on_cores(place: int, of: int) -> Iterator[None]:
    """What this thread starts has its share of the cores, where there is one for each.

    Libraries start as many threads as they see cores; those of several processes on the same cores wait for each other.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if of > len(cores):
        yield
        return
    os.sched_setaffinity(0, cores[place::of])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def shared_out(unit: Unit, jobs: int) -> list[Unit]:
    """A divisible unit's cells dealt to so many workers, each of which prepares it; any other unit as it is."""
    if not unit.divisible:
        return [unit]
    parts = (unit.cells[index::jobs] for index in range(jobs))
    return [replace(unit, cells=part) for part in parts if part]


class Crew:
    """The workers of a run and the units they have yet to take."""

    def __init__(self, sweep: Sweep, units: Sequence[Unit], jobs: int):
        self.sweep, self.jobs = sweep, jobs
        missing = (left for unit in units if (left := sweep.missing(unit)) is not None)
        self.waiting = deque(part for unit in missing for part in shared_out(unit, jobs))
        self.workers: list[Worker] = []
        self.deaths: Counter[str] = Counter()  # unit -> while it was opened

    def run(self) -> None:
        """Until every cell is recorded. Raises Refused, Terminated, BrokenPipeError where a worker ends so."""
        while self.waiting or any(worker.unit for worker in self.workers):
            self._assign()
            ready = wait([worker.pipe for worker in self.workers])
            for worker in [worker for worker in self.workers if worker.pipe in ready]:
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    self._lost(worker)
                else:
                    self._heard(worker, message)

    def _assign(self) -> None:
        idle = [worker for worker in self.workers if worker.unit is None]
        while self.waiting and (idle or len(self.workers) < self.jobs):
            if idle:
                worker = idle.pop()
            else:
                module = self.sweep.experiment.__name__  # type: ignore[attr-defined]
                place = min(set(range(self.jobs)) - {worker.place[0] for worker in self.workers})
                alone = getattr(self.sweep.experiment, "ALONE", False)
                at = (place, self.jobs)
                worker = Worker(module, self.sweep.config, self.sweep.directory, at, alone=alone)
                self.workers.append(worker)
            unit = self.waiting.popleft()
            print(f"{unit.name}: {cells(len(unit.cells))} to measure", flush=True)
            worker.take(unit)

    def _heard(self, worker: Worker, message: Any) -> None:
        if isinstance(message, Outcome):
            worker.left.pop(0)
            worker.since = time.monotonic()
            self.sweep.add(message)
        elif message == OPENED:
            worker.opened, worker.since = True, time.monotonic()
        elif message == DONE:
            worker.unit = None
            self.sweep.report()
        else:
            raise Refused(message[1])

    def _lost(self, worker: Worker) -> None:
        """A worker died: a row for the cell it was at, the rest of its unit to another."""
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)
        unit, code = worker.unit, worker.process.exitcode or 0
        if code in STOPPED:
            raise Terminated  # as when the machine shuts down: not a result
        if code == CLOSED:
            raise BrokenPipeError
        if unit is None or not worker.left:
            return
        lost = 1
        status, reason = _cause(code)
        if not worker.opened:
            self.deaths[unit.name] += 1
            tries = self.deaths[unit.name]
            lost = len(worker.left) if tries == TRIES else 0
            reason = f"{reason}, {tries} times in a row before its first cell"
        print(f"{unit.name}: {reason}", flush=True)
        for cell in worker.left[:lost]:
            self.sweep.add(Outcome(cell, time.monotonic() - worker.since, status=status, reason=reason))
        if worker.left[lost:]:
            self.waiting.appendleft(replace(unit, cells=tuple(worker.left[lost:])))

    def close(self) -> None:
        """Let go of workers that are done; tell those at work to stop, and wait until they have saved."""
        deadline = time.monotonic() + PATIENCE
        try:
            for worker in self.workers:
                if worker.unit is not None:
                    worker.process.terminate()
                worker.pipe.close()
            for worker in self.workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        finally:  # a second signal ends the waiting
            for worker in self.workers:
                worker.process.kill()
                worker.process.join()


def _cause(code: int) -> tuple[Status, str]:
    """Why a process ended with this exit code, as a status and a reason."""
    if code == -signal.SIGKILL:
        return "out-of-memory", "its process was ended by SIGKILL, as the system does when memory runs out"
    if code < 0:
        return "failed", f"its process was ended by {signal.Signals(-code).name}"
    return "failed", f"its process ended with status {code}"


def run_apart(sweep: Sweep, units: Sequence[Unit], jobs: int) -> None:
    """Every unit in one of `jobs` processes. Whatever ends this ends them all."""
    crew = Crew(sweep, units, jobs)
    try:
        crew.run()
    finally:
        crew.close()
