"""Train one model, or several named ones: checkpoints, stopping and going on, a record of each at the end."""

import contextlib
import math
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.compilation import keep_compiled
from experiments.directory import Refused, RunDirectory
from experiments.progress import show, steps_once
from experiments.settings import Build
from slimjax import checkpoint, trackers
from slimjax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
    resolved,
)
from slimjax.data import Corpus, load_corpus
from slimjax.records import Record, RecordLog, provenance
from slimjax.report import write_report
from slimjax.train import Report, TrainState, held_out, state_shapes, train

FOLLOWED = ("loss", "bits_per_byte", "learning_rate", "tokens_per_second")  # what trackers are told


@dataclass(frozen=True, kw_only=True)
class Variant(Config):
    """A model and how it is trained."""

    name: str
    model: ModelConfig
    train: TrainConfig

    def validate(self) -> None:
        if self.model.position == "learned" and self.model.max_length < self.train.length:
            raise ConfigError(
                f"{self.name}: learned positions end at max_length = {self.model.max_length}, "
                f"training needs {self.train.length}"
            )


@dataclass(frozen=True, kw_only=True)
class Training(Config):
    """The whole run."""

    data: DataConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    held_out_tokens: int
    variants: tuple[Variant, ...]


def resolve(build: Build) -> Training:
    """The run from its sections; a model's name is the scope of its bindings."""
    section = build("Training")
    tracking = build("Tracking")
    trackers.check(tracking)
    return Training(
        data=build("Data"),
        checkpoint=build("Checkpoint"),
        tracking=tracking,
        held_out_tokens=section.held_out_tokens,
        variants=tuple(
            Variant(name=name, model=build("Model", name), train=build("Train", name))
            for name in section.models
        ),
    )


def cells(config: Training) -> list[dict[str, Any]]:
    """One per model."""
    return [_cell(variant) for variant in config.variants]


def _cell(variant: Variant) -> dict[str, Any]:
    return {
        "experiment": "train",
        "model": variant.name,
        "position": variant.model.position,
        "heads": variant.model.heads,
        "kv_heads": variant.model.K,
        "head_dim": variant.model.H,
        "width": variant.model.width,
        "batch": variant.train.batch,
        "steps": variant.train.steps,
        "dtype": variant.train.dtype,
        "seed": variant.train.seed,
    }


def run(config: Training, directory: RunDirectory) -> list[Record]:
    """Train what is not recorded, going on where training stopped; returns all records."""
    log = RecordLog(directory.path / "records.jsonl")
    corpus = load_corpus(config.data)
    for variant in config.variants:
        if _cell(variant) not in log:
            log.add(_recorded(variant, corpus, config, directory))
    write_report(
        directory.path,
        log.records,
        title="Training",
        config=resolved(config),
        metrics=steps_once(directory.metrics()),
    )
    return log.records


def _recorded(variant: Variant, corpus: Corpus, config: Training, directory: RunDirectory) -> Record:
    """One model's record: numbers, or why there are none. What can be mended (`Refused`) is no result."""
    start = time.monotonic()

    def record(**result: Any) -> Record:
        seconds = time.monotonic() - start
        source = provenance(config=directory.run, seed=variant.train.seed, seconds=seconds)
        return Record(_cell(variant), provenance=source, **result)

    try:
        state = trained(variant, corpus, directory, config.checkpoint, config.tracking)
        metrics = held_out(variant.model, variant.train, state, corpus, config.held_out_tokens)
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001  recorded, logged, and the run's exit status
        directory.log(f"{variant.name}\n{traceback.format_exc()}")
        return record(status="failed", reason=" ".join(f"{type(error).__name__}: {error}".split()))
    lines = [line for line in steps_once(directory.metrics()) if line["model"] == variant.name]
    if speeds := [line["tokens_per_second"] for line in lines if line["tokens_per_second"]]:
        metrics["tokens_per_second"] = statistics.median(speeds)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return record(metrics={**metrics, "parameters": parameters})


def trained(
    variant: Variant,
    corpus: Corpus,
    directory: RunDirectory,
    saving: CheckpointConfig = CheckpointConfig(),
    tracking: TrackingConfig = TrackingConfig(),
) -> TrainState:
    """The variant's state after its last step, from `models/NAME`: restored, gone on with, or begun.

    SIGTERM and Ctrl-C let the step at work end, save, and end the run: SystemExit(143), KeyboardInterrupt.

    Raises:
        Refused: the newest checkpoint is damaged, or the disk is full: mended, the same command goes on.
        FloatingPointError: the loss, or a parameter, is not finite; the checkpoints before are kept.
    """
    keep_compiled()
    folder = directory.path / "models" / variant.name
    again = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    done = checkpoint.latest_step(folder) or 0
    state = _restored(folder, variant) if done else None
    if state is not None and done >= variant.train.steps:
        return state
    opened = trackers.tracking(
        tracking,
        folder=directory.path / "tensorboard" / variant.name,
        name=f"{variant.name}-{directory.run}",
        values=resolved(variant),
        step=done,
    )
    try:
        if again:
            directory.metric({"event": "resume", "model": variant.name, "step": done})
        with opened as followers, deferred_signals() as caught:
            state = train(
                variant.model,
                variant.train,
                corpus,
                on_step=_reporting(variant, corpus, directory, followers),
                state=state,
                save=lambda state: checkpoint.save(folder, int(state.step), state, keep=saving.keep),
                save_every=saving.every,
                stop=lambda: caught,
            )
    except OSError as error:
        step = checkpoint.latest_step(folder) or 0
        raise Refused(f"{error}; that mended, the same command goes on from step {step}") from error
    if caught:
        _end(variant.name, int(state.step), caught[0])
    return state


def _restored(folder: Path, variant: Variant) -> TrainState:
    try:
        return checkpoint.restore(folder, state_shapes(variant.model, variant.train))
    except ValueError as error:
        raise Refused(str(error)) from error


def _reporting(
    variant: Variant, corpus: Corpus, directory: RunDirectory, followers: Sequence[trackers.Tracker]
) -> Report:
    """What training calls with each report: to metrics.jsonl first, then the screen and the trackers."""

    def on_step(line: Mapping[str, float]) -> None:
        bits = line["loss"] / math.log(2) / corpus.bytes_per_token
        full = {"model": variant.name, **line, "bits_per_byte": bits}
        directory.metric(full)
        show(variant.name, full)
        for follower in followers:
            follower.log({name: full[name] for name in FOLLOWED}, int(line["step"]))

    return on_step


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """A list that the first SIGTERM or Ctrl-C is put into, for the work to end well; a second acts at once."""
    caught: list[signal.Signals] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number))
        print(f"{caught[-1].name}: saving after this step", file=sys.stderr, flush=True)
        for name, handler in previous.items():
            signal.signal(name, handler)

    if threading.current_thread() is threading.main_thread():  # elsewhere signals do not arrive
        for name in (signal.SIGTERM, signal.SIGINT):
            previous[name] = signal.getsignal(name) or signal.SIG_DFL
            signal.signal(name, note)
    try:
        yield caught
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _end(name: str, step: int, caught: signal.Signals) -> None:
    print(f"{name}: saved at step {step}", file=sys.stderr)
    if caught is signal.SIGINT:
        raise KeyboardInterrupt
    print("terminated; the same command goes on from here", file=sys.stderr)
    raise SystemExit(128 + caught)
