"""Compiled programs are kept on disk, so that a restart, or a cell of a shape seen before, compiles nothing.

They lie in ~/.cache/slimjax/compiled (under XDG_CACHE_HOME where that is set), a folder per kind of
processor, since compiled code asks for its instructions. JAX_COMPILATION_CACHE_DIR names another folder;
JAX_ENABLE_COMPILATION_CACHE=false turns it off. Deleting the folder costs compilation alone.
"""

import contextlib
import functools
import hashlib
import math
import os
import platform
import zlib
from pathlib import Path

import jax

SHORTEST = 0.1  # seconds of compilation worth keeping; jax's own bound, 1, would leave small models out

ZLIB = b"x"  # how its streams begin


def keep_compiled() -> Path | None:
    """Turn the cache on, once a process, before anything compiles; returns the folder in use, None where it is off.

    A folder that the user has named is taken as it is.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    given = jax.config.values["jax_compilation_cache_dir"]
    if given:
        return Path(given)
    folder = cache_folder() / "compiled" / _processor()
    drop_torn(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    return folder


def drop_torn(folder: Path) -> None:
    """Delete entries that a killed process left unfinished: jax would warn of each for ever, and write none anew.

    Looks at those written since the last look. zlib's alone: of other compressions jax goes on to warn.
    """
    looked = folder / ".looked"
    since = looked.stat().st_mtime if looked.exists() else 0.0
    folder.mkdir(parents=True, exist_ok=True)
    looked.touch()
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process was faster
            if entry.stat().st_mtime >= since and not _whole(entry.read_bytes()):
                entry.unlink()


def _whole(entry: bytes) -> bool:
    if entry and not entry.startswith(ZLIB):
        return True
    stream = zlib.decompressobj()
    try:
        stream.decompress(entry)
    except zlib.error:
        return False
    return stream.eof


def compile_seconds() -> float:
    """What this process has spent so far on lowering and compiling, or on programs from the disk; tracing is left out.

    Counted from the first call on.
    """
    return math.fsum(_listened())


@functools.cache
def _listened() -> list[float]:
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith(("/jaxpr_to_mlir_module_duration", "/backend_compile_duration")):  # neither nests
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def cache_folder() -> Path:
    """Where slimjax keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimjax"


def _processor() -> str:
    """Architecture, and a digest of the instruction sets where the system tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
