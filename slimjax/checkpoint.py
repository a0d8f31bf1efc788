"""Checkpoints: any pytree of arrays, one folder per step, complete or absent, checked when read back.

A step is written under another name, flushed, and renamed when all of it is on the disk. orbax stores the
arrays; it would cast dtypes silently and read flipped bits without complaint, so a manifest stands beside
them: shape, dtype and digest of every leaf, digest of every file. One process writes to a folder at a time.

step_00000100/      arrays/ (orbax)   manifest.json   manifest.sha256
step_00000100.1/    the same step, saved a second time: it counts, once it is there
.step_.../          unfinished or being deleted; the next save clears it away
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")
_STEP = re.compile(r"step_(\d{8})(?:\.(\d+))?")


def steps(folder: Path | str) -> dict[int, Path]:
    """The folder of every complete step, oldest first; of a step that was saved again, the newest."""
    folder = Path(folder).absolute()
    names = [_STEP.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    found = sorted((int(match[1]), int(match[2] or 0), match[0]) for match in names if match)
    return {step: folder / name for step, _, name in found}


def latest_step(folder: Path | str) -> int | None:
    """The newest complete step in ``folder``; None where there is none."""
    return max(steps(folder), default=None)


def save(folder: Path | str, step: int, tree: Any, *, keep: int | None = None) -> Path:
    """Write ``tree`` as the checkpoint of ``step``, in place of one that is there; returns its folder.

    At every moment, the last that was complete before is complete still, until this one is.

    Args:
        folder, step: where.
        tree: pytree of arrays.
        keep: afterwards, delete all but this many of the newest steps; None: delete none.

    Raises:
        FloatingPointError: a floating-point leaf is not finite everywhere; the message names it.
        OSError: it could not be written; what was saved before is as it was.
    """
    leaves = _named_leaves(tree)
    for name, leaf in leaves.items():
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) and not np.isfinite(leaf).all():
            raise FloatingPointError(f"step {step} is not saved: {name} holds values that are not finite")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    old = steps(folder).get(step)
    final = folder / f"step_{step:08d}"
    if old is not None:
        final = final.with_name(f"{final.name}.{int(old.suffix[1:] or 0) + 1}")
    temporary = final.with_name(f".{final.name}")
    try:
        _write(temporary, leaves)
        temporary.rename(final)
        _flush(folder)
    except (OSError, ValueError, RuntimeError) as error:  # the latter are what orbax makes of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} could not be written: {_cause(error, folder)}") from error
    kept = list(steps(folder).values())[-(keep or 0) :]
    for path in folder.iterdir():
        if _STEP.fullmatch(path.name) and path not in (*kept, final):
            path.rename(path.with_name(f".{path.name}"))  # a half deleted one must not look complete
    _clear(folder)
    return final


def described(folder: Path | str, step: int, *, part: str = "") -> dict[str, Any]:
    """Shape, dtype and sha256 of the leaves of a complete step whose names begin with ``part``, by name.

    Raises ValueError where the manifest is damaged; the arrays are not read.
    """
    leaves = _read_manifest(steps(folder)[step])["leaves"]
    return {name: leaf for name, leaf in leaves.items() if name.startswith(part)}


def restore(folder: Path | str, like: Tree, step: int | None = None, *, part: str = "") -> Tree:
    """The checkpoint of ``step`` (None: the newest) as a tree of the structure of ``like``.

    Args:
        folder, step: where.
        like: pytree of arrays or of ``jax.ShapeDtypeStruct``.
        part: where in the tree that was saved ``like`` stands, such as ".params"; "": it is all of it.

    Raises:
        ValueError: no such step; leaves, shapes or dtypes other than those of ``like``; damage, with the
            file or the leaf that is not what was saved.
    """
    step = latest_step(folder) if step is None else step
    path = steps(folder).get(-1 if step is None else step)
    if path is None:
        raise ValueError(f"{folder}: no checkpoint{'' if step is None else f' of step {step}'}")
    manifest = _read_manifest(path)
    stored = list(manifest["leaves"])
    saved = {name: leaf for name, leaf in manifest["leaves"].items() if name.startswith(part)}
    wanted = {part + name: leaf for name, leaf in _shapes(like).items()}
    if saved.keys() != wanted.keys():
        raise ValueError(f"{path}: other leaves than expected: {sorted(saved.keys() ^ wanted.keys())}")
    for name, (shape, dtype) in wanted.items():
        if saved[name]["shape"] != shape or saved[name]["dtype"] != dtype:
            found = f"{saved[name]['dtype']}{saved[name]['shape']}"
            raise ValueError(f"{path}: {name} is {found}, expected {dtype}{shape}")
    damaged = [
        name
        for name, digest in manifest["files"].items()
        if not (path / name).is_file() or _sha256(path / name) != digest
    ]
    if damaged:
        raise _damage(path, f"{', '.join(damaged)}{_suspects(path, manifest['leaves'])}")
    arrays = _read(path, stored, list(wanted))
    for name, leaf in arrays.items():
        if _describe(leaf) != saved[name]:
            raise _damage(path, name)
    return jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(arrays[name]) for name in wanted])


def _cause(error: Exception, folder: Path) -> str:
    """Why a save failed, in a few words: orbax says it at length, or after a first failure says something else."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number).lower() in text.lower():
            return os.strerror(number)
    free = shutil.disk_usage(folder).free
    return f"{text[:120]}{'...' * (len(text) > 120)} ({free >> 20} MiB are free there)"


def _damage(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged: {what}: not what was saved; delete it to go on from an older step")


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.PyTreeCheckpointer]:
    """orbax, which raises what goes wrong, without the pages it logs of it besides."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    if hook is not _unraisable:
        _unraisable.hook, sys.unraisablehook = hook, _unraisable
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            yield checkpointer
        sys.unraisablehook = hook
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _let_go(error: BaseException) -> None:
    """End the other writes of a save now: those that the traceback keeps complain when the interpreter ends."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()


class _Unraisable:
    """Passes over what the threads of a save say that failed: they come back to an event loop that orbax has closed.

    They do so later, so it stays in place after a failure.
    """

    hook: Callable[[Any], object] = sys.__unraisablehook__

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self.hook(unraisable)


_unraisable = _Unraisable()


def _write(folder: Path, leaves: dict[str, np.ndarray]) -> None:
    """Arrays, manifest and the manifest's digest, all on the disk when this returns."""
    folder.mkdir()
    with _orbax() as checkpointer:
        checkpointer.save(folder / "arrays", leaves)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {
        "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
        "files": {path.relative_to(folder).as_posix(): _sha256(path) for path in files},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    # `sha256sum -c` reads it too
    (folder / "manifest.sha256").write_text(f"{_sha256(folder / 'manifest.json')}  manifest.json\n")
    for path in (folder, *folder.rglob("*")):
        _flush(path)


def _read(path: Path, names: list[str], wanted: list[str]) -> dict[str, np.ndarray]:
    """The ``wanted`` ones of all arrays, ``names``, as orbax finds them."""
    item = {name: 0 if name in wanted else ocp.PLACEHOLDER for name in names}
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _orbax() as checkpointer:
        found = checkpointer.restore(path / "arrays", item=item, restore_args=restore_args)
    return {name: np.asarray(found[name]) for name in wanted}


def _read_manifest(path: Path) -> dict[str, Any]:
    file, digest = path / "manifest.json", path / "manifest.sha256"
    for part in (file, digest):
        if not part.is_file():
            raise _damage(path, f"{part.name} is missing")
    if digest.read_bytes() != f"{_sha256(file)}  {file.name}\n".encode():
        raise _damage(path, f"{file.name} or {digest.name}")
    return json.loads(file.read_text())


def _suspects(path: Path, saved: dict[str, Any]) -> str:
    """Which leaves a damaged file touches, read one by one."""

    def wrong(name: str) -> bool:
        try:
            return _describe(_read(path, list(saved), [name])[name]) != saved[name]
        except Exception:  # noqa: BLE001  whatever orbax and its parsers make of damaged bytes
            return True

    found = [name for name in saved if wrong(name)]
    which = "all leaves" if len(found) == len(saved) else f"leaf {', '.join(found)}"
    return f" ({which})" if found else ""


def _clear(folder: Path) -> None:
    """Delete what an interrupted save, or an interrupted deletion, left."""
    for path in folder.iterdir():
        if path.name.startswith(".step_"):
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Leaves on the host by their path in the tree, in the tree's order."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _shapes(tree: Any) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every leaf by its path, nothing moved to the host."""
    return {
        jax.tree_util.keystr(path): (list(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(leaf: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
