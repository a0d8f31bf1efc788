"""Metrics to other programs while a run is at work. metrics.jsonl has them all; these are views of it.

The packages are extras, imported when a config names them.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from slimjax.config import ConfigError, TrackingConfig

EXTRAS = {"tensorboardX": "tensorboard", "wandb": "trackers", "trackio": "trackers"}


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Event files in ``folder``, by tensorboardX; on going on after ``step``, later values of before are hidden."""

    def __init__(self, folder: Path, step: int):
        writer = importlib.import_module("tensorboardX").SummaryWriter
        self._writer = writer(str(folder), purge_step=step + 1 if step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class Run:
    """A run of wandb or of trackio, which share their interface; going on, it is the same run again.

    wandb drops values of steps it has seen. They are equal: training is bit-exact.
    """

    def __init__(self, module: str, project: str, name: str, config: Mapping[str, Any]):
        self._module = importlib.import_module(module)
        same = {"id": name} if module == "wandb" else {}  # trackio knows a run by its name
        self._module.init(project=project, name=name, config=dict(config), resume="allow", **same)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def finish(self) -> None:
        self._module.finish()


def check(config: TrackingConfig) -> None:
    """Raise ConfigError where a package that the config names is not installed."""
    wanted = {"tensorboard": "tensorboardX" if config.tensorboard else None, "tracker": config.tracker}
    for field, module in wanted.items():
        if module and importlib.util.find_spec(module) is None:
            hint = f"pip install 'slimjax[{EXTRAS[module]}]'"
            raise ConfigError(
                f"{field} = {getattr(config, field)!r}: {module} is not installed; {hint}", field
            )


@contextlib.contextmanager
def tracking(
    config: TrackingConfig, *, folder: Path, name: str, values: Mapping[str, Any], step: int = 0
) -> Iterator[list[Tracker]]:
    """The trackers a config asks for, finished at the end.

    Args:
        config: which.
        folder: for event files.
        name: of the run, the same when it goes on.
        values: the run's config.
        step: steps done before.
    """
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        if config.tensorboard:
            trackers.append(TensorBoard(folder, step))
            stack.callback(trackers[-1].finish)
        if config.tracker is not None:
            trackers.append(Run(config.tracker, config.project, name, values))
            stack.callback(trackers[-1].finish)
        yield trackers
