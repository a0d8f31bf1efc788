"""Decoding speed: attention through every kind of cache, by itself and in models, with peers where installed."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.bench_settings import DecodeBenchConfig
from experiments.directory import RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from experiments.train_bench import torch_peer
from slimjax import timing
from slimjax.attention.layer import CachedAttention, init_cache
from slimjax.attention.projections import Projections
from slimjax.cache import Cache
from slimjax.config import Config, ConfigError, ModelConfig
from slimjax.generate import generate
from slimjax.kernels.api import IMPLEMENTATIONS, decode, native
from slimjax.kernels.shapes import SHAPES, Shape
from slimjax.models.decoder import DecoderLM, convert_model
from slimjax.scheme import parse_scheme, suggest
from slimjax.solve import convert

TITLE = "How fast is decoding?"
ALONE = True  # timings
PACKAGES = ("torch",)  # timed too
SEED = 0
JAX_PEER, TORCH_PEER = "jax.nn.dot_product_attention", "torch.scaled_dot_product_attention"
PEERS = (JAX_PEER, TORCH_PEER)
# The codec of a peer's keys and values: the compute dtype's own.
CODECS = {"float64": "float64", "float32": "float32", "bfloat16": "bf16", "float16": "fp16"}
EAGER = "torch"  # the peer of a whole model


@dataclass(frozen=True, kw_only=True)
class Named(Config):
    """A model that generates."""

    name: str
    model: ModelConfig


@dataclass(frozen=True, kw_only=True)
class DecodeBench(Config):
    """The whole run."""

    bench: DecodeBenchConfig
    implementations: tuple[str, ...]
    models: tuple[Named, ...]

    def validate(self) -> None:
        for field, names, known in (
            ("shapes", self.bench.shapes, SHAPES),
            ("implementations", self.implementations, IMPLEMENTATIONS),
        ):
            for name in names:
                if name not in known:
                    problem = f"{field}: unknown name {name!r}{suggest(name, known)}"
                    raise ConfigError(problem, field, "DecodeBench")
        for field in ("schemes", "model_schemes"):
            for scheme in getattr(self.bench, field):
                try:
                    parse_scheme(scheme)
                except ValueError as error:
                    raise ConfigError(f"{field}: {error}", field, "DecodeBench") from None


def resolve(build: Build) -> DecodeBench:
    """The run from its sections; the implementations are those made for the backend in use."""
    bench = build("DecodeBench")
    return DecodeBench(
        bench=bench,
        implementations=bench.implementations or native(),
        models=tuple(Named(name=name, model=build("Model", name)) for name in bench.models),
    )


def units(config: DecodeBench) -> list[Unit]:
    """Shapes, each with one batch, context and dtype; then models, each with one batch. Peers come first."""
    bench = config.bench
    grid = itertools.product(bench.shapes, bench.batches, bench.contexts, bench.dtypes)
    shapes = [_shape_unit(config, *point) for point in grid]
    models = [
        _model_unit(config, named.name, named.model, batch)
        for named, batch in itertools.product(config.models, bench.model_batches)
    ]
    return shapes + models


def _shape_unit(config: DecodeBench, name: str, batch: int, context: int, dtype: str) -> Unit:
    shape = SHAPES[name]
    kv = f"kv:{CODECS[dtype]}"
    pairs = [
        *((kv, peer) for peer in PEERS),
        *((str(parse_scheme(scheme)), kind) for scheme in config.bench.schemes for kind in config.implementations),
    ]  # fmt: skip
    cells = tuple(
        {
            "experiment": "decode_bench",
            "shape": name,
            "scheme": scheme,
            "backend": backend,
            "position": shape.position,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "width": shape.width,
            "batch": batch,
            "context": context,
            "dtype": dtype,
        }
        for scheme, backend in pairs
    )
    return Unit(f"{name}, batch {batch}, context {context}, {dtype}", cells, (shape, batch, context, dtype))


def _model_unit(config: DecodeBench, name: str, model: ModelConfig, batch: int) -> Unit:
    bench = config.bench
    pairs = [
        ("kv:float32", EAGER),
        *((str(parse_scheme(scheme)), "slimjax") for scheme in bench.model_schemes),
    ]
    cells = tuple(
        {
            "experiment": "decode_bench_models",
            "model": name,
            "scheme": scheme,
            "framework": framework,
            "layers": model.layers,
            "width": model.width,
            "heads": model.heads,
            "batch": batch,
            "context": bench.prompt_length + bench.generated,
            "dtype": "float32",
            "seed": SEED,
        }
        for scheme, framework in pairs
    )
    return Unit(f"model {name}, batch {batch}", cells, (model, batch))


def forecast(unit: Unit, config: DecodeBench) -> Forecast:
    """Memory for the largest of the caches."""
    if "model" in unit.cells[0]:
        return Forecast()
    shape, batch, context, dtype = unit.data
    refused, largest = {}, 0
    for index, cell in enumerate(unit.cells):
        spec = shape.spec(str(cell["scheme"]), dtype)
        try:
            held = jax.eval_shape(functools.partial(init_cache, spec, batch=batch, capacity=context))
        except NotImplementedError as error:
            refused[index] = str(error)
            continue
        largest = max(largest, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held)))
    return Forecast(bytes=config.bench.caches * largest, refused=refused)


def prepare(unit: Unit, config: DecodeBench, directory: RunDirectory) -> Measure:
    """Weights, and for shapes the speed of memory."""
    if "model" in unit.cells[0]:
        model, batch = unit.data
        return _model_measure(model, batch, config.bench)
    shape, batch, context, dtype = unit.data
    return _Attention(shape, batch, context, dtype, config.bench).measure


# Attention by itself --------------------------------------------------------------------------------------


@functools.cache
def _ceilings(nbytes: int) -> timing.Ceilings:
    """Once in a process."""
    return timing.ceilings(nbytes)


@functools.lru_cache(maxsize=1)
def random_projections(shape: Shape) -> Projections:
    """Weights whose W_K is as well-conditioned as a random matrix is, float32."""
    d, n, k, h = shape.width, shape.heads, shape.kv_heads, shape.head_dim
    keys = jax.random.split(jax.random.key(SEED), 4)
    sizes = ((d, n, h), (d, k, h), (d, k, h), (n, h, d))
    wq, wk, wv, wo = (jax.random.normal(key, size) * d**-0.5 for key, size in zip(keys, sizes, strict=True))
    return Projections(wq=wq, wk=wk, wv=wv, wo=wo)


def random_cache(layer: CachedAttention, batch: int, context: int, seed: int) -> Cache:
    """A full cache of random codes, whatever the codec stores."""
    empty = init_cache(layer.spec, batch=batch, capacity=context)
    random = np.random.default_rng(seed)

    def fill(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(random.standard_normal(leaf.shape, np.float32) * 0.1, leaf.dtype)
        bounds = jnp.iinfo(leaf.dtype)
        return jnp.asarray(random.integers(int(bounds.min), int(bounds.max), leaf.shape), leaf.dtype)

    streams = jax.tree.map(fill, empty.streams)
    return dataclasses.replace(empty, streams=streams, length=jnp.full((batch,), context, jnp.int32))


def bytes_read(layer: CachedAttention, cache: Cache) -> int:
    """What one decode step must read at least: every row of the cache, and the weights that stand beside it."""
    return cache.nbytes + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer.weights))


class _Attention:
    """One shape, batch, context and dtype: its queries, its peers' times, and the measuring of a cell."""

    def __init__(self, shape: Shape, batch: int, context: int, dtype: str, bench: DecodeBenchConfig):
        self.shape, self.batch, self.context, self.dtype, self.bench = shape, batch, context, dtype, bench
        query = jax.random.normal(jax.random.key(SEED + 1), (batch, 1, shape.heads, shape.head_dim))
        self.query = query.astype(dtype)
        self.peers: dict[str, timing.Timing | str] = {}  # a time, or why there is none

    def measure(self, cell: Cell) -> dict[str, Any]:
        backend = str(cell["backend"])
        if backend in PEERS:
            run, moved = self._peer(backend), self._rows()
            if isinstance(run, str):
                raise NotImplementedError(run)
            return {**run.metrics(), **self._bandwidth(run, moved)}
        return self._ours(str(cell["scheme"]), backend)

    def _ours(self, scheme: str, implementation: str) -> dict[str, Any]:
        spec = self.shape.spec(scheme, self.dtype)
        layer = convert(random_projections(self.shape), spec).layer
        held = [random_cache(layer, self.batch, self.context, seed) for seed in range(self.bench.caches)]
        call = functools.partial(decode, spec=spec, implementation=implementation)
        program, seconds = timing.compiled(call, self.query, held[0], layer.weights)
        turn = itertools.cycle(held)
        run = self._time(lambda: program(self.query, next(turn), layer.weights))
        run = timing.Timing(run.samples, seconds)
        metrics = {**run.metrics(), **self._bandwidth(run, bytes_read(layer, held[0]))}
        metrics["bytes_per_token"] = held[0].bytes_per_token
        peers = [peer.milliseconds for peer in map(self._peer, PEERS) if not isinstance(peer, str)]
        if peers:
            metrics["speed_over_peer"] = min(peers) / run.milliseconds
        return metrics

    def _time(self, call: Callable[[], Any], **options: Any) -> timing.Timing:
        bench = self.bench
        return timing.time_calls(call, seconds=bench.seconds, least=bench.least, most=1000, **options)

    def _bandwidth(self, run: timing.Timing, moved: int) -> dict[str, float]:
        rate, best = moved / run.milliseconds / 1e6, _ceilings(self.bench.copy_bytes).best
        return {
            "gigabytes_per_second": rate,
            "copy_gigabytes_per_second": best,
            "share_of_copy_bandwidth": rate / best,
        }

    # Peers: keys and values as arrays, rotated before; the query not at all, which flatters them.

    def _keys_values(self, seed: int) -> tuple[jax.Array, jax.Array]:
        size = (self.batch, self.context, self.shape.kv_heads, self.shape.head_dim)
        pair = jax.random.split(jax.random.key(seed))
        k, v = (jax.random.normal(key, size).astype(self.dtype) for key in pair)
        return k, v

    def _rows(self) -> int:
        each = self.batch * self.context * self.shape.kv_heads * self.shape.head_dim
        return 2 * each * jnp.dtype(self.dtype).itemsize

    def _peer(self, name: str) -> timing.Timing | str:
        """Its time, or why it cannot do what the layer does, or that it is not installed."""
        if name not in self.peers:
            try:
                self.peers[name] = self._time_peer(name)
            except NotImplementedError as error:
                self.peers[name] = str(error)
        return self.peers[name]

    def _time_peer(self, name: str) -> timing.Timing:
        if self.shape.position in ("alibi", "t5", "fire", "kerple"):
            raise NotImplementedError(f"{name} is not timed with the score bias of {self.shape.position}")
        held = [self._keys_values(seed) for seed in range(self.bench.caches)]
        if name == JAX_PEER:
            program, seconds = timing.compiled(jax.nn.dot_product_attention, self.query, *held[0])
            turn = itertools.cycle(held)
            run = self._time(lambda: program(self.query, *next(turn)))
            return timing.Timing(run.samples, seconds)
        peer = torch_peer()
        peer.use_threads(self.bench.threads)
        arrays = [[np.asarray(x.astype(jnp.float32)) for x in (self.query, *pair)] for pair in held]
        device = "cuda" if jax.default_backend() == "gpu" and peer.torch.cuda.is_available() else "cpu"
        calls = [peer.attention(*each, self.dtype, device) for each in arrays]
        turn = itertools.cycle(calls)

        def call() -> Any:
            step, _ = next(turn)
            return step()

        return self._time(call, wait=calls[0][1])


# Whole models ---------------------------------------------------------------------------------------------


def _model_measure(model_config: ModelConfig, batch: int, bench: DecodeBenchConfig) -> Measure:
    model = DecoderLM(model_config, rngs=nnx.Rngs(SEED))
    random = np.random.default_rng(SEED)
    prompts = random.integers(0, model_config.vocab, (batch, bench.prompt_length)).astype(np.int32)

    @functools.cache
    def eager() -> tuple[np.ndarray, dict[str, Any]]:
        peer = torch_peer()
        peer.use_threads(bench.threads)
        twin = peer.Peer(model_config, nnx.state(model, nnx.Param), train=False)
        return _timed_generation(lambda new: twin.generate(prompts, new), batch, bench)

    def measure(cell: Cell) -> dict[str, Any]:
        if cell["framework"] == EAGER:
            return eager()[1]
        layers, _ = convert_model(model, str(cell["scheme"]))
        tokens, metrics = _timed_generation(
            lambda new: np.asarray(generate(model, prompts, layers=layers, max_new_tokens=new)), batch, bench
        )
        try:
            others, theirs = eager()
        except NotImplementedError:
            return metrics  # the peer's own row says why
        # Until a rounding error tips one token, both programs write the same text.
        same = np.cumprod(tokens == others, axis=1).sum(axis=1)
        return {
            **metrics,
            "speed_over_peer": theirs["milliseconds"] / metrics["milliseconds"],
            "greedy_agreement": float(same.mean()),
            "generated": bench.generated,
            "sequences": batch,
        }

    return measure


def _timed_generation(
    call: Callable[[int], np.ndarray], batch: int, bench: DecodeBenchConfig
) -> tuple[np.ndarray, dict[str, Any]]:
    """Milliseconds per token: those of the whole text less those of its first token, over the other tokens."""
    with timing.compiling_anew():
        first = timing.time_calls(lambda: call(1), seconds=0.0, least=1, most=1, warmup=0, wait=lambda x: x)
        whole = timing.time_calls(
            lambda: call(bench.generated), seconds=0.0, least=1, most=1, warmup=0, wait=lambda x: x
        )
    short, long = _short_and_long(call, bench)
    compile_seconds = (first.samples[0] + whole.samples[0] - short.milliseconds - long.milliseconds) / 1e3
    samples = [(each - short.milliseconds) / (bench.generated - 1) for each in long.samples]
    run = timing.Timing(tuple(samples), max(compile_seconds, 0.0))
    metrics = {
        **run.metrics(),
        "tokens_per_second": 1e3 * batch / run.milliseconds,
        "time_to_first_token": short.milliseconds,
    }
    return call(bench.generated), metrics


def _short_and_long(
    call: Callable[[int], np.ndarray], bench: DecodeBenchConfig
) -> tuple[timing.Timing, timing.Timing]:
    """Of the first token and of the whole text; again and longer where a stall of the machine hides the difference."""
    for times in (1, 4, 16):
        least = times * bench.least
        options = {"seconds": times * bench.seconds, "least": least, "most": max(100, least)}
        short = timing.time_calls(lambda: call(1), wait=lambda x: x, **options)
        long = timing.time_calls(lambda: call(bench.generated), wait=lambda x: x, **options)
        if long.milliseconds > short.milliseconds:
            return short, long
    raise ValueError("the whole text took no longer than its first token: generate more, or time it longer")
