"""Sections of the experiments on slim attention: `slim_whisper`, `slim_error` and `slim_rows`."""

from collections.abc import Sequence
from dataclasses import dataclass

from slimjax.config import ComputeDtype, Config, ConfigError, Count, Positive, Whole
from slimjax.scheme import parse_schemes, suggest
from slimjax.solve.products import PRODUCTS as PRODUCT_NAMES

SLIM_ROWS = tuple(f"S{number}" for number in range(1, 14))  # of slim attention's features


def _check_schemes(name: str, texts: Sequence[str], most: int = 1) -> None:
    """Raise ConfigError for a text of field `name` that is not a scheme, or up to `most` of them."""
    for text in texts:
        try:
            found = parse_schemes(text)
        except ValueError as error:
            raise ConfigError(str(error), name) from None
        if len(found) > most:
            pair = ", or 'cross,self'" if most > 1 else ""
            raise ConfigError(f"{name}: {text!r}: expected one scheme{pair}", name)


@dataclass(frozen=True, kw_only=True)
class SlimWhisperConfig(Config):
    """A Whisper model, speech with its words, and the caches that are tried on both."""

    model: str = "models/whisper-tiny.en"  # a directory that `slimjax transcribe` reads
    speech: str = "models/speech"  # wav files, and their words in a file `transcription`
    layer_schemes: tuple[str, ...] = ("k:bf16", "k:int16", "k:int16+16")  # on every layer by itself
    product_scheme: str = "k:int16+16"  # whose map is multiplied in `products`
    products: tuple[str, ...] = ()  # names in `slimjax.solve.products`
    sparse_schemes: tuple[str, ...] = ()  # thresholded, k:int16+16@sparse(0.001), on every layer by itself
    schemes: tuple[str, ...] = ("kv:bf16", "k:int16+16")  # of transcripts; 'cross,self' or one for both
    max_errors: tuple[Positive, ...] = ()  # of transcripts under plans

    def validate(self) -> None:
        for name in ("layer_schemes", "products", "sparse_schemes", "schemes", "max_errors"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} = {values}: expected distinct values", name)
        for name in ("layer_schemes", "sparse_schemes", "schemes"):
            _check_schemes(name, getattr(self, name), 2 if name == "schemes" else 1)
        _check_schemes("product_scheme", (self.product_scheme,))
        for product in self.products:
            if product not in PRODUCT_NAMES:
                raise ConfigError(
                    f"products: unknown {product!r}{suggest(product, PRODUCT_NAMES)}", "products"
                )


@dataclass(frozen=True, kw_only=True)
class SlimErrorConfig(Config):
    """The models whose layers are looked into, what they are given, and the caches that are tried on each layer."""

    whisper: str = "models/whisper-tiny.en"  # a directory that `slimjax transcribe` reads
    speech: str = "models/speech"  # wav files, at least five
    trained: str = ""  # language models: a run directory that holds some, or the folder of one
    schemes: tuple[str, ...] = ("kv:bf16", "k:bf16", "k:int16", "k:int16+16")
    tokens: Count = 8192  # of held-out text
    length: Count = 128  # tokens per window of it

    def validate(self) -> None:
        if not self.trained:
            raise ConfigError(
                "trained is not given: add --set \"SlimError.trained = 'PATH'\", PATH the folder of a run of "
                "configs/slim_lm.gin",
                "trained",
            )
        if not self.schemes or len(set(self.schemes)) < len(self.schemes):
            raise ConfigError(f"schemes = {self.schemes}: expected distinct values, at least one", "schemes")
        _check_schemes("schemes", self.schemes)
        if self.tokens // self.length < 5:
            raise ConfigError(
                f"tokens = {self.tokens}: expected at least five windows of {self.length}", "tokens"
            )


@dataclass(frozen=True, kw_only=True)
class SlimRowsConfig(Config):
    """The rows of slim attention's features that are tried, on layers drawn from a seed."""

    rows: tuple[str, ...] = SLIM_ROWS
    dtypes: tuple[ComputeDtype, ...] = ("float32", "bfloat16")  # beside float64, whose caches are exact
    tokens: Count = 24
    seed: Whole = 0

    def validate(self) -> None:
        for name in ("rows", "dtypes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} = {values}: expected distinct values, at least one", name)
        for row in self.rows:
            if row not in SLIM_ROWS:
                raise ConfigError(f"rows: unknown {row!r}{suggest(row, SLIM_ROWS)}", "rows")
        if self.tokens < 4:
            raise ConfigError(f"tokens = {self.tokens}: expected at least 4, two chunks of two", "tokens")
