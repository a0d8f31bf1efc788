"""One stream of a cache whose codec encodes tiles of tokens: whole tiles, and a buffer of the newest tokens.

The first ``length // W * W`` tokens of a sequence are in tiles, the others in a buffer of W slots (W whole
tiles; the codec's ``window``). When the buffer is full, its W tokens are encoded at once: KIVI's residual
window, GEAR's buffer and FlashQ's decode buffer (arXiv 2412.08585, section 3) are this one mechanism.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slimjax.axes import Lengths
from slimjax.cache.codecs.base import Role, TiledCodec
from slimjax.pytree import pytree


@pytree
class TiledRows:
    """Codes of tiles, [B, C/G, ...]; the buffer, [B, W, K, H]; and its scale, or None where it has none.

    Invariants: tiles at and past ``length // W * W`` tokens, and buffer slots at and past ``length % W``,
    hold anything. ``scale`` [B, 1, K, 1] is set when a sequence's first tokens arrive.
    """

    tiles: Any
    buffer: Array
    scale: Float[Array, "B 1 K 1"] | None


def capacity_of(capacity: int, codec: TiledCodec) -> int:
    """Slots of a cache that holds at least ``capacity`` tokens: whole windows."""
    return -(-capacity // codec.span) * codec.span


def empty_tiles(codec: TiledCodec, row: tuple[int, int], role: Role, *, batch: int, slots: int) -> TiledRows:
    """No tokens yet; ``slots`` is from ``capacity_of``."""
    tiles = jax.ShapeDtypeStruct((batch, slots // codec.tile, codec.tile, *row), jnp.float32)
    window = jax.ShapeDtypeStruct((batch, codec.span, *row), jnp.float32)

    def of(rows: Array, window: Array) -> TiledRows:
        scale = codec.buffer_scale(window, jnp.ones(window.shape[:2], bool))
        return TiledRows(tiles=codec.encode_tiles(rows, role), buffer=codec.hold(window, scale), scale=scale)

    shapes = jax.eval_shape(of, tiles, window)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def append_tiles(
    stored: TiledRows,
    rows: Float[Array, "B T K H"],
    codec: TiledCodec,
    role: Role,
    length: Lengths,
    new: Lengths,
) -> TiledRows:
    """Hold ``new`` of the T rows behind the ``length`` tokens there are, and encode the windows that fill up.

    T = 1 encodes a window every W steps; under jit the branch costs nothing in between.
    """
    batch, tokens = rows.shape[:2]
    span = codec.span
    first = (length == 0)[:, None, None, None]
    step = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    given = step < new[:, None]
    scale = codec.buffer_scale(rows, given)
    if scale is not None and stored.scale is not None:
        scale = jnp.where(first & (new > 0)[:, None, None, None], scale, stored.scale)
    windows = (span - 1 + tokens) // span  # at most so many fill up
    # Buffer and new rows side by side: slot j is token length // W * W + j.
    held = length % span
    line = jnp.pad(stored.buffer, ((0, 0), (0, windows * span), (0, 0), (0, 0)))
    slots = jnp.where(given, held[:, None] + step, line.shape[1])
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None]
    line = line.at[sequence, slots].set(codec.hold(rows, scale), mode="drop")
    full = (held + new) // span
    buffer = jnp.take_along_axis(
        line.reshape(batch, windows + 1, span, *line.shape[2:]), full[:, None, None, None, None], axis=1
    )[:, 0]

    def flush(tiles: Any) -> Any:
        return _flush(tiles, line[:, : windows * span], rows, codec, role, scale, length, full)

    tiles = jax.lax.cond(jnp.any(full > 0), flush, lambda tiles: tiles, stored.tiles)
    return TiledRows(tiles=tiles, buffer=buffer, scale=scale)


def _flush(
    tiles: Any,
    line: Array,
    rows: Float[Array, "B T K H"],
    codec: TiledCodec,
    role: Role,
    scale: Float[Array, "B 1 K 1"] | None,
    length: Lengths,
    full: Int[Array, "B"],
) -> Any:
    """Write the tiles of each sequence's first ``full`` windows of ``line``."""
    batch, span, tile = line.shape[0], codec.span, codec.tile
    count, per_window = line.shape[1] // tile, span // tile
    codes = codec.flush(line.reshape(batch, count, tile, *line.shape[2:]), scale, role)
    if codec.prefills and rows.shape[1] >= span:
        # A first chunk's whole tiles are encoded from its rows, not from what the buffer makes of them.
        wanted = count * tile
        fitted = jnp.pad(rows, ((0, 0), (0, max(0, wanted - rows.shape[1])), (0, 0), (0, 0)))[:, :wanted]
        fresh = codec.encode_tiles(fitted.reshape(batch, count, tile, *rows.shape[2:]), role)
        codes = jax.tree.map(lambda new, old: _choose(length == 0, new, old), fresh, codes)
    index = jnp.arange(count, dtype=jnp.int32)[None, :]
    total = jax.tree.leaves(tiles)[0].shape[1]
    target = jnp.where(
        index < full[:, None] * per_window, (length // span * per_window)[:, None] + index, total
    )
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return jax.tree.map(lambda held, fresh: held.at[sequence, target].set(fresh, mode="drop"), tiles, codes)


def _choose(which: Bool[Array, "B"], yes: Array, no: Array) -> Array:
    return jnp.where(which.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


def read_tiles(
    stored: TiledRows, codec: TiledCodec, length: Lengths, start: Int[Array, ""] | int, size: int
) -> Float[Array, "B S K H"]:
    """Rows of slots start .. start + size - 1, both multiples of W, float32; past each length, anything."""
    batch, span, tile = stored.buffer.shape[0], codec.span, codec.tile
    tiles = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start // tile, size // tile, axis=1), stored.tiles
    )
    rows = codec.decode_tiles(tiles)
    windows = rows.reshape(batch, size // span, span, *rows.shape[3:])
    newest = buffered(length, span, start, size)
    held = codec.held(stored.buffer, stored.scale)[:, None]
    rows = jnp.where(newest[:, :, None, None, None], jnp.broadcast_to(held, windows.shape), windows)
    return rows.reshape(batch, size, *rows.shape[3:])


def buffered(length: Lengths, span: int, start: Int[Array, ""] | int, size: int) -> Bool[Array, "B n"]:
    """Which of the windows from ``start`` on is the one in the buffer."""
    index = jnp.arange(size // span, dtype=jnp.int32)[None, :] + start // span
    return index == (length // span)[:, None]
