"""Train one model, or several named ones: checkpoints, stopping and going on, a record of each at the end."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments import checks, schemes
from experiments.directory import Refused, RunDirectory
from experiments.progress import show, steps_once
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from experiments.stopping import deferred_signals, say, stop
from slimjax import checkpoint, pretrained, trackers
from slimjax.config import (
    ASIDE,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
    resolved,
)
from slimjax.data import Corpus
from slimjax.train import TrainState, held_out, state_shapes, train

TITLE = "Training"
FOLLOWED = ("mean_loss", "bits_per_byte", "learning_rate", "tokens_per_second")  # what trackers are told


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
                f"training needs {self.train.length}",
                ("max_length", "position"),
                "Model",
                self.name,
                ("Train.length",),
            )


@dataclass(frozen=True, kw_only=True)
class Training(Config):
    """The whole run."""

    data: DataConfig
    checkpoint: CheckpointConfig = dataclasses.field(metadata=ASIDE)
    tracking: TrackingConfig = dataclasses.field(metadata=ASIDE)
    held_out_tokens: int
    variants: tuple[Variant, ...]


def resolve(build: Build) -> Training:
    """The run from its sections; a model's name is the scope of its bindings."""
    section = build("Training")
    tracking = build("Tracking")
    try:
        trackers.check(tracking)
    except ConfigError as error:
        raise ConfigError(error.problem, error.field, "Tracking") from None
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


def units(config: Training) -> list[Unit]:
    """A model each, of one cell."""
    return [Unit(variant.name, (_cell(variant),), variant) for variant in config.variants]


def _cell(variant: Variant) -> Cell:
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


def forecast(unit: Unit, config: Training) -> Forecast:
    """Of training; the held-out text is little beside it."""
    return schemes.training(unit.data.model, unit.data.train)


def check(config: Training) -> Mapping[str, str]:
    """Of the text, for every model."""
    corpus = checks.text(config.data)
    for variant in config.variants:
        checks.trainable(corpus, variant.model, variant.train, variant.name)
        checks.held_out(corpus, variant.train, config.held_out_tokens, variant.name)
    return checks.named(config.data, corpus)


def prepare(unit: Unit, config: Training, directory: RunDirectory) -> Measure:
    """Training is the cell's own work, so that its time is the record's."""
    variant, corpus = unit.data, checks.loaded(config.data, directory)

    def measure(cell: Cell) -> dict[str, Any]:
        state = trained(variant, corpus, config.data, directory, config.checkpoint, config.tracking)
        metrics = held_out(variant.model, variant.train, state, corpus, config.held_out_tokens)
        lines = [line for line in steps_once(directory.metrics()) if line["model"] == variant.name]
        if speeds := [line["tokens_per_second"] for line in lines if line["tokens_per_second"]]:
            metrics["tokens_per_second"] = statistics.median(speeds)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        return {**metrics, "parameters": parameters}

    return measure


def trained(
    variant: Variant,
    corpus: Corpus,
    data: DataConfig,
    directory: RunDirectory,
    saving: CheckpointConfig = CheckpointConfig(),
    tracking: TrackingConfig = TrackingConfig(),
) -> TrainState:
    """The variant's state after its last step, from `models/NAME`: restored, gone on with, or begun.

    SIGTERM and Ctrl-C let the step at work end, save, and end the run: Terminated, KeyboardInterrupt.

    Raises:
        Refused: the newest checkpoint is damaged, or nothing can be written: mended, the same command goes on.
        FloatingPointError: the loss, or a parameter, is not finite; the checkpoints before are kept.
    """
    folder = directory.path / "models" / variant.name
    again = folder.exists()
    try:
        pretrained.describe(folder, variant.model, data)
    except OSError as error:
        raise _unwritten(folder, error) from error
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
            reporting = Reporting(variant, corpus, directory, followers)
            state = train(
                variant.model,
                variant.train,
                corpus,
                on_step=reporting.on_step,
                on_loss=reporting.on_loss,
                state=state,
                save=lambda state: checkpoint.save(folder, int(state.step), state, keep=saving.keep),
                save_every=saving.every,
                stop=lambda: caught,
            )
    except BrokenPipeError:  # nobody reads the progress any more
        raise
    except OSError as error:
        raise _unwritten(folder, error) from error
    if caught:
        say(f"{variant.name}: saved at step {int(state.step)}")
        stop(caught[0])
    return state


def _unwritten(folder: Path, error: OSError) -> Refused:
    """Of a disk that is full, or whatever else keeps a run from writing."""
    step = checkpoint.latest_step(folder) or 0
    problem = " ".join(str(error).split())
    return Refused(f"{problem}; that mended, the same command goes on from step {step}")


def _restored(folder: Path, variant: Variant) -> TrainState:
    try:
        return checkpoint.restore(folder, state_shapes(variant.model, variant.train))
    except ValueError as error:
        raise Refused(str(error)) from error


class Reporting:
    """What training calls: a line a step to metrics.jsonl first, then the screen and the trackers now and then.

    A line holds the step's own loss; where progress is due it also has the mean loss since the last time.
    """

    def __init__(
        self, variant: Variant, corpus: Corpus, directory: RunDirectory, followers: Sequence[trackers.Tracker]
    ):
        self.variant, self.directory, self.followers = variant, directory, followers
        self.nats_per_bit = math.log(2) * corpus.bytes_per_token
        self.loss = math.nan  # of the newest step

    def on_loss(self, step: int, loss: float) -> None:
        self.loss = loss
        train = self.variant.train
        if step % train.log_every and step != train.steps:  # else on_step follows, with more to say
            # Not synced each: the next line that is, or the system's own time, takes them along.
            self.directory.metric({"model": self.variant.name, "step": step, "loss": loss}, sync=False)

    def on_step(self, line: Mapping[str, float]) -> None:
        mean = line["loss"]
        own = {"loss": self.loss, "mean_loss": mean, "bits_per_byte": mean / self.nats_per_bit}
        full = {"model": self.variant.name, **line, **own}
        self.directory.metric(full)
        show(self.variant.name, full)
        for follower in self.followers:
            follower.log({name: full[name] for name in FOLLOWED}, int(line["step"]))
