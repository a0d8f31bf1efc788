"""One head's attention on Gaussian numbers: what a scheme does to its output, and what SAS does to its softmax.

No model's weights, so anybody can check the figures; no model's outliers either, so they are no forecast of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import schemes
from experiments.compare_settings import SyntheticConfig
from experiments.directory import RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax.attention.projections import DecodeWeights
from slimjax.attention.sas import lost_mass, polynomial_error
from slimjax.attention.softmax import softmax_of
from slimjax.cache import append, codec_of, empty
from slimjax.compare import attention_errors
from slimjax.config import Config
from slimjax.kernels.api import decode
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import parse_scheme

TITLE = "Attention on Gaussian numbers"


@dataclass(frozen=True, kw_only=True)
class Synthetic(Config):
    """The whole run."""

    grid: SyntheticConfig


def resolve(build: Build) -> Synthetic:
    """The run from its section."""
    return Synthetic(grid=build("Synthetic"))


def units(config: Synthetic) -> list[Unit]:
    """The schemes, then SAS context by context."""
    grid = config.grid
    found = [Unit("schemes", tuple(_scheme_cells(grid)))] if grid.schemes else []
    if grid.thresholds:
        found += [Unit(f"SAS, {keys} keys", tuple(_sas_cells(grid, keys))) for keys in grid.contexts]
    return found


def _scheme_cells(grid: SyntheticConfig) -> Iterator[Cell]:
    for text in grid.schemes:
        for seed in grid.seeds:
            yield {
                "experiment": "synthetic",
                **schemes.parts(parse_scheme(text)),
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
            return scheme_errors(str(cell["scheme"]), draw, config.grid.tokens, config.grid.head_dim)
        return sas_errors(cell, draw, config.grid.queries)

    return measure


def scheme_errors(text: str, draw: np.random.Generator, tokens: int, size: int) -> dict[str, float]:
    """A scheme's attention of ``tokens`` N(0, 1) queries on as many keys and values, all seeing all, float32.

    Against the exact one in float64.
    """
    q, k, v = (draw.standard_normal((1, tokens, 1, size)) for _ in range(3))
    scheme = parse_scheme(text)
    spec = DecodeSpec(scheme=scheme, heads=1, kv_heads=1, head_dim=size, width=size, causal=False)
    codec = codec_of(scheme)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        cache = empty({"k": (1, size), "v": (1, size)}, codec, batch=1, capacity=tokens)
        return decode(q, append(cache, {"k": k, "v": v}, codec), DecodeWeights(), spec)

    found = run(*(jnp.asarray(each, jnp.float32) for each in (q, k, v)))
    weights = _softmax(np.einsum("btnh,bsnh->ts", q, k) / np.sqrt(size))
    wanted = (weights @ v[0, :, 0])[None, :, None]
    bits = 8 * (codec.nbytes((1, tokens, 1, size), "k") + codec.nbytes((1, tokens, 1, size), "v"))
    return _single(np.asarray(found), wanted) | {"bits_per_value": bits / (2 * tokens * size)}


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
