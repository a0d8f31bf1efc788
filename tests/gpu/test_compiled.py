"""Every GPU kernel compiled for a H100: no spills, shared memory that there is, no copy of the cache."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from slimjax.cache import codec_of
from slimjax.kernels import gpu_aot, gpu_cases
from slimjax.kernels.flashq import widths
from slimjax.kernels.gpu import keys, mosaic, tiles

pytestmark = pytest.mark.skipif(
    bool(gpu_aot.missing()) and os.environ.get("SLIMJAX_REQUIRE_GPU_AOT") != "1",
    reason=f"{gpu_aot.missing()}; make test-gpu-aot installs it",
)
TWICE = ["slimjax_score_rows", "slimjax_weigh_rows"]
ONCE = ["slimjax_keys"]


def registers_of(names):
    """All that a thread can have where a kernel begins with four warpgroups, or three: it hands out no fewer later."""
    return 65536 // (128 * (4 if names == ONCE else 3)) // 8 * 8


def expected(case):
    """Names of a program's kernels: one for heads of each width, one or two for keys alone."""
    if case.scheme.startswith("kv:flashq"):
        return ["slimjax_tiles"] * (2 if "2-4" in case.scheme else 1)
    if case.scheme == "kv:bf16":
        return ["slimjax_heads"]
    if case.scheme[0] in "xeh":
        return ONCE
    return TWICE if keys.plan(case.spec, case.tokens, None) is None else ONCE


@pytest.mark.parametrize("case", gpu_cases.CASES, ids=str)
def test_it_compiles_without_spills_or_copies(case):
    function, specs = gpu_cases.program(case)
    compiled, kernels = gpu_aot.compile_for_h100(function, *specs)
    tiled = case.scheme.startswith("kv:flashq")
    names = [kernel.name for kernel in kernels]
    assert names == expected(case)
    for kernel in kernels:
        assert (kernel.spilled, kernel.stack) == (0, 0)
        if tiled:  # what is refused beforehand is counted from above
            rows, part = -(-case.tokens * case.spec.group // 8) * 8, codec_of(case.spec.scheme)
            counted = max(
                tiles.memory(rows, case.spec.head_dim, each.bits, each.tile) for each in widths(part) or ()
            )
            assert kernel.shared <= counted
        assert kernel.registers == registers_of(names)
        # Each block of threads has a processor of its own, and most of its shared memory; packed tiles need less.
        assert (0 if tiled else gpu_aot.SHARED_LIMIT / 2) < kernel.shared <= gpu_aot.SHARED_LIMIT
    memory = compiled.memory_analysis()
    cached, maps = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(each)) for each in specs[1:3]
    )
    assert memory.argument_size_in_bytes > cached
    # Scores, or parts; XLA copies maps to multiply by them.
    share = 3 if names == TWICE else 12 if names == ONCE else 50
    if (
        names == ONCE and "flashq" in case.scheme
    ):  # codes of an eighth to a half of bfloat16's bytes; and the buffer
        share /= 8
    assert memory.temp_size_in_bytes < cached / share + maps


@pytest.mark.parametrize("scheme", ["kv:bf16", "kv:flashq4", "k2:int16+16"])
def test_a_step_appends_without_copying(scheme):
    """One program that appends to a cache given away, and decodes: the cache stays where it is."""
    function, specs = gpu_cases.step_program(gpu_cases.Case(scheme=scheme, shape="llama-2-7b"))
    memory = gpu_aot.compile_for_h100(function, *specs, donate=(0,))[0].memory_analysis()
    cached = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(specs[0]))
    maps = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(specs[3]))
    assert memory.alias_size_in_bytes >= cached
    assert memory.temp_size_in_bytes < cached / 12 + maps


@pytest.mark.parametrize(("scheme", "shape"), gpu_cases.PROMPTS)
def test_prompts_compile_without_spills(scheme, shape):
    function, specs = gpu_cases.prompt_program(scheme, shape)
    compiled, (kernel,) = gpu_aot.compile_for_h100(function, *specs)
    assert (kernel.name, kernel.spilled, kernel.stack) == ("slimjax_prompt", 0, 0)
    assert kernel.registers == registers_of([kernel.name])
    assert kernel.shared <= gpu_aot.SHARED_LIMIT
    # Floats and codes of queries, keys and values; nothing that grows with the square of the prompt.
    rows = sum(spec.size for spec in specs)
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * rows


def toy(x, *, slots=1):
    """Rows less their largest numbers, which are known only when all of a row has been read."""

    def body(x, out, shared):
        held = shared["rows"].at[0]
        plgpu.copy_gmem_to_smem(x, held, shared["ready"])
        plgpu.barrier_wait(shared["ready"])
        values = plgpu.layout_cast(held[...], plgpu.Layout.WGMMA)
        held[...] = values - jax.lax.broadcast_in_dim(values.max(axis=1), values.shape, (0,))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(held, out)
        plgpu.wait_smem_to_gmem(0)

    scratch = {"rows": mosaic.tiled((slots, *x.shape), x.dtype), "ready": plgpu.Barrier()}
    (out,) = mosaic.call(
        body,
        out=(jax.ShapeDtypeStruct(x.shape, x.dtype),),
        scratch=scratch,
        grid={"all": 1},
        groups=1,
        interpret=False,
        name="slimjax_toy",
    )(x)
    return out


def test_a_good_kernel_has_no_fault():
    spec = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    _, (kernel,) = gpu_aot.compile_for_h100(toy, spec)
    assert (kernel.name, kernel.spilled, kernel.stack) == ("slimjax_toy", 0, 0)
    assert 64 * 64 * 4 < kernel.shared < 64 * 64 * 4 + 4096


def test_spills_are_seen():
    """A thread has 255 registers, and each of the 128 holds 384 numbers."""
    _, (kernel,) = gpu_aot.compile_for_h100(toy, jax.ShapeDtypeStruct((64, 768), jnp.float32))
    assert kernel.registers == 255
    assert kernel.spilled > 0
    assert kernel.stack > 0


def test_too_much_shared_memory_is_an_error():
    spec = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    with pytest.raises(ValueError, match=r"shared memory|max_smem_bytes"):
        gpu_aot.compile_for_h100(functools.partial(toy, slots=15), spec)


def test_a_program_without_a_kernel_is_told_from_one():
    with pytest.raises(RuntimeError, match="no Mosaic GPU kernel"):
        gpu_aot.compile_for_h100(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32))


def test_a_hidden_copy_of_the_cache_is_seen():
    """A wrapper that takes the cache the wrong way round, so that XLA turns all of it before the kernel starts."""
    spec = jax.ShapeDtypeStruct((128, 64), jnp.float32)

    def turned(x):
        return toy(x.T)

    compiled, _ = gpu_aot.compile_for_h100(turned, spec)
    assert compiled.memory_analysis().temp_size_in_bytes >= 128 * 64 * 4
