"""The kernels and shapes that are compiled for every TPU generation; experiments/tpu_matrix.py runs them."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slimjax.attention.bases import basis
from slimjax.attention.compute import compute_of
from slimjax.attention.integer import Integer
from slimjax.attention.projections import DecodeWeights
from slimjax.cache import Cache, append, codec_of, empty
from slimjax.kernels import pallas_tpu
from slimjax.kernels.shapes import SHAPES
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tiles import Tiles
from slimjax.kernels.tpu import flashq, flashq_prompt, online
from slimjax.kernels.tpu.generations import GENERATIONS


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled.

    Attributes:
        function: of arrays.
        specs: its arguments, trees of jax.ShapeDtypeStruct.
        donate: numbers of the arguments it is given for good.
        name: the `name=` of the pallas_call whose schedule is looked at; "": none is.
        tiles: 128x128 tiles of cached values one grid step works on; 0: cycles are given as a step takes them.
        bytes: what a grid step reads from HBM, scales included.
        cached: size of the largest array of the cache, bytes: XLA may make nothing as large outside the kernels.
            Larger than any VMEM (128 MiB), or XLA moves the cache there; 0: not looked at.
        running: which of the body's conditional blocks runs in an ordinary step (`Schedule.steady`).
        trips: how often each loop runs in such a step.
    """

    function: Callable[..., Any]
    specs: Sequence[Any]
    donate: tuple[int, ...] = ()
    name: str = ""
    tiles: float = 0.0
    bytes: float = 0.0
    cached: int = 0
    running: int | None = None
    trips: int = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the matrix.

    Attributes:
        kernel, shape: names; together they are the case's.
        build: makes the program for a generation, in a process of its own: a function of a module or a
            functools.partial of one. A kernel that does not serve the generation raises NotImplementedError, here
            or as it is traced.
        ci: whether it is compiled in every `make test-tpu`, or by `make tpu-matrix` only.
    """

    kernel: str
    shape: str
    build: Callable[[str], Program]
    ci: bool = False


PROMPT = 2048  # tokens
BATCH, CAPACITY = 16, 8192  # of the caches: at real widths each array of rows is larger than any VMEM
HEADED, ROPE = ("kv:bf16", "kv:int8", "k2:bf16", "k2:int16+16"), ("smollm2-1.7b", "llama-2-7b", "tiny-rope")
LATENT, CROSS = ("e2:bf16",), ("whisper-large-cross", "t5-11b-cross")
TILED, TILED_TOO = (
    ("kv:flashq4",),
    ("kv:flashq2", "kv:flashq8", "kv:flashq2-4@sas"),
)  # these take minutes to compile
TILED_KEYS = ("k2:flashq4",)
# What no row above has: grouped heads, heads of 96, keys without RoPE, fp8, latent rows in int16, four query tokens.
FURTHER = (
    ("kv:bf16", "llama-3-8b", 1),
    ("kv:bf16", "phi-3-mini", 1),
    ("k2:bf16", "phi-3-mini", 1),
    ("k2:bf16", "whisper-large-self", 1),
    ("k2:int16+16", "whisper-large-self", 1),
    ("kv:fp8", "smollm2-1.7b", 1),
    ("e2:int16", "whisper-large-cross", 1),
    ("kv:bf16", "smollm2-1.7b", 4),
    ("k2:bf16", "smollm2-1.7b", 4),
)
PROMPTS = ("kv:flashq4", "kv:flashq4@sas", "kv:flashq4/128")
APPENDED = ("kv:bf16", "k2:int16+16", "kv:flashq4")
IN_CI = 1  # shapes of each


def build_rows(generation: str, *, scheme: str, shape: str, tokens: int = 1) -> Program:
    """The kernel of whole rows on a full cache, as ``slimjax.decode`` calls it."""
    spec = SHAPES[shape].spec(scheme, "bfloat16")
    cache = _cache(spec)
    query: Any = jax.ShapeDtypeStruct((BATCH, tokens, spec.heads, spec.head_dim), jnp.bfloat16)
    specs = (query, cache, _weights(spec), jax.ShapeDtypeStruct((BATCH,), jnp.int32))
    tiles = pallas_tpu.tiles_of(*specs[:3], spec, GENERATIONS[generation])
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in _read(cache)]
    widths = [math.prod(row) for row in basis(spec).streams(spec).values()]
    return Program(
        function=functools.partial(_decode, spec=spec, tiles=tiles, generation=generation),
        specs=specs,
        name="slimjax_rows",
        tiles=tiles.block * sum(widths) / 128**2,
        bytes=sum(sizes) * tiles.block // (BATCH * CAPACITY),
        cached=_told(max(sizes)),
        running=1,  # of: begin, a full block, a ragged one, the end
        trips=online.trips(max(widths)),
    )


def build_tiles(generation: str, *, scheme: str, shape: str) -> Program:
    """The kernel of FlashQ's tiles on a full cache, and the buffer behind it."""
    spec = SHAPES[shape].spec(scheme, "bfloat16")
    cache = _cache(spec)
    query: Any = jax.ShapeDtypeStruct((BATCH, 1, spec.heads, spec.head_dim), jnp.bfloat16)
    specs = (query, cache, _weights(spec), jax.ShapeDtypeStruct((BATCH,), jnp.int32))
    tiles = pallas_tpu.tiles_of(*specs[:3], spec, GENERATIONS[generation])
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in _read(cache)]
    return Program(
        function=functools.partial(_decode, spec=spec, tiles=tiles, generation=generation),
        specs=specs,
        name="slimjax_flashq",
        tiles=tiles.block * 2 * spec.key_width / 128**2,
        bytes=sum(sizes) * tiles.block // (BATCH * CAPACITY),
        cached=_told(max(sizes)),
        running=1,  # of: begin, a block
        trips=flashq.trips(spec.kv_heads, spec.head_dim, spec.group),
    )


def build_append(generation: str, *, scheme: str, shape: str) -> Program:
    """A token appended to a cache that is given away; of tiles, the window that it fills is encoded, too."""
    spec = SHAPES[shape].spec(scheme, "bfloat16")
    streams, cache = basis(spec).streams(spec), _cache(spec)
    rows = {name: jax.ShapeDtypeStruct((BATCH, 1, *row), jnp.float32) for name, row in streams.items()}
    return Program(
        function=functools.partial(append, codec=codec_of(spec.scheme), prompt=False),
        specs=(cache, rows),
        donate=(0,),
        cached=_told(max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))),
    )


def build_prompt(generation: str, *, scheme: str, shape: str) -> Program:
    """The kernel of prompts in INT8 tiles, on codes: what makes them is XLA's."""
    spec = SHAPES[shape].spec(scheme, "bfloat16")
    integer = compute_of(spec)
    assert isinstance(integer, Integer)
    fixed = flashq_prompt.static(
        spec, PROMPT, integer, integer.tokens(spec), int8=GENERATIONS[generation].int8
    )

    def codes(heads: int, *sizes: int) -> Any:
        whole = jax.ShapeDtypeStruct((1, heads, *sizes), jnp.int8)
        return whole, jax.ShapeDtypeStruct((1, heads, 1, PROMPT), jnp.float32)

    queries = codes(spec.heads, PROMPT, spec.head_dim)
    keys, values = (codes(spec.kv_heads, *sizes) for sizes in (queries[0].shape[2:], queries[0].shape[:1:-1]))
    return Program(
        function=functools.partial(
            flashq_prompt.attend_codes, fixed=fixed, dtype=spec.dtype, interpret=False
        ),
        specs=(jax.ShapeDtypeStruct((1,), jnp.int32), queries, keys, values),
        name="slimjax_flashq_prompt",
        running=1,  # of: begin, a block that is seen, the end
        trips=fixed.columns // flashq_prompt.LANES,
    )


def _told(size: int) -> int:
    """What copies are told by: nothing where XLA may move the whole cache to VMEM."""
    return size if size > max(generation.vmem for generation in GENERATIONS.values()) else 0


def _cache(spec: DecodeSpec) -> Cache:
    """A cache's shapes."""
    streams, codec = basis(spec).streams(spec), codec_of(spec.scheme)
    return jax.eval_shape(lambda: empty(streams, codec, batch=BATCH, capacity=CAPACITY))


def _read(cache: Cache) -> list[Any]:
    """The arrays that a kernel reads: of tiles not the buffer."""
    streams = cache.streams.values()
    return [leaf for each in streams for leaf in getattr(each, "tiles", each).leaves]


def _decode(
    q: Any, cache: Any, weights: Any, start: Any, *, spec: DecodeSpec, tiles: Tiles, generation: str
) -> Any:
    found = GENERATIONS[generation]
    return pallas_tpu.decode(q, cache, weights, spec, start, tiles=tiles, generation=found, interpret=False)


def _weights(spec: DecodeSpec) -> DecodeWeights:
    """The shapes of what stands in for rows that are not cached."""

    def projection(rows: int) -> Any:
        return jax.ShapeDtypeStruct((rows, spec.kv_heads, spec.head_dim), jnp.float32)

    match spec.scheme.basis:
        case "k":
            return DecodeWeights(w_kv=projection(spec.key_width + spec.scheme.extra))
        case "x" | "e":
            return DecodeWeights(wk=projection(spec.width), wv=projection(spec.width))
    return DecodeWeights()


def cases() -> tuple[Case, ...]:
    """All of them, in the order of the table."""
    reading = [
        Case(kernel=scheme, shape=shape, build=_build(build, scheme, shape), ci=place < some)
        for build, schemes, shapes, some in (
            (build_rows, HEADED, ROPE, IN_CI),
            (build_rows, LATENT, CROSS, IN_CI),
            (build_tiles, TILED, ROPE[:2], IN_CI),
            (build_tiles, TILED_TOO, ROPE[:1], 0),
            (build_rows, TILED_KEYS, ROPE[:1], IN_CI),
        )
        for scheme in schemes
        for place, shape in enumerate(shapes)
    ]
    further = [
        Case(
            kernel=scheme if tokens == 1 else f"{scheme} T{tokens}",
            shape=shape,
            build=functools.partial(build_rows, scheme=scheme, shape=shape, tokens=tokens),
        )
        for scheme, shape, tokens in FURTHER
    ]
    writing = [
        Case(kernel=f"append {scheme}", shape=shape, build=_build(build_append, scheme, shape), ci=True)
        for scheme in APPENDED
        for shape in ROPE[:1]
    ]
    prompts = [
        Case(
            kernel=f"prompt {scheme}",
            shape=ROPE[1],
            build=_build(build_prompt, scheme, ROPE[1]),
            ci=place < IN_CI,
        )
        for place, scheme in enumerate(PROMPTS)
    ]
    return (*reading, *further, *writing, *prompts)


def _build(build: Callable[..., Program], scheme: str, shape: str) -> Callable[[str], Program]:
    return functools.partial(build, scheme=scheme, shape=shape)
