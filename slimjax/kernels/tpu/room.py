"""The fast memory that ``rows.attend_rows`` takes, and the sizes that it and the kernel share."""

import jax.numpy as jnp

from slimjax.kernels.tiles import Memory
from slimjax.kernels.tpu.online import LANES, Held, Rules, at_once, padded
from slimjax.kernels.tpu.operands import Operands, angles_period
from slimjax.kernels.tpu.tiled_rows import Tiled


def memory(operands: Operands, rules: Rules) -> Memory:
    """Bytes of VMEM: inputs and outputs twice (one is copied while the other is used); once what every step reads
    whole, and sums. RoPE's tables are counted before there are any: how long they are depends on the tiles.
    """
    rows, keys = operands.rows, operands.keys
    column = LANES * 4  # of a number a row
    narrow = (operands.q_scale, operands.q_offset, operands.limit)
    fixed = 2 * operands.q[0].nbytes + 2 * rows * column * sum(each is not None for each in narrow)
    fixed += 0 if operands.slopes is None else rows * column
    fixed += 0 if operands.key_bias is None else operands.key_bias.nbytes
    fixed += 2 * rows * (4 * padded(sum(answers(operands, rules))) + column)
    fixed += rows * (4 * sum(map(padded, widths(operands, rules))) + 2 * column)
    token = sum(map(_held, (keys, *operands.further)))
    token += len(kept(operands, rules)) * padded(keys.width) * operands.kept.itemsize
    token += (3 if operands.bias is None else 5) * 4 * rows  # scores, weights, a copy of either; bias, twice
    token += 0 if rules.softmax == "exact" else 5 * 4 * rows  # what SAS makes of them
    period = LANES
    if operands.turned is not None:
        period = angles_period(keys.width // rules.kv_heads, keys.width)
        fixed += 2 * operands.turned[0].nbytes + 2 * 2 * 4 * padded(keys.width)
        token += 2 * 4 * padded(period)
    # What the columns at work are turned into, float32 or pairs of bfloat16 (as the compiler was seen to).
    wide = operands.turned is not None or bool(keys.operands(jnp.bfloat16))
    token += (24 if wide else 8) * padded(at_once(keys.width, period))
    return Memory(fixed=fixed, token=token)


def _held(each: Held | Tiled) -> int:
    """Bytes of a token's row and its scales, twice; where tokens come last, lanes are not filled up."""
    row = (each.width if each.tokens_last else padded(each.width)) * each.stored
    return 2 * (row + (0 if each.scale is None else 4 * each.scale.shape[1]))


def kept(operands: Operands, rules: Rules) -> tuple[float, ...]:
    """The factors of the keys' operands that are kept."""
    return operands.keys.operands(operands.kept) if rules.keys_weigh else ()


def widths(operands: Operands, rules: Rules) -> list[int]:
    """Of the sums."""
    weighed = (operands.keys, *operands.further) if rules.keys_weigh else operands.further
    return [each.width for each in weighed]


def answers(operands: Operands, rules: Rules) -> list[int]:
    """Of what is answered for every query row."""
    found = widths(operands, rules)
    return found if rules.keys_weigh else [width // rules.kv_heads for width in found]
