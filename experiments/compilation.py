"""Compiled programs are kept on disk, so that a restart, or a cell of a shape seen before, compiles nothing.

They lie in ~/.cache/slimjax/compiled (under XDG_CACHE_HOME where that is set), a folder per kind of
processor, since compiled code asks for its instructions. JAX_COMPILATION_CACHE_DIR names another folder;
JAX_ENABLE_COMPILATION_CACHE=false turns it off. Deleting the folder costs compilation alone.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax

SHORTEST = 0.1  # seconds of compilation worth keeping; jax's own bound, 1, would leave small models out


def keep_compiled() -> Path:
    """Turn the cache on, unless the user has named a folder; returns the folder in use."""
    given = jax.config.values["jax_compilation_cache_dir"]
    if given:
        return Path(given)
    folder = cache_folder() / "compiled" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    return folder


def cache_folder() -> Path:
    """Where slimjax keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimjax"


def _processor() -> str:
    """Architecture, and a digest of the instruction sets where the system tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
