"""How long a call takes: compilation apart, warm-up, every sample kept; and what the device could do at best.

A clock is handed in where tests want one that they can wind.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CALL, MOST = 10.0, 64  # milliseconds of a call whose bandwidth is measured, and passes through its array
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Timing:
    """The timed calls of one program.

    Attributes:
        samples: milliseconds of each call, in order, warm-up left out.
        compile_seconds: what came before them and will not come again; None: nothing was compiled.
    """

    samples: tuple[float, ...]
    compile_seconds: float | None = None

    @property
    def milliseconds(self) -> float:
        """The median call."""
        return statistics.median(self.samples)

    def metrics(self) -> dict[str, Any]:
        """For a Record: median, raw samples, compilation."""
        compiled = {} if self.compile_seconds is None else {"compile_seconds": self.compile_seconds}
        samples = [round(sample, 4) for sample in self.samples]
        return {"milliseconds": self.milliseconds, "milliseconds_samples": samples, **compiled}


def time_calls(
    call: Callable[[], Any],
    *,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 100,
    warmup: int = 2,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Call again and again, each time until its result is there.

    Args:
        call: what is timed; it compiles nothing (``compiled``), or its warm-up does.
        seconds: no new call begins after so long, warm-up left out.
        least, most: bounds on the number of calls.
        warmup: calls before those, not kept.
        wait: blocks until a call's result is there; for torch on a GPU, its synchronize.
        clock: seconds, growing.

    Raises:
        ValueError: least is not in 1..most.
    """
    if not 1 <= least <= most:
        raise ValueError(f"{least=} {most=}: expected 1 <= least <= most")
    for _ in range(warmup):
        wait(call())
    samples: list[float] = []
    begun = clock()
    while len(samples) < least or (len(samples) < most and clock() - begun < seconds):
        start = clock()
        wait(call())
        samples.append(1e3 * (clock() - start))
    return Timing(tuple(samples))


def compiled(
    function: Callable[..., Any], *arguments: Any, clock: Clock = time.perf_counter, **options: Any
) -> tuple[jax.stages.Compiled, float]:
    """``function`` compiled for arguments like these, and the seconds that tracing and compiling took.

    The persistent compilation cache is left out, or a second run would time the disk.

    Args:
        function: pure, of arrays.
        arguments: arrays or their shapes.
        clock: seconds, growing.
        options: of ``jax.jit``, such as ``donate_argnums``.
    """
    with compiling_anew():
        start = clock()
        program = jax.jit(function, **options).lower(*arguments).compile()
        return program, clock() - start


@contextmanager
def compiling_anew() -> Iterator[None]:
    """Inside, what is compiled is neither taken from the persistent compilation cache nor put there."""
    from jax.experimental.compilation_cache import compilation_cache

    before = bool(jax.config.values["jax_enable_compilation_cache"])
    try:
        _use_cache(compilation_cache, False)
        yield
    finally:
        _use_cache(compilation_cache, before)


def _use_cache(compilation_cache: Any, use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # jax looks at the switch once


@dataclass(frozen=True)
class Ceilings:
    """The fastest that memory was seen to be, in GB/s (10^9 bytes).

    Attributes:
        copy: bytes read and written by adding a number in place.
        read: bytes read by a sum, which writes none: decoding is like that.
    """

    copy: float
    read: float

    @property
    def best(self) -> float:
        """What a share of the bandwidth is a share of."""
        return max(self.copy, self.read)


def ceilings(
    nbytes: int, *, seconds: float = 1.0, clock: Clock = time.perf_counter, buffers: int = 2
) -> Ceilings:
    """Measured on the default device with ``buffers`` arrays of ``nbytes`` random numbers each; calls take turns.

    Take more bytes than the caches hold. A call goes through its array until it lasts about ``CALL``, or launching it
    would lower the ceiling. The fastest of the calls counts, since it is one.

    Raises:
        ValueError: nbytes is not positive.
    """
    if nbytes < 4 or buffers < 1:
        raise ValueError(f"{nbytes=} {buffers=}: expected at least one float32 and one buffer")
    arrays = [jax.random.normal(jax.random.key(index), (nbytes // 4,)) for index in range(buffers)]

    def timed(passes: Callable[..., Any], times: int, seconds: float, most: int, **options: Any) -> float:
        """The fastest call."""
        program, _ = compiled(functools.partial(passes, times=times), arrays[0], **options)
        turn = itertools.cycle(range(buffers))

        def call() -> Any:
            index = next(turn)
            out = program(arrays[index])
            if options:  # it was given away, and what came back is in its place
                arrays[index] = out
            return out

        return min(time_calls(call, seconds=seconds, least=min(5, most), most=most, clock=clock).samples)

    def rate(passes: Callable[..., Any], moved: int, **options: Any) -> float:
        once = timed(passes, 1, 0.0, 2, **options)
        times = min(MOST, max(1, round(CALL / once)))
        return times * moved / timed(passes, times, seconds / 2, 1000, **options) / 1e6

    return Ceilings(copy=rate(_copies, 2 * nbytes, donate_argnums=0), read=rate(_sums, nbytes))


def _copies(x: Float[Array, "n"], *, times: int) -> Float[Array, "n"]:
    return jax.lax.fori_loop(0, times, lambda _, x: x + 1, x)


def _sums(x: Float[Array, "n"], *, times: int) -> Float[Array, ""]:
    """Each asks for the one before, or XLA would take the same sum once."""
    return jax.lax.fori_loop(0, times, lambda _, level: jnp.mean(jnp.abs(x - level)), jnp.zeros(()))
