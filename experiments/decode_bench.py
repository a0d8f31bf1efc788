"""Decoding speed: attention through every kind of cache, by itself and in models, with peers where installed."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments import decode_models, decode_peers, schemes
from experiments.bench_settings import DecodeBenchConfig
from experiments.decode_peers import CODECS, PEERS
from experiments.directory import RunDirectory
from experiments.settings import Build, Cell, Forecast, Measure, Unit
from slimjax import timing
from slimjax.attention.bases import basis
from slimjax.attention.layer import init_cache
from slimjax.attention.projections import DecodeWeights
from slimjax.cache import Cache, TiledCodec, append, codec_of, role_of
from slimjax.config import Config, ConfigError, ModelConfig
from slimjax.kernels import pallas_tpu
from slimjax.kernels.api import IMPLEMENTATIONS, decode, native
from slimjax.kernels.shapes import SHAPES, Shape
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import parse_scheme, suggest

TITLE = "How fast is decoding?"
ALONE = True  # timings
PACKAGES = ("torch", "flash-attn3-jax", "tokamax")  # timed too
FITS = True  # a cell that does not fit in memory is a result: the largest that does is looked for
TABLE = (
    "milliseconds",
    "share_of_copy_bandwidth",
    "speed_over_peer",
    "tokens_per_second",
    "time_to_first_token",
)  # printed at the end
SEED = 0
FEW = 128  # tokens that are encoded; a cache for timing has them again and again


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
    peers: tuple[str, ...]
    models: tuple[Named, ...]

    def validate(self) -> None:
        for field, names, known in (
            ("shapes", self.bench.shapes, SHAPES),
            ("implementations", self.implementations, IMPLEMENTATIONS),
            ("model_implementations", self.bench.model_implementations, IMPLEMENTATIONS),
            ("peers", self.peers, PEERS),
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
    """The run from its sections; implementations and peers are those made for the backend in use."""
    bench = build("DecodeBench")
    return DecodeBench(
        bench=bench,
        implementations=bench.implementations or native(),
        peers=bench.peers or (PEERS if jax.default_backend() == "gpu" else decode_peers.EVERYWHERE),
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
        *((kv, peer) for peer in config.peers),
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
        (f"kv:{CODECS[bench.model_dtype]}", decode_models.EAGER),
        *itertools.product(
            [str(parse_scheme(scheme)) for scheme in bench.model_schemes],
            bench.model_implementations or ("slimjax",),
        ),
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
            "dtype": bench.model_dtype,
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
    return Forecast(bytes=_distinct(largest, config.bench) * largest, refused=refused)


def prepare(unit: Unit, config: DecodeBench, directory: RunDirectory) -> Measure:
    """Weights, and for shapes the speed of memory."""
    if "model" in unit.cells[0]:
        model, batch = unit.data
        return decode_models.measure(model, batch, config.bench)
    shape, batch, context, dtype = unit.data
    return _Attention(shape, batch, context, dtype, config).measure


def _distinct(nbytes: int, bench: DecodeBenchConfig) -> int:
    """How many caches of so many bytes are read in turns: no more than it takes for none of them to stay close."""
    return max(1, min(bench.caches, -(-bench.copy_bytes // max(1, nbytes))))


def _told(error: Exception) -> Exception:
    """The error without what would keep its arrays alive; a lack of memory, whoever's, is one of Python's."""
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's
        return MemoryError(str(error))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


# Attention by itself --------------------------------------------------------------------------------------


@functools.cache
def _ceilings(nbytes: int) -> timing.Ceilings:
    """Once in a process."""
    return timing.ceilings(nbytes)


def random_weights(spec: DecodeSpec) -> DecodeWeights:
    """What decoding needs beside the cache, its numbers random: solving for them is not timed."""
    leaves, tree = jax.tree.flatten(schemes.abstract_layer(spec).weights)
    keys = jax.random.split(jax.random.key(SEED), max(1, len(leaves)))

    def random(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return (jax.random.normal(key, leaf.shape) * leaf.shape[0] ** -0.5).astype(leaf.dtype)

    return jax.tree.unflatten(tree, [random(key, leaf) for key, leaf in zip(keys, leaves, strict=False)])


def random_cache(spec: DecodeSpec, batch: int, context: int, seed: int) -> Cache:
    """A full cache for timing: a few random rows, encoded once, are those of every sequence again and again."""
    return _filled(jax.random.key(seed), spec=spec, batch=batch, context=context)


def encoded_cache(spec: DecodeSpec, length: jax.Array, context: int, seed: int) -> Cache:
    """Sequences of these lengths, every row encoded as a prompt's are; behind their ends are codes of others."""
    return _encoded(jax.random.key(seed), length, spec=spec, context=context)


@functools.partial(jax.jit, static_argnames=("spec", "batch", "context"))
def _filled(key: jax.Array, *, spec: DecodeSpec, batch: int, context: int) -> Cache:
    codec = codec_of(spec.scheme)
    full = init_cache(spec, batch=batch, capacity=context)
    few = init_cache(spec, batch=1, capacity=min(context, FEW))

    def fill(stored: Any, part: Any, rows: jax.Array, name: str) -> Any:
        own, role = codec.stream(name), role_of(name)
        place = jnp.arange(part.tiles.count if isinstance(own, TiledCodec) else few.capacity)[None]
        if isinstance(own, TiledCodec):  # the buffer stays empty
            tiles = rows.reshape(1, -1, own.tile, *rows.shape[2:])
            part = part.tiles.written(own.encode_tiles(tiles, role), place)
            return dataclasses.replace(stored, tiles=jax.tree.map(_repeated, stored.tiles, part))
        return jax.tree.map(_repeated, stored, part.written(own.encode(rows, role), place))

    rows = _rows(key, spec, 1, few.capacity)
    streams = {name: fill(full.streams[name], few.streams[name], rows[name], name) for name in rows}
    return dataclasses.replace(full, streams=streams, length=jnp.full((batch,), context, jnp.int32))


@functools.partial(jax.jit, static_argnames=("spec", "context"))
def _encoded(key: jax.Array, length: jax.Array, *, spec: DecodeSpec, context: int) -> Cache:
    first, second = jax.random.split(key)
    held = _filled(first, spec=spec, batch=len(length), context=context)
    held = dataclasses.replace(held, length=jnp.zeros_like(length))
    return append(held, _rows(second, spec, len(length), context), codec_of(spec.scheme), length)


def _rows(key: jax.Array, spec: DecodeSpec, batch: int, tokens: int) -> dict[str, jax.Array]:
    """What a basis caches, its numbers random."""
    streams = basis(spec).streams(spec)
    keys = jax.random.split(key, len(streams))
    return {
        name: jax.random.normal(own, (batch, tokens, *row))
        for own, (name, row) in zip(keys, streams.items(), strict=True)
    }


def _repeated(full: jax.Array, part: jax.Array) -> jax.Array:
    """The part again and again along every axis that is shorter."""
    times = [-(-whole // some) for whole, some in zip(full.shape, part.shape, strict=True)]
    return jnp.tile(part, times)[tuple(map(slice, full.shape))]


def bytes_read(weights: DecodeWeights, cache: Cache) -> int:
    """What one decode step must read at least: every row of the cache, and the weights that stand beside it."""
    return cache.nbytes + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))


def chosen_tiles(
    query: jax.Array, cache: Cache, weights: DecodeWeights, spec: DecodeSpec, implementation: str
) -> dict[str, float]:
    """What a kernel with a choice of tiles chose."""
    if implementation != "pallas_tpu":
        return {}
    tiles = pallas_tpu.tiles_of(query, cache, weights, spec)
    return {"tile_tokens": tiles.block, "tile_splits": tiles.splits}


class _Attention:
    """One shape, batch, context and dtype: its queries, its peers' times, and the measuring of a cell."""

    def __init__(self, shape: Shape, batch: int, context: int, dtype: str, config: DecodeBench):
        self.shape, self.batch, self.context, self.dtype = shape, batch, context, dtype
        self.bench, self.names = config.bench, config.peers
        query = jax.random.normal(jax.random.key(SEED + 1), (batch, 1, shape.heads, shape.head_dim))
        self.query = query.astype(dtype)
        self.peers: dict[str, timing.Timing | Exception] = {}  # a time, or why there is none

    def measure(self, cell: Cell) -> dict[str, Any]:
        backend = str(cell["backend"])
        if backend not in PEERS:
            return self._ours(str(cell["scheme"]), backend)
        run = self._peer(backend)
        if isinstance(run, Exception):
            raise run
        return {**run.metrics(), **self._bandwidth(run, self._sizes(1).nbytes)}

    def _ours(self, scheme: str, implementation: str) -> dict[str, Any]:
        spec, bench = self.shape.spec(scheme, self.dtype), self.bench
        # Before there are arrays of our own, beside which theirs might not fit.
        peers = [peer.milliseconds for peer in map(self._peer, self.names) if isinstance(peer, timing.Timing)]
        _ceilings(bench.copy_bytes)
        weights = random_weights(spec)
        caches = _distinct(schemes.cache_bytes(spec, self.batch, self.context), bench)
        held = [random_cache(spec, self.batch, self.context, seed) for seed in range(caches)]
        step = functools.partial(decode, spec=spec, implementation=implementation)
        steps = functools.partial(decode_peers.in_turn, step)
        turn = itertools.cycle(held)
        program, seconds = timing.compiled(steps, self.query, self._turns(turn), weights)
        run = self._time(lambda: program(self.query, self._turns(turn), weights), seconds)
        analysis = program.memory_analysis()
        metrics = {**run.metrics(), **self._bandwidth(run, bytes_read(weights, held[0]))}
        metrics["bytes_per_token"] = held[0].bytes_per_token
        if analysis is not None:  # not every backend tells
            metrics["temporary_bytes"] = float(analysis.temp_size_in_bytes)
        if peers:
            metrics["speed_over_peer"] = min(peers) / run.milliseconds
        return metrics | chosen_tiles(self.query, held[0], weights, spec, implementation)

    def _turns(self, turn: Iterator[Cache]) -> tuple[Cache, ...]:
        """The caches of the next call."""
        return tuple(itertools.islice(turn, self.bench.steps))

    def _time(self, call: Callable[[], Any], compile_seconds: float | None, **options: Any) -> timing.Timing:
        """Of one step."""
        bench = self.bench
        run = timing.time_calls(call, seconds=bench.seconds, least=bench.least, most=1000, **options)
        return timing.Timing(tuple(sample / bench.steps for sample in run.samples), compile_seconds)

    def _bandwidth(self, run: timing.Timing, moved: int) -> dict[str, float]:
        rate, best = moved / run.milliseconds / 1e6, _ceilings(self.bench.copy_bytes).best
        return {
            "gigabytes_per_second": rate,
            "copy_gigabytes_per_second": best,
            "share_of_copy_bandwidth": rate / best,
        }

    def _sizes(self, caches: int) -> decode_peers.Sizes:
        shape, bench = self.shape, self.bench
        return decode_peers.Sizes(
            batch=self.batch,
            context=self.context,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=self.dtype,
            caches=caches,
            steps=bench.steps,
            threads=bench.threads,
        )

    def _peer(self, name: str) -> timing.Timing | Exception:
        """Its time, or why it cannot do what the layer does, is not installed, has no memory for it."""
        if name not in self.peers:
            try:
                self.peers[name] = self._time_peer(name)
            except Exception as error:  # noqa: BLE001  its own row says it; ours are measured all the same
                self.peers[name] = _told(error)
            decode_peers.give_back()
        return self.peers[name]

    def _time_peer(self, name: str) -> timing.Timing:
        if self.shape.position in ("alibi", "t5", "fire", "kerple"):
            raise NotImplementedError(f"{name} is not timed with the score bias of {self.shape.position}")
        sizes = self._sizes(_distinct(self._sizes(1).nbytes, self.bench))
        ready = decode_peers.ready(name, sizes)
        return self._time(ready.call, ready.compile_seconds, wait=ready.wait)
