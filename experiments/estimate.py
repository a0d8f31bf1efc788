"""What a run will cost, said before it starts: every unit built in the abstract, its work added up."""

import functools
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.directory import Refused
from experiments.settings import Cell, Experiment, Forecast, Unit

SIZE, REPEATS = 768, 3  # of the matrix product that the rate is taken from
YEAR = 365.25 * 86400.0  # seconds
LONGEST, BEYOND = 10 * YEAR, 64  # a time, and a multiple of the memory, that only a slip of the pen asks for


@dataclass(frozen=True)
class Estimate:
    """Of a whole run. refused: the cells known to be refused, by their index in the run."""

    cells: int
    units: int
    flops: float
    bytes: int
    refused: dict[int, str]

    def __str__(self) -> str:
        def count(number: int, word: str) -> str:
            return f"{number} {word}{'' if number == 1 else 's'}"

        parts = [count(self.cells, "cell"), f"in {count(self.units, 'unit')}"]
        if self.refused:
            parts.append(f"({len(self.refused)} will be refused)")
        return " ".join(parts)


def estimate(experiment: Experiment, units: Sequence[Unit], config: Any) -> Estimate:
    """Forecast every unit; nothing is computed. Raises Refused with the first unit that cannot be built."""
    forecasts: list[Forecast] = []
    for unit in units:
        try:
            with warnings.catch_warnings():  # that a size is beyond int32 is said by the error that follows
                warnings.filterwarnings("ignore", "Explicitly requested dtype")
                forecasts.append(experiment.forecast(unit, config))
        except NotImplementedError as refusal:
            forecasts.append(Forecast(refused=dict.fromkeys(range(len(unit.cells)), str(refusal))))
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split()) or "not enough memory"
            raise Refused(f"{unit.name} cannot be built: {reason}") from error
    first, refused = 0, {}
    for unit, forecast in zip(units, forecasts, strict=True):
        refused |= {first + index: reason for index, reason in forecast.refused.items()}
        first += len(unit.cells)
    return Estimate(
        cells=first,
        units=len(units),
        flops=sum(forecast.flops for forecast in forecasts),
        bytes=max((forecast.bytes for forecast in forecasts), default=0),
        refused=refused,
    )


def cost(found: Estimate) -> str:
    """The estimate's cost in a line; empty where nothing is known of it."""
    parts = []
    if found.flops:
        least = duration(found.flops / rate())
        parts.append(
            f"{found.flops:.1e} FLOP, {least} at the {rate() / 1e9:.0f} GFLOP/s of a plain product here"
        )
    if found.bytes:
        room = memory()
        beyond = f", more than the {size(room)} here" if room and found.bytes > room else ""
        parts.append(
            f"at most {size(found.bytes)} of parameters, optimizer state, caches and logits at a time{beyond}"
        )
    return "; ".join(parts)


def check_sane(found: Estimate) -> None:
    """Raises Refused where no machine would see the end of it, or hold it."""
    if (room := memory()) and found.bytes > BEYOND * room:
        raise Refused(
            f"a unit needs {size(found.bytes)} of memory, {size(room)} are here: expected a smaller batch or model"
        )
    if found.flops / rate() > LONGEST:
        years = found.flops / rate() / YEAR
        raise Refused(
            f"{found.flops:.1e} FLOP would take {years:,.0f} years here: expected fewer steps, or smaller ones"
        )


def duration(seconds: float) -> str:
    """A lower bound of a time, in the unit that suits it."""
    if seconds < 60:
        return "under a minute"
    for unit, length, most in (("min", 60.0, 120), ("h", 3600.0, 72), ("days", 86400.0, 730)):
        if seconds < most * length:
            return f"at least {seconds / length:.0f} {unit}"
    return f"at least {seconds / YEAR:.0f} years"


def size(number: float) -> str:
    """Bytes in the unit that suits them."""
    if number < 2**20:
        return "1 MiB"  # at most
    for unit in ("MiB", "GiB", "TiB"):
        number /= 2**10 if unit != "MiB" else 2**20
        if number < 10_000:
            break
    return f"{number:,.0f} {unit}"


def memory() -> int | None:
    """Bytes that the default device has; None where that is not told."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


@functools.cache
def rate() -> float:
    """FLOP/s of a float32 matrix product on this device, the best of a few."""
    product = jax.jit(jnp.matmul)
    matrix = jnp.ones((SIZE, SIZE), jnp.float32)
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * SIZE**3 / min(times)


def listing(cells: Sequence[Cell], refused: dict[int, str]) -> str:
    """The coordinates all cells share, once; then a line per cell with the others, and why it will be refused."""
    shared = {
        name: value for name, value in cells[0].items() if all(cell.get(name) == value for cell in cells)
    }

    def line(cell: Cell) -> str:
        return "  ".join(f"{name}={value}" for name, value in cell.items())

    own = [{name: value for name, value in cell.items() if name not in shared} for cell in cells]
    lines = [
        line(cell) + (f"  REFUSED: {refused[index]}" if index in refused else "")
        for index, cell in enumerate(own)
    ]
    return "\n".join([f"every cell: {line(shared)}", *lines])
