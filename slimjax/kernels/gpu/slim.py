"""Rows that weigh themselves, on Hopper, in one pass: read once, for their scores and as what is weighed.

    s[m, c] = q[m] . R(c) k[c, head of m] * scale       p = softmax(s)       out[m] = sum_c p[m, c] [k, r][c]

Slim attention's option 2 (arXiv 2503.05840): k are keys, R(c) is RoPE's turn, which their second use does not have, r
are R extra coordinates. And rows that every head meets (inputs, the encoder's output): no heads, no turn. The sum has
E = K*H columns for every query row, so no block of threads can hold it. A cluster does: each of its C blocks owns E/C
columns, of keys whole heads, and keeps them in shared memory while scores go round. Its warpgroups, for 64 tokens at a
time:

    loader   brings the block's columns, in pieces, and the scores of all queries once all blocks have written theirs
    scorer   s^T = k q^T of the block's own heads, or the part of all sums that its columns make, to global memory,
             which is to say to L2, and tells the cluster; then, of the 64 tokens before, the softmax of every query
    mixers   two, each for half of the columns: out^T += k^T p^T, from the pieces that the scorer has read

* Products are turned: tokens, or columns, are their 64 rows, and queries their columns, 8 at least. Queries of a block
  stand in the columns of their own head, zeros elsewhere: one product over the block's columns is the scores.
* Codes of 16 bits are two bfloat16 numbers each, exactly; they, and keys under RoPE, go through registers, the mixers'
  transposed on the way. Their scale is a token's: scores are multiplied by it, and weights once more.
* FlashQ's packed codes become bfloat16 rows on the way: the loader brings their bytes, and writes the rows
  (``slim_packed``). A block of tokens is then one part of 64 rows of bytes, and its tokens are not neighbours; extra
  coordinates come decoded, in the same order.
* RoPE turns keys in float32, halves of a head against each other, by the angles of the block's start and of the tokens
  in it. Turned keys are rounded to bfloat16, those of codes to two.
* Shared memory holds two blocks of tokens and a part of a third: while one is weighed, scores of the next go round.
  They have so many places in global memory that nobody overwrites what another reads (``Share.places``).
* SAS in place of the exponential cuts what is small against the maximum so far, of its part of the tokens.
* More query rows than a cluster can hold the sums of are other clusters, or other calls (``share``, ``keys.plan``).

Bytes a token: 2*E of rows, and 2*R (of codes 8 more); for M query rows, filled up by block, 4*M written and 4*M*C read
of scores within L2 (of rows that every head meets C times both); once a part 4*E*M. FLOPs: 4*E*M at most, of codes
twice.

Compiled for sm_90a (jax 0.12.0.1, CUDA 13.0, 2026-11-23), no registers spilled, bytes of shared memory:

    Llama-2-7B    C 8   bf16 224,488             int16 225,544       int16+16 214,312
    Phi-3-mini    C 8   bf16 222,400             int16+16 220,432
    SmolLM2-1.7B  C 4   bf16+16 224,520
    Whisper       C 2   bf16 227,752 (cross)     int16+16 224,728    x bf16, 3 tokens 221,560    e int16 222,616
    T5-11B        C 2   e bf16 228,536, three clusters for 128 heads: each reads all rows
    flashq        Llama-2-7B 4 bits 227,672      Phi-3-mini 8 bits 223,448    Whisper 4 bits 224,760
                  SmolLM2-1.7B 2 bits, 2 tokens 222,552
    flashq+16     Phi-3-mini 4 bits 219,432      SmolLM2-1.7B 2 bits 210,272    (Llama-2-7B: no room)

Not run on a GPU: what the exchange through L2 costs is not known. Blocks of a cluster could send scores to each
other's shared memory instead, which the interpreter does not know. A block of tokens waits for the weights of the one
before: where shared memory holds little more than two (Llama-2-7B) a step is estimated to take up to twice as long as
its bytes. Not served: keys with a bias under RoPE, RoPE of neighbouring coordinates, keys of more columns than a
cluster of 8 shares (T5-11B has 16,384), extra coordinates as they are cached where slots are no multiple of 64.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int8, Int32, Num

from slimjax.attention.positions import Position
from slimjax.axes import Lengths
from slimjax.kernels.combine import combine
from slimjax.kernels.gpu import mosaic, ring, slim_packed
from slimjax.kernels.gpu.grid import CLUSTERS, parts
from slimjax.kernels.gpu.ring import BLOCK, Rules
from slimjax.kernels.gpu.share import GROUPS, LOADER, MIXERS, SCORER, SLOTS, Share
from slimjax.kernels.gpu.slim_load import load_rows
from slimjax.kernels.gpu.slim_mix import mix
from slimjax.kernels.gpu.slim_steps import score

# Registers of a thread of the loader, the scorer and a mixer, 512 for the four. True: keys are codes, or not alone.
BEGUN = 128  # that all four begin with
REGISTERS = {False: (72, 152, 144), True: (64, 128, 160)}


class Held(NamedTuple):
    """Rows as they are cached: bfloat16, or int16 codes and a scale of each token; or FlashQ's packed codes.

    Attributes:
        step, low: of the n tiles of codes of fewer than 8 bits.
    """

    rows: Num[Array, "B _ _"]
    scale: Float[Array, "B _ _"] | None = None  # [B, 1, S], or of tiles [B, n, K]
    step: Int8[Array, "B n _"] | None = None
    low: Int8[Array, "B n _"] | None = None

    def named(self, name: str) -> dict[str, Array]:
        """All but the rows."""
        found = {f"{name}_{kind}": getattr(self, kind) for kind in ("scale", "step", "low")}
        return {kind: array for kind, array in found.items() if array is not None}


def attend_keys(
    q: BFloat16[Array, "GB C R W"],
    keys: Held,
    extra: Held | None,
    length: Lengths,
    first: Lengths,
    rules: Rules,
    position: Position,
    part: Share,
    *,
    limit: Int32[Array, "B T"] | None = None,
    splits: int | None,
    interpret: Any = False,
) -> tuple[Float[Array, "GB M E+R"], Float[Array, "GB M"]]:
    """Weighed rows of every query row, float32, 0 where it sees none; and the logarithms of their softmax's sums.

    q: rows of each block's heads, in the columns of their own head and else zero; or, G groups a sequence, rows that
    meet all columns. keys: [B, S, E]; extra: [B, R, S]. S and R are multiples of 8. ``first``: position of each
    sequence's first query. ``limit``: tokens in tiles that each query token sees, at most ``length``. ``splits``: parts
    of a sequence; None: ``parts``. ``interpret``: False, or ``mosaic.interpreter()``.
    """
    width, tokens = keys.rows.shape[2], keys.rows.shape[1]
    length, first = (jnp.repeat(each, part.groups) for each in (length, first))
    batch = len(length)
    blocks = -(-tokens // BLOCK)
    if part.packing:
        blocks *= part.packing.parts
    if splits is None:
        splits = parts(batch, blocks * BLOCK, processors=CLUSTERS[part.blocks])
    given = keys.named("keys") | ({"extra": extra.rows, **extra.named("extra")} if extra else {})
    given |= _angles(position, part, blocks) if part.rotary else {}
    given |= {"limit": limit} if limit is not None else {}

    def body(length: Any, first: Any, q: Any, keys: Any, *rest: Any) -> None:
        more, (out, log_sums, scores, shared) = dict(zip(given, rest, strict=False)), rest[len(given) :]
        arrays = {"q": q, "keys": keys, "scores": scores, **more}
        _kernel(length, first, arrays, out, log_sums, shared, rules, part, splits, interpret is not False)

    # TMA brings whole tiles: of extra coordinates 64 rows are summed, and those that are none not read again.
    rows = width + (BLOCK if part.extra else 0)
    out, log_sums, _ = mosaic.call(
        body,
        out=(
            jax.ShapeDtypeStruct((splits, batch, rows, part.queries), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, part.queries), jnp.float32),
            jax.ShapeDtypeStruct((batch, splits, part.places * BLOCK, part.blocks, part.rows), jnp.float32),
        ),
        scratch=_shared(part),
        grid={"sequence": batch, "part": splits},  # groups of a sequence side by side
        cluster={"column": part.blocks},
        groups=GROUPS,
        interpret=interpret,
        name="slimjax_keys",
    )(length, first, q, keys.rows, *given.values())
    return combine(jnp.swapaxes(out[:, :, : width + part.extra], 2, 3), log_sums)


def _angles(position: Position, part: Share, blocks: int) -> dict[str, Array]:
    """Cosines and sines of RoPE's angles, made in float64: of a block's tokens, [64, H/2], and of blocks' first ones,
    [blocks, H/2].
    """
    frequency = position.theta ** (-np.arange(0, part.size, 2) / part.size)
    places = {"": part.offset(np.arange(BLOCK)), "start_": part.begin(np.arange(blocks))[1]}
    return {
        f"{name}{function.__name__}": jnp.asarray(function(each[:, None] * frequency), jnp.float32)
        for name, each in places.items()
        for function in (np.cos, np.sin)
    }


def _shared(part: Share) -> dict[str, Any]:
    """Shared memory and barriers; ``share`` counts their bytes."""
    step = part.columns
    held = jnp.int16 if part.codes else jnp.bfloat16
    shared = {
        "q": mosaic.tiled((part.rows, part.width), jnp.bfloat16, columns=step),
        "q_ready": plgpu.Barrier(),
        "keys": mosaic.tiled((part.slots, BLOCK, part.piece), held, columns=step),
        "keys_ready": plgpu.Barrier(num_barriers=part.slots),
        "keys_free": plgpu.Barrier(num_barriers=part.slots, num_arrivals=MIXERS),
        "sent": mosaic.tiled((BLOCK, part.rows), jnp.float32),
        "met": plgpu.ClusterBarrier(collective_axes=("column",), num_barriers=part.ahead),
        "scores": plgpu.SMEM((BLOCK, part.blocks, part.sent), jnp.float32),
        "scores_ready": plgpu.Barrier(),
        "scores_free": plgpu.Barrier(),
        "p": mosaic.tiled((part.queries, BLOCK), jnp.bfloat16, columns=step),
        **{name: plgpu.SMEM((part.queries,), jnp.float32) for name in ("factor", "peak", "total")},
        "p_ready": plgpu.Barrier(),
        "p_free": plgpu.Barrier(num_arrivals=MIXERS),
    }
    if part.codes:
        for name in ("keys_scale", "extra_scale") if part.extra else ("keys_scale",):
            shared |= ring.slot(name, plgpu.SMEM((SLOTS, BLOCK), jnp.float32), SLOTS)
    if part.extra:
        shared |= ring.slot("extra", mosaic.tiled((SLOTS, BLOCK, BLOCK), held), SLOTS)
    if part.extra and part.codes:
        shared["p_extra"] = mosaic.tiled((part.queries, BLOCK), jnp.bfloat16, columns=step)
    if part.rotary:
        table = mosaic.tiled((BLOCK, part.size // 2), jnp.float32, columns=step)
        shared |= {"cos": table, "sin": table, "angles_ready": plgpu.Barrier(num_barriers=2)}
    return shared | (slim_packed.shared_of(part) if part.packing else {})


def _kernel(
    # inputs, all in global memory: [B], [B]; q [B, C, R, W], keys [B, S, E], scores [B, P, *, C, R], and others by name
    length: Any,
    first: Any,
    arrays: dict[str, Any],
    # outputs: [P, B, E, M], [P, B, M]
    out: Any,
    log_sums: Any,
    # shared memory and barriers, by name
    shared: dict[str, Any],
    # static
    rules: Rules,
    part: Share,
    splits: int,
    interpreted: bool,
) -> None:
    place, group = ring.place(length, first, rules, splits, part.span), jax.lax.axis_index("group")
    loading, scoring, mixing = REGISTERS[part.codes or part.extra > 0]
    if part.packing:
        several = part.packing.parts  # blocks of tokens of the same bytes
        place = dataclasses.replace(place, start=place.start * several, count=place.count * several)
        loading, scoring, mixing = slim_packed.REGISTERS

    @pl.when(group == LOADER)
    def load() -> None:
        plgpu.set_max_registers(loading, action="decrease")
        load_rows(arrays, shared, place, part, interpreted)

    @pl.when(group == SCORER)
    def meet() -> None:
        if scoring > BEGUN:
            plgpu.set_max_registers(scoring, action="increase")
        score(arrays, log_sums, shared, place, rules, part, interpreted)

    @pl.when(group < MIXERS)
    def add() -> None:
        plgpu.set_max_registers(mixing, action="increase")
        mix(out, shared, place, group, part, interpreted)
