"""FlashQ attention by definition (arXiv 2412.08585): numpy loops over tiles, nothing imported from slimjax or jax.

Written from the paper's text apart from the package. Scales are float32, as stored; everything else is float64
or an exact integer.
"""

import math

import numpy as np


def quantise(rows, limit=119):
    """Stage 1 of one head's tile [G, H]: INT8 codes (as int) and the float32 scale max|x| / 119."""
    rows = np.asarray(rows, np.float32)
    peak = np.float32(np.abs(rows).max())
    scale = np.float32(peak / np.float32(limit)) if peak else np.float32(1)
    return np.rint(rows / scale).astype(int), float(scale)


def clamp(rows, scale, limit=119):
    """Codes of rows under a scale chosen beforehand."""
    return np.clip(np.rint(np.asarray(rows, np.float32) / np.float32(scale)), -limit, limit).astype(int)


def squeeze(codes, bits):
    """Stage 2 and back of one head's tile of INT8 codes [G, H], channel by channel."""
    if bits == 8:
        return codes
    out = np.zeros_like(codes)
    for channel in range(codes.shape[1]):
        column = codes[:, channel]
        low, high = int(column.min()), int(column.max())
        step = max(math.ceil((high - low) / (2**bits - 1)), 1)
        for token, value in enumerate(column):
            exact = (int(value) - low) / step
            out[token, channel] = low + round(exact) * step  # round() is half to even
    return out


def cut(x, threshold, polynomial):
    """SAS of one distance x >= 0; ``polynomial`` has the highest power first."""
    if x > threshold:
        return 0.0
    return math.exp(-math.floor(x)) * float(np.polyval(polynomial, x - math.floor(x)))


def attend(
    queries,
    tiles,
    seen,
    *,
    scale,
    exponential=lambda x: math.exp(-x),
    p="tile",
    denominator="before",
    rescale=None,
):
    """One head's attention of a tile of queries, online over tiles of keys and values.

    queries: [T, H] floats, quantised here; tiles: of (k codes [G, H], k scale, v codes, v scale), in order;
    seen(t, s): whether query t sees key s, counted over all tiles.
    """
    q, q_scale = quantise(queries)
    count, size = q.shape
    peak = np.full(count, -np.inf)
    total = np.zeros(count)
    out = np.zeros((count, size))
    first = 0
    for k, k_scale, v, v_scale in tiles:
        mask = np.array([[seen(t, first + s) for s in range(len(k))] for t in range(count)])
        first += len(k)
        scores = (q @ k.T) * q_scale * k_scale * scale
        new = np.maximum(peak, np.where(mask, scores, -np.inf).max(axis=1))
        weights = np.zeros(scores.shape)
        for t, s in np.argwhere(mask):
            weights[t, s] = exponential(new[t] - scores[t, s])
        factor = np.array(
            [
                0.0
                if np.isinf(old)
                else (rescale or (lambda x: math.exp(-x)))(now - old)
                if now > old
                else 1.0
                for old, now in zip(peak, new, strict=True)
            ]
        )
        top = {
            "tile": np.full(count, weights.max()),
            "row": weights.max(axis=1),
            "static": np.full(count, 119 / 127),
        }
        unit = np.where(top[p] > 0, top[p] / 119, 1.0)
        codes = np.rint(weights / unit[:, None]).astype(int)
        share = weights if denominator == "before" else codes * unit[:, None]
        total = factor * total + share.sum(axis=1)
        out = factor[:, None] * out + (codes @ v) * unit[:, None] * v_scale
        peak = new
    return out / np.where(total > 0, total, 1.0)[:, None]
