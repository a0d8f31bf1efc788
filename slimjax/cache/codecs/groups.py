"""Asymmetric quantisation of groups along one axis, packed along it: what KIVI, GEAR and XQuant share."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from slimjax.cache.codecs.extremes import least
from slimjax.cache.pack import pack, packed_size, padded_count, unpack
from slimjax.numerics import accumulation_dtype
from slimjax.pytree import pytree, static

WIDTHS = (2, 3, 4, 8)
SCALE_DTYPES = ("float16", "bfloat16", "float32")


@pytree
class Groups:
    """Codes of groups along ``axis``: value = low + code * scale.

    Attributes:
        packed: uint8, laid out by ``slimjax.cache.pack`` along ``axis``, zeros filling the last byte.
        scale: one for each group, at that place of ``axis``.
        low: the group's least value.
        bits: bits of a code.
        axis: counted from the end (negative), so that leading axes may come and go.
        size: values along ``axis``.
        group: values of a group; the last group may be shorter.
    """

    packed: UInt8[Array, "..."]
    scale: Float[Array, "..."]
    low: Float[Array, "..."]
    bits: int = static()
    axis: int = static()
    size: int = static()
    group: int = static()


def checked(bits: int, group: int, scale_dtype: str) -> None:
    """Raises ValueError, naming the field, for what groups cannot be made of."""
    if bits not in WIDTHS:
        raise ValueError(f"{bits=} is none of {', '.join(map(str, WIDTHS))}")
    if group < 1:
        raise ValueError(f"{group=}: a group has at least one value")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"{scale_dtype=} is none of {', '.join(SCALE_DTYPES)}")


def _filled(array: Array, axis: int, size: int, **how: str) -> Array:
    width = [(0, 0)] * array.ndim
    width[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, width, **how)


def _grouped(array: Array, axis: int, group: int) -> Array:
    """[..., count*group, ...] to [..., count, group, ...]: ``axis``, being negative, then is the group's."""
    place = array.ndim + axis
    return array.reshape(*array.shape[:place], -1, group, *array.shape[place + 1 :])


def _ungrouped(array: Array, axis: int, size: int) -> Array:
    """[..., count, group, ...] to the first ``size`` of [..., count*group, ...]."""
    place = array.ndim - 1 + axis
    flat = array.reshape(*array.shape[:place], -1, *array.shape[place + 2 :])
    return jax.lax.slice_in_dim(flat, 0, size, axis=axis)


def encode_groups(
    rows: Float[Array, "..."], *, bits: int, group: int, axis: int, scale_dtype: str = "float16"
) -> Groups:
    """Groups of ``group`` consecutive values along ``axis``: scale = (max - min) / (2^bits - 1), code =
    (x - min) / scale, clamped to [0, 2^bits - 1], then rounded half to even.

    Codes are chosen by the scale and minimum before these are rounded to ``scale_dtype``. float16 holds
    magnitudes up to 65,504: a group beyond it decodes to infinities or NaN, as one with a NaN in it does.

    Args:
        rows: any float dtype.
        bits: 2, 3, 4 or 8.
        group: values of a group, the last one shorter where it does not divide the axis.
        axis: negative.
        scale_dtype: what scale and minimum are stored in: float16, bfloat16 or float32.
    """
    rows = rows.astype(accumulation_dtype(rows.dtype))
    size = rows.shape[axis]
    group = min(group, size)
    count = -(-size // group)
    # Copies of the last value change neither minimum nor maximum of its group.
    values = _grouped(_filled(rows, axis, count * group, mode="edge"), axis, group)
    low = least(values, axis=axis, keepdims=True)  # NaN where there is one, and so is the scale
    scale = (jnp.max(values, axis=axis, keepdims=True) - low) / (2**bits - 1)
    codes = (values - low) / jnp.where(scale == 0, jnp.ones_like(scale), scale)
    codes = jnp.round(jnp.clip(codes, 0, 2**bits - 1)).astype(jnp.uint8)
    codes = _filled(_ungrouped(codes, axis, size), axis, padded_count(size, bits))
    scale, low = (jnp.squeeze(array, axis).astype(scale_dtype) for array in (scale, low))
    packed = pack(codes, bits, axis)
    return Groups(packed=packed, scale=scale, low=low, bits=bits, axis=axis, size=size, group=group)


def group_codes(groups: Groups) -> UInt8[Array, "..."]:
    """The integer codes, unpacked, in the shape of the rows."""
    codes = unpack(groups.packed, groups.bits, groups.axis)
    return jax.lax.slice_in_dim(codes, 0, groups.size, axis=groups.axis)


def decode_groups(groups: Groups) -> Float[Array, "..."]:
    """low + code * scale in float32, in the shape of the rows."""
    axis, count = groups.axis, groups.scale.shape[groups.axis]
    codes = _grouped(_filled(group_codes(groups), axis, count * groups.group), axis, groups.group)
    scale, low = (jnp.expand_dims(array.astype(jnp.float32), axis) for array in (groups.scale, groups.low))
    return _ungrouped(codes.astype(jnp.float32) * scale + low, axis, groups.size)


def groups_nbytes(shape: tuple[int, ...], *, bits: int, group: int, axis: int, scale_dtype: str) -> int:
    """Bytes of ``encode_groups`` of rows of this shape: codes, and a scale and a minimum for each group."""
    size = shape[axis]
    others = math.prod(shape) // size
    packed = packed_size(padded_count(size, bits), bits)
    return others * (packed + 2 * jnp.dtype(scale_dtype).itemsize * -(-size // min(group, size)))
