"""Sections of the programs that prove and measure kernels on an accelerator."""

from dataclasses import dataclass

from experiments.bench_settings import BenchConfig
from slimjax.config import ComputeDtype, Config, ConfigError, Count, Whole
from slimjax.kernels.api import IMPLEMENTATIONS
from slimjax.kernels.shapes import SHAPES
from slimjax.scheme import parse_scheme, suggest


def check_names(config: Config, section: str) -> None:
    """Raise ConfigError for unknown shapes, schemes or implementations, and for values that are there twice."""
    for field, known in (
        ("shapes", SHAPES),
        ("implementations", IMPLEMENTATIONS),
        ("schemes", None),
        ("prompts", None),
    ):
        names = getattr(config, field, ())
        for name in names:
            if known is not None and name not in known:
                raise ConfigError(f"{field}: unknown name {name!r}{suggest(name, known)}", field, section)
            if known is None:
                _check_scheme(name, field, section)
    for field in (
        "shapes",
        "schemes",
        "prompts",
        "implementations",
        "dtypes",
        "tokens",
        "batches",
        "contexts",
    ):
        values = getattr(config, field, None)
        if values is not None and len(set(values)) < len(values):
            raise ConfigError(f"{field} = {values}: expected distinct values", field, section)


def _check_scheme(text: str, field: str, section: str) -> None:
    try:
        parse_scheme(text)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}", field, section) from None


@dataclass(frozen=True, kw_only=True)
class ParityConfig(Config):
    """Kernels beside the reference in float64, on ragged batches whose unused slots are poisoned."""

    shapes: tuple[str, ...] = ("tiny-rope",)  # names in `slimjax.kernels.shapes`
    schemes: tuple[str, ...] = ("kv:bf16",)
    implementations: tuple[str, ...] = ()  # of `slimjax.decode`; (): those made for the backend in use
    dtypes: tuple[ComputeDtype, ...] = ("bfloat16",)  # compute dtypes
    tokens: tuple[Count, ...] = (1,)  # query tokens
    prompts: tuple[str, ...] = ()  # schemes whose prompts, of so many tokens as there are slots, meet in INT8
    block: Count = 64  # sequences end beside, at and inside blocks of so many slots
    context: Count = 512  # slots
    seed: Whole = 0

    def validate(self) -> None:
        check_names(self, "Parity")
        if self.context <= 2 * self.block:
            raise ConfigError(f"context = {self.context}: expected more than two blocks", "context")


@dataclass(frozen=True, kw_only=True)
class CeilingsConfig(BenchConfig):
    """What the device can do at best."""

    copy_bytes: Count = 1 << 28  # of an array that is copied and summed
    product: Count = 1024  # rows and columns of a matrix
    dtypes: tuple[ComputeDtype, ...] = ("float32", "bfloat16")  # of the product

    def validate(self) -> None:
        check_names(self, "Ceilings")


@dataclass(frozen=True, kw_only=True)
class BreakdownConfig(BenchConfig):
    """Decoding of tiled caches, stage by stage."""

    shapes: tuple[str, ...] = ("small-rope",)  # names in `slimjax.kernels.shapes`
    schemes: tuple[str, ...] = ("kv:flashq4", "kv:flashq4@sas")  # of INT8 tiles
    batches: tuple[Count, ...] = (1,)
    contexts: tuple[Count, ...] = (4096,)  # cached tokens
    implementation: str | None = None  # of `slimjax.decode`, for the whole; None: that of the backend in use

    def validate(self) -> None:
        check_names(self, "Breakdown")
        if self.implementation is not None and self.implementation not in IMPLEMENTATIONS:
            hint = suggest(self.implementation, IMPLEMENTATIONS)
            raise ConfigError(
                f"implementation: unknown name {self.implementation!r}{hint}", "implementation", "Breakdown"
            )
