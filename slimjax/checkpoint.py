"""Checkpoints: any pytree of arrays, one folder per step, complete or absent, checked when read back.

A step is written under another name and renamed when all of it is on the disk. orbax stores the arrays;
it would cast dtypes silently and read flipped bits without complaint, so a manifest of shapes, dtypes and
digests stands beside them.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")
_STEP = re.compile(r"step_(\d{8})")


def latest_step(folder: Path | str) -> int | None:
    """The newest complete step in ``folder``; None where there is none."""
    folder = Path(folder)
    names = [_STEP.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(match[1]) for match in names if match), default=None)


def save(folder: Path | str, step: int, tree: Any) -> Path:
    """Write ``tree`` as the checkpoint of ``step``, in place of one that is there; returns its folder.

    Raises:
        ValueError: a floating-point leaf is not finite everywhere; the message names it.
    """
    leaves = _named_leaves(tree)
    for name, leaf in leaves.items():
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) and not np.isfinite(leaf).all():
            raise ValueError(f"step {step} is not saved: {name} holds values that are not finite")
    final = Path(folder).absolute() / f"step_{step:08d}"
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(temporary / "arrays", leaves)
    manifest = {name: _describe(leaf) for name, leaf in leaves.items()}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final


def restore(folder: Path | str, like: Tree, step: int | None = None) -> Tree:
    """The checkpoint of ``step`` (None: the newest) as a tree of the structure of ``like``.

    Raises:
        ValueError: no such step; leaves, shapes or dtypes other than those of ``like``; damaged data.
    """
    step = latest_step(folder) if step is None else step
    path = Path(folder).absolute() / f"step_{step or 0:08d}"
    if step is None or not path.is_dir():
        raise ValueError(f"{folder}: no checkpoint{'' if step is None else f' of step {step}'}")
    manifest = json.loads((path / "manifest.json").read_text())
    wanted = _named_leaves(like)
    if manifest.keys() != wanted.keys():
        raise ValueError(f"{path}: other leaves than expected: {sorted(manifest.keys() ^ wanted.keys())}")
    for name, leaf in wanted.items():
        saved, expected = manifest[name], _describe(leaf)
        if any(saved[key] != expected[key] for key in ("shape", "dtype")):
            raise ValueError(f"{path}: {name} is {saved['dtype']}{saved['shape']}, expected {expected}")
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(path / "arrays", restore_args=restore_args)
    for name, leaf in found.items():
        if _describe(np.asarray(leaf)) != manifest[name]:
            raise ValueError(f"{path}: {name} is damaged: it is not what was saved")
    return jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(found[name]) for name in wanted])


def _named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Leaves on the host by their path in the tree, in the tree's order."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(leaf: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest}
