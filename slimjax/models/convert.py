"""``slimjax convert``: a model by a plan, written layer by layer, without the weights that it no longer needs."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimjax.attention.pair import Pair
from slimjax.config import resolved
from slimjax.models.load.converted import (
    CONFIG,
    FORMAT,
    MODEL_TYPE,
    is_converted,
    read_section,
    solved_name,
)
from slimjax.models.load.text_tokens import TOKENIZER
from slimjax.models.opened import OpenedModel, Place
from slimjax.models.store import SHARD_BYTES, Tensor, write_tensors, write_text
from slimjax.solve.augment import Solution
from slimjax.solve.convert import convert
from slimjax.solve.options import Layer
from slimjax.solve.plan import Plan
from slimjax.solve.planfile import plan_content

# What a basis no longer reads, and what it is multiplied out of: (dropped, kept) of W_K, W_V.
_DROPPED = {"k": (1, 0), "kr": (1, 0), "v": (0, 1)}


def check_plan(plan: Plan, model: OpenedModel) -> None:
    """Raise ValueError where a plan is not for this model: other layers, or other weights."""
    planned, held = list(plan.schemes), [place.name for place in model.places]
    if len(planned) != len(plan.layers):
        raise ValueError("the plan names a layer twice")
    if unknown := sorted(set(planned) - set(held)):
        raise ValueError(
            f"the plan names {', '.join(unknown)}, which {model.directory} has not ({held[0]}, ...)"
        )
    if missing := [name for name in held if name not in planned]:
        raise ValueError(f"the plan says nothing of {', '.join(missing)} of {model.directory}")
    if plan.digest != model.digest:
        raise ValueError(
            f"the plan was made for other weights ({plan.digest}, {model.directory} has {model.digest}); plan again"
        )


def convert_model(model: OpenedModel, plan: Plan, out: Path, *, shard_bytes: int = SHARD_BYTES) -> bool:
    """Write ``out``, a directory that every command takes as a model.

    Weights are read, solved for and written one tensor at a time. Everything is written beside ``out`` and
    renamed when it is complete. W_V of a layer that caches keys alone is dropped: [W_K, U] M stands for it.

    Args:
        model: what to convert.
        plan: for it.
        out: absent, an empty directory, or what this very conversion has written before.
        shard_bytes: of one file at most.

    Returns:
        Whether anything was written; not where ``out`` is there already.

    Raises:
        ValueError: the plan is for another model.
        NotImplementedError: a layer, named, cannot use its scheme.
        OSError: ``out`` holds something else, or cannot be written.
    """
    check_plan(plan, model)
    identity = _identity(model, plan)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if out.is_dir() and is_converted(out) and _same(out, identity):
            return False
        raise FileExistsError(f"{out}: holds something else; name another directory, or remove it first")
    part = out.parent / f".{out.name}.part"
    if part.exists():  # of a conversion that was killed
        shutil.rmtree(part)
    part.mkdir()
    try:
        files = write_tensors(part, _tensors(model, plan), shard_bytes)
        if model.tokenizer is not None:
            files[TOKENIZER] = write_text(part / TOKENIZER, model.tokenizer())
        section = identity | {"files": files}
        write_text(
            part / CONFIG,
            json.dumps({"model_type": MODEL_TYPE, "slimjax": section}, indent=1, sort_keys=True) + "\n",
        )
        _sync(part)
        part.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return True


def dropped(model: OpenedModel, plan: Plan) -> dict[str, dict[str, str]]:
    """The parameters that are not written -> their layer and the parameter kept of it."""
    found = {}
    for place in model.places:
        pair = _DROPPED.get(plan.schemes[place.name].basis)
        if pair:
            gone, kept = (place.kernels[index] for index in pair)
            found[gone] = {"layer": place.name, "kept": kept}
    return found


def _identity(model: OpenedModel, plan: Plan) -> dict[str, Any]:
    """All of the section but the files: equal for equal models and plans."""
    return {
        "format": FORMAT,
        "kind": model.kind,
        "model": resolved(model.sizes),
        "details": dict(model.details),
        "source": {"layout": model.layout, "sha256": _content(model), "maps": _maps(plan.solutions)},
        "weights": model.digest,
        "plan": plan_content(plan),
        "dropped": dropped(model, plan),
    }


def _same(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a converted model is the one that would be written, unharmed."""
    section = read_section(out)
    same = all(
        getattr(section, name) == value for name, value in _plain(identity).items() if name != "format"
    )
    for name, digest in section.files.items():
        with (out / name).open("rb") as file:
            same = same and hashlib.file_digest(file, "sha256").hexdigest() == digest
    return same


def _plain(content: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(content))


def _content(model: OpenedModel) -> str:
    """sha256 of every parameter and of the tokenizer, read one at a time."""
    total = hashlib.sha256()
    for path, shape in model.shapes.items():
        array = model.parameters.read(path, shape)
        total.update(f"{path} {array.dtype} {shape}\0".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    if model.tokenizer is not None:
        total.update(model.tokenizer().encode())
    return total.hexdigest()


def _maps(solutions: Mapping[str, Solution]) -> str:
    """sha256 of the plan's maps in float32, as they are stored."""
    total = hashlib.sha256()
    for name in sorted(solutions):
        for array in (solutions[name].weight, solutions[name].extra, solutions[name].scale):
            total.update(
                name.encode() + b"\0" + (b"" if array is None else array.astype(np.float32).tobytes())
            )
    return total.hexdigest()


def _tensors(model: OpenedModel, plan: Plan) -> list[Tensor]:
    """What is kept of the model, and what was solved for, each layer's behind its keys."""
    gone = dropped(model, plan)
    first: dict[str, Layer] = {}

    @functools.lru_cache(maxsize=1)  # weight and extra of one layer are written one after the other
    def solved(place: Place) -> dict[str, np.ndarray]:
        return _solved(model, plan, place, first)

    tensors = [
        Tensor(
            name=path,
            dtype=model.parameters.dtype(path),
            shape=shape,
            read=functools.partial(model.parameters.read, path, shape),
        )
        for path, shape in model.shapes.items()
        if path not in gone
    ]
    for place in model.places:
        scheme, spec = plan.schemes[place.name], place.spec
        if scheme.basis not in _DROPPED:
            _solved(model, plan, place, first)  # refuses what cannot be
            continue
        shapes = {"weight": (spec.key_width + scheme.extra, spec.key_width)}
        if scheme.extra:
            shapes["extra"] = (spec.width, scheme.extra)
        given = plan.solutions.get(place.name)
        if given is not None and given.scale is not None:
            shapes["scale"] = (1, spec.key_width)
        tensors += [
            Tensor(
                name=solved_name(place.name, part),
                dtype=np.dtype("float32"),
                shape=shape,
                read=lambda place=place, part=part: solved(place)[part],
            )
            for part, shape in shapes.items()
        ]
    return tensors


def _solved(model: OpenedModel, plan: Plan, place: Place, first: dict[str, Layer]) -> dict[str, np.ndarray]:
    """A layer's map, directions and scales, float32. Raises NotImplementedError where there are none."""
    layer, scheme = model.layer(place), plan.schemes[place.name]
    if scheme.basis == "h":
        first.setdefault(str(scheme), layer)
    given = plan.solutions.get(place.name)
    done = convert(
        layer.projections,
        layer.under(scheme),
        layer=place.name,
        solution=given,
        first=first[str(scheme)].projections if scheme.basis == "h" else None,
    ).layer.weights
    weight = done.w_vk if scheme.basis == "v" else done.w_kv
    assert not isinstance(weight, Pair)  # none was asked for
    if weight is None:
        return {}
    found = {"weight": np.asarray(weight).reshape(weight.shape[0], -1)}
    if done.extra is not None:
        found["extra"] = np.asarray(done.extra)
    if given is not None and given.scale is not None:
        found["scale"] = given.scale.astype(np.float32)[None]
    return found


def _sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
