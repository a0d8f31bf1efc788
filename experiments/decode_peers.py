"""Other programs for a decode step on plain keys and values, each in the layout that it likes best.

Keys are as a cache holds them: rotated before, where there is RoPE; queries not at all, which flatters the peers. What
is not installed, or not made for the device, is refused with the reason when it is asked for.
"""

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.train_bench import torch_peer
from slimjax import timing
from slimjax.axes import Keys, Queries, Values
from slimjax.kernels.gpu import grid

Step = Callable[[Queries, Keys, Values], Queries]
DOT = "jax.nn.dot_product_attention"
SDPA = "torch.scaled_dot_product_attention"
# Of PyTorch: its name for each program that it would choose among by itself.
TORCH = {SDPA: None, "torch flash": "FLASH_ATTENTION", "torch cudnn": "CUDNN_ATTENTION"}
FLASH3, TOKAMAX, CUDNN = "flash_attn3_jax", "tokamax", "jax cudnn"
PEERS = (DOT, CUDNN, *TORCH, FLASH3, TOKAMAX)
EVERYWHERE = (DOT, SDPA)  # the others are for GPUs
FULL = ("RESOURCE_EXHAUSTED", "OutOfMemoryError")  # as XLA and PyTorch say that memory does not suffice
# The codec of a peer's keys and values: the compute dtype's own.
CODECS = {"float64": "float64", "float32": "float32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Ready:
    """A peer about to be timed.

    Attributes:
        call: so many steps, one after the other, on the caches in turn.
        wait: blocks until a call's result is there.
        compile_seconds: None: nothing is compiled.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    compile_seconds: float | None = None


@dataclass(frozen=True)
class Sizes:
    """What a peer is asked: B queries of one token on so many distinct caches of S tokens, ``steps`` times a call."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    caches: int
    steps: int
    threads: int

    @property
    def nbytes(self) -> int:
        """Of one cache."""
        return 2 * self.batch * self.context * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize


def ready(name: str, sizes: Sizes) -> Ready:
    """Arrays and a program for a peer, called once: what a library was not built for may show only then.

    Raises:
        NotImplementedError: it is not installed, not made for this device, dtype or head size, or does not work; with
            the reason.
        Exception: whatever it raises where memory does not suffice, which says nothing about the peer.
    """
    try:
        made = _torch(sizes, TORCH[name]) if name in TORCH else _jax(name, sizes)
        made.wait(made.call())
    except NotImplementedError:
        raise
    except Exception as error:  # whatever another program raises
        if isinstance(error, MemoryError) or any(word in f"{type(error)} {error}" for word in FULL):
            raise
        raise NotImplementedError(f"{name}: {type(error).__name__}: {error}") from None
    return made


def _jax(name: str, sizes: Sizes) -> Ready:
    step = _jax_step(name, sizes)
    turn = itertools.cycle(map(functools.partial(_keys_values, sizes), range(sizes.caches)))
    query = _normal(sizes, 1, sizes.heads, jax.random.key(sizes.caches))

    def turns() -> tuple[tuple[Keys, Values], ...]:
        return tuple(itertools.islice(turn, sizes.steps))

    program, seconds = timing.compiled(
        functools.partial(in_turn, lambda q, held: step(q, *held)), query, turns()
    )
    return Ready(lambda: program(query, turns()), compile_seconds=seconds)


def in_turn(step: Callable[..., Queries], query: Queries, held: Sequence[Any], *more: Any) -> list[Queries]:
    """A step on each, one after the other: each query waits for the answer before, or XLA would join their products."""
    outs: list[Queries] = []
    for each in held:
        outs.append(step(query, each, *more))
        query, _ = jax.lax.optimization_barrier((query, outs[-1]))
    return outs


def _keys_values(sizes: Sizes, seed: int) -> tuple[Keys, Values]:
    first, second = jax.random.split(jax.random.key(seed))
    k, v = (_normal(sizes, sizes.context, sizes.kv_heads, key) for key in (first, second))
    return k, v


def _normal(sizes: Sizes, tokens: int, heads: int, key: Array) -> Float[Array, "B S K H"]:
    """In its own dtype at once: the largest would not fit beside themselves in float32."""
    return jax.random.normal(key, (sizes.batch, tokens, heads, sizes.head_dim), jnp.dtype(sizes.dtype))


def _jax_step(name: str, sizes: Sizes) -> Step:
    """Raises NotImplementedError with the reason why there is none."""
    if name == DOT:
        return jax.nn.dot_product_attention
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"{name} is for GPUs")
    if sizes.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"{name} has no {sizes.dtype}: bfloat16 or float16")
    if name == CUDNN:
        return functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    module = _installed(name)
    if name == TOKAMAX:  # its own kernels: left to itself it would go on to XLA
        return functools.partial(module.dot_product_attention, implementation=("mosaic", "triton"))
    lengths = jnp.full((sizes.batch,), sizes.context, jnp.int32)
    splits = grid.parts(sizes.batch * sizes.kv_heads, sizes.context)  # it does not choose for itself

    def flash(q: Queries, k: Keys, v: Values) -> Queries:
        found = module.flash_mha_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=splits)
        return found[0] if isinstance(found, tuple) else found

    return flash


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotImplementedError(f"{name} is not installed: pip install {name.replace('_', '-')}") from error


def _torch(sizes: Sizes, backend: str | None) -> Ready:
    """On the CPU a call is as many steps; on a GPU one graph of them."""
    peer = torch_peer()
    peer.use_threads(sizes.threads)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not peer.torch.cuda.is_available():
        raise NotImplementedError("PyTorch sees no GPU: the one installed is for CPUs")
    if backend is not None and device == "cpu":
        raise NotImplementedError(f"torch's {backend} is for GPUs")
    call, wait = peer.attention(sizes, device, backend)
    return Ready(call, wait)


def give_back() -> None:
    """Memory that PyTorch keeps for arrays that are no more."""
    if peer := sys.modules.get("experiments.torch_peer"):
        peer.give_back()
