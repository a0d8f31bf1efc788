"""Training speed: the same model, weights and batches here and in PyTorch eager, compilation apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.bench_settings import TrainBenchConfig
from experiments.directory import RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from experiments.train import Variant
from slimjax import timing
from slimjax.config import Config
from slimjax.optimizer import numbers, schedule
from slimjax.train import initial_state, state_shapes, train_step

TITLE = "How fast is training?"
ALONE = True  # timings
PACKAGES = ("torch",)  # timed too
CHECKED = 3  # steps over which the losses of both programs must agree
NEED_TORCH = "PyTorch is not installed: pip install 'slimjax[parity]'"


@dataclass(frozen=True, kw_only=True)
class TrainBench(Config):
    """The whole run."""

    bench: TrainBenchConfig
    variants: tuple[Variant, ...]


def resolve(build: Build) -> TrainBench:
    """The run from its sections; a model's name is the scope of its bindings."""
    bench = build("TrainBench")
    return TrainBench(
        bench=bench,
        variants=tuple(
            Variant(name=name, model=build("Model", name), train=build("Train", name))
            for name in bench.models
        ),
    )


def units(config: TrainBench) -> list[Unit]:
    """A model each; its peer first, so that the ratio is to numbers of the same run."""
    return [Unit(variant.name, _cells(variant, config.bench), variant) for variant in config.variants]


def _cells(variant: Variant, bench: TrainBenchConfig) -> tuple[Cell, ...]:
    model, train = variant.model, variant.train
    return tuple(
        {
            "experiment": "train_bench",
            "model": variant.name,
            "layers": model.layers,
            "width": model.width,
            "heads": model.heads,
            "batch": train.batch,
            "length": train.length,
            "dtype": train.dtype,
            "framework": framework,
            "threads": bench.threads or None,
            "seed": train.seed,
        }
        for framework in ("torch", "slimjax")
    )


def forecast(unit: Unit, config: TrainBench) -> Forecast:
    """6 operations per parameter and token, of a few steps at least."""
    variant: Variant = unit.data
    shapes = state_shapes(variant.model, variant.train)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    tokens = variant.train.batch * variant.train.length
    steps = len(unit.cells) * (CHECKED + config.bench.least)
    return Forecast(flops=6.0 * size * tokens * steps, bytes=16 * size)


def prepare(unit: Unit, config: TrainBench, directory: RunDirectory) -> Measure:
    """Random batches; the programs are made when a cell asks for them."""
    variant, bench = unit.data, config.bench
    train = variant.train
    random = np.random.default_rng(train.seed)
    shape = (CHECKED, train.batch, train.length + 1)
    batches = random.integers(0, variant.model.vocab, shape).astype(np.int32)
    found: dict[str, tuple[list[float], timing.Timing]] = {}

    def timed(framework: str) -> tuple[list[float], timing.Timing]:
        if framework not in found:
            make = _slimjax if framework == "slimjax" else _torch
            step, compile_seconds = make(variant, batches[0], bench)
            losses = [step(batch) for batch in batches]
            run = timing.time_calls(
                lambda: step(batches[-1]), seconds=bench.seconds, least=bench.least, wait=lambda loss: loss
            )
            found[framework] = losses, timing.Timing(run.samples, compile_seconds)
        return found[framework]

    def measure(cell: Cell) -> dict[str, Any]:
        losses, run = timed(str(cell["framework"]))
        metrics = run.metrics()
        metrics["tokens_per_second"] = 1e3 * train.batch * train.length / run.milliseconds
        if cell["framework"] == "slimjax":
            metrics |= _against(losses, run, timed)
        return metrics

    return measure


def _against(
    losses: Sequence[float], run: timing.Timing, timed: Callable[[str], tuple[list[float], timing.Timing]]
) -> dict[str, float]:
    """Speed and losses against the peer's, where there is one."""
    try:
        others, peer = timed("torch")
    except NotImplementedError:
        return {}  # the peer's own row says why
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))
    return {
        "speed_over_peer": peer.milliseconds / run.milliseconds,
        "fastest_over_peer": min(peer.samples) / min(run.samples),
        "peer_difference": difference,
    }


def _slimjax(
    variant: Variant, batch: np.ndarray, bench: TrainBenchConfig
) -> tuple[Callable[[np.ndarray], float], float]:
    state = initial_state(variant.model, variant.train)
    given = numbers(variant.train)
    program, seconds = timing.compiled(
        train_step(variant.model, variant.train), state, batch, given, donate_argnums=0
    )

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        state, loss = program(state, tokens, given)
        return float(loss)

    return step, seconds


def _torch(
    variant: Variant, batch: np.ndarray, bench: TrainBenchConfig
) -> tuple[Callable[[np.ndarray], float], None]:
    del batch
    peer = torch_peer()
    peer.use_threads(bench.threads)
    params: nnx.State = initial_state(variant.model, variant.train).params
    model = peer.Peer(variant.model, params, train=True)
    rates = schedule(variant.train)
    steps = [rates(index) for index in range(variant.train.steps)]
    return model.training_step(variant.train, lambda index: steps[min(index, len(steps) - 1)]), None


def torch_peer() -> Any:
    """The module of the PyTorch programs. Raises NotImplementedError where PyTorch is not installed."""
    try:
        from experiments import torch_peer as module
    except ImportError as error:
        raise NotImplementedError(NEED_TORCH) from error
    return module
