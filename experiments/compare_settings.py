"""Sections of the comparison of caches on language models: `compare` and `synthetic`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from slimjax.config import ELSEWHERE, Config, ConfigError, Count, Fraction, Positive, Whole
from slimjax.scheme import parse_scheme

Study = Literal[
    "main", "components", "selectors", "tiles", "buffer", "sas", "protection", "slim_turbo", "context", "pareto"
]  # fmt: skip
Selector = Literal["none", "priority", "entropy", "minmax", "variation", "random", "calibrated"]


def _check(config: Config, names: Sequence[str], least: int = 1) -> None:
    """Raise ConfigError for a field whose values are not distinct, or are fewer than ``least``."""
    for name in names:
        values = getattr(config, name)
        if len(values) < least or len(set(values)) < len(values):
            many = ", at least one" if least else ""
            raise ConfigError(f"{name} = {values}: expected distinct values{many}", name)


def _check_schemes(name: str, texts: Sequence[str]) -> None:
    """Raise ConfigError for a text that is not a scheme, and for two that are the same one."""
    found: set[str] = set()
    for text in texts:
        try:
            scheme = str(parse_scheme(text))
        except ValueError as error:
            raise ConfigError(str(error), name) from None
        if scheme in found:
            raise ConfigError(f"{name} has {scheme} twice, the second time as {text!r}", name)
        found.add(scheme)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """Language models, and the caches that are tried on each.

    Every scheme is a cell under every number of protected layers; one of two widths besides under every selector
    and fraction, the random selector under every seed.
    """

    study: Study = "main"  # the table that the cells are for
    # Directories of Llama-like models, and what those read; folders of models trained here, which read the part of
    # their own text that they were not trained on.
    models: tuple[str, ...] = field(default=("models/smollm2-135m-instruct",), metadata=ELSEWHERE)
    text: str = field(default="models/text/in_the_year_2889.txt", metadata=ELSEWHERE)
    trained: tuple[str, ...] = field(default=(), metadata=ELSEWHERE)
    problems: Whole = 0  # that a model trained on a task is set; 0: none
    schemes: tuple[str, ...] = ("kv:bf16", "kv:flashq4@sas", "kv:kivi4")
    selectors: tuple[Selector, ...] = ("none",)
    fractions: tuple[Fraction, ...] = ()  # of the heads in fewer bits; (): as each scheme says
    protected: tuple[Whole, ...] = (0,)  # layers at either end
    protection: str = "kv:int8"  # their scheme
    seeds: tuple[Whole, ...] = (0,)
    tokens: Count = 4096  # held-out tokens scored, of each model
    length: Count = 256  # tokens per window of them
    calibration: Count = 2048  # further tokens, on which maps and heads are chosen
    context: Count = 4096  # tokens of the cache whose bytes are reported

    def validate(self) -> None:
        for name in ("models", "trained", "fractions"):
            _check(self, (name,), least=0)
        _check(self, ("schemes", "selectors", "protected", "seeds"))
        _check_schemes("schemes", self.schemes)
        _check_schemes("protection", (self.protection,))
        if not self.models and not self.trained:
            raise ConfigError(
                "no model: add --set \"Compare.trained = ('PATH',)\", PATH a folder that training has written, such "
                "as results/train/ID/models/NAME",
                ("trained", "models"),
            )
        for name in ("tokens", "calibration"):
            if getattr(self, name) % self.length:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} is not a multiple of length = {self.length}",
                    (name, "length"),
                )


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(Config):
    """One head's attention on Gaussian numbers: schemes on keys and values, and SAS in place of the softmax."""

    schemes: tuple[str, ...] = ()  # of basis kv, on N(0, 1) queries, keys and values
    tokens: Count = 1024  # of those
    thresholds: tuple[Whole, ...] = ()  # of SAS; 0: no cut
    degrees: tuple[Count, ...] = (3,)  # of its polynomial
    contexts: tuple[Count, ...] = (1024,)  # keys of a query
    spread: Positive = 2.0  # standard deviation of the logits
    head_dim: Count = 64
    queries: Count = 64
    seeds: tuple[Whole, ...] = (0,)

    def validate(self) -> None:
        _check(self, ("schemes", "thresholds"), least=0)
        _check(self, ("degrees", "contexts", "seeds"))
        _check_schemes("schemes", self.schemes)
        for text in self.schemes:
            if parse_scheme(text).basis != "kv":
                raise ConfigError(
                    f"schemes: {text}: there is no layer to take keys from values by; expected basis kv",
                    "schemes",
                )
        if not self.schemes and not self.thresholds:
            raise ConfigError("nothing to measure: give schemes or thresholds", ("schemes", "thresholds"))
        if wrong := [degree for degree in self.degrees if degree > 8]:
            raise ConfigError(f"degrees: {wrong[0]}: SAS has polynomials of degree 1 to 8", "degrees")
