"""Reader of GGUF, versions 2 and 3: sizes and tokenizer as named values, weights plain or in ggml's blocks.

Little endian: "GGUF", u32 version, u64 tensors, u64 values; of each value string name, u32 type, data; of each
tensor string name, u32 rank, u64 dim * rank (fastest first), u32 type, u64 offset; then, aligned, the data. A
string is a u64 length and as many bytes, an array u32 type, u64 length and its members.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

VERSIONS = (2, 3)
_SCALARS = {  # number of a value's type -> layout
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PLAIN = {
    0: np.dtype("float32"),
    1: np.dtype("float16"),
    28: np.dtype("float64"),
    30: np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = (24, 25, 26, 27)  # int8 to int64: no weights
_LARGEST_RANK, _LARGEST_ALIGNMENT = 4, 1 << 16
NEEDED = "the package gguf is needed for quantised weights: pip install 'slimjax[gguf]'"


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor is: its shape with the slowest axis first, ggml's type, bytes, offset into the file."""

    shape: tuple[int, ...]
    kind: int
    nbytes: int
    offset: int


class GGUFFile:
    """The values and tensors of a ``.gguf``, mapped and not read: a wrong length in it can claim no memory.

    Attributes:
        path: of the file.
        values: name -> number, bool, string, or a list of them.

    Raises:
        OSError: no such file.
        ValueError: of another format or version, cut off, or inconsistent; the message has the file and the byte.
        NotImplementedError: big-endian, in parts, or with tensors in blocks that are not known; or quantised, and
            the package gguf is not installed.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise ValueError(f"{path}: the file is empty")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self.values: dict[str, Any] = {}
        self._found: dict[str, _Tensor] = {}
        self._parse()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._found.items()}

    def file(self, name: str) -> Path:
        return self.path

    def dtype(self, name: str) -> np.dtype:
        """Of what is read: float32 of blocks."""
        return _PLAIN.get(self._found[name].kind, np.dtype("float32"))

    def read(self, name: str) -> np.ndarray:
        """A tensor, blocks multiplied out by ggml's own formulas."""
        tensor = self._found[name]
        if tensor.kind in _INTEGERS:
            raise NotImplementedError(f"{self.path}: tensor {name!r} holds whole numbers; expected weights")
        if tensor.kind in _PLAIN:
            dtype = _PLAIN[tensor.kind]
            return np.frombuffer(self._data, dtype, math.prod(tensor.shape), tensor.offset).reshape(
                tensor.shape
            )
        from gguf import GGMLQuantizationType, dequantize

        raw = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        try:
            rows = dequantize(raw.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType(tensor.kind))
        except NotImplementedError:
            raise NotImplementedError(
                f"{self.path}: tensor {name!r} is {GGMLQuantizationType(tensor.kind).name}, whose blocks the "
                "package gguf does not multiply out"
            ) from None
        return rows.reshape(tensor.shape)

    def _parse(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError(
                f"{self.path}: no GGUF file: it begins with {self._data[:4]!r}, expected b'GGUF'"
            )
        self._at = 4
        version = self._number("I", "the version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise NotImplementedError(f"{self.path}: a big-endian GGUF file; convert it to little-endian")
            raise ValueError(f"{self.path}: version {version} of GGUF; versions 2 and 3 are read")
        tensors, values = (
            self._number("Q", "the number of tensors"),
            self._number("Q", "the number of values"),
        )
        for _ in range(values):
            name = self._string("a value's name")
            if name in self.values:
                self._fail(f"the value {name!r} is there twice")
            self.values[name] = self._value(self._number("I", f"the type of {name!r}"), name)
        if self.values.get("split.count", 1) not in (0, 1):
            raise NotImplementedError(
                f"{self.path}: one of {self.values['split.count']} parts; merge them (gguf-split --merge)"
            )
        described = [self._tensor() for _ in range(tensors)]
        alignment = self.values.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT:
            self._fail(f"general.alignment = {alignment!r}, expected a number up to {_LARGEST_ALIGNMENT}")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in described:
            if name in self._found:
                self._fail(f"tensor {name!r} is there twice")
            size = self._nbytes(name, shape, kind)
            if start + offset + size > len(self._data):
                self._fail(
                    f"tensor {name!r} takes {size} bytes at {start + offset}; the file has {len(self._data)}"
                )
            self._found[name] = _Tensor(shape, kind, size, start + offset)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with the slowest axis first, type, offset into the data."""
        name = self._string("a tensor's name")
        rank = self._number("I", f"the rank of {name!r}")
        if not 1 <= rank <= _LARGEST_RANK:
            self._fail(f"{name!r} has rank {rank}, expected 1 to {_LARGEST_RANK}")
        shape = tuple(self._number("Q", f"a dimension of {name!r}") for _ in range(rank))[::-1]
        if not math.prod(shape):
            self._fail(f"{name!r} of shape {shape} is empty")
        return (
            name,
            shape,
            self._number("I", f"the type of {name!r}"),
            self._number("Q", f"the offset of {name!r}"),
        )

    def _nbytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        """Bytes of a tensor: of whole blocks along its last axis."""
        if kind in _PLAIN:
            return math.prod(shape) * _PLAIN[kind].itemsize
        if kind in _INTEGERS:
            return math.prod(shape) << (kind - _INTEGERS[0])
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError:
            raise NotImplementedError(f"{self.path}: {NEEDED}") from None
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise NotImplementedError(
                f"{self.path}: tensor {name!r} is of ggml's type {kind}, not known"
            ) from None
        if shape[-1] % block:
            self._fail(f"{name!r} of shape {shape} is no whole number of blocks of {block}")
        return math.prod(shape) // block * size

    def _value(self, kind: int, name: str) -> Any:
        if kind == _STRING:
            return self._string(f"the value {name!r}")
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], f"the value {name!r}")
        if kind != _ARRAY:
            self._fail(f"the value {name!r} is of type {kind}, which there is not")
        inner, count = (
            self._number("I", f"the type of {name!r}"),
            self._number("Q", f"the length of {name!r}"),
        )
        if inner == _STRING:
            self._take(8 * count, f"the array {name!r}", ahead=True)  # a string takes 8 bytes or more
            what = f"a member of {name!r}"
            return [self._string(what) for _ in range(count)]
        if inner not in _SCALARS:
            self._fail(f"the array {name!r} has members of type {inner}; numbers and strings are read")
        dtype = np.dtype(_SCALARS[inner]).newbyteorder("<")
        start = self._take(dtype.itemsize * count, f"the array {name!r}")
        return np.frombuffer(self._data, dtype, count, start).tolist()

    def _string(self, what: str) -> str:
        length = self._number("Q", what)
        start = self._take(length, what)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is no UTF-8 text")
            raise

    def _number(self, kind: str, what: str) -> Any:
        layout = f"<{kind}"
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout), what))[0]

    def _take(self, size: int, what: str, *, ahead: bool = False) -> int:
        """The offset of the next ``size`` bytes, which are then behind us, unless we only look ``ahead``."""
        if self._at + size > len(self._data):
            self._fail(f"{what} takes {size} bytes, {len(self._data) - self._at} are left")
        start = self._at
        if not ahead:
            self._at += size
        return start

    def _fail(self, reason: str) -> None:
        raise ValueError(f"{self.path}: damaged at byte {self._at} of {len(self._data)}: {reason}")
