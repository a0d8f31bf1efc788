"""Codes of 1, 2, 3, 4 or 8 bits, several to a byte, along any axis: the layout of every low-bit codec here.

The layout is "by parts". The n codes along the axis are cut into 8/bits equal parts, one after the other, and a
byte holds one code of each part, the first part in its low bits: at 4 bits byte j holds codes j and j + n/2, at
2 bits codes j, j + n/4, j + 2n/4 and j + 3n/4. Three bits are two planes, one after the other: n/4 bytes of the
low two bits, then n/8 bytes of the high bit, each laid out as codes of its own width. So unpacking is shifts,
masks and a concatenation of whole blocks; nothing is interleaved, which vector units pay for.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

# The planes of a code, low bits first: how many bits each holds.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def _unit(bits: int) -> int:
    """The number of codes that fill whole bytes at this width."""
    if bits not in PLANES:
        raise ValueError(f"codes are packed at {', '.join(map(str, PLANES))} bits, not {bits=}")
    return 8 // min(PLANES[bits])


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take along the packed axis: exactly count * bits / 8.

    Raises:
        ValueError: a width that is not packed, or a count that does not fill whole bytes.
    """
    unit = _unit(bits)
    if count % unit:
        raise ValueError(
            f"{count} codes of {bits} bits do not fill whole bytes: a multiple of {unit} is needed"
        )
    return count * bits // 8


def padded_count(count: int, bits: int) -> int:
    """The least number of codes, at least ``count``, that fills whole bytes. Raises ValueError for other widths."""
    unit = _unit(bits)
    return -(-count // unit) * unit


def _pack_plane(codes: Array, bits: int, axis: int) -> Array:
    packed, *rest = jnp.split(codes, 8 // bits, axis=axis)
    for place, part in enumerate(rest, start=1):
        packed = packed | (part << jnp.uint8(bits * place))
    return packed


def _unpack_plane(packed: Array, bits: int, axis: int) -> Array:
    mask = jnp.uint8((1 << bits) - 1)
    parts = [(packed >> jnp.uint8(bits * place)) & mask for place in range(8 // bits)]
    return jnp.concatenate(parts, axis=axis)


def pack(codes: UInt8[Array, "..."], bits: int, axis: int) -> UInt8[Array, "..."]:
    """Codes below 2^bits, several to a byte along ``axis``; the other axes stay.

    Args:
        codes: uint8, n of them along ``axis``; bits above the width would spill into other codes and are cut.
        bits: 1, 2, 3, 4 or 8 (8: the codes as they are).
        axis: the axis that shrinks from n to n * bits / 8; may be negative.

    Raises:
        ValueError: another width, or n does not fill whole bytes (multiple of 8/bits; of 8 at 3 bits).
    """
    packed_size(codes.shape[axis], bits)
    planes, low = [], 0
    for width in PLANES[bits]:
        plane = (codes >> jnp.uint8(low)) & jnp.uint8((1 << width) - 1)
        planes.append(_pack_plane(plane, width, axis))
        low += width
    return planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis=axis)


def unpack(packed: UInt8[Array, "..."], bits: int, axis: int) -> UInt8[Array, "..."]:
    """The codes that ``pack`` stored: uint8, m * 8 / bits of them where ``packed`` has m bytes along ``axis``.

    Raises:
        ValueError: another width, or at 3 bits a number of bytes that is no multiple of 3.
    """
    _unit(bits)
    if len(PLANES[bits]) == 1:
        return _unpack_plane(packed, bits, axis)
    count = packed.shape[axis]
    if count % bits:
        raise ValueError(
            f"{count} bytes along axis {axis} cannot hold {bits}-bit codes: a multiple of {bits} is needed"
        )
    low, high = jnp.split(packed, [2 * count // 3], axis=axis)
    return _unpack_plane(low, 2, axis) | (_unpack_plane(high, 1, axis) << jnp.uint8(2))
