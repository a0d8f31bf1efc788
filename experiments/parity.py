"""Do the kernels give what the reference gives in float64, on the device at hand?

One ragged batch a cell: sequences of no token, of one, and ending beside, at and inside a block, up to a full cache.
What lies behind a sequence's end is NaN where codes are floats, and random where they are integers: a kernel that
reads it shows. Each runs twice, must give the same bits, and must be about as close as the reference is in its dtype.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode_bench import encoded_cache, random_weights
from experiments.directory import RunDirectory
from experiments.gpu_settings import ParityConfig
from experiments.schemes import cache_bytes
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax.attention.projections import DecodeWeights
from slimjax.cache import Cache
from slimjax.config import Config
from slimjax.kernels.api import decode, native
from slimjax.kernels.prompts import attend_prompt
from slimjax.kernels.shapes import SHAPES, Shape
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import relative_l2, tolerance
from slimjax.scheme import parse_scheme

TITLE = "Do the kernels give what the reference gives?"
TABLE = ("attention_error", "reference_error")  # printed at the end


@dataclass(frozen=True, kw_only=True)
class Parity(Config):
    """The whole run."""

    parity: ParityConfig
    implementations: tuple[str, ...]


def resolve(build: Build) -> Parity:
    """The run from its section; the implementations are those made for the backend in use."""
    parity = build("Parity")
    return Parity(parity=parity, implementations=parity.implementations or native())


def units(config: Parity) -> list[Unit]:
    """A shape each."""
    return [_unit(config, name) for name in config.parity.shapes]


def _unit(config: Parity, name: str) -> Unit:
    asked, shape = config.parity, SHAPES[name]
    steps = itertools.product(asked.schemes, asked.tokens)
    phases = [("decode", *each) for each in steps] + [
        ("prefill", each, asked.context) for each in asked.prompts
    ]
    cells = tuple(
        {
            "experiment": "parity",
            "shape": name,
            "scheme": str(parse_scheme(scheme)),
            "backend": backend,
            "phase": phase,
            "tokens": tokens,
            "position": shape.position,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "width": shape.width,
            "context": asked.context,
            "dtype": dtype,
            "seed": asked.seed,
        }
        for (phase, scheme, tokens), backend, dtype in itertools.product(
            phases, config.implementations, asked.dtypes
        )
    )
    return Unit(name, cells, shape)


def forecast(unit: Unit, config: Parity) -> Forecast:
    """What no layer of this shape takes is refused; a kernel says for itself what it does not serve."""
    refused, largest = {}, 0
    for index, cell in enumerate(unit.cells):
        spec = unit.data.spec(str(cell["scheme"]), str(cell["dtype"]))
        try:
            largest = max(largest, cache_bytes(spec, len(_lengths(config.parity)), config.parity.context))
        except NotImplementedError as error:
            refused[index] = str(error)
    return Forecast(bytes=2 * largest, refused=refused)


def prepare(unit: Unit, config: Parity, directory: RunDirectory) -> Measure:
    """A question, its exact answer and the reference's error are every implementation's, whose cells are neighbours."""
    given = functools.partial(_Question, shape=unit.data, asked=config.parity)
    return functools.partial(_measure, questions=functools.lru_cache(len(config.parity.dtypes))(given))


def _lengths(asked: ParityConfig) -> tuple[int, ...]:
    block, slots = asked.block, asked.context
    return (0, 1, block - 1, block, block + 1, slots - block // 2, slots)


class _Question:
    """A phase, scheme, number of query tokens and dtype: what is asked, and what is known of the answer."""

    def __init__(
        self, phase: str, scheme: str, tokens: int, dtype: str, *, shape: Shape, asked: ParityConfig
    ):
        self.spec, self.asked = shape.spec(scheme, dtype), asked
        given = _prompt if phase == "prefill" else _step
        self.call, self.spoilt, self.clean = given(
            self.spec, jnp.asarray(_lengths(asked), jnp.int32), asked, tokens
        )

    def program(self, implementation: str) -> Callable[[], np.ndarray]:
        """A call of one compiled program; a second compilation may choose otherwise, and is no second run."""
        compiled = jax.jit(functools.partial(self.call, implementation=implementation))
        return lambda: np.asarray(compiled(*self.spoilt), np.float64)

    @functools.cached_property
    def wanted(self) -> np.ndarray:
        return _exact(self.call, self.clean, self.spec)

    @functools.cached_property
    def reference_error(self) -> float:
        return self.error(self.program("reference")())

    def error(self, found: np.ndarray) -> float:
        """The worst sequence's: the mean of many tokens is small, and would not count beside one token's."""
        return max(map(relative_l2, found[1:], self.wanted[1:]))

    @property
    def bound(self) -> float:
        """Of a kernel's error, which has the reference's roundings, in another order and sometimes one more.

        Four times its error, and what rounding to the dtype may cost by itself: the reference in float32 is exact
        where the answer is one stored row.
        """
        return 4 * self.reference_error + tolerance(self.spec.dtype, size=self.asked.context)


def _measure(cell: Cell, *, questions: Callable[..., _Question]) -> dict[str, Any]:
    phase, scheme, dtype = (str(cell[name]) for name in ("phase", "scheme", "dtype"))
    question = questions(phase, scheme, int(str(cell["tokens"])), dtype)
    run = question.program(str(cell["backend"]))
    found = run()  # first: a kernel that refuses costs no exact answer
    if not np.isfinite(found).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(found))} of {found.size} values are not finite")
    if found[0].any():
        raise ValueError("a sequence without tokens has an answer")
    if not np.array_equal(found, run()):
        raise ValueError("a second run gave other bits")
    if (error := question.error(found)) > question.bound:
        raise ValueError(
            f"error {error:.2e} in a sequence, more than {question.bound:.2e}: the reference has "
            f"{question.reference_error:.2e} in {dtype}"
        )
    return {"attention_error": error, "reference_error": question.reference_error}


Given = tuple[
    Callable[..., jax.Array], tuple[Any, ...], tuple[Any, ...]
]  # a call, its poisoned arguments, and those that are not


def _step(spec: DecodeSpec, length: jax.Array, asked: ParityConfig, tokens: int) -> Given:
    """So many query tokens on a ragged cache."""
    weights = random_weights(spec)
    clean = encoded_cache(spec, length, asked.context, asked.seed)
    size = (clean.batch, tokens, spec.heads, spec.head_dim)
    query = jax.random.normal(jax.random.key(asked.seed + 1), size).astype(spec.dtype)
    # A query that stands before the first token sees nothing; cross-attention's have no place among the keys.
    start = jnp.maximum(length - tokens, 0) if spec.causal else jnp.zeros_like(length)

    def call(
        query: jax.Array,
        cache: Cache,
        weights: DecodeWeights,
        start: jax.Array,
        *,
        implementation: str,
        spec: DecodeSpec = spec,
    ) -> jax.Array:
        return decode(query, cache, weights, spec, start=start, implementation=implementation)

    return call, (query, poisoned(clean), weights, start), (query, clean, weights, start)


def _prompt(spec: DecodeSpec, length: jax.Array, asked: ParityConfig, tokens: int) -> Given:
    """Prompts of these lengths on themselves."""
    keys = jax.random.split(jax.random.key(asked.seed + 1), 3)
    heads = (spec.heads, spec.kv_heads, spec.kv_heads)
    rows = [
        jax.random.normal(key, (len(length), tokens, count, spec.head_dim)).astype(spec.dtype)
        for key, count in zip(keys, heads, strict=True)
    ]
    past = (jnp.arange(tokens)[None] >= length[:, None])[:, :, None, None]

    def call(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        length: jax.Array,
        *,
        implementation: str,
        spec: DecodeSpec = spec,
    ) -> jax.Array:
        return attend_prompt(q, k, v, spec, length, implementation=implementation)

    return call, (*(jnp.where(past, jnp.nan, each) for each in rows), length), (*rows, length)


def poisoned(cache: Cache) -> Cache:
    """NaN behind each sequence's tokens, in rows of floats and in scales of rows, [B, S, ...] or [B, *, S]."""
    slots = jnp.arange(cache.capacity)[None]
    past = slots >= cache.length[:, None]

    def spoil(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if leaf.shape[:2] == past.shape:
            behind = past.reshape(*past.shape, *(1,) * (leaf.ndim - 2))
        elif leaf.ndim == 3 and leaf.shape[::2] == past.shape:  # tokens last
            behind = past[:, None]
        else:
            return leaf
        return jnp.where(behind, jnp.full_like(leaf, jnp.nan), leaf)

    return dataclasses.replace(cache, streams=jax.tree.map(spoil, cache.streams))


def _exact(call: Callable[..., jax.Array], given: tuple[Any, ...], spec: DecodeSpec) -> np.ndarray:
    """The reference on the same codes, in float64 on the CPU; INT8 products and their scales are what they are."""
    exact = functools.partial(
        call, implementation="reference", spec=dataclasses.replace(spec, dtype="float64")
    )
    held = jax.tree.map(np.asarray, given)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        widened = jax.tree.map(_widened, held, is_leaf=lambda leaf: isinstance(leaf, Cache))
        return np.asarray(jax.jit(exact)(*widened))


def _widened(leaf: Any) -> Any:
    """Floats in float64, but a cache's, which are part of its codes."""
    if isinstance(leaf, Cache):
        return jax.tree.map(jnp.asarray, leaf)
    return jnp.asarray(leaf, jnp.float64 if jnp.issubdtype(leaf.dtype, jnp.floating) else None)
