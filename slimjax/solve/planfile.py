"""Plans on disk: a JSON file to read and edit by hand, and beside it the maps that calibration found."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimjax.scheme import parse_scheme
from slimjax.solve.augment import Solution
from slimjax.solve.plan import Choice, Plan

FORMAT = "slimjax plan 1"


def save_plan(path: Path, plan: Plan) -> None:
    """Write ``path`` (.json) and, where there are maps, ``path`` with .safetensors; each by rename."""
    from safetensors.numpy import save

    maps = {}
    for name, solution in plan.solutions.items():
        # safetensors writes memory as it lies, whatever the strides say.
        maps[f"{name}.weight"] = np.ascontiguousarray(solution.weight, np.float32)
        if solution.extra is not None:
            maps[f"{name}.extra"] = np.ascontiguousarray(solution.extra, np.float32)
        if solution.scale is not None:
            maps[f"{name}.scale"] = np.ascontiguousarray(solution.scale, np.float32)
    content = plan_content(plan)
    if maps:
        data = save(maps)
        beside = path.with_suffix(".safetensors")
        _write(beside, data)
        content["maps"] = {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}
    _write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def plan_content(plan: Plan) -> dict[str, Any]:
    """A plan as plain JSON data, all but its maps."""
    return {
        "format": FORMAT,
        "weights": plan.digest,
        "budget": dict(plan.budget),
        "calibration": plan.calibration,
        "totals": {
            "bytes_per_token": plan.bytes_per_token,
            "kv_bf16_bytes_per_token": plan.kv_bytes_per_token,
            "weight_bytes": sum(choice.weight_bytes for choice in plan.layers),
            "break_even_tokens": plan.break_even,
        },
        "layers": [dataclasses.asdict(choice) for choice in plan.layers],
    }


def plan_of(content: Any) -> Plan:
    """A plan without its maps from JSON data. Raises ValueError, in one line, for what is none."""
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
        known = {field.name for field in dataclasses.fields(Choice)}
        layers = tuple(
            Choice(**{name: value for name, value in line.items() if name in known})
            for line in content["layers"]
        )
        for choice in layers:
            parse_scheme(choice.scheme)
        return Plan(
            layers=layers,
            digest=content["weights"],
            budget=content["budget"],
            calibration=content["calibration"],
            kv_bytes_per_token=content["totals"]["kv_bf16_bytes_per_token"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def load_plan(path: Path, digest: str | None = None) -> Plan:
    """Read a plan, edited by hand or not.

    A layer whose scheme was edited to another R, or whose ``how`` was emptied, loses its stored map and is
    solved exactly when the model is converted.

    Args:
        path: the .json file.
        digest: of the weights it is to be used with (``weights_digest``); None: not looked at.

    Raises:
        OSError: a file is missing.
        ValueError: not a plan, a scheme that does not parse, maps that were changed, or a plan for other
            weights; one line that names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        plan = plan_of(content)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a plan: {error}") from None
    if digest is not None and plan.digest != digest:
        raise ValueError(f"{path}: made for other weights ({plan.digest}, these are {digest}); plan again")
    return dataclasses.replace(plan, solutions=_solutions(path, content.get("maps"), plan))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredMaps(Mapping[str, Solution]):
    """The maps of a plan on disk, read when asked for, one at a time: a large model's do not fit memory together.

    Attributes:
        path: the .safetensors file.
        how: layer -> how its map was found, of the layers that have one.
    """

    path: Path
    how: Mapping[str, str]

    def __getitem__(self, name: str) -> Solution:
        how = self.how[name]
        with _opened(self.path) as file:
            held = set(file.keys())

            def part(which: str) -> np.ndarray | None:
                key = f"{name}.{which}"
                return file.get_tensor(key).astype(np.float64) if key in held else None

            weight = part("weight")
            assert weight is not None  # ``_solutions`` has seen it
            return Solution(weight=weight, extra=part("extra"), scale=part("scale"), how=how)

    def __iter__(self) -> Iterator[str]:
        return iter(self.how)

    def __len__(self) -> int:
        return len(self.how)


def _opened(path: Path) -> Any:
    """The tensors of a file by name. Raises ValueError naming the file where it is no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def _solutions(path: Path, maps: Mapping[str, str] | None, plan: Plan) -> Mapping[str, Solution]:
    """The stored maps of the layers whose scheme still fits them."""
    if not maps:
        return {}
    beside = path.with_name(Path(maps["file"]).name)
    with beside.open("rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != maps["sha256"]:
            raise ValueError(f"{beside}: not the maps that {path} was written with")
    found = {}
    with _opened(beside) as file:
        held = set(file.keys())
        for choice in plan.layers:
            scheme, extra = parse_scheme(choice.scheme), f"{choice.name}.extra"
            rank = file.get_slice(extra).get_shape()[1] if extra in held else 0
            fits = scheme.basis in ("k", "kr") and scheme.extra == rank
            if f"{choice.name}.weight" in held and fits and choice.how:
                found[choice.name] = choice.how
    return StoredMaps(path=beside, how=found)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
