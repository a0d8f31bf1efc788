"""One case of the TPU matrix for one generation: a row, whatever becomes of the process that compiles it."""

import ast
import functools
import hashlib
import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import slimjax
from slimjax.kernels import tpu_aot
from slimjax.kernels.tpu_cases import Case, Program

Row = dict[str, Any]
# What schedules and temporaries depend on, in slimjax/.
SOURCES = (
    "kernels/tpu/*.py",
    *(f"kernels/{name}.py" for name in ("tiles", "pallas_tpu", "buffer", "combine", "flashq")),
    *(f"cache/{name}.py" for name in ("layout", "tiled", "cache")),
    *(f"attention/{name}.py" for name in ("softmax", "sas")),
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
LIMIT = 600.0  # seconds a program may take
REASON = 400  # characters of a reason that are kept
# Imported once, by the process that all others are forked from. None of it starts a backend.
PRELOADED = ["jax", "jax.experimental.pallas.tpu", "experiments.tpu_row"]


def measure(case: Case, generation: str, *, cycles: bool = False, limit: float = LIMIT) -> Row:
    """The row of a case: compiled, refused, failed or aborted, never an exception of the case's own.

    cycles: also read the schedule of `Program.name`; limit: seconds, after which the process is ended.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slimjax-tpu-") as folder:
        result = _in_process(case, generation, cycles, limit, Path(folder))
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "generation": generation,
        **result,
        "seconds": round(time.monotonic() - began, 2),
        "versions": tpu_aot.versions(),
        "source": kernel_source(),
        "date": datetime.now(UTC).date().isoformat(),
    }


@functools.cache
def kernel_source() -> str:
    """sha256 (12 hex) of what the kernels' modules do, whatever lines of comments and docstrings say."""
    folder, total = Path(slimjax.__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in folder.glob(pattern)):
        code = "\n".join(_code(path.read_text(encoding="utf-8")))
        total.update(f"{path.relative_to(folder).as_posix()}\0{code}\0".encode())
    return total.hexdigest()[:12]


def _code(text: str) -> list[str]:
    """Lines that do something. Not what Python makes of them: that is each version's own."""
    said: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            said.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return [
        line for at, line in lines if at not in said and line.strip() and not line.strip().startswith("#")
    ]


def _in_process(case: Case, generation: str, cycles: bool, limit: float, folder: Path) -> Row:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, case, generation, cycles, folder))
    process.start()
    theirs.close()  # so that its death ends the pipe
    try:
        if not ours.poll(limit):
            return _row("failed", f"not compiled after {limit:.0f} s")
        return ours.recv()
    except EOFError:
        process.join()
        return _row("aborted", _last_words(process.exitcode, folder / "log"))
    finally:
        process.join(1)  # one that has answered ends by itself
        process.kill()
        process.join()
        ours.close()


def _row(status: str, reason: str = "") -> Row:
    # libtpu quotes the whole instruction before it says what is wrong with it.
    plain = re.sub(r", custom_call_target=.*?stack_frame_id=\d+\}", "", " ".join(reason.split()))
    return {"status": status, "reason": plain[:REASON]}


def _last_words(exitcode: int | None, log: Path) -> str:
    """How a process ended, and what it said: its first fatal line, or its last."""
    code = exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    lines = [line.strip() for line in lines if line.strip()]
    fatal = [line for line in lines if line.startswith("F") and line[1:5].isdigit()]
    said = (fatal or lines[-1:] or [""])[0].partition("] ")
    return ": ".join(filter(None, (how, said[2] or said[0])))


# In the process of its own -----------------------------------------------------------------------------------


def _work(pipe: Connection, case: Case, generation: str, cycles: bool, folder: Path) -> None:
    with (folder / "log").open(
        "wb"
    ) as log:  # libtpu is talkative, and its last words are the reason of an abort
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    pipe.send(_measured(case, generation, cycles, folder))
    pipe.close()


def _measured(case: Case, generation: str, cycles: bool, folder: Path) -> Row:
    import jax

    jax.config.update("jax_traceback_filtering", "off")  # `_ours` looks where an error was raised
    dump = folder / "dump"
    try:
        tpu_aot.prepare(dump if cycles else None)
        program = case.build(generation)
        compiled = tpu_aot.compile_for(generation, program.function, *program.specs, donate=program.donate)
        return _row("compiled") | _sizes(program, compiled, generation) | _cycles(program, dump, cycles)
    except NotImplementedError as error:
        return _row("refused", str(error)) if _ours(error, case) else _failed(error)
    except Exception as error:  # noqa: BLE001  whatever jax and libtpu raise is the row's reason
        return _failed(error)


def _failed(error: Exception) -> Row:
    return _row("failed", f"{type(error).__name__}: {error}".rstrip(": "))


def _ours(error: Exception, case: Case) -> bool:
    """Whether this package, or the module that built the case, raised it; jax says "not implemented" as well."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    function = getattr(case.build, "func", case.build)
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] in {
        "slimjax",
        function.__module__.partition(".")[0],
    }


def _sizes(program: Program, compiled: Any, generation: str) -> Row:
    import jax

    given = jax.tree.leaves([program.specs[number] for number in program.donate])
    return {
        "vmem_bytes": tpu_aot.vmem_bytes(compiled),
        "vmem_limit": tpu_aot.vmem_limit(compiled, generation),
        "temporary_bytes": tpu_aot.temporary_bytes(compiled),
        "copied_bytes": tpu_aot.copied_bytes(compiled),
        "cached_bytes": program.cached,
        "donated_bytes": sum(one.size * one.dtype.itemsize for one in given),
        "aliased_bytes": tpu_aot.aliased_bytes(compiled),
    }


def _cycles(program: Program, dump: Path, cycles: bool) -> Row:
    if not (cycles and program.name):
        return {}
    schedule = tpu_aot.scheduled_cycles(dump, program.name)
    return {
        "cycles": schedule.steady(program.running, program.trips),
        "step_cycles": schedule.step,
        "total_cycles": schedule.total,
        "blocks": list(schedule.blocks),
        "loops": [cycles for _, cycles in schedule.loops],
        "trips": program.trips,
        "tiles": program.tiles,
        "step_bytes": program.bytes,
    }
