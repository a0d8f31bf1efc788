"""The kernels and shapes that are lowered, and compiled, for GPUs without one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slimjax.attention.bases import basis
from slimjax.attention.compute import compute_of
from slimjax.attention.integer import Integer
from slimjax.attention.positions import Position
from slimjax.attention.projections import DecodeWeights
from slimjax.cache import Cache, append, codec_of, empty
from slimjax.kernels import pallas_gpu
from slimjax.kernels.gpu.prompt import attend_prompt
from slimjax.kernels.shapes import SHAPES
from slimjax.kernels.spec import DecodeSpec

BATCH, CAPACITY = 16, 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program: a scheme on a shape, with so many query tokens; ``options``: further fields of the spec."""

    scheme: str
    shape: str
    tokens: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.scheme, self.shape, f"T{self.tokens}", *(name for name, _ in self.options)])

    @property
    def spec(self) -> DecodeSpec:
        """Of bfloat16."""
        return dataclasses.replace(SHAPES[self.shape].spec(self.scheme, "bfloat16"), **dict(self.options))


PLAIN = ("position", Position())
CASES = (
    Case(scheme="kv:bf16", shape="llama-2-7b"),
    Case(scheme="kv:bf16", shape="llama-2-7b", tokens=8),
    Case(scheme="kv:bf16", shape="llama-3-8b"),
    Case(scheme="kv:bf16", shape="llama-3-8b", tokens=4, options=(("window", 4096), ("softcap", 50.0))),
    Case(scheme="kv:bf16", shape="phi-3-mini"),
    Case(scheme="kv:bf16", shape="phi-3-mini", tokens=2),
    Case(scheme="kv:bf16", shape="smollm2-1.7b"),
    Case(scheme="kv:bf16", shape="whisper-large-self", tokens=4),
    Case(scheme="kv:bf16", shape="whisper-large-cross"),
    Case(scheme="kv:bf16", shape="t5-11b-cross"),
    Case(scheme="kv:flashq4", shape="llama-2-7b"),
    Case(scheme="kv:flashq4@sas", shape="llama-3-8b", tokens=2),
    Case(scheme="kv:flashq2", shape="llama-2-7b"),
    Case(scheme="kv:flashq4", shape="phi-3-mini", tokens=2),
    Case(scheme="kv:flashq4", shape="whisper-large-cross"),
    Case(scheme="kv:flashq2-4", shape="llama-2-7b"),
    Case(scheme="kv:flashq8", shape="smollm2-1.7b", tokens=8),
    Case(scheme="kv:flashq2-4@sas", shape="smollm2-1.7b"),
    Case(scheme="k2:bf16", shape="llama-2-7b", options=(PLAIN,)),
    Case(scheme="k2:bf16", shape="llama-2-7b"),
    Case(scheme="k2:bf16", shape="phi-3-mini"),
    Case(scheme="k2:bf16", shape="smollm2-1.7b", tokens=2),
    Case(scheme="k2:bf16+16", shape="smollm2-1.7b"),
    Case(scheme="k2:int16", shape="llama-2-7b", options=(PLAIN,)),
    Case(scheme="k2:int16", shape="llama-2-7b"),
    Case(scheme="k2:int16", shape="phi-3-mini"),
    Case(scheme="k2:int16", shape="smollm2-1.7b"),
    Case(scheme="k2:int16+16", shape="llama-2-7b"),
    Case(scheme="k2:int16+16", shape="phi-3-mini"),
    Case(scheme="k2:int16+8", shape="smollm2-1.7b"),
    Case(scheme="k2:int16+16", shape="whisper-large-self"),
    Case(scheme="k2:flashq4/64", shape="llama-2-7b", options=(PLAIN,)),
    Case(scheme="k2:flashq4/64", shape="llama-2-7b"),
    Case(scheme="k2:flashq4/64@sas", shape="llama-2-7b"),
    Case(scheme="k2:flashq4/64+16", shape="phi-3-mini"),
    Case(scheme="k2:flashq8/64", shape="phi-3-mini"),
    Case(scheme="k2:flashq4/64", shape="whisper-large-self"),
    Case(scheme="k2:flashq4/64", shape="smollm2-1.7b"),
    Case(scheme="k2:flashq2/64", shape="smollm2-1.7b", tokens=2),
    Case(scheme="x2:bf16", shape="whisper-large-self", tokens=3),
    Case(scheme="e2:bf16", shape="t5-11b-cross"),
    Case(scheme="e2:int16", shape="whisper-large-cross"),
    Case(scheme="h2:bf16", shape="whisper-large-cross"),
    Case(scheme="k2:bf16", shape="phi-3-mini", options=(PLAIN,)),
    Case(scheme="k2:bf16", shape="smollm2-1.7b", tokens=2, options=(PLAIN,)),
    Case(scheme="k2:bf16", shape="whisper-large-self", tokens=3),
    Case(scheme="k2:bf16", shape="whisper-large-cross"),
)


# Of prompts in INT8: a scheme on a shape.
PROMPTS = (("kv:flashq4@sas", "llama-3-8b"), ("kv:flashq4", "phi-3-mini"), ("kv:flashq4@sas", "smollm2-1.7b"))


def program(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``pallas_gpu.decode`` on a cache of ``BATCH`` sequences and ``CAPACITY`` slots, and its arguments' shapes."""
    spec = case.spec
    streams, codec = basis(spec).streams(spec), codec_of(spec.scheme)
    cache: Cache = jax.eval_shape(lambda: empty(streams, codec, batch=BATCH, capacity=CAPACITY))
    query = jax.ShapeDtypeStruct((BATCH, case.tokens, spec.heads, spec.head_dim), jnp.bfloat16)
    start = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    weights = DecodeWeights()
    if spec.scheme.basis == "k":
        # Extra coordinates are rows of the map, too.
        shape = (spec.key_width + spec.scheme.extra, spec.kv_heads, spec.head_dim)
        weights = DecodeWeights(w_kv=jax.eval_shape(lambda: jnp.zeros(shape, jnp.float32)))
    if spec.scheme.basis in ("x", "e", "h"):
        (width,) = (size for _, size in streams.values())
        shape = (width, spec.kv_heads, spec.head_dim)
        made = jax.eval_shape(lambda: jnp.zeros(shape, jnp.float32))
        weights = DecodeWeights(wk=made, wv=made)
    return functools.partial(_decode, spec=spec), (query, cache, weights, start)


def _decode(q: Any, cache: Any, weights: Any, start: Any, *, spec: DecodeSpec) -> Any:
    return pallas_gpu.decode(q, cache, weights, spec, start, interpret=False)


def step_program(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A token appended to the cache, its first argument, and decoded: the answer and the cache."""
    spec, (_, (query, cache, weights, _)) = case.spec, program(case)
    streams, codec = basis(spec).streams(spec), codec_of(spec.scheme)
    rows = {name: jax.ShapeDtypeStruct((BATCH, 1, *row), jnp.float32) for name, row in streams.items()}

    def step(cache: Cache, rows: Any, q: Any, weights: Any) -> tuple[Any, Cache]:
        longer = append(cache, rows, codec, prompt=False)
        return _decode(q, longer, weights, cache.length, spec=spec), longer

    return step, (cache, rows, query, weights)


def prompt_program(scheme: str, shape: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``gpu.prompt.attend_prompt`` on ``BATCH`` prompts of ``CAPACITY`` tokens, and its arguments' shapes."""
    spec = SHAPES[shape].spec(scheme, "bfloat16")
    integer = compute_of(spec)
    assert isinstance(integer, Integer)  # what keys and values in these tiles are multiplied in

    def prompt(q: Any, k: Any, v: Any, length: Any) -> Any:
        return attend_prompt(q, k, v, spec, length, integer, integer.tokens(spec))

    rows = [
        jax.ShapeDtypeStruct((BATCH, CAPACITY, heads, spec.head_dim), jnp.bfloat16)
        for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
    ]
    return prompt, (*rows, jax.ShapeDtypeStruct((BATCH,), jnp.int32))
