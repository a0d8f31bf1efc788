"""What differs between the versions of Pallas Mosaic GPU (jax 0.10 to 0.12), and between a GPU and its interpreter.

Kernels call these instead. ``interpreted`` is static: the interpreter multiplies only what lies in shared memory, and
that of jax 0.10 knows neither layouts of registers nor transposed operands.
"""

import importlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

OLD = not hasattr(plgpu, "InterpretGPUParams")  # jax 0.10
_HOME = "jax._src.pallas.mosaic_gpu.interpret.params" if OLD else "jax.experimental.pallas.mosaic_gpu"
LOG2E = math.log2(math.e)
_load: Any = plgpu.load  # in jax 0.10 with one argument more, and not called there
THREADS = 16  # that the interpreter wants of a large kernel
SCRATCH = (
    512  # float32 numbers that a reduction over rows goes through: two registers of each thread at a time
)
_Parameters: Any = importlib.import_module(_HOME).InterpretGPUParams


def interpreter(*, detect_races: bool = False) -> Any:
    """The interpreter's parameters, as strict as it can be: shared memory is NaN until it is written.

    What TMA brings from behind an array is zero; jax 0.10 can call it an error, or make it NaN.
    """
    more = {"out_of_bounds_reads": "uninitialized"} if OLD else {}
    return _Parameters(detect_races=detect_races, **more)


def threads() -> int:
    """Of XLA on this machine, which the interpreter's warpgroups wait in."""
    asked = os.environ.get("NPROC", "")
    return int(asked) if asked.isdecimal() else os.cpu_count() or 1


def order_global(*, interpreted: bool) -> None:
    """What other blocks of a cluster have written to global memory before they arrived comes before what follows.

    Both sides call it: who writes, once its copy is complete and before it arrives; who reads, once it has waited.
    """
    if interpreted:
        return

    def emit(ctx: Any) -> None:
        del ctx
        for fence in ("fence.acq_rel.cluster;", "fence.proxy.async.global;"):
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [], fence, "", has_side_effects=True)

    inlined: Any = plgpu.inline_mgpu()(emit)
    inlined()


def enough_threads(needed: int, where: str, interpret: Any) -> None:
    """Raise RuntimeError where the interpreter's warpgroups would wait for each other for ever."""
    if interpret is not False and (few := threads()) < needed:
        raise RuntimeError(
            f"interpreted {where}, threads of XLA wait for each other, and {few} are too few: set the environment's "
            f"NPROC={needed} before JAX starts"
        )


def call(
    body: Callable[..., None],
    *,
    out: Sequence[jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    grid: dict[str, int],
    cluster: dict[str, int] | None = None,
    groups: int,
    interpret: Any,
    name: str,
) -> Callable[..., Any]:
    """A kernel on a grid of named axes, ``groups`` warpgroups (axis "group") a block.

    cluster: a named axis of blocks that run at the same time and can tell each other so, or None.
    interpret: False, or what ``interpreter`` gives.
    """
    return plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=(scratch,),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple((cluster or {}).values()),
        cluster_names=tuple(cluster or {}),
        num_threads=groups,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
        kernel_name=name,
    )


def tiled(shape: Sequence[int], dtype: Any, *, columns: int | None = None) -> Any:
    """Shared memory for operands of products: in tiles of 8 rows, swizzled as wide as rows allow.

    columns: what is read at a time, where that is less than a row.
    """
    width = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle((columns or shape[-1]) * width * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def full(shape: Sequence[int], value: float, *, interpreted: bool) -> jax.Array:
    """One number in the layout of the results of products, [64, n] float32, or of their rows, [64]."""
    layout: Any = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return _laid(jnp.full(tuple(shape), value, jnp.float32), layout, interpreted)


def iota(shape: Sequence[int], axis: int, *, interpreted: bool) -> jax.Array:
    """Indices along an axis, int32, in the layout of the results of products."""
    return _laid(jax.lax.broadcasted_iota(jnp.int32, tuple(shape), axis), plgpu.Layout.WGMMA, interpreted)


def _laid(x: jax.Array, layout: Any, interpreted: bool) -> jax.Array:
    return x if interpreted else plgpu.layout_cast(x, layout)


def full_columns(count: int, value: float, *, interpreted: bool) -> jax.Array:
    """One number for each column of the results of products, [n] float32."""
    return _laid(jnp.full((count,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(0), interpreted)


def by_column(ref: Any, *, far: bool = False, interpreted: bool) -> jax.Array:
    """Numbers of columns, [n], to be broadcast to products' results; from shared, or with ``far`` global, memory."""
    if far and not interpreted:
        return _load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return _laid(_read(ref, interpreted), plgpu.Layout.WGMMA.reduce(0), interpreted)


def load(ref: Any, *, interpreted: bool) -> jax.Array:
    """Rows from shared memory, [64, n] of any width, in the layout of the results and operands of products."""
    return _laid(_read(ref, interpreted), plgpu.Layout.WGMMA, interpreted)


def load_turned(ref: Any, *, interpreted: bool) -> jax.Array:
    """Columns of shared memory [n, 64] as rows, [64, n]; of two bytes each."""
    if interpreted:
        return _read(ref, interpreted).T
    return _load(ref.transpose((1, 0)), layout=plgpu.Layout.WGMMA)


def by_row(ref: Any, *, interpreted: bool) -> jax.Array:
    """Numbers of rows, [64], from shared memory, to be broadcast to products' results."""
    return _laid(_read(ref, interpreted), plgpu.Layout.WGMMA.reduce(1), interpreted)


def tanh(x: jax.Array) -> jax.Array:
    """By an exponential: the GPU's own is right to 2^-11, of which a softcap of 50 makes 2 % of a weight."""
    return 1 - 2 / (jnp.exp2(x * (2 * LOG2E)) + 1)


def across(by_row: jax.Array, like: jax.Array) -> jax.Array:
    """Numbers of rows in every column."""
    return jax.lax.broadcast_in_dim(by_row, like.shape, (0,))


def down(by_column: jax.Array, like: jax.Array) -> jax.Array:
    """Numbers of columns in every row."""
    return jax.lax.broadcast_in_dim(by_column, like.shape, (1,))


def over_rows(x: jax.Array, operation: str, scratch: Any, *, interpreted: bool) -> jax.Array:
    """The largest ("max") or the sum ("add") over rows: of every column [64, n], or of numbers of rows [64], one.

    scratch: ``SCRATCH`` float32 numbers of shared memory that no other warpgroup uses at the time. Those that Pallas
    takes for reductions of its own are one place for all warpgroups of a block, who would mix up their numbers.
    """
    if interpreted:
        return x.max(axis=0) if operation == "max" else x.sum(axis=0)
    layout, single = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())
    given, left = (layout, layout.reduce(0)) if x.ndim == 2 else (layout.reduce(1), single)

    def emit(ctx: Any, x: Any, scratch: Any) -> Any:
        del ctx
        return x.reduce(operation, 0, scratch)

    found = plgpu.ShapeDtypeStruct(x.shape[1:], x.dtype, layout=left)
    inlined: Any = plgpu.inline_mgpu(arg_types=(given, plgpu.RefType()), return_type=found)(emit)
    return inlined(x, scratch)


def load_columns(ref: Any, columns: Any, *, interpreted: bool) -> jax.Array:
    """Columns of rows that lie one behind the other in shared memory, [64, ...], in the same layout."""
    if interpreted:
        return _read(ref, interpreted).reshape(ref.shape[0], -1)[
            :, columns.start : columns.start + columns.size
        ]
    flat = ref.reshape(ref.shape[0], math.prod(ref.shape[1:])).at[:, columns]
    return _load(flat, layout=plgpu.Layout.WGMMA, optimized=False)


def _read(ref: Any, interpreted: bool) -> jax.Array:
    held = ref[...]
    if interpreted:
        # TMA may overwrite what is in registers when a slot is set free; the interpreter asks for more.
        plgpu.commit_smem()
    return held


def turned_product(a: Any, b: Any, *, onto: jax.Array | None = None, interpreted: bool) -> jax.Array:
    """a [k, m] transposed times b [n, k] transposed, both in shared memory, added to ``onto``; [m, n] float32."""
    if interpreted:
        left, right = a[...].T, b[...].T
        plgpu.commit_smem()
        new = jnp.dot(left, right, preferred_element_type=jnp.float32)
        return new if onto is None else onto + new

    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a.transpose((1, 0)), b.transpose((1, 0)))
        return sums[...]

    def add(sums: Any) -> None:
        plgpu.wgmma(sums, a.transpose((1, 0)), b.transpose((1, 0)))
        plgpu.wgmma_wait(0)

    if onto is not None:  # in the registers that it has already
        sums: Any = plgpu.WGMMAAccumulatorRef.init(onto)
        return pl.run_state(add)(sums)
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[1], b.shape[0]), jnp.float32))


def added(onto: jax.Array, pairs: Sequence[tuple[jax.Array, Any]], *, interpreted: bool) -> jax.Array:
    """onto [64, n] and all a b^T: a [64, k] in registers, b [n, k] in shared memory. Waits once, for all of them."""
    if interpreted:
        rights = [b[...].T for _, b in pairs]
        plgpu.commit_smem()
        products = [
            jnp.dot(a, right, preferred_element_type=jnp.float32)
            for (a, _), right in zip(pairs, rights, strict=True)
        ]
        return sum(products, onto)

    def add(sums: Any) -> None:
        for a, b in pairs:
            plgpu.wgmma(sums, a, b.transpose((1, 0)))
        plgpu.wgmma_wait(0)

    sums: Any = plgpu.WGMMAAccumulatorRef.init(onto)
    return pl.run_state(add)(sums)


def store_turned(ref: Any, rows: jax.Array, *, interpreted: bool) -> None:
    """Results of products, [64, n], into shared memory [n, 64]."""
    if interpreted:
        ref[...] = rows.T
    else:
        ref.transpose((1, 0))[...] = rows


def product(a: Any, b: Any, *, turned: bool = False, interpreted: bool) -> jax.Array:
    """a [64, k] times b [k, n], or with ``turned`` b [n, k] transposed; float32, finished.

    a: in shared memory or registers; b: in shared memory.
    """
    if interpreted and (OLD or isinstance(a, jax.Array)):
        right = b[...].T if turned else b[...]
        plgpu.commit_smem()  # TMA may overwrite what is read here; it need not wait so for what wgmma reads
        return jnp.dot(a[...], right, preferred_element_type=jnp.float32)
    right = b.transpose((1, 0)) if turned else b

    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, right)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], right.shape[1]), jnp.float32))


def whole_product(a: Any, b: Any, *, interpreted: bool) -> jax.Array:
    """INT8 codes a [64, k] times b [n, k] transposed, both in shared memory; int32 [64, n], finished."""
    if interpreted:
        left, right = a[...], b[...].T
        plgpu.commit_smem()
        return jnp.dot(left, right, preferred_element_type=jnp.int32)

    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, b.transpose((1, 0)))
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.int32))
