"""Sections of the comparison of caches on language models: `compare` and `synthetic`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from slimjax.config import ELSEWHERE, Config, ConfigError, Count, Fraction, Positive, Whole
from slimjax.scheme import parse_scheme

Study = Literal[
    "main", "components", "selectors", "tiles", "buffer", "sas", "protection", "slim_turbo", "context", "pareto"
]  # fmt: skip
Selector = Literal["none", "priority", "entropy", "minmax", "variation", "random", "calibrated", "dynamic"]
Protect = Literal["ends", "middle"]
LEAST = 5  # windows that calibrate


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

    Every scheme is a cell under every number of protected layers, in every place; one of two widths besides under
    every selector and fraction, the random selector under every seed.
    """

    study: Study = "main"  # the table that the cells are for
    # Directories of Llama-like models, and what those read; folders of models trained here, which read the part of
    # their own text that they were not trained on.
    models: tuple[str, ...] = field(default=("models/smollm2-135m-instruct",), metadata=ELSEWHERE)
    text: str = field(default="models/text/in_the_year_2889.txt", metadata=ELSEWHERE)
    trained: tuple[str, ...] = field(default=(), metadata=ELSEWHERE)
    # Folders of finished runs, of other tables: cells that those have measured on the same models are taken over.
    known: tuple[str, ...] = field(default=(), metadata=ELSEWHERE)
    problems: Whole = 0  # that a model trained on a task is set; 0: none
    schemes: tuple[str, ...] = ("kv:bf16", "kv:flashq4@sas", "kv:kivi4")
    selectors: tuple[Selector, ...] = ("none",)
    fractions: tuple[Fraction, ...] = ()  # of the heads in fewer bits; (): as each scheme says
    protected: tuple[Whole, ...] = (0,)  # layers at either end
    protect: tuple[Protect, ...] = ("ends",)  # "middle": as many layers in the middle in their place
    protection: str = "kv:int8"  # their scheme
    seeds: tuple[Whole, ...] = (0,)
    tokens: Count = 4096  # held-out tokens scored, of each model
    # Tokens per window of them, and how many of these are a prompt, which is not scored: its rows are written to the
    # cache as prefill writes them. A task's rows, and their prompts, have lengths of their own.
    length: Count = 1024
    prompt: Whole = 512
    calibration: Count = 8192  # further tokens, fewer of a short text, on which maps and heads are chosen
    context: Count = 4096  # tokens of the cache whose bytes are reported

    def validate(self) -> None:
        for name in ("models", "trained", "known", "fractions"):
            _check(self, (name,), least=0)
        _check(self, ("schemes", "selectors", "protected", "protect", "seeds"))
        _check_schemes("schemes", self.schemes)
        _check_schemes("protection", (self.protection,))
        if not self.models and not self.trained:
            raise ConfigError(
                "no model: add --set \"Compare.trained = ('PATH',)\", PATH a folder that training has written, such "
                "as results/train/ID/models/NAME",
                ("trained", "models"),
            )
        if self.prompt >= self.length:
            raise ConfigError(
                f"prompt = {self.prompt} leaves nothing to score of windows of length = {self.length}",
                ("prompt", "length"),
            )
        if self.tokens % (scored := self.length - self.prompt):
            raise ConfigError(
                f"tokens = {self.tokens} is not a multiple of the {scored} that a window scores (length - prompt)",
                ("tokens", "length", "prompt"),
            )
        if self.calibration < LEAST:
            raise ConfigError(
                f"calibration = {self.calibration}: expected at least a token for each of {LEAST} windows",
                "calibration",
            )
        if "dynamic" in self.selectors and not self.prompt:
            raise ConfigError(
                "selectors: dynamic chooses heads on a prompt, and prompt = 0", ("selectors", "prompt")
            )


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(Config):
    """One head's attention on Gaussian numbers: schemes on keys and values, and SAS in place of the softmax."""

    schemes: tuple[str, ...] = ()  # of basis kv, on N(0, 1) queries, keys and values
    tokens: Count = 1024  # of those
    # Besides by encode and decode alone: no buffer of newest tokens, products in floating point.
    alone: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()  # besides as a prompt, whose queries share tiles, in the arithmetic alone
    thresholds: tuple[Whole, ...] = ()  # of SAS; 0: no cut
    degrees: tuple[Count, ...] = (3,)  # of its polynomial
    contexts: tuple[Count, ...] = (1024,)  # keys of a query
    spread: Positive = 2.0  # standard deviation of the logits
    head_dim: Count = 64
    queries: Count = 64
    seeds: tuple[Whole, ...] = (0,)

    def validate(self) -> None:
        _check(self, ("schemes", "alone", "prompts", "thresholds"), least=0)
        _check(self, ("degrees", "contexts", "seeds"))
        for name in ("schemes", "alone", "prompts"):
            _check_schemes(name, getattr(self, name))
            for text in getattr(self, name):
                if parse_scheme(text).basis != "kv":
                    raise ConfigError(
                        f"{name}: {text}: there is no layer to take keys from values by; expected basis kv",
                        name,
                    )
        if not self.schemes and not self.thresholds:
            raise ConfigError("nothing to measure: give schemes or thresholds", ("schemes", "thresholds"))
        if wrong := [degree for degree in self.degrees if degree > 8]:
            raise ConfigError(f"degrees: {wrong[0]}: SAS has polynomials of degree 1 to 8", "degrees")
