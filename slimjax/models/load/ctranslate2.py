"""Reader of CTranslate2's ``model.bin``, version 6.

Little endian: u32 version, string spec, u32 revision, u32 n; n times: string name, u8 rank, u32 dim * rank,
u8 dtype, u32 bytes, data; then u32 n and n times: string alias, string name. A string is a u16 length and as
many bytes, a NUL at the end included.
"""

import math
import mmap
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

VERSION = 6
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)
_FLOATING = (0, 4, 5)  # of them, those that weights may have
_LARGEST_RANK = 8


class CTranslate2File:
    """The variables of a ``model.bin``, mapped and not read: a wrong length in it can claim no memory.

    Raises:
        OSError: no such file.
        ValueError: of another version, cut off, or inconsistent; the message has the file and the byte.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise ValueError(f"{path}: the file is empty")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self._found: dict[str, tuple[int, int, tuple[int, ...]]] = {}  # name -> dtype, offset, shape
        self._parse()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape) in self._found.items()}

    def file(self, name: str) -> Path:
        return self.path

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(_DTYPES[self._found[name][0]])

    def read(self, name: str) -> np.ndarray:
        dtype = self._found[name][0]
        if dtype not in _FLOATING:
            raise NotImplementedError(
                f"{self.path}: tensor {name!r} is {np.dtype(_DTYPES[dtype]).name}; quantised weights are not "
                "read, convert the model with float16, bfloat16 or float32 weights"
            )
        return self._array(name)

    def number(self, name: str) -> int:
        """A whole number among the variables. Raises ValueError where it is absent or not one."""
        if name not in self._found or math.prod(self._found[name][2]) != 1:
            raise ValueError(f"{self.path}: the number {name!r} is missing")
        return int(self._array(name).reshape(()))

    def _array(self, name: str) -> np.ndarray:
        dtype, offset, shape = self._found[name]
        flat = np.frombuffer(self._data, _DTYPES[dtype], math.prod(shape), offset)
        return flat.reshape(shape)

    def _parse(self) -> None:
        version = self._integer("I", "the version")
        if version != VERSION:
            raise ValueError(
                f"{self.path}: version {version} of CTranslate2's format, or another format altogether; "
                f"version {VERSION} is read"
            )
        self.spec = self._string("the name of the architecture")
        self.revision = self._integer("I", "the revision")
        for _ in range(self._integer("I", "the number of variables")):
            self._variable()
        for _ in range(self._integer("I", "the number of aliases")):
            alias, name = self._string("an alias"), self._string("what an alias stands for")
            if name not in self._found:
                self._fail(f"alias {alias!r} stands for {name!r}, which there is not")
            self._found.setdefault(alias, self._found[name])
        if self._at != len(self._data):
            self._fail(f"{len(self._data) - self._at} bytes are left behind the end")

    def _variable(self) -> None:
        name = self._string("a variable's name")
        rank = self._integer("B", f"the rank of {name!r}")
        if rank > _LARGEST_RANK:
            self._fail(f"{name!r} has rank {rank}, expected {_LARGEST_RANK} at most")
        shape = tuple(self._integer("I", f"a dimension of {name!r}") for _ in range(rank))
        dtype = self._integer("B", f"the dtype of {name!r}")
        if dtype >= len(_DTYPES):
            self._fail(f"{name!r} has dtype {dtype}, expected 0 to {len(_DTYPES) - 1}")
        size = self._integer("I", f"the size of {name!r}")
        wanted = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if size != wanted:
            self._fail(f"{name!r} of shape {shape} and {wanted} bytes says that it has {size}")
        if name in self._found:
            self._fail(f"{name!r} is there twice")
        self._found[name] = (dtype, self._take(size, f"the data of {name!r}"), shape)

    def _string(self, what: str) -> str:
        length = self._integer("H", f"the length of {what}")
        start = self._take(length, what)
        try:
            return self._data[start : start + length].rstrip(b"\0").decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is no UTF-8 text")
            raise

    def _integer(self, kind: str, what: str) -> int:
        layout = f"<{kind}"
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout), what))[0]

    def _take(self, size: int, what: str) -> int:
        """The offset of the next ``size`` bytes, which are then behind us."""
        if self._at + size > len(self._data):
            self._fail(f"{what} takes {size} bytes, {len(self._data) - self._at} are left")
        start, self._at = self._at, self._at + size
        return start

    def _fail(self, reason: str) -> None:
        raise ValueError(f"{self.path}: damaged at byte {self._at} of {len(self._data)}: {reason}")
