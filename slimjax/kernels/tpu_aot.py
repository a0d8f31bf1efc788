"""Compile for a TPU without one, and read what its compiler says.

libtpu compiles for a named topology on any Linux machine. What it tells is everything but the time: whether a kernel
is legal, the VMEM it takes, the temporaries around it, its schedule. libtpu reads its environment once, and a
type it does not know can abort the process: one fresh process a program, `prepare` first
(experiments/tpu_matrix.py does so).
"""

import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled

from slimjax.kernels.tpu.generations import GENERATIONS

TILE_BYTES = 128 * 128 * 2  # a 128x128 tile of bfloat16
# Other versions schedule up to 30 % better or worse: cycles are compared on this pair alone.
PINNED = {"jax": "0.12.0.1", "libtpu": "0.0.52"}
HOW_TO = f"pip install libtpu=={PINNED['libtpu']}"  # 0.5 GB; the extra `tpu`

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # constants of a program are made on the CPU; no TPU is looked for
    "TPU_SKIP_MDS_QUERY": "1",  # nor the metadata server of a cloud machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: unset, libtpu complains
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
DUMP = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


# The process -------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """Why nothing can be compiled for a TPU here, or None."""
    if not sys.platform.startswith("linux"):
        return f"libtpu is for Linux, not {sys.platform}"
    return None if importlib.util.find_spec("libtpu") else f"libtpu is not installed: {HOW_TO}"


def versions() -> dict[str, str | None]:
    """jax's and libtpu's; None for one that is not installed."""
    return {name: _version(name) for name in PINNED}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unpinned() -> str | None:
    """Why cycles found here are not those of the pinned versions, or None."""
    other = [
        f"{name} {found or 'missing'}, pinned {PINNED[name]}"
        for name, found in versions().items()
        if found != PINNED[name]
    ]
    return "; ".join(other) or None


def prepare(dump: Path | str | None = None) -> None:
    """Set this process's environment for `compile_for`; with `dump`, libtpu writes its schedules into that folder.

    Raises RuntimeError where it is too late: libtpu reads the environment as it is loaded, jax its platforms as
    its first backend starts.
    """
    if _loaded():
        raise RuntimeError("libtpu is loaded already and reads no more settings: prepare a new process first")
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        # jax has read the variable if it is imported. It refuses the change once a backend has started.
        jax.config.update("jax_platforms", "cpu")
    os.environ.update(ENVIRONMENT)
    if dump is not None:
        flags = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {DUMP.format(folder=dump)}".strip()


def _loaded() -> bool:
    maps = Path("/proc/self/maps")
    return maps.exists() and "libtpu.so" in maps.read_text(encoding="utf-8", errors="replace")


def _check_process() -> None:
    problem = missing()
    if problem:
        raise ImportError(problem)
    unset = [f"{name}={value}" for name, value in ENVIRONMENT.items() if name not in os.environ]
    if unset:
        raise RuntimeError(f"call prepare() before jax does anything, or set {' '.join(unset)}")


# A program ---------------------------------------------------------------------------------------------------


def compile_for(
    generation: str, function: Callable[..., Any], *specs: Any, donate: Sequence[int] = ()
) -> Compiled:
    """`function` compiled for one chip (v7x, v4: one core) of `generation`, a key of GENERATIONS.

    specs: trees of jax.ShapeDtypeStruct, one an argument; donate: numbers of arguments given away.

    Raises ImportError without libtpu, RuntimeError in an unprepared process, ValueError for another generation, and
    what jax and libtpu raise: jax.errors.JaxRuntimeError for too much VMEM. May abort the process.
    """
    if generation not in GENERATIONS:
        raise ValueError(f"{generation=} is none of {', '.join(GENERATIONS)}")
    _check_process()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=GENERATIONS[generation].topology)
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding), specs)
    traced = jax.jit(function, donate_argnums=tuple(donate)).trace(*placed)
    return traced.lower(lowering_platforms=("tpu",)).compile()


_KERNEL = re.compile(r'custom_call_target="tpu_custom_call".*')
_SCOPED = r'_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
_USED = re.compile('"used_scoped_memory' + _SCOPED)
_ASKED = re.compile('"scoped_memory' + _SCOPED)


def _kernels(compiled: Compiled) -> list[str]:
    """The line of each Pallas kernel in the compiled program."""
    return _KERNEL.findall(compiled.as_text() or "")


def vmem_bytes(compiled: Compiled) -> int:
    """VMEM that the largest Pallas kernel takes; 0 without one.

    What XLA keeps in VMEM for it is not counted: on v7x small operands are put there before the kernel starts.
    """
    return max((int(size) for line in _kernels(compiled) for size in _USED.findall(line)), default=0)


def vmem_limit(compiled: Compiled, generation: str) -> int:
    """VMEM that its Pallas kernels may take, bytes: what they asked for, or the generation's own limit."""
    asked = [int(size) for line in _kernels(compiled) for size in _ASKED.findall(line)]
    return max(asked, default=GENERATIONS[generation].scoped)


def temporary_bytes(compiled: Compiled) -> int:
    """HBM the program takes beside its arguments and results.

    A hidden copy of an argument shows here, unless it fits into VMEM or is itself the result: see `copied_bytes`.
    """
    return _memory(compiled).temp_size_in_bytes


def aliased_bytes(compiled: Compiled) -> int:
    """Bytes of its results that lie where donated arguments did."""
    return _memory(compiled).alias_size_in_bytes


def _memory(compiled: Compiled) -> Any:
    found = compiled.memory_analysis()
    if found is None:
        raise RuntimeError("this libtpu does not tell what memory the program takes")
    return found


_MADE = re.compile(r"^ +(?:ROOT )?%\S+ = (.+?) ([a-z][a-z-]*)\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
# These only name what is there already.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done", "async-done", "while"}


def copied_bytes(compiled: Compiled) -> int:
    """Size of the largest array that XLA makes outside the Pallas kernels, wherever it puts it, bytes.

    Of a program that reads a cache it must be far below the cache's size; so small caches, which XLA moves to VMEM
    as a whole, are no test.
    """
    largest, fused = 0, False
    for line in (compiled.as_text() or "").splitlines():
        if line.startswith(("%", "ENTRY")):
            fused = line.startswith("%fused")  # what happens inside a fusion stays in registers
        made = _MADE.match(line)
        if made and not fused and made[2] not in _FREE and not _KERNEL.search(line):
            largest = max([largest, *map(_size, _SHAPE.findall(made[1]))])
    return largest


def _size(shape: tuple[str, str]) -> int:
    """Bytes of an array of HLO's type and sizes, ("bf16", "2,128")."""
    digits = re.search(r"\d+", shape[0])
    bits = int(digits[0]) if digits else 8
    return math.prod(int(size) for size in shape[1].split(",") if size) * bits // 8


# Its schedule ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Cycles of one Pallas kernel as it is scheduled, without waits for memory.

    Attributes:
        total: the whole program, every instruction once.
        step: its loop over the grid, once: one grid step where every condition holds.
        blocks: of those, what each `pl.when` (or other condition) of the body can skip, in order. Short ones
            become predicated instructions and are none.
        loops: what each loop inside the step takes, once, and the number of the block that it is in, None: in none.
    """

    total: int
    step: int
    blocks: tuple[int, ...] = ()
    loops: tuple[tuple[int | None, int], ...] = ()

    def steady(self, running: int | None = None, trips: int = 1) -> int:
        """Cycles of a grid step in which one of `blocks` runs, by number, and every loop so often.

        running: None: the longest.
        """
        kept = running
        if kept is None and self.blocks:
            kept = max(range(len(self.blocks)), key=self.blocks.__getitem__)
        skipped = sum(cycles for number, cycles in enumerate(self.blocks) if number != kept)
        again = sum(cycles for number, cycles in self.loops if number in (None, kept))
        return self.step - skipped + (trips - 1) * again


_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})?:")
_BRANCH = re.compile(r"\bsbr\.[^;}]*target bundleno = (\d+)")


def scheduled_cycles(dump: Path | str, kernel: str) -> Schedule:
    """The schedule of the Pallas kernel of that name, from the folder `prepare` was given; of several, the longest.

    Raises FileNotFoundError where it is not there, RuntimeError where it cannot be read.
    """
    wanted = re.compile(rf"\d+-{re.escape(kernel)}(\.\d+)?-\d+-packed-bundles-post-ra\.txt")
    paths = [path for path in Path(dump).iterdir() if wanted.fullmatch(path.name)]
    if not paths:
        raise FileNotFoundError(
            f"no schedule of kernel {kernel!r} in {dump}: is it the name= of the pallas_call?"
        )
    found = [read_schedule(path.read_text(encoding="utf-8", errors="replace")) for path in sorted(paths)]
    return max(found, key=lambda schedule: schedule.total)


def read_schedule(text: str) -> Schedule:
    """The schedule in one of libtpu's listings of bundles after register allocation. One bundle is one cycle.

    Raises RuntimeError for a text without bundles.
    """
    total, branches = 0, []
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle:
            total = int(bundle[1], 16) + 1
        branches += [(total - 1, int(target)) for target in _BRANCH.findall(line)]
    if not total:
        raise RuntimeError("no bundles in this listing: libtpu writes it otherwise now")
    # A branch backwards closes a loop, one forwards skips a block. Its delay slots are counted to the block.
    loops = sorted((target, at + 1) for at, target in branches if target <= at)
    skipped = sorted((at + 1, target) for at, target in branches if target > at)
    grid = max(loops, key=_length, default=(0, total))
    inside = [span for span in skipped if _within(span, grid)]
    # The pipeline's own condition, around the body: the first steps only fetch.
    body = max(inside, key=_length, default=grid) if loops else grid
    blocks = _outermost([span for span in inside if span != body and _within(span, body)])

    def holding(loop: tuple[int, int]) -> int | None:
        return next((number for number, block in enumerate(blocks) if _within(loop, block)), None)

    return Schedule(
        total=total,
        step=_length(grid),
        blocks=tuple(map(_length, blocks)),
        loops=tuple((holding(span), _length(span)) for span in loops if span != grid and _within(span, grid)),
    )


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _within(span: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= span[0] and span[1] <= outer[1]


def _outermost(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that start behind the end of the one before; `spans` are sorted."""
    kept: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or span[0] >= kept[-1][1]:
            kept.append(span)
    return kept
