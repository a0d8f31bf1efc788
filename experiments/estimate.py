"""What a run will cost, said before it starts: every unit built in the abstract, its work added up."""

import functools
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
        seconds = found.flops / rate()
        least = "under a minute" if seconds < 60 else f"at least {seconds / 60:.0f} min"
        parts.append(
            f"{found.flops:.1e} FLOP, {least} at the {rate() / 1e9:.0f} GFLOP/s of a plain product here"
        )
    if found.bytes:
        parts.append(
            f"at most {found.bytes / 2**20:.0f} MiB of parameters, optimizer state and caches at a time"
        )
    return "; ".join(parts)


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
