"""What slim attention covers: every row S1 to S13 of its features on single layers with random weights.

Each row under each position scheme: filling the cache and decoding through it against attention without one, in
float64 from an exact cache (the identity) and in the compute dtypes from the cache as the scheme stores it. What a
row cannot do is refused, with the reason.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.directory import RunDirectory
from experiments.schemes import IDENTITY, cache_bytes
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from experiments.slim_settings import SLIM_ROWS
from experiments.slim_sparse import skipped
from slimjax.attention.bases import basis
from slimjax.attention.cross import attend_filled, cross_full, fill
from slimjax.attention.layer import CachedAttention, attend_cached, attend_full, init_cache, prefill
from slimjax.attention.positions import Position, init_bias
from slimjax.attention.projections import Projections
from slimjax.config import Config
from slimjax.cost import model
from slimjax.cost.architectures import Architecture
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import relative_l2
from slimjax.scheme import parse_scheme
from slimjax.solve import convert

TITLE = "Slim attention, row by row"
ALL = ("none", "learned", "rope", "alibi", "t5", "fire", "kerple")
BATCH = 2
# name -> N, K, H, D; E = K*H.
LAYOUTS = {
    "square": (4, 4, 16, 64),
    "wide": (4, 4, 32, 64),
    "gqa": (6, 3, 16, 64),
    "narrow": (4, 2, 16, 64),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row of the features is tried on.

    Attributes:
        schemes, layouts, positions: every combination is a cell; layouts are names in `LAYOUTS`.
        cross: cross-attention; its layers have no position scheme of their own.
        biases: of all four projections.
    """

    schemes: tuple[str, ...]
    layouts: tuple[str, ...] = ("square",)
    positions: tuple[str, ...] = ALL
    cross: bool = False
    biases: bool = False


ROWS: Mapping[str, Row] = {
    "S1 K-cache": Row(schemes=("k:int16", "k1:int16")),
    "S2 V-cache": Row(schemes=("v:int16", "v1:int16")),
    "S3 X-cache, E > D": Row(schemes=("x:int16", "x1:int16"), layouts=("wide",)),
    "S4 non-square K-cache, E > D": Row(schemes=("k:int16", "k1:int16"), layouts=("wide",)),
    "S5 encoder-decoder, K": Row(schemes=("k:int16", "k1:int16"), cross=True, layouts=("square", "wide")),
    "S6 encoder-decoder, E": Row(schemes=("e:int16", "e1:int16"), cross=True, layouts=("square", "narrow")),
    "S7 encoder-decoder, first layer's K": Row(schemes=("h:int16", "h1:int16"), cross=True),
    "S8 RoPE, raw keys": Row(schemes=("k:int16", "k1:int16"), positions=("rope", "interleaved")),
    "S9 RoPE, rotated keys": Row(
        schemes=("kr:int16", "kr:int16@sparse(0.01)"), positions=("none", "rope", "interleaved", "alibi")
    ),
    "S10 biases": Row(schemes=("k:int16", "v1:int16"), positions=("none", "rope"), biases=True),
    "S11 GQA, D/2 < E < D": Row(
        schemes=("k:int16", "k:int16+16", "k:int16+32"), layouts=("gqa", "narrow"), positions=("none", "rope")
    ),
    "S12 softmax sparsity": Row(
        schemes=("kv:int16@sparse(0.01)", "k1:int16@sparse(0.01)", "k:int16@sparse(0.01)"),
        positions=("none", "rope"),
    ),
    "S13 cost model": Row(
        schemes=("kv:int16", "k:int16", "k1:int16", "x1:int16"), positions=("none", "rope")
    ),
}
assert tuple(name.partition(" ")[0] for name in ROWS) == SLIM_ROWS


@dataclass(frozen=True, kw_only=True)
class SlimRows(Config):
    """The whole run."""

    rows: tuple[str, ...]
    dtypes: tuple[str, ...]
    tokens: int
    seed: int


def resolve(build: Build) -> SlimRows:
    """The run from its section."""
    section = build("SlimRows")
    return SlimRows(rows=section.rows, dtypes=section.dtypes, tokens=section.tokens, seed=section.seed)


def units(config: SlimRows) -> list[Unit]:
    """A row each."""
    return [
        Unit(name, _cells(name, row, config), name)
        for name, row in ROWS.items()
        if name.partition(" ")[0] in config.rows
    ]


def _cells(name: str, row: Row, config: SlimRows) -> tuple[Cell, ...]:
    cells = []
    for layout in row.layouts:
        heads, kv_heads, size, width = LAYOUTS[layout]
        for position in ("none",) if row.cross else row.positions:
            for text in row.schemes:
                for dtype in (IDENTITY, *config.dtypes):
                    scheme = parse_scheme(text)
                    cells.append(
                        {
                            "experiment": "slim_rows",
                            "method": name,
                            "attention": "cross" if row.cross else "self",
                            "scheme": text,
                            "basis": scheme.basis,
                            "option": scheme.option,
                            "extra": scheme.extra,
                            "position": position,
                            "heads": heads,
                            "kv_heads": kv_heads,
                            "head_dim": size,
                            "width": width,
                            "dtype": dtype,
                            "context": config.tokens,
                            "seed": config.seed,
                        }
                    )
    return tuple(cells)


def spec_of(cell: Cell) -> DecodeSpec:
    """The layer's spec; under float64 rows are stored as they are."""
    scheme, position = parse_scheme(str(cell["scheme"])), str(cell["position"])
    if cell["dtype"] == IDENTITY:
        scheme = dataclasses.replace(scheme, codec="float64")
    kind = "rope" if position == "interleaved" else position
    sizes: dict[str, Any] = {
        name: int(cell[name] or 0) for name in ("heads", "kv_heads", "head_dim", "width")
    }
    return DecodeSpec(
        scheme=scheme,
        position=Position(kind=kind, interleaved=position == "interleaved"),
        dtype=str(cell["dtype"]),
        causal=cell["attention"] == "self",
        **sizes,
    )


def forecast(unit: Unit, config: SlimRows) -> Forecast:
    """Layers of a few kilobytes; what will be refused is known."""
    refused = {}
    for index, cell in enumerate(unit.cells):
        try:
            basis(spec_of(cell))
        except NotImplementedError as refusal:
            refused[index] = f"layer: {refusal}"
    return Forecast(refused=refused)


def prepare(unit: Unit, config: SlimRows, directory: RunDirectory) -> Measure:
    """Every cell draws its layer anew from the seed."""

    def measure(cell: Cell) -> dict[str, Any]:
        spec, row = spec_of(cell), ROWS[str(cell["method"])]
        with jax.enable_x64(True):
            return _errors(spec, row, cell)

    return measure


def _errors(spec: DecodeSpec, row: Row, cell: Cell) -> dict[str, Any]:
    """Against attention without a cache, in float64; under a thresholded softmax against kv with the same."""
    tokens, draw = int(cell["context"] or 0), np.random.default_rng(int(cell["seed"] or 0))
    layers = [_drawn(spec, draw, biases=row.biases) for _ in range(2 if spec.scheme.basis == "h" else 1)]
    x, memory = (draw.standard_normal((BATCH, tokens, spec.width)) for _ in range(2))
    first, last = layers[0], layers[-1]
    done = convert(last, spec, first=first if spec.scheme.basis == "h" else None)
    exact = dataclasses.replace(spec, scheme=parse_scheme("kv:float64"), dtype=IDENTITY)
    if spec.scheme.softmax != "exact":
        exact = dataclasses.replace(
            exact, scheme=dataclasses.replace(exact.scheme, softmax=spec.scheme.softmax)
        )
    filler = convert(first, spec).layer if spec.scheme.basis == "h" else done.layer
    found = _through(done.layer, filler, _as(x, spec), _as(memory, spec))
    if spec.scheme.softmax != "exact":
        plain = convert(last, exact).layer
        wanted = _through(plain, plain, _as(x, exact), _as(memory, exact))
    elif spec.causal:
        wanted = attend_full(_as(x, exact), last, exact)
    else:
        wanted = cross_full(_as(x, exact), _as(memory, exact), last, exact)
    error = relative_l2(np.asarray(found, np.float64), np.asarray(wanted, np.float64))
    metrics: dict[str, Any] = {"identity_error" if cell["dtype"] == IDENTITY else "attention_error": error}
    if done.figures.condition_number is not None:
        metrics["condition_number"] = done.figures.condition_number
    if cell["dtype"] != IDENTITY:
        metrics["bytes_per_token"] = cache_bytes(spec, BATCH, tokens) / (BATCH * tokens)
    if spec.scheme.softmax != "exact":
        metrics |= skipped(last, dataclasses.replace(spec, dtype=IDENTITY), [(x, x)])
    return metrics | (_counted(spec, tokens) if "cost" in str(cell["method"]) else {})


def _through(layer: CachedAttention, filler: CachedAttention, x: jax.Array, memory: jax.Array) -> jax.Array:
    """A first chunk, a second one and a token by itself, or all queries on a filled memory; float64."""
    batch, tokens, _ = x.shape
    cache = init_cache(layer.spec, batch=batch, capacity=tokens)
    if not layer.spec.causal:
        cache = fill(memory, filler, cache)
        parts = [attend_filled(part, layer, cache) for part in (x[:, :-1], x[:, -1:])]
        return jnp.concatenate(parts, axis=1)
    half = tokens // 2
    start, cache = prefill(x[:, :half], layer, cache)
    middle, cache = attend_cached(x[:, half:-1], layer, cache)
    end, _ = attend_cached(x[:, -1:], layer, cache)
    return jnp.concatenate([start, middle, end], axis=1)


def _as(x: np.ndarray, spec: DecodeSpec) -> jax.Array:
    return jnp.asarray(x, spec.dtype)


def _drawn(spec: DecodeSpec, draw: np.random.Generator, *, biases: bool) -> Projections:
    """Gaussian weights, in float32 so that every compute dtype sees the same layer."""

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape) / np.sqrt(spec.width), jnp.float32)

    heads, kv_heads, size, width = spec.heads, spec.kv_heads, spec.head_dim, spec.width
    more = {"bq": (heads, size), "bk": (kv_heads, size), "bv": (kv_heads, size), "bo": (width,)}
    return Projections(
        wq=2 * array(width, heads, size),
        wk=array(width, kv_heads, size),
        wv=array(width, kv_heads, size),
        wo=array(heads, size, width),
        position=init_bias(spec.position, heads, jax.random.key(0)),
        **({name: array(*shape) for name, shape in more.items()} if biases else {}),
    )


def _counted(spec: DecodeSpec, tokens: int) -> dict[str, float]:
    """Operations of one layer and token by the formulas."""
    sizes = Architecture(
        name="layer", width=spec.width, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim,
        layers=1, position="rope" if spec.position.rotary else "none",
    )  # fmt: skip
    work = model.projections(sizes, spec.scheme, tokens), model.attention(sizes, spec.scheme, tokens)
    return {"projection_operations": work[0].operations, "attention_operations": work[1].operations}
