"""Sections of the programs that take times."""

from dataclasses import dataclass
from typing import Annotated

from slimjax.config import ComputeDtype, Config, ConfigError, Count, Positive, Range, Whole
from slimjax.scheme import parse_scheme


def check_models(names: tuple[str, ...]) -> None:
    """Raise ConfigError where these are no names of models: they are scopes of bindings, and folders."""
    if not names or len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise ConfigError(f"models = {names}: expected distinct names like 'default', at least one", "models")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Config):
    """How long each cell is timed."""

    seconds: Positive = 2.0  # no new call of a cell begins after so long
    least: Count = 10  # calls, whatever they take
    threads: Whole = 0  # CPU threads of PyTorch; 0: as many as JAX has


@dataclass(frozen=True, kw_only=True)
class TrainBenchConfig(BenchConfig):
    """The models whose training is timed, named as in `Quickstart`."""

    models: tuple[str, ...] = ("default",)

    def validate(self) -> None:
        check_models(self.models)


@dataclass(frozen=True, kw_only=True)
class DecodeBenchConfig(BenchConfig):
    """Decode attention by itself (shapes), and whole models that generate text (models, named as in `Quickstart`)."""

    shapes: tuple[str, ...] = ("tiny-rope",)  # names in `slimjax.kernels.shapes`
    schemes: tuple[str, ...] = (
        "kv:float32",
        "k:float32",
    )  # one whose dtype is not among `dtypes` is timed under all
    dtypes: tuple[ComputeDtype, ...] = ("float32",)  # compute dtypes
    batches: tuple[Count, ...] = (1,)
    contexts: tuple[Count, ...] = (1024,)  # cached tokens
    implementations: tuple[str, ...] = ()  # of `slimjax.decode`; (): those made for the backend in use
    copy_bytes: Annotated[int, Range(least=1, most=1 << 40)] = 1 << 28  # moved to see how fast memory is
    caches: Count = 4  # at most, read in turns, so that the processor's own cache serves less
    steps: Count = 1  # in one timed program, for those that launching a program takes longer than
    peers: tuple[str, ...] = ()  # of `experiments.decode_peers`; (): those made for the backend in use
    models: tuple[str, ...] = ()
    model_schemes: tuple[str, ...] = ("kv:float32", "k:float32")
    model_implementations: tuple[str, ...] = ()  # that all layers take; (): that of the backend in use
    model_batches: tuple[Count, ...] = (1, 8)
    model_dtype: ComputeDtype = "float32"  # of the models' weights and arithmetic
    alike: bool = False  # every layer has the first one's weights, which alone is converted: for large models
    prompt_length: Count = 128
    generated: Count = 128

    def validate(self) -> None:
        if self.models:
            check_models(self.models)
        lists = ("shapes", "schemes", "dtypes", "batches", "contexts", "implementations", "peers")
        for name in (*lists, "model_schemes", "model_implementations", "model_batches"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} = {values}: expected distinct values", name)
        if self.generated < 2:
            raise ConfigError(
                "generated = 1: expected at least 2, time per token being a difference", "generated"
            )


@dataclass(frozen=True, kw_only=True)
class LayerBenchConfig(BenchConfig):
    """One self-attention layer under many caches; `kv:bf16` is the peer, whether it is among the schemes or not."""

    shapes: tuple[str, ...] = ("small-rope",)  # names in `slimjax.kernels.shapes`
    schemes: tuple[str, ...] = ("kv:bf16",)
    dtypes: tuple[ComputeDtype, ...] = ("float32",)  # compute dtypes
    batches: tuple[Count, ...] = (1,)
    context: Count = 4096  # tokens of a prefill, and those that decoding finds in the cache
    generated: Count = (
        128  # tokens that are decoded one by one in a timed call: whole buffers are flushed in it
    )

    def validate(self) -> None:
        for name in ("shapes", "schemes", "dtypes", "batches"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} = {values}: expected distinct values, at least one", name)
        for scheme in self.schemes:
            try:
                parse_scheme(scheme)
            except ValueError as error:
                raise ConfigError(f"schemes: {error}", "schemes") from None
