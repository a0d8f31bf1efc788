"""Cells of cache schemes on a trained model: their coordinates, what they will cost, how they are measured."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.settings import Cell, Forecast, Measure
from slimjax import evaluate
from slimjax.attention.bases import basis
from slimjax.attention.compute import compute_of
from slimjax.attention.layer import CachedAttention, init_cache
from slimjax.attention.positions import Position, init_bias
from slimjax.attention.projections import DecodeWeights, Projections
from slimjax.config import EquivalenceConfig, ModelConfig, TrainConfig
from slimjax.kernels.spec import DecodeSpec
from slimjax.models.decoder import DecoderLM, position_of
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve.fold import key_bias_matters
from slimjax.train import state_shapes

LENGTHS = tuple(f"Equivalence.{name}" for name in ("length", "prompt_length", "generated"))
IDENTITY = "float64"  # the compute dtype whose cells hold the identity error


def scheme_cells(shared: Cell, model: ModelConfig, equivalence: EquivalenceConfig) -> tuple[Cell, ...]:
    """One cell per scheme and compute dtype, float64 (the identity) first; `shared`: coordinates of all."""
    return tuple(
        {
            **shared,
            **(found := parts(parse_scheme(scheme))),
            "compute": found["compute"] or "float",
            "backend": "reference",
            "heads": model.heads,
            "kv_heads": model.K,
            "head_dim": model.H,
            "width": model.width,
            "dtype": dtype,
            "context": equivalence.length,
        }
        for scheme in equivalence.schemes
        for dtype in (IDENTITY, *(dtype for dtype in equivalence.dtypes if dtype != IDENTITY))
    )


def parts(scheme: Scheme) -> dict[str, Any]:
    """A scheme as a record's coordinates."""
    found = {field.name: getattr(scheme, field.name) for field in dataclasses.fields(scheme)}
    del found["options"]  # no coordinate of its own: the scheme's text has them
    return {"scheme": str(scheme), **found}


def measuring(reference: evaluate.Reference, equivalence: EquivalenceConfig) -> Measure:
    """All of `slimjax.evaluate` for a cell of the reference's model."""

    def measure(cell: Cell) -> Mapping[str, Any]:
        scheme, dtype = str(cell["scheme"]), str(cell["dtype"])
        if dtype == IDENTITY:
            return evaluate.identity(reference, scheme)
        metrics = evaluate.measure(reference, scheme, dtype)
        return metrics | {"generated": equivalence.generated, "sequences": equivalence.prompts}

    return measure


# In the abstract ---------------------------------------------------------------------------------------------


def forecast(
    cells: Sequence[Cell],
    model: ModelConfig,
    equivalence: EquivalenceConfig,
    train: TrainConfig | None = None,
) -> Forecast:
    """Of a unit of such cells, and of the training before them, where there is any."""
    cost = training(model, train) if train is not None else Forecast(bytes=floats(model) * 4)
    width = max(equivalence.length, equivalence.prompt_length + equivalence.generated)
    rows = equivalence.tokens // equivalence.length + equivalence.prompts
    refused, largest = {}, 0
    for index, cell in enumerate(cells):
        try:
            spec = layer_spec(model, str(cell["scheme"]), str(cell["dtype"]), cell.get("position"))
            largest = max(largest, model.layers * cache_bytes(spec, rows, width))
        except NotImplementedError as refusal:
            refused[index] = str(refusal)
    scored = [cell for i, cell in enumerate(cells) if i not in refused and cell["dtype"] != IDENTITY]
    return Forecast(
        flops=cost.flops + 2.0 * floats(model) * equivalence.tokens * len(scored),
        bytes=max(cost.bytes, floats(model) * 4 + largest),
        refused=refused,
    )


def training(model: ModelConfig, train: TrainConfig) -> Forecast:
    """Of training alone: 6 FLOP per parameter and token; parameters, gradient, the optimizer's two, a part's logits."""
    state = _state(model, dataclasses.replace(train, seed=0, steps=max(train.steps, train.warmup)))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    parameters, tokens = floats(model), train.batch * train.length
    logits = 4 * tokens // train.accumulation * model.vocab
    return Forecast(flops=6.0 * parameters * train.steps * tokens, bytes=stored + 4 * parameters + logits)


@functools.lru_cache(maxsize=64)
def _state(model: ModelConfig, train: TrainConfig) -> Any:
    """The shapes of a training state; its loss is built on a batch of them, too."""
    state = state_shapes(model, train)
    tokens = jax.ShapeDtypeStruct((train.batch // train.accumulation, train.length), jnp.int32)
    graph = nnx.graphdef(nnx.eval_shape(lambda: DecoderLM(model, rngs=nnx.Rngs(0))))
    jax.eval_shape(lambda params, tokens: nnx.merge(graph, params)(tokens, train.dtype), state.params, tokens)
    return state


@functools.lru_cache(maxsize=64)
def floats(model: ModelConfig) -> int:
    """Trained numbers."""
    shapes = jax.eval_shape(lambda: nnx.state(DecoderLM(model, rngs=nnx.Rngs(0)), nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def layer_spec(model: ModelConfig, scheme: str, dtype: str, position: Any = None) -> DecodeSpec:
    """Of any of the model's layers; position: a kind in place of the model's own."""
    chosen = parse_scheme(scheme)
    if dtype == IDENTITY:  # as `evaluate.identity`: rows unrounded
        chosen = dataclasses.replace(chosen, codec="float64", bits=None, group=None)
    return DecodeSpec(
        scheme=chosen,
        heads=model.heads,
        kv_heads=model.K,
        head_dim=model.H,
        width=model.width,
        position=position_as(model, position),
        window=model.window,
        dtype=dtype,
    )


def position_as(model: ModelConfig, kind: Any) -> Position:
    """The model's own position scheme, or one of another kind. NotImplementedError: its layers cannot have that."""
    own = position_of(model)
    if kind in (None, own.kind):
        return own
    if kind == "rope" and model.H % 2:
        raise NotImplementedError(f"RoPE turns pairs of coordinates, and the head size is {model.H}")
    return Position(kind=kind, theta=own.theta, interleaved=own.interleaved)


@functools.lru_cache(maxsize=1024)
def cache_bytes(spec: DecodeSpec, batch: int, length: int) -> int:
    """Bytes of one layer's cache, built in the abstract. NotImplementedError: attention through it is refused."""
    try:
        with jax.enable_x64(spec.dtype == "float64"):
            cache = jax.eval_shape(lambda: init_cache(spec, batch=batch, capacity=length))
            basis(spec)
            compute_of(spec)
    except NotImplementedError as refusal:
        raise NotImplementedError(f"layer 0: {refusal}") from None
    return cache.nbytes


def abstract_layer(spec: DecodeSpec, *, bias: bool = False) -> CachedAttention:
    """Shapes and dtypes of what `slimjax.convert` makes of a float32 layer, nothing solved for."""
    width, heads, kv_heads, size = spec.width, spec.heads, spec.kv_heads, spec.head_dim

    def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def solved(rows: int) -> Any:
        return shape(rows, kv_heads, size, dtype=spec.accumulation)

    key = shape(width, kv_heads, size)
    extra, wide = spec.scheme.extra, spec.key_width
    fields: dict[str, Any] = {
        "kv": {},
        "k": {"w_kv": solved(wide + extra)},
        "kr": {"w_kv": solved(wide + extra)},
        "v": {"w_vk": solved(wide)},
        "h": {"wk": solved(wide), "wv": solved(wide)},
    }.get(spec.scheme.basis, {"wk": key, "wv": key})
    if extra and "w_kv" in fields:
        fields["extra"] = shape(width, extra, dtype=spec.accumulation)
    if bias and spec.scheme.basis != "kv" and key_bias_matters(spec):
        fields["k_bias"] = shape(kv_heads, size)
    position = jax.eval_shape(lambda: init_bias(spec.position, spec.heads, jax.random.key(0)))
    return CachedAttention(
        projections=Projections(
            wq=shape(width, heads, size),
            wk=key,
            wv=key,
            wo=shape(heads, size, width),
            bq=shape(heads, size) if bias else None,
            bk=shape(kv_heads, size) if bias else None,
            bo=shape(width) if bias else None,
            position=position,
        ),
        weights=DecodeWeights(position=position, **fields),
        spec=spec,
    )
