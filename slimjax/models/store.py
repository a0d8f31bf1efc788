"""Writing safetensors a tensor at a time: the header needs shapes alone, so no file is ever held in memory."""

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from slimjax.models.load.safetensors import INDEX, SINGLE

SHARD_BYTES = 5_000_000_000
_NAMES = {
    np.dtype("float64"): "F64",
    np.dtype("float32"): "F32",
    np.dtype("float16"): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """A tensor to be written; ``read`` makes it when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Sequence[Tensor], most: int = SHARD_BYTES) -> dict[str, str]:
    """Write model.safetensors, or shards of at most ``most`` bytes (or one tensor) and their index.

    Args:
        folder: exists; its files of those names are overwritten.
        tensors: in the order in which they are read and written.
        most: bytes of a shard's tensors.

    Returns:
        name -> sha256 of the files written. Equal tensors give equal bytes.
    """
    shards = _shards(tensors, most)
    if len(shards) == 1:
        return {SINGLE: _write(folder / SINGLE, shards[0])}
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = {name: _write(folder / name, shard) for name, shard in zip(names, shards, strict=True)}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    return files | {INDEX: write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")}


def write_text(path: Path, text: str) -> str:
    """A text file, on the disk when this returns; its sha256."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        flush(file)
    return hashlib.sha256(data).hexdigest()


def flush(file: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _shards(tensors: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """The tensors in order, parted before each that would make a shard too large."""
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards


def _write(path: Path, tensors: Sequence[Tensor]) -> str:
    """u64 length of the header, JSON header padded to 8 bytes, then the values one tensor after the other."""
    header, at = {}, 0
    for tensor in tensors:
        end = at + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (struct.pack("<Q", len(text)), text):
            digest.update(part)
            file.write(part)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read())
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name}: {array.dtype}{array.shape}, expected {tensor.dtype}{tensor.shape}"
                )
            data = array.tobytes()
            digest.update(data)
            file.write(data)
        flush(file)
    return digest.hexdigest()
