"""Which kernel, if any, serves a prompt's attention on itself; where none does, XLA does."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slimjax.attention.compute import Compute, compute_of
from slimjax.attention.integer import Integer
from slimjax.attention.reference import geometry
from slimjax.axes import Keys, Lengths, Queries, Values, typed
from slimjax.kernels.gpu import mosaic, prompt as gpu_prompt
from slimjax.kernels.gpu.grid import foreign
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tpu import flashq_prompt, prompt
from slimjax.kernels.tpu.generations import known, running

Prompt = Callable[..., Queries]


def prompt_kernel(spec: DecodeSpec, tokens: int, compute: Compute | None) -> Prompt | None:
    """A function of (q, k, v, spec, length) for T tokens in this arithmetic (None: floating point), or None.

    On TPU splash attention for bfloat16, and a kernel of INT8 tiles for ``#int8``; elsewhere there is none. That for
    Hopper has been compiled and interpreted, but run on no GPU: it is for a spec that names "pallas_gpu".
    """
    named = spec.implementation == "pallas_gpu"
    if named and isinstance(compute, Integer) and not gpu_prompt.refusal(spec, compute.tokens(spec)):
        return functools.partial(attend_prompt, implementation="pallas_gpu")
    if jax.default_backend() != "tpu" or spec.implementation not in (None, "pallas_tpu"):
        return None
    if compute is None:
        return None if prompt.refusal(spec, tokens) else prompt.attend_prompt
    if not isinstance(compute, Integer):
        return None
    tile = compute.tokens(spec)
    if flashq_prompt.refusal(spec, tile):
        return None
    generation = running()
    if generation is None:  # whether it multiplies INT8 is not known
        return None
    return functools.partial(flashq_prompt.attend_prompt, integer=compute, tile=tile, int8=generation.int8)


@typed
def attend_prompt(
    q: Queries, k: Keys, v: Values, spec: DecodeSpec, length: Lengths, *, implementation: str
) -> Queries:
    """A prompt's attention on itself in INT8 tiles, by a named implementation, which never falls back.

    Args:
        q: [B, T, N, H] before any rotation.
        k, v: [B, T, K, H], keys rotated.
        spec: of a scheme whose compute mode is int8.
        length: [B], tokens of each right-padded sequence; what lies behind may be anything.
        implementation: "reference", "pallas_tpu" or "pallas_gpu"; elsewhere than on their device these are interpreted.

    Returns:
        [B, T, N, H] in ``spec.dtype``; rows at ``length`` and behind are 0.

    Raises:
        NotImplementedError: another compute mode, or what the kernel does not serve.
        ValueError: an unknown implementation.
    """
    compute, backend = compute_of(spec), jax.default_backend()
    if not isinstance(compute, Integer):
        raise NotImplementedError(f"scheme {spec.scheme}: its prompts are not multiplied in INT8")
    if implementation == "reference":
        return _reference(q, k, v, spec, length, compute)
    tile = compute.tokens(spec)
    call: Any
    if implementation == "pallas_tpu":
        generation = known() if backend == "tpu" else None
        int8 = generation is None or generation.int8
        call = functools.partial(flashq_prompt.attend_prompt, int8=int8, interpret=backend != "tpu")
    elif implementation == "pallas_gpu":
        if reason := foreign():
            raise NotImplementedError(reason)
        interpret = False if backend == "gpu" else mosaic.interpreter()
        call = functools.partial(gpu_prompt.attend_prompt, interpret=interpret)
    else:
        raise ValueError(f"{implementation=}: expected reference, pallas_tpu or pallas_gpu")
    return call(q, k, v, spec, length, compute, tile)


def _reference(
    q: Queries, k: Keys, v: Values, spec: DecodeSpec, length: Lengths, integer: Integer
) -> Queries:
    positions = jnp.arange(q.shape[1], dtype=jnp.int32)
    everywhere = jnp.broadcast_to(positions[None], q.shape[:2])
    there = everywhere < length[:, None]
    where = geometry(everywhere, positions, length, None, spec).restrict(there[:, None, :, None])
    q = jnp.where(there[:, :, None, None], q, jnp.zeros_like(q))
    return integer.attend(q, k, v, where, spec)
