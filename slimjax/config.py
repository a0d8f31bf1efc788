"""Configuration: frozen, keyword-only, hashable dataclasses that check themselves when built.

A field's annotation is its whole rule: the type, the words allowed (`Literal`), the range (`Annotated`).
Values are never converted, with one exception: an `int` given for a `float` becomes that float, so that
equal configs have equal JSON and an equal `digest`.
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from slimjax.scheme import parse_scheme


class ConfigError(ValueError):
    """A wrong config value.

    Attributes:
        problem: what is wrong, in a line.
        field: the field at fault; several that clash; or None.
        section, scope: the field's, where they are not those that are being built.
        others: fields of other sections that clash with it, as 'Section.field'.
    """

    def __init__(
        self,
        problem: str,
        field: str | tuple[str, ...] | None = None,
        section: str | None = None,
        scope: str = "",
        others: tuple[str, ...] = (),
    ):
        super().__init__(problem)
        self.problem, self.field, self.section, self.scope, self.others = (
            problem,
            field,
            section,
            scope,
            others,
        )

    @property
    def places(self) -> list[tuple[str, str]]:
        """(section, field) of everything that may be at fault."""
        fields = (self.field,) if isinstance(self.field, str) else self.field or ()
        split = [name.partition(".") for name in self.others]
        return [(self.section or "", field) for field in fields] + [(name, field) for name, _, field in split]


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included; `above` is a bound that is itself excluded."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.least <= value <= self.most and value > self.above

    def __str__(self) -> str:
        parts = [
            f">= {self.least}" if self.least > -math.inf else "",
            f"> {self.above}" if self.above > -math.inf else "",
            f"<= {self.most}" if self.most < math.inf else "",
        ]
        return "a finite number " + " and ".join(part for part in parts if part)


MOST = 2**31 - 1  # what the device counts to
Count = Annotated[int, Range(least=1, most=MOST)]
Whole = Annotated[int, Range(least=0, most=MOST)]
Positive = Annotated[float, Range(above=0.0)]
NonNegative = Annotated[float, Range(least=0.0)]
Fraction = Annotated[float, Range(least=0.0, most=1.0)]
ComputeDtype = Literal["float64", "float32", "bfloat16", "float16"]
PositionKind = Literal["none", "learned", "rope", "alibi", "t5", "fire", "kerple"]


def _fit(value: Any, annotation: Any, field: str) -> Any:
    """`value` as `annotation` wants it, or ConfigError."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:  # `validate` knows more
        return value
    if origin is Annotated:
        inner, bounds = arguments
        value = _fit(value, inner, field)
        if value not in bounds:
            raise ConfigError(f"{field} = {value!r}: expected {bounds}", field)
        return value
    if origin is Literal:
        if value not in arguments or type(value) not in {type(word) for word in arguments}:
            words = ", ".join(map(repr, arguments))
            raise ConfigError(f"{field} = {value!r}: expected one of {words}", field)
        return value
    if origin in (typing.Union, types.UnionType):  # only `X | None` is in use
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _fit(value, inner, field)
    if origin is tuple:
        if not isinstance(value, tuple):
            hint = ", write (a, b) or (a,)" if isinstance(value, list | str) else ""
            raise ConfigError(f"{field} = {value!r}: expected a tuple{hint}", field)
        return tuple(_fit(item, arguments[0], field) for item in value)
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is not annotation:  # exact: True is not an int here
        raise ConfigError(
            f"{field} = {value!r}: expected {annotation.__name__}, got {type(value).__name__}", field
        )
    return value


ELSEWHERE = {"elsewhere": True}
"""Metadata of a field that says where something lies, and not what: it is no part of what a config resolves to."""

ASIDE = {"aside": True}
"""Metadata of a field that no result depends on, such as how often progress is told: no part of the run id."""

ADDED = {"added": True}
"""Metadata of a field younger than configs in use: at its default it is left out, so that those keep their ids."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every section: checks types and ranges, then asks `validate` about the fields together."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value = _fit(getattr(self, field.name), hints[field.name], field.name)
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Raise ConfigError where fields clash with each other."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A decoder language model; K, H, F (see the axis legend) are derived where not given."""

    vocab: Count = 256
    layers: Annotated[int, Range(least=1, most=1024)] = 4
    width: Count = 128
    heads: Count = 4
    kv_heads: Count | None = None  # None: as many as heads
    head_dim: Count | None = None  # None: width / heads
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_width: Count | None = (
        None  # None: 4 width (gelu); 8/3 width rounded up to 16 (swiglu), as many weights
    )
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    bias: bool = False
    tied: bool = True
    position: PositionKind = "rope"
    rope_theta: Positive = 1e4
    rope_interleaved: bool = False
    window: Count | None = None  # tokens a query sees, itself included
    key_init: Literal["default", "orthogonal"] = "default"
    norm_epsilon: Positive = dataclasses.field(default=1e-6, metadata=ADDED)  # added to the variance
    qkv_bias: bool = dataclasses.field(
        default=False, metadata=ADDED
    )  # of queries, keys, values, as Qwen2 has
    max_length: Count = 1024  # longest sequence of learned positions

    @property
    def K(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def H(self) -> int:
        """Head size."""
        return self.head_dim or self.width // self.heads

    @property
    def F(self) -> int:
        """Width of the MLP."""
        default = 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // (3 * 16)) * 16
        return self.mlp_width or default

    def validate(self) -> None:
        if self.head_dim is None and self.width % self.heads:
            raise ConfigError(
                f"width = {self.width} is not a multiple of heads = {self.heads}; set head_dim",
                ("width", "heads"),
            )
        if self.heads % self.K:
            raise ConfigError(
                f"heads = {self.heads} is not a multiple of kv_heads = {self.K}", ("heads", "kv_heads")
            )
        if self.position == "rope" and self.H % 2:
            raise ConfigError(
                f"position = 'rope' needs an even head size, got {self.H}",
                ("position", "width", "heads", "head_dim"),
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """AdamW with linear warm-up and cosine decay; parameters and optimizer state stay float32."""

    steps: Whole = 1000
    batch: Count = 16  # sequences per step, over all accumulation parts
    length: Count = 128  # tokens per sequence
    learning_rate: Positive = 1e-3
    warmup: Whole = 50  # steps
    final_fraction: Fraction = 0.1  # of learning_rate, reached at the last step
    weight_decay: NonNegative = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    clip: Positive | None = 1.0  # global gradient norm
    accumulation: Count = 1  # parts a batch is split into
    dtype: Literal["float32", "bfloat16"] = "float32"  # compute dtype
    seed: Whole = 0
    conditioning_penalty: NonNegative = 0.0  # weight of the penalty on W_K, 0 = off
    log_every: Count = dataclasses.field(default=50, metadata=ASIDE)  # steps

    def validate(self) -> None:
        if self.warmup > self.steps:
            raise ConfigError(
                f"warmup = {self.warmup} is longer than steps = {self.steps}", ("warmup", "steps")
            )
        if self.batch % self.accumulation:
            raise ConfigError(
                f"batch = {self.batch} is not a multiple of accumulation = {self.accumulation}",
                ("batch", "accumulation"),
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """When training saves what it can go on from; it saves at the end and when told to stop, too."""

    every: Count = 500  # steps
    keep: Count = 2  # the newest


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Config):
    """Programs that are told the metrics while training is at work; each is an extra."""

    tensorboard: bool = False  # event files in the run directory
    tracker: Literal["wandb", "trackio"] | None = None
    project: str = "slimjax"  # the tracker's


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Text as bytes (or tokens of a tokenizer), split by file; or a task's problems, split one by one."""

    path: str | None = None  # a file, a folder or a glob; None: the running Python's standard library
    tokenizer: str | None = None  # a tokenizer.json; None: bytes
    held_out_percent: Annotated[float, Range(above=0.0, most=50.0)] = 5.0
    task: str | None = dataclasses.field(default=None, metadata=ADDED)  # `slimjax.tasks.parse_task` reads it
    first_task: str | None = dataclasses.field(default=None, metadata=ADDED)  # an easier one, to begin with
    first_steps: Whole = dataclasses.field(default=0, metadata=ADDED)  # for so many training steps

    def validate(self) -> None:
        if (self.first_task is None) != (self.first_steps == 0) or (self.first_task and self.task is None):
            raise ConfigError(
                "first_task, first_steps and the task they lead to belong together: expected all three, or "
                "neither of the first two",
                ("first_task", "first_steps", "task"),
            )
        if self.task is None:
            return
        if self.path is not None or self.tokenizer is not None:
            raise ConfigError("task makes its own text: expected no path and no tokenizer beside it", "task")
        from slimjax.tasks import parse_task  # tasks import models, which import this module

        for name in ("task", "first_task"):
            try:
                parse_task(getattr(self, name) or "lookup_sum")
            except ValueError as error:
                raise ConfigError(str(error), name) from None


@dataclass(frozen=True, kw_only=True)
class EquivalenceConfig(Config):
    """What is measured of each scheme on a trained model."""

    schemes: tuple[str, ...] = ("kv:bf16", "k:float32", "k:int16", "k:bf16", "k:int8")
    dtypes: tuple[ComputeDtype, ...] = (
        "float32",
        "bfloat16",
        "float16",
    )  # compute dtypes, the first for quality
    tokens: Count = 8192  # held-out tokens scored
    length: Count = 256  # tokens per scored window
    generated: Count = 128  # tokens generated for the greedy agreement
    prompts: Count = 8  # sequences generated
    prompt_length: Count = 64

    def validate(self) -> None:
        for field in ("schemes", "dtypes"):
            values = getattr(self, field)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{field} = {values}: expected distinct values, at least one", field)
        found: set[str] = set()
        for text in self.schemes:
            try:
                scheme = str(parse_scheme(text))
            except ValueError as error:
                raise ConfigError(str(error), "schemes") from None
            if scheme in found:
                raise ConfigError(f"schemes has {scheme} twice, the second time as {text!r}", "schemes")
            found.add(scheme)
        if self.tokens % self.length:
            raise ConfigError(
                f"tokens = {self.tokens} is not a multiple of length = {self.length}", ("tokens", "length")
            )


def resolved(config: Any, *, aside: bool = True) -> Any:
    """A config, or a mapping or sequence of configs, as plain JSON data; without the fields marked ELSEWHERE.

    aside: with those marked ASIDE.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: resolved(getattr(config, field.name), aside=aside)
            for field in dataclasses.fields(config)
            if field.metadata != ELSEWHERE
            and (aside or field.metadata != ASIDE)
            and (field.metadata != ADDED or getattr(config, field.name) != field.default)
        }
    if isinstance(config, Mapping):
        return {key: resolved(value, aside=aside) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [resolved(value, aside=aside) for value in config]
    return config


def canonical_json(config: Any) -> str:
    """The one JSON text of a config: sorted keys, two spaces, a newline at the end."""
    return json.dumps(resolved(config), sort_keys=True, indent=2, allow_nan=False) + "\n"


def digest(config: Any) -> str:
    """First 12 hex digits of the sha256 of the `canonical_json`, fields marked ASIDE left out: the run id."""
    return hashlib.sha256(canonical_json(resolved(config, aside=False)).encode()).hexdigest()[:12]
