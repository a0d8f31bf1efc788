"""How fast are this device's memory and its products? What shares of a bandwidth are shares of."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.directory import RunDirectory
from experiments.gpu_settings import CeilingsConfig
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax import timing
from slimjax.config import Config

TITLE = "What can this device do at best?"
ALONE = True  # timings
TABLE = ("gigabytes_per_second", "teraflops_per_second")  # printed at the end
COPY, READ, PRODUCT = "copy", "read", "product"


@dataclass(frozen=True, kw_only=True)
class CeilingsRun(Config):
    """The whole run."""

    ceilings: CeilingsConfig


def resolve(build: Build) -> CeilingsRun:
    """The run from its section."""
    return CeilingsRun(ceilings=build("Ceilings"))


def units(config: CeilingsRun) -> list[Unit]:
    """One: memory first, then products."""
    asked = config.ceilings
    shared = {"experiment": "ceilings"}
    memory = [{**shared, "phase": phase, "dtype": "float32"} for phase in (COPY, READ)]
    products = [{**shared, "phase": PRODUCT, "dtype": dtype} for dtype in asked.dtypes]
    return [Unit("ceilings", (*memory, *products))]


def forecast(unit: Unit, config: CeilingsRun) -> Forecast:
    """Three arrays of the largest kind."""
    asked = config.ceilings
    return Forecast(bytes=3 * max(asked.copy_bytes, 4 * asked.product**2))


def prepare(unit: Unit, config: CeilingsRun, directory: RunDirectory) -> Measure:
    """Memory's speed is measured once for both of its cells."""
    asked = config.ceilings

    @functools.cache
    def memory() -> timing.Ceilings:
        return timing.ceilings(asked.copy_bytes, seconds=asked.seconds)

    def measure(cell: Cell) -> dict[str, Any]:
        if cell["phase"] == PRODUCT:
            return _product(asked, str(cell["dtype"]))
        return {"gigabytes_per_second": memory().copy if cell["phase"] == COPY else memory().read}

    return measure


def _multiply(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.matmul(first, second, precision="highest")  # float32 is TF32 on recent GPUs otherwise


def _product(asked: CeilingsConfig, dtype: str) -> dict[str, Any]:
    """A square product of random numbers: zeros are multiplied faster on some devices."""
    first, second = (
        jax.random.normal(jax.random.key(seed), (asked.product, asked.product)).astype(dtype)
        for seed in range(2)
    )
    program, seconds = timing.compiled(_multiply, first, second)
    run = timing.time_calls(lambda: program(first, second), seconds=asked.seconds, least=asked.least)
    run = timing.Timing(run.samples, seconds)
    return {**run.metrics(), "teraflops_per_second": 2 * asked.product**3 / run.milliseconds / 1e9}
