"""The tool that compiles for a GPU: all that needs no plugin. tests/gpu has the rest, `make test-gpu-aot` runs it."""

import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from slimjax.kernels import gpu_aot
from slimjax.kernels.gpu_aot import Kernel, read_kernels

# As ptxas and Mosaic GPU write it.
ASSEMBLER = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'slimjax_toy_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for slimjax_toy_mosaic_gpu_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
RESOURCES = (
    "Resources(smem_scratch_bytes=2048, tmem_scratch_cols=0, barrier_counts=Counter({Barrier(arrival_count=128, "
    "num_barriers=4, orders_tensor_core=False): 3, Barrier(arrival_count=1, num_barriers=1, "
    "orders_tensor_core=False): 1}), scoped_gmem_semaphores={})"
)


def test_what_a_kernel_takes_is_read(tmp_path):
    for place in (0, 1):
        (tmp_path / f"slimjax_toy_{place}.ptxas").write_text(ASSEMBLER)
        (tmp_path / f"slimjax_toy_{place}.resources.txt").write_text(RESOURCES)
    (tmp_path / "slimjax_toy_0.ptx").write_text("")
    toy = Kernel(name="slimjax_toy", registers=168, spilled=20, stack=16, shared=2048 + 8 * (3 * 4 + 1))
    assert read_kernels(tmp_path) == (toy, toy)


def test_a_missing_or_unknown_report_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="no Mosaic GPU kernel"):
        read_kernels(tmp_path)
    (tmp_path / "slimjax_toy_0.resources.txt").write_text(RESOURCES)
    with pytest.raises(
        RuntimeError,
        match=r"slimjax_toy_0.resources: this process has compiled it, or",
    ):
        read_kernels(tmp_path)
    (tmp_path / "slimjax_toy_0.ptxas").write_text("ptxas info : all is well")
    with pytest.raises(RuntimeError, match="written otherwise now"):
        read_kernels(tmp_path)


def test_without_the_wheels_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(gpu_aot, "_version", lambda name: None if "plugin" in name else gpu_aot.PINNED[name])
    assert str(gpu_aot.missing()).startswith(
        "jax-cuda13-plugin not installed: pip install 'slimjax[gpu-aot]'"
    )
    with pytest.raises(ImportError, match="jax-cuda13-plugin not installed"):
        gpu_aot.compile_for_h100(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))
    monkeypatch.setattr(gpu_aot, "_version", lambda name: "0.10.2")
    assert str(gpu_aot.missing()).startswith("jax 0.10.2, pinned 0.12.0.1; jax-cuda13-pjrt")
    monkeypatch.setattr("sys.platform", "darwin")
    assert gpu_aot.missing() == "the compiler for GPUs is for Linux, not darwin"


def test_the_pins_are_those_of_the_extra():
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    extra = project["project"]["optional-dependencies"]["gpu-aot"]
    assert dict(pin.split("==") for pin in extra) == gpu_aot.PINNED


def test_lowering_needs_no_plugin():
    text = gpu_aot.lower(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32)).as_text()
    assert "stablehlo.sine" in text


def test_a_folder_is_written_to_only_while_compiling(monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "0")
    monkeypatch.delenv("MOSAIC_GPU_DUMP_TO", raising=False)
    with gpu_aot._dumping(str(tmp_path)):
        assert gpu_aot.os.environ["MOSAIC_GPU_DUMP_TO"] == str(tmp_path)
        assert gpu_aot.os.environ["MOSAIC_GPU_DUMP_PTXAS"] == "1"
    assert "MOSAIC_GPU_DUMP_TO" not in gpu_aot.os.environ
    assert gpu_aot.os.environ["MOSAIC_GPU_DUMP_PTXAS"] == "0"
