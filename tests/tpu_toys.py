"""Toy Pallas kernels that the compile gates are tried on: good ones, and one for each thing a gate must catch."""

import functools
import os

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slimjax.kernels.tpu_cases import Case, Program

# The cache, 256 MiB, fits into no VMEM: XLA moves smaller ones there, and the numbers are of another program.
ROWS, BLOCK, WIDTH, HEADS = 65536, 512, 2048, 16
CACHED = ROWS * WIDTH * 2
CACHE = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)
LENGTH = jax.ShapeDtypeStruct((1,), jnp.int32)
QUERY = jax.ShapeDtypeStruct((HEADS, BLOCK), jnp.bfloat16)


def _sum_body(length_ref, query_ref, cache_ref, out_ref, total_ref, *, slow):
    """total[n, e] += sum over s of query[n, s] cache[s, e]; the slow twin passes thrice through exp and log."""
    block = pl.program_id(0)

    @pl.when(block == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(block * BLOCK < length_ref[0])
    def _():
        rows = cache_ref[...]
        for _ in range(3 if slow else 0):  # which takes longer than the bytes of a step
            rows = jnp.log(jnp.exp(rows.astype(jnp.float32))).astype(rows.dtype)
        total_ref[...] += jnp.dot(query_ref[...], rows, preferred_element_type=jnp.float32)

    @pl.when(block == pl.num_programs(0) - 1)
    def _():
        out_ref[...] = jnp.tanh(total_ref[...])


def weighted_sum(length, query, cache, *, slow=False):
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(cache.shape[0] // BLOCK,),
        in_specs=[
            pl.BlockSpec((HEADS, BLOCK), lambda i, _: (0, 0)),
            pl.BlockSpec((BLOCK, WIDTH), lambda i, _: (i, 0)),
        ],
        out_specs=pl.BlockSpec((HEADS, WIDTH), lambda i, _: (0, 0)),
        scratch_shapes=[pltpu.VMEM((HEADS, WIDTH), jnp.float32)],
    )
    return pl.pallas_call(
        functools.partial(_sum_body, slow=slow),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((HEADS, WIDTH), jnp.float32),
        name="toy_slow" if slow else "toy_sum",
    )(length, query, cache)


def build_sum(generation, *, slow=False):
    return Program(
        function=functools.partial(weighted_sum, slow=slow),
        specs=(LENGTH, QUERY, CACHE),
        name="toy_slow" if slow else "toy_sum",
        tiles=BLOCK * WIDTH / 128**2,
        bytes=BLOCK * WIDTH * 2,
        cached=CACHED,
    )


def build_hidden_copy(generation, *, rows=ROWS):
    """The wrapper takes the cache the wrong way round, so XLA turns all of it before the kernel starts."""

    def function(length, query, turned):
        return weighted_sum(length, query, turned.T)

    turned = jax.ShapeDtypeStruct((WIDTH, rows), jnp.bfloat16)
    return Program(function=function, specs=(LENGTH, QUERY, turned), cached=rows * WIDTH * 2)


def _copy_body(in_ref, out_ref):
    out_ref[...] = in_ref[...].astype(out_ref.dtype)


def build_much_vmem(generation, *, mib=40):
    """Two whole arrays of so many MiB in VMEM."""
    spec = jax.ShapeDtypeStruct((mib * 256, 1024), jnp.float32)
    return Program(function=pl.pallas_call(_copy_body, out_shape=spec), specs=(spec,))


def build_int2(generation):
    """A cast of two-bit integers: v4's compiler aborts on it."""
    call = pl.pallas_call(_copy_body, out_shape=jax.ShapeDtypeStruct((128, 128), jnp.float32))
    return Program(function=call, specs=(jax.ShapeDtypeStruct((128, 128), jnp.int2),))


def _append_body(row_ref, cache_in_ref, cache_ref, semaphore):
    copy = pltpu.make_async_copy(row_ref, cache_ref.at[pl.ds(0, 16)], semaphore)
    copy.start()
    copy.wait()


def build_append(generation, *, donate=(1,)):
    """Sixteen rows written into a cache; nothing is copied where the cache is given away."""
    call = pl.pallas_call(
        _append_body,
        in_specs=[pl.BlockSpec((16, WIDTH), lambda: (0, 0)), pl.BlockSpec(memory_space=pltpu.HBM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
        out_shape=CACHE,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        input_output_aliases={1: 0},
        name="toy_append",
    )
    return Program(
        function=call,
        specs=(jax.ShapeDtypeStruct((16, WIDTH), jnp.bfloat16), CACHE),
        donate=donate,
        cached=CACHED,
    )


def build_of_jax(generation):
    """jax's own NotImplementedError, from inside the kernel: no refusal of ours."""
    spec = jax.ShapeDtypeStruct((128, 128), jnp.float32)

    def body(in_ref, out_ref):
        out_ref[...] = jnp.linalg.qr(in_ref[...])[0]

    return Program(function=pl.pallas_call(body, out_shape=spec), specs=(spec,))


def build_abort(generation):
    os.write(2, b"F1122 10:00:00.000000 1 file.cc:1] Check failed: a type nobody knows\n    @ a frame\n")
    os.abort()


def build_refused(generation):
    raise NotImplementedError(f"toys do not run on {generation}")


def build_wrong(generation):
    raise ValueError("a mistake\nin two lines")


def case(build, kernel="toy", shape="small", **options):
    """The case of a builder of this module, with its options."""
    return Case(kernel=kernel, shape=shape, build=functools.partial(build, **options) if options else build)
