"""One stream of a cache whose codec encodes tiles of tokens: whole tiles, and a buffer of the newest tokens.

Windows of W whole tiles are encoded at once, out of a buffer of W slots: KIVI's residual window, GEAR's buffer and
FlashQ's decode buffer (arXiv 2412.08585, section 3) are this one mechanism. A window is encoded as soon as it is
full, or, where the codec is ``lazy``, when the next token comes; ``flushed`` says how many have been.

Tokens come in steps or as a prompt. T tokens in steps store, and are read as, what T calls of one token would. A
prompt's windows that lie within one call are encoded from its rows, if the codec ``prefills``, and its buffer has
one scale from all of its rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slimjax.axes import Lengths
from slimjax.cache.codecs.base import Role, TiledCodec
from slimjax.cache.layout import LaidTiles, empty_tiles_like
from slimjax.pytree import pytree


@pytree
class TiledRows:
    """Codes of tiles, C/G of them; the buffer, [B, W, K, H]; and its scales, or None where it has none.

    Invariants: tiles at and past ``flushed`` windows, and buffer slots past the newest token, hold anything.

    Attributes:
        scale: the universal scale, 0 before the first token. It grows with the rows until the first window is
            full, or until the prompt ends that fills it, and stays from then on.
        scales: what each buffer slot was rounded under: the universal scale as it was when the token came.
    """

    tiles: LaidTiles
    buffer: Array
    scale: Float[Array, "B 1 K 1"] | None
    scales: Float[Array, "B W K 1"] | None


@pytree
class Line:
    """Tokens, from the first of some window on, as the buffer holds them, or held them before they were encoded."""

    codes: Array  # [B, n, K, H]
    scales: Float[Array, "B n K 1"] | None


def flushed(codec: TiledCodec, length: Array) -> Array:
    """Windows in tiles when a sequence holds ``length`` tokens; the token after them is the buffer's first."""
    if codec.lazy:
        length = jnp.maximum(length - 1, 0)
    return length // codec.span


def capacity_of(capacity: int, codec: TiledCodec) -> int:
    """Slots of a cache that holds at least ``capacity`` tokens: whole windows."""
    return -(-capacity // codec.span) * codec.span


def empty_tiles(codec: TiledCodec, row: tuple[int, int], role: Role, *, batch: int, slots: int) -> TiledRows:
    """No tokens yet; ``slots`` is from ``capacity_of``."""
    tiles = jax.ShapeDtypeStruct((batch, slots // codec.tile, codec.tile, *row), jnp.float32)
    window = jax.ShapeDtypeStruct((batch, codec.span, *row), jnp.float32)

    def of(rows: Array, window: Array) -> TiledRows:
        scale = codec.buffer_scale(window, jnp.ones(window.shape[:2], bool))
        scales = None if scale is None else jnp.broadcast_to(scale, (batch, codec.span, row[0], 1))
        buffer = codec.hold(window, scales)
        tiles = empty_tiles_like(codec.encode_tiles(rows, role))
        return TiledRows(tiles=tiles, buffer=buffer, scale=scale, scales=scales)

    shapes = jax.eval_shape(of, tiles, window)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def append_tiles(
    stored: TiledRows,
    rows: Float[Array, "B T K H"],
    codec: TiledCodec,
    role: Role,
    length: Lengths,
    new: Lengths,
    *,
    prompt: bool = False,
) -> tuple[TiledRows, Line]:
    """Hold ``new`` of the T rows behind the ``length`` tokens there are, and encode the windows that fill up.

    T = 1 encodes a window every W steps; under jit the branch costs nothing in between. The line starts at the
    first token that was not in tiles before: old buffer and new rows side by side.
    """
    tokens, span = rows.shape[1], codec.span
    before, after = flushed(codec, length), flushed(codec, length + new)
    step = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    given = step < new[:, None]
    scale, scales = _scales(stored, rows, codec, length, given, after * span, prompt=prompt)
    windows = (span - 1 + tokens) // span  # at most so many fill up
    held = length - before * span
    slots = jnp.where(given, held[:, None] + step, (windows + 1) * span)
    codes = _behind(
        stored.buffer, codec.hold(rows, None if scales is None else _safe(scales)), slots, windows
    )
    marks = None
    if stored.scales is not None and scales is not None:
        marks = _behind(stored.scales, scales, slots, windows)
    line = Line(codes=codes, scales=marks)
    full = after - before

    def flush() -> Any:
        found = _encoded(line, codec, role, scale, windows)
        if prompt and codec.prefills and tokens >= span:
            found = _from_rows(found, rows, codec, role, held, windows)
        return found

    def nothing() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(flush))

    # The branch makes a few windows and no tiles of the cache, which a TPU would copy to give them back.
    tiles = _written(stored.tiles, jax.lax.cond(jnp.any(full > 0), flush, nothing), codec, before, full)
    newest = Line(
        codes=_window(codes, full, span), scales=None if marks is None else _window(marks, full, span)
    )
    return TiledRows(tiles=tiles, buffer=newest.codes, scale=scale, scales=newest.scales), line


def _scales(
    stored: TiledRows,
    rows: Float[Array, "B T K H"],
    codec: TiledCodec,
    length: Lengths,
    given: Bool[Array, "B T"],
    tail: Int[Array, "B"],
    *,
    prompt: bool,
) -> tuple[Float[Array, "B 1 K 1"] | None, Float[Array, "B T K 1"] | None]:
    """The universal scale after the rows, and what each of them is rounded under; the slot ``tail`` is buffered."""
    if stored.scale is None:
        return None, None
    batch, tokens, heads, size = rows.shape
    slot = length[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
    shape = (batch, tokens, heads, 1)
    if prompt:
        found = codec.buffer_scale(rows, given)
        assert found is not None  # as there is a stored one
        grown = jnp.maximum(stored.scale, found)
        scale = jnp.where((length < codec.span)[:, None, None, None], grown, stored.scale)
        each = jnp.broadcast_to(scale, shape)
        last = given & (slot >= tail[:, None])
        own = codec.tail_scale(rows, last)
        return scale, each if own is None else jnp.where(last[:, :, None, None], jnp.minimum(own, each), each)
    found = codec.buffer_scale(rows.reshape(batch * tokens, 1, heads, size), given.reshape(batch * tokens, 1))
    assert found is not None
    grows = (given & (slot < codec.span))[:, :, None, None]
    found = jnp.where(grows, found.reshape(shape), jnp.zeros(shape, found.dtype))
    each = jnp.maximum(jax.lax.associative_scan(jnp.maximum, found, axis=1), stored.scale)
    return each[:, -1:], each


def _safe(scale: Array) -> Array:
    """Nothing is divided by zero: rows of zeros have codes of zero under any scale."""
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _behind(buffer: Array, fresh: Array, slots: Int[Array, "B T"], windows: int) -> Array:
    """The buffer and what comes behind it, [B, (windows + 1) * W, ...]."""
    line = jnp.pad(buffer, ((0, 0), (0, windows * buffer.shape[1]), (0, 0), (0, 0)))
    sequence = jnp.arange(len(buffer), dtype=jnp.int32)[:, None]
    return line.at[sequence, slots].set(fresh, mode="drop")


def _window(line: Array, index: Int[Array, "B"], span: int) -> Array:
    """One window of the line."""
    parts = line.reshape(len(line), -1, span, *line.shape[2:])
    return jnp.take_along_axis(parts, index[:, None, None, None, None], axis=1)[:, 0]


def _encoded(
    line: Line, codec: TiledCodec, role: Role, scale: Float[Array, "B 1 K 1"] | None, windows: int
) -> Any:
    """Codes of the tiles of the line's first windows, from what the buffer holds of them."""
    count = windows * codec.span
    codes = line.codes[:, :count]
    if line.scales is not None and scale is not None:
        # Codes rounded under a smaller scale, before it had grown, are rounded once more; the others stay.
        scale = _safe(scale)
        ratio = line.scales[:, :count] / scale
        codes = jnp.round(codes.astype(jnp.float32) * ratio).astype(codes.dtype)
    return codec.flush(codes.reshape(len(codes), -1, codec.tile, *codes.shape[2:]), scale, role)


def _from_rows(
    codes: Any,
    rows: Float[Array, "B T K H"],
    codec: TiledCodec,
    role: Role,
    held: Int[Array, "B"],
    windows: int,
) -> Any:
    """The codes, but of windows all of whose tokens are rows of this call, encoded from these."""
    span, tile = codec.span, codec.tile
    index = jnp.arange(windows * span, dtype=jnp.int32)[None, :] - held[:, None]
    index = jnp.clip(index, 0, rows.shape[1] - 1)
    fitted = jnp.take_along_axis(rows, index[:, :, None, None], axis=1)
    fresh = codec.encode_tiles(fitted.reshape(len(rows), -1, tile, *rows.shape[2:]), role)
    first = jnp.arange(windows * span // tile, dtype=jnp.int32)[None, :] // (span // tile) * span
    inside = first >= held[:, None]

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(inside.reshape(*inside.shape, *[1] * (new.ndim - 2)), new, old)

    return jax.tree.map(choose, fresh, codes)


def _written(
    tiles: LaidTiles, codes: Any, codec: TiledCodec, before: Int[Array, "B"], full: Int[Array, "B"]
) -> LaidTiles:
    """The tiles with those of each sequence's first ``full`` new windows behind its ``before`` old ones, in place."""
    per_window = codec.span // codec.tile
    index = jnp.arange(jax.tree.leaves(codes)[0].shape[1], dtype=jnp.int32)[None, :]
    place = before[:, None] * per_window + index
    return tiles.written(codes, jnp.where(index < full[:, None] * per_window, place, tiles.count))


def read_tiles(
    stored: TiledRows, codec: TiledCodec, start: Int[Array, ""] | int, size: int
) -> Float[Array, "B S K H"]:
    """Rows of slots start .. start + size - 1, both multiples of G, from tiles, float32; past these, anything."""
    tile = codec.tile
    rows = codec.decode_tiles(stored.tiles.tiles(start // tile, size // tile))
    return rows.reshape(len(rows), size, *rows.shape[3:])


def read_window(
    stored: TiledRows, codec: TiledCodec, length: Lengths, start: Int[Array, ""] | int, size: int
) -> Float[Array, "B S K H"]:
    """As ``read_tiles``, both multiples of W, but of the buffer's window from the buffer."""
    span = codec.span
    rows = read_tiles(stored, codec, start, size)
    windows = rows.reshape(len(rows), size // span, span, *rows.shape[2:])
    newest = buffered(codec, length, start, size)
    held = codec.held(stored.buffer, stored.scales)[:, None]
    chosen = jnp.where(newest[:, :, None, None, None], jnp.broadcast_to(held, windows.shape), windows)
    return chosen.reshape(rows.shape)


def buffered(
    codec: TiledCodec, length: Lengths, start: Int[Array, ""] | int, size: int
) -> Bool[Array, "B n"]:
    """Which of the windows from ``start`` on is the one in the buffer."""
    index = jnp.arange(size // codec.span, dtype=jnp.int32)[None, :] + start // codec.span
    return index == flushed(codec, length)[:, None]


def part_of(line: Line, first: Int[Array, "B"], start: Int[Array, ""] | int, size: int) -> Line:
    """Slots start .. start + size - 1 of a line whose first slot is ``first``; beyond it, anything."""
    index = jnp.arange(size, dtype=jnp.int32)[None, :] + start - first[:, None]
    index = jnp.clip(index, 0, line.codes.shape[1] - 1)[:, :, None, None]

    def part(array: Array) -> Array:
        return jnp.take_along_axis(array, index, axis=1)

    return Line(codes=part(line.codes), scales=None if line.scales is None else part(line.scales))
