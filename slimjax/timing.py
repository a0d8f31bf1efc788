"""How long a call takes: compilation apart, warm-up, every sample kept; and what the device could do at best.

A clock is handed in where tests want one that they can wind.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

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
        copy: bytes read and written by a plain copy.
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
    """Measured on the default device with ``buffers`` arrays of ``nbytes`` each, taken in turns.

    Take more bytes than the caches hold. The fastest of the calls counts, since it is a ceiling.

    Raises:
        ValueError: nbytes is not positive.
    """
    if nbytes < 4 or buffers < 1:
        raise ValueError(f"{nbytes=} {buffers=}: expected at least one float32 and one buffer")
    arrays = [jnp.full((nbytes // 4,), index, jnp.float32) for index in range(buffers)]
    programs = [compiled(program, arrays[0])[0] for program in (lambda x: x + 1, jnp.sum)]

    def rate(program: Callable[..., Any], moved: int) -> float:
        turn = iter(range(1 << 62))
        timing = time_calls(
            lambda: program(arrays[next(turn) % buffers]), seconds=seconds / 2, most=1000, clock=clock
        )
        return moved / min(timing.samples) / 1e6

    return Ceilings(copy=rate(programs[0], 2 * nbytes), read=rate(programs[1], nbytes))
