"""The kernels and shapes that are compiled for every TPU generation. Data alone; experiments/tpu_matrix.py runs it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled.

    Attributes:
        function: of arrays.
        specs: its arguments, trees of jax.ShapeDtypeStruct.
        donate: numbers of the arguments it is given for good.
        name: the `name=` of the pallas_call whose schedule is looked at; "": none is.
        tiles: 128x128 tiles of cached values one grid step works on; 0: cycles are given as a step takes them.
        bytes: what a grid step reads from HBM, scales included.
        cached: size of the smallest array of the cache, bytes: XLA may make nothing as large outside the kernels.
            Larger than any VMEM (128 MiB), or XLA moves the cache there; 0: not looked at.
        running: which of the body's conditional blocks runs in an ordinary step (`Schedule.steady`).
    """

    function: Callable[..., Any]
    specs: Sequence[Any]
    donate: tuple[int, ...] = ()
    name: str = ""
    tiles: float = 0.0
    bytes: float = 0.0
    cached: int = 0
    running: int | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the matrix.

    Attributes:
        kernel, shape: names; together they are the case's.
        build: makes the program for a generation, in a process of its own: a function of a module or a
            functools.partial of one. A kernel that does not serve the generation raises NotImplementedError, here
            or as it is traced.
        ci: whether it is compiled in every `make test-tpu`, or by `make tpu-matrix` only.
    """

    kernel: str
    shape: str
    build: Callable[[str], Program]
    ci: bool = False


def cases() -> tuple[Case, ...]:
    """All of them, in the order of the table."""
    return ()
