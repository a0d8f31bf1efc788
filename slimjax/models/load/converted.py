"""Reader of what ``slimjax convert`` writes: safetensors by our own names, config.json saying what was dropped.

config.json     {"model_type": "slimjax", "slimjax": section}, see ``Section``
*.safetensors   parameters by their paths; "solved.LAYER.weight" [E+R, E], ".extra" [D, R] and ".scale" [1, E]
                of layers that cache keys (or values) alone
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slimjax.models.load.parameters import finite
from slimjax.models.load.safetensors import SafetensorsFolder
from slimjax.models.load.source import read_json
from slimjax.solve.augment import Solution
from slimjax.solve.plan import Plan
from slimjax.solve.planfile import plan_of

CONFIG, FORMAT, MODEL_TYPE = "config.json", "slimjax model 1", "slimjax"
Sizes = TypeVar("Sizes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """What config.json says under "slimjax".

    Attributes:
        kind: "whisper" or "decoder".
        model: the sizes, the fields of the model's config.
        details: what else the kind needs ("multilingual", "data").
        source: where the weights came from: "layout".
        weights: digest of W_K and W_V of all layers as they were before conversion, which plans are made for.
        plan: the plan, as in its own file.
        dropped: parameters that are not here -> the "layer" and the parameter that is "kept" of it.
        files: name -> sha256 of every other file.
    """

    kind: str
    model: Mapping[str, Any]
    details: Mapping[str, Any]
    source: Mapping[str, Any]
    weights: str
    plan: Mapping[str, Any]
    dropped: Mapping[str, Mapping[str, str]]
    files: Mapping[str, str]

    def made(self, sizes: type[Sizes]) -> Sizes:
        """The model's config of that class. Raises ValueError where the fields are not its own."""
        try:
            return sizes(**self.model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{CONFIG}: the sizes of the converted model: {error}") from None


def solved_name(layer: str, part: str) -> str:
    """The tensor's name of a layer's solved "weight", "extra" or "scale"."""
    return f"solved.{layer}.{part}"


def is_converted(folder: Path) -> bool:
    """Whether a directory is what ``slimjax convert`` writes."""
    path = folder / CONFIG
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def read_section(folder: Path) -> Section:
    """What a converted model says of itself. Raises OSError or ValueError, in one line."""
    path = folder / CONFIG
    found = read_json(path).get("slimjax")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a section 'slimjax' of format {FORMAT!r}")
    fields = {field.name: field.type for field in dataclasses.fields(Section)}
    if found.keys() - {"format"} != fields.keys():
        raise ValueError(f"{path}: the section 'slimjax' has {sorted(found)}, expected {sorted(fields)}")
    for name, kind in fields.items():
        if not isinstance(found[name], str if kind is str else dict):
            raise ValueError(f"{path}: {name!r} of the section 'slimjax' is {type(found[name]).__name__}")
    return Section(**{name: found[name] for name in fields})


class ConvertedParameters:
    """The parameters of a converted model; those that were dropped are multiplied out of what stands for them.

    With V = [K, X U] M, values at prefill are X W_V' with W_V' = [W_K, U] M: what decoding reads, but for the
    codec's rounding.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what was written, or config.json is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.section = read_section(folder)
        for name, digest in self.section.files.items():
            path = folder / name
            if Path(name).name != name:  # a path could lead out of the folder
                raise ValueError(f"{folder / CONFIG}: {name!r} is not the name of a file")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ValueError(f"{path}: not what was written: its sha256 differs from {CONFIG}'s")
        self._source = SafetensorsFolder(folder)
        most = max((n for n in self.section.model.values() if isinstance(n, int)), default=0)
        counts = [n for name, n in self.section.model.items() if "layers" in name and isinstance(n, int)]
        if any(count > len(self._source.shapes) for count in counts):
            raise ValueError(f"{folder / CONFIG}: {max(counts)} layers, {len(self._source.shapes)} tensors")
        if most > 1 << 31:
            raise ValueError(f"{folder / CONFIG}: a size of {most}")

    @property
    def plan(self) -> Plan:
        """The plan the model was converted by, maps included. Raises ValueError where it is damaged."""
        try:
            plan = plan_of(self.section.plan)
        except ValueError as error:
            raise ValueError(f"{self.folder / CONFIG}: not a plan: {error}") from None
        return dataclasses.replace(plan, solutions=self.solutions)

    @property
    def solutions(self) -> dict[str, Solution]:
        """The stored maps of the layers that cache keys alone."""
        schemes = plan_of(self.section.plan).schemes
        return {name: self._solution(name) for name, each in schemes.items() if each.basis in ("k", "kr")}

    def dtype(self, path: str) -> np.dtype:
        return np.dtype("float32") if path in self.section.dropped else self._source.dtype(path)

    def file(self, path: str) -> Path:
        return self._source.file(path)

    def read(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        dropped = self.section.dropped.get(path)
        if dropped is None:
            return self._tensor(path, shape)
        try:
            layer, kept_name = dropped["layer"], dropped["kept"]
        except (KeyError, TypeError):
            raise ValueError(
                f"{self.folder / CONFIG}: dropped {path!r}: expected 'layer' and 'kept'"
            ) from None
        kept = self._tensor(kept_name, shape).astype(np.float64).reshape(shape[0], -1)
        solution = self._solution(layer)
        whole = solution.cached(kept)
        if whole.shape[1] != solution.weight.shape[0]:
            raise ValueError(
                f"{self.folder}: {layer}: rows of {whole.shape[1]}, a map of {solution.weight.shape}"
            )
        return (whole @ solution.weight).reshape(shape).astype(np.float32)

    def _solution(self, layer: str) -> Solution:
        weight, extra, scale = (solved_name(layer, part) for part in ("weight", "extra", "scale"))
        shapes = self._source.shapes

        def found(name: str) -> np.ndarray:
            if len(shapes.get(name, ())) != 2:
                raise ValueError(
                    f"{self.file(name)}: tensor {name!r} is {shapes.get(name, 'missing')}, expected 2 axes"
                )
            return self._tensor(name, shapes[name]).astype(np.float64)

        return Solution(
            weight=found(weight),
            extra=found(extra) if extra in shapes else None,
            scale=found(scale)[0] if scale in shapes else None,
            how="from the converted model",
        )

    def _tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        held = self._source.shapes.get(name)
        if held != shape:
            state = "missing" if held is None else f"of shape {held}"
            raise ValueError(f"{self._source.file(name)}: tensor {name!r} is {state}, expected {shape}")
        return finite(self._source.read(name), self._source.file(name), name)
