"""One head's attention on Gaussian numbers: what a scheme does to its output, and what SAS does to its softmax.

No model's weights, so anybody can check the figures; no model's outliers either, so they are no forecast of one.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import schemes
from experiments.compare_settings import SyntheticConfig
from experiments.directory import RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax.attention.compute import compute_of
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.reference import geometry
from slimjax.attention.sas import lost_mass, polynomial_error
from slimjax.attention.softmax import softmax_of
from slimjax.cache import Cache, append, codec_of, empty
from slimjax.compare import attention_errors
from slimjax.config import Config
from slimjax.kernels.api import decode
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import parse_scheme

TITLE = "Attention on Gaussian numbers"
CACHE, CODES, PROMPT = "cache", "encode and decode", "prompt"


@dataclass(frozen=True, kw_only=True)
class Synthetic(Config):
    """The whole run."""

    grid: SyntheticConfig


def resolve(build: Build) -> Synthetic:
    """The run from its section."""
    return Synthetic(grid=build("Synthetic"))


def units(config: Synthetic) -> list[Unit]:
    """Scheme by scheme, whose seeds share a compilation; then SAS context by context."""
    grid = config.grid
    ways = ((grid.schemes, CACHE), (grid.alone, CODES), (grid.prompts, PROMPT))
    found = [
        Unit(f"{text}, {backend}", tuple(_scheme_cells(grid, text, backend)))
        for texts, backend in ways
        for text in texts
    ]
    if grid.thresholds:
        found += [Unit(f"SAS, {keys} keys", tuple(_sas_cells(grid, keys))) for keys in grid.contexts]
    return found


def _scheme_cells(grid: SyntheticConfig, text: str, backend: str) -> Iterator[Cell]:
    for seed in grid.seeds:
        yield {
            "experiment": "synthetic",
            **schemes.parts(parse_scheme(text)),
            "backend": backend,
            "head_dim": grid.head_dim,
            "context": grid.tokens,
            "seed": seed,
        }


def _sas_cells(grid: SyntheticConfig, keys: int) -> Iterator[Cell]:
    for threshold in grid.thresholds:
        for degree in grid.degrees:
            for seed in grid.seeds:
                yield {
                    "experiment": "synthetic",
                    "softmax": f"sas({threshold},{degree})",
                    "threshold": threshold,
                    "degree": degree,
                    "spread": grid.spread,
                    "head_dim": grid.head_dim,
                    "context": keys,
                    "seed": seed,
                }


def forecast(unit: Unit, config: Synthetic) -> Forecast:
    """Milliseconds each."""
    return Forecast()


def prepare(unit: Unit, config: Synthetic, directory: RunDirectory) -> Measure:
    """Every cell draws its numbers from its seed."""

    def measure(cell: Cell) -> dict[str, Any]:
        draw = np.random.default_rng(int(cell["seed"] or 0))
        if cell.get("scheme") is not None:
            errors = {CACHE: scheme_errors, CODES: codec_errors, PROMPT: prompt_errors}
            return errors[str(cell["backend"])](
                str(cell["scheme"]), draw, config.grid.tokens, config.grid.head_dim
            )
        return sas_errors(cell, draw, config.grid.queries)

    return measure


def scheme_errors(text: str, draw: np.random.Generator, tokens: int, size: int) -> dict[str, float]:
    """A scheme's attention of ``tokens`` N(0, 1) queries on as many keys and values, all seeing all, float32.

    Against the exact one in float64. All keys and values are appended at once, as decoded tokens; the newest are in
    the cache's buffer, if the codec has one. Bits per value are those of the whole cache, buffer and lengths included.
    """
    q, k, v = _drawn(draw, tokens, size)
    found, cache = _through(text, tokens, size)(*(jnp.asarray(each, jnp.float32) for each in (q, k, v)))
    bits = 8 * cache.nbytes / (2 * cache.capacity * size)
    return _single(np.asarray(found), _attended(q, k, v)) | {"bits_per_value": bits}


@functools.cache
def _through(text: str, tokens: int, size: int) -> Callable[..., tuple[jax.Array, Cache]]:
    """Attention of q on k and v through a cache, which comes along; compiled once for all draws."""
    spec = _head(text, size)
    codec = codec_of(spec.scheme)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Cache]:
        cache = empty({"k": (1, size), "v": (1, size)}, codec, batch=1, capacity=tokens)
        cache = append(cache, {"k": k, "v": v}, codec)
        return decode(q, cache, DecodeWeights(), spec), cache

    return run


def codec_errors(text: str, draw: np.random.Generator, tokens: int, size: int) -> dict[str, float]:
    """As ``scheme_errors``, but of keys and values that the scheme's codec has encoded and decoded, all of them: no
    buffer keeps the newest better, and attention is exact on what comes back. So others emulate a codec.
    """
    q, k, v = _drawn(draw, tokens, size)
    codec, alone = codec_of(parse_scheme(text)), _alone(text)
    k_rounded, v_rounded = alone(*(jnp.asarray(each, jnp.float32) for each in (k, v)))
    found = _attended(q, *(np.asarray(each, np.float64) for each in (k_rounded, v_rounded)))
    shape = (1, tokens, 1, size)
    bits = 8 * (codec.nbytes(shape, "k") + codec.nbytes(shape, "v")) / (2 * tokens * size)
    return _single(found, _attended(q, k, v)) | {"bits_per_value": bits}


@functools.cache
def _alone(text: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Keys and values, encoded and decoded; compiled once for all draws."""
    codec = codec_of(parse_scheme(text))

    @jax.jit
    def run(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return codec.decode(codec.encode(k, "k")), codec.decode(codec.encode(v, "v"))

    return run


def prompt_errors(text: str, draw: np.random.Generator, tokens: int, size: int) -> dict[str, float]:
    """As ``scheme_errors``, but in the scheme's arithmetic alone, and of a prompt: nothing is cached, and queries come
    in tiles. In a cache every query is a tile of its own, and P has a scale for each, not for a tile of 64.
    """
    q, k, v = _drawn(draw, tokens, size)
    found = _prompted(text, tokens, size)(*(jnp.asarray(each, jnp.float32) for each in (q, k, v)))
    return _single(np.asarray(found), _attended(q, k, v))


@functools.cache
def _prompted(text: str, tokens: int, size: int) -> Callable[..., jax.Array]:
    """Attention of a prompt on itself; compiled once for all draws."""
    spec = _head(text, size)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        places = jnp.arange(tokens, dtype=jnp.int32)
        where = geometry(places[None], places, jnp.full((1,), tokens, jnp.int32), None, spec)
        return compute_of(spec).attend(q, k, v, where, spec)

    return run


def _head(text: str, size: int) -> DecodeSpec:
    """One head without a mask."""
    scheme = parse_scheme(text)
    return DecodeSpec(scheme=scheme, heads=1, kv_heads=1, head_dim=size, width=size, causal=False)


def _drawn(draw: np.random.Generator, tokens: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values, [1, T, 1, H], float64."""
    shape = (1, tokens, 1, size)
    return draw.standard_normal(shape), draw.standard_normal(shape), draw.standard_normal(shape)


def _attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Exact attention without a mask, [1, T, 1, H], float64."""
    weights = _softmax(np.einsum("btnh,bsnh->ts", q, k) / np.sqrt(q.shape[-1]))
    return (weights @ v[0, :, 0])[None, :, None]


def sas_errors(cell: Cell, draw: np.random.Generator, queries: int) -> dict[str, float]:
    """SAS in place of the softmax of Gaussian logits, and the output on N(0, 1) values, float32.

    ``error_bound`` is the one of ``slimjax.attention.sas``, from the lost mass of these very logits.
    """
    keys, size, threshold = (int(cell[name] or 0) for name in ("context", "head_dim", "threshold"))
    scores = float(cell["spread"] or 1) * draw.standard_normal((1, 1, queries, keys))
    values = draw.standard_normal((keys, size))
    logits = jnp.asarray(scores, jnp.float32)
    found = np.asarray(softmax_of(str(cell["softmax"]))(logits, jnp.ones(logits.shape, bool)), np.float64)[
        0, 0
    ]
    exact = _softmax(scores[0, 0])
    lost = np.asarray(lost_mass(logits, float(threshold)), np.float64)
    r = polynomial_error(int(cell["degree"] or 1))[1]
    return _single(found @ values, exact @ values) | {
        "lost_mass": float(lost.mean()),
        "weight_error": float(np.abs(found - exact).sum() / exact.sum()),
        "error_bound": float(2 * lost.mean() + 2 * r / (1 - r)),
    }


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _single(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """There is one layer: the mean over layers says no more."""
    return {name: value for name, value in attention_errors([found], [wanted]).items() if "_mean" not in name}
