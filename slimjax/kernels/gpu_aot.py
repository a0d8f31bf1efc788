"""Compile for a H100 without one, and read what its assembler says.

XLA's plugin for CUDA compiles for a described GPU on any Linux machine, and Mosaic GPU writes down what a kernel takes:
registers, spills to local memory, shared memory. What it does not tell is time. Lowering alone, which checks layouts,
transfers and the size of shared memory, needs nothing but jax (`lower`).
"""

import importlib.util
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding
from jax.stages import Compiled, Lowered

from slimjax.kernels.gpu.ring import SHARED_LIMIT

# Other versions allocate registers otherwise, and a plugin works with the jaxlib of its own version only.
PINNED = {
    "jax": "0.12.0.1",
    "jax-cuda13-pjrt": "0.12.0.1",
    "jax-cuda13-plugin": "0.12.0.1",
    "nvidia-cuda-nvcc": "13.0.88",
}
HOW_TO = "pip install 'slimjax[gpu-aot]' on Python 3.12"  # 0.6 GB
KIND = "NVIDIA H100 80GB HBM3"

# What XLA has to know of the GPU, as a GpuTargetConfigProto. Bytes, and bytes a second.
TARGET = f"""
platform_name: "CUDA"
device_description_str: "{KIND}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {SHARED_LIMIT}
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
}}
"""
DUMPS = {"MOSAIC_GPU_DUMP_PTXAS": "1"}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What one Mosaic GPU kernel takes.

    Attributes:
        registers: of a thread, as the kernel starts; warpgroups may then trade them.
        spilled: bytes a thread stores to local memory, and loads from it, for want of registers.
        stack: bytes of local memory a thread.
        shared: bytes of shared memory a block of threads, barriers included.
    """

    name: str
    registers: int
    spilled: int
    stack: int
    shared: int


def missing() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    if not sys.platform.startswith("linux"):
        return f"the compiler for GPUs is for Linux, not {sys.platform}"
    found = {name: _version(name) for name in PINNED}
    lacking = [name for name, version in found.items() if version is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: {HOW_TO}"
    other = [f"{name} {found[name]}, pinned {pin}" for name, pin in PINNED.items() if found[name] != pin]
    if other:
        return f"{'; '.join(other)}: {HOW_TO}"
    return None if importlib.util.find_spec("jax_plugins") else f"jax finds no plugins: {HOW_TO}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def lower(function: Callable[..., Any], *specs: Any, donate: tuple[int, ...] = ()) -> Lowered:
    """Lower a function for a H100; needs no plugin. ``specs``: trees of jax.ShapeDtypeStruct, one an argument;
    ``donate``: arguments that are given away.

    Raises what Mosaic GPU raises: ValueError for too much shared memory, and for what TMA cannot bring.
    """
    device = AbstractDevice(device_kind=KIND, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function, donate_argnums=donate).trace(*specs).lower(lowering_platforms=("cuda",))


def compile_for_h100(
    function: Callable[..., Any], *specs: Any, donate: tuple[int, ...] = ()
) -> tuple[Compiled, tuple[Kernel, ...]]:
    """Compile a function for a H100 (sm_90a), as ``lower`` takes it: the program, and its Mosaic GPU kernels.

    Raises ImportError without the plugin, and what jax, ptxas and ``lower`` raise. A kernel that this process has
    compiled before is not assembled again, and one that lowers a kernel before its first compilation is told nothing of
    any: RuntimeError.
    """
    if problem := missing():
        raise ImportError(problem)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding), specs)
    with tempfile.TemporaryDirectory() as folder, _dumping(folder):
        compiled = lower(function, *placed, donate=donate).compile()
        return compiled, read_kernels(Path(folder))


@contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Mosaic GPU writes into the folder."""
    fresh = {**DUMPS, "MOSAIC_GPU_DUMP_TO": folder}
    before = {name: os.environ.get(name) for name in fresh}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_NAME = re.compile(r"entry function '(\w+)'")
_REGISTERS = re.compile(r"Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_SCRATCH = re.compile(r"smem_scratch_bytes=(\d+)")
_BARRIERS = re.compile(r"num_barriers=(\d+)[^)]*\): (\d+)")


def read_kernels(folder: Path) -> tuple[Kernel, ...]:
    """The kernels that Mosaic GPU has written about. Raises RuntimeError where a report is missing or unknown."""
    wanted = sorted(folder.glob("*.resources.txt"))
    found = [_read(path.with_name(path.name.replace(".resources.txt", ".ptxas")), path) for path in wanted]
    if not found:
        raise RuntimeError("the program has no Mosaic GPU kernel, or its reports are written otherwise now")
    return tuple(found)


def _read(assembler: Path, resources: Path) -> Kernel:
    if not assembler.exists():
        raise RuntimeError(
            f"nothing was told of {resources.stem}: this process has compiled it, or lowered kernels, before"
        )
    said, taken = assembler.read_text(encoding="utf-8"), resources.read_text(encoding="utf-8")
    name, registers, stack = _NAME.search(said), _REGISTERS.search(said), _STACK.search(said)
    scratch = _SCRATCH.search(taken)
    if not (name and registers and stack and scratch):
        raise RuntimeError(f"these reports are written otherwise now: {said!r}, {taken!r}")
    barriers = Counter[int]()
    for count, arrays in _BARRIERS.findall(taken):
        barriers[int(count)] += int(arrays)
    return Kernel(
        name=name[1].removesuffix("_mosaic_gpu_kernel"),
        registers=int(registers[1]),
        spilled=int(stack[2]) + int(stack[3]),
        stack=int(stack[1]),
        shared=int(scratch[1]) + 8 * sum(count * arrays for count, arrays in barriers.items()),
    )
