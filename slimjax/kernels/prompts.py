"""Which kernel, if any, serves a prompt's attention on itself; where none does, XLA does."""

import functools
from collections.abc import Callable

import jax

from slimjax.attention.compute import Compute
from slimjax.attention.integer import Integer
from slimjax.axes import Queries
from slimjax.kernels.spec import DecodeSpec
from slimjax.kernels.tpu import flashq_prompt, prompt
from slimjax.kernels.tpu.generations import running

Prompt = Callable[..., Queries]


def prompt_kernel(spec: DecodeSpec, tokens: int, compute: Compute | None) -> Prompt | None:
    """A function of (q, k, v, spec, length) for T tokens in this arithmetic (None: floating point), or None.

    On TPU splash attention for bfloat16, and a kernel of INT8 tiles for ``#int8``; elsewhere there is none.
    """
    if jax.default_backend() != "tpu":
        return None
    if compute is None:
        return None if prompt.refusal(spec, tokens) else prompt.attend_prompt
    if not isinstance(compute, Integer):
        return None
    tile = compute.tokens(spec)
    if flashq_prompt.refusal(spec, tile):
        return None
    generation = running()
    int8 = generation is None or generation.int8
    return functools.partial(flashq_prompt.attend_prompt, integer=compute, tile=tile, int8=int8)
