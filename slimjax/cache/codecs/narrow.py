"""What the token-local codecs of few bits share: groups along a head's channels, packing, the dtype of scales."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from slimjax.cache.pack import pack, packed_size, unpack

SCALE_DTYPES = ("float32", "bfloat16", "float16")


def check(bits: int, allowed: tuple[int, ...], scale_dtype: str, group: int | None, where: str) -> None:
    """Raise ValueError, naming the field, where a codec's options are not among those it has."""
    if bits not in allowed:
        raise ValueError(f"{where}: {bits=} is none of {', '.join(map(str, allowed))}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"{where}: {scale_dtype=} is none of {', '.join(SCALE_DTYPES)}")
    if group is not None and group < 1:
        raise ValueError(f"{where}: {group=}: a group has at least one channel; None: the whole head")


def as_stored(
    scale: Float[Array, "B S K n"], dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "B S K n"], Float[Array, "B S K n"]]:
    """The scale in the dtype it is stored in, and that in float32: what rows have to be coded with."""
    # Behind a barrier, as XLA is free to leave a cast there and back out.
    kept = jax.lax.optimization_barrier(scale.astype(dtype))
    return kept, kept.astype(jnp.float32)


def group_count(size: int, group: int | None) -> int:
    """Groups of a head of ``size`` channels; the last may be shorter."""
    return 1 if group is None else -(-size // group)


def grouped(rows: Float[Array, "B S K H"], group: int | None) -> Float[Array, "B S K n g"]:
    """Channels in groups; a shorter last one is filled up with its last channel, which moves no extreme."""
    size = rows.shape[-1]
    count = group_count(size, group)
    width = size if group is None else group
    filled = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, count * width - size)), mode="edge")
    return filled.reshape(*rows.shape[:-1], count, width)


def spread(scale: Float[Array, "B S K n"], group: int | None, size: int) -> Float[Array, "B S K #H"]:
    """Each group's number at each of its channels; one group's is left to broadcast."""
    return scale if group is None else jnp.repeat(scale, group, axis=-1)[..., :size]


def pack_rows(codes: UInt8[Array, "B S K H"], bits: int) -> UInt8[Array, "B S K P"]:
    """Packed along the channels, filled up with zeros to whole bytes."""
    size = codes.shape[-1]
    return pack(jnp.pad(codes, ((0, 0), (0, 0), (0, 0), (0, _whole(size, bits) - size))), bits, -1)


def unpack_rows(packed: UInt8[Array, "B S K P"], bits: int, size: int) -> UInt8[Array, "B S K H"]:
    """What ``pack_rows`` was given, ``size`` channels of it."""
    return unpack(packed, bits, -1)[..., :size]


def row_bytes(size: int, bits: int) -> int:
    """Bytes of one head's packed codes, P: size * bits / 8, and up to 2 more where that fills no whole unit."""
    return packed_size(_whole(size, bits), bits)


def _whole(size: int, bits: int) -> int:
    """The number of codes that fills whole bytes: of 8/bits codes, of 8 at 3 bits."""
    unit = 8 if bits == 3 else 8 // bits
    return -(-size // unit) * unit
