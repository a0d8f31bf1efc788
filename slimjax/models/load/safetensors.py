"""Reader of Hugging Face weights: ``model.safetensors``, or shards named by ``model.safetensors.index.json``."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slimjax.models.load.source import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": ml_dtypes.bfloat16}  # those read


class SafetensorsFolder:
    """The tensors of a folder, each shard mapped and its header checked by the safetensors library.

    Raises:
        OSError: a file is missing.
        ValueError: a shard is cut off or inconsistent, or the index does not fit the shards.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        index = folder / INDEX
        named = _index(index) if not (folder / SINGLE).exists() and index.exists() else None
        shards = sorted(set(named.values())) if named else [SINGLE]
        for shard in shards:
            self._add(folder / shard, None if named is None else {n for n, s in named.items() if s == shard})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def file(self, name: str) -> Path:
        return self._where.get(name, self.folder / SINGLE if len(self._open) == 1 else self.folder / INDEX)

    def dtype(self, name: str) -> np.dtype:
        dtype = self._open[self._where[name]].get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise NotImplementedError(
                f"{self._where[name]}: tensor {name!r} is {dtype}; only {', '.join(DTYPES)} are read"
            )
        return np.dtype(DTYPES[dtype])

    def read(self, name: str) -> np.ndarray:
        self.dtype(name)  # raises where it is none that is read
        return self._open[self._where[name]].get_tensor(name)

    def _add(self, path: Path, named: set[str] | None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(str(path), framework="numpy")
            held = set(handle.keys())
            if named is not None and named - held:
                raise ValueError(f"tensor {min(named - held)!r}, which {INDEX} says is here, is not")
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in named or held}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: damaged or no safetensors file: {error}") from None
        self._open[path] = handle
        self._shapes |= shapes
        self._where |= dict.fromkeys(shapes, path)


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> shard. Raises ValueError where that is not what the file says."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: expected an object 'weight_map' of tensor names and files")
    for shard in table.values():
        # A name alone: a path could lead out of the folder.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{path}: {shard!r} is not the name of a safetensors file")
    return table
