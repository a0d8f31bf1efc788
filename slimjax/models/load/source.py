"""What a reader of weights offers, whatever its format, and the checks that all of them share."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """Named tensors on a disk. Shapes are known without reading; reading one tensor takes its memory only."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its name in the file."""
        ...

    def file(self, name: str) -> Path:
        """The file that holds a tensor, for messages; of a tensor that is absent, the one that should."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The dtype that a tensor is stored in."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored, of a floating dtype. Raises NotImplementedError for any other."""
        ...


def read_part(source: Source, name: str, shape: tuple[int, ...], part: int = 0, parts: int = 1) -> np.ndarray:
    """One of ``parts`` equal slices along a tensor's first axis, float32.

    Args:
        source: where from.
        name: the tensor's name in the file.
        shape: that the slice must have.
        part, parts: which slice, of how many.

    Raises:
        ValueError: absent, of another shape, or not finite in that slice; names file and tensor.
    """
    wanted = (shape[0] * parts, *shape[1:])
    found = source.shapes.get(name)
    if found is None:
        raise ValueError(f"{source.file(name)}: tensor {name!r} of shape {wanted} is missing")
    if found != wanted:
        raise ValueError(f"{source.file(name)}: tensor {name!r} has shape {found}, expected {wanted}")
    rows = source.read(name)[part * shape[0] : (part + 1) * shape[0]].astype(np.float32)
    if not np.isfinite(rows).all():
        raise ValueError(f"{source.file(name)}: tensor {name!r} holds values that are not finite")
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises OSError or ValueError naming the file."""
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
