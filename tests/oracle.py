"""Attention by definition: float64 numpy, explicit loops, nothing imported from slimjax or jax.

Written from the mathematics (papers named per function), not from the package, so that an error in one is
not an error in both. Small inputs only: every score is a Python-level dot product.

Axes: B batch, T query tokens, S cached tokens, N query heads, K KV heads, H head size, D width, E = K*H.
Query head n belongs to KV head n // (N // K). Query t of T has position start + t, cached row s position s.
"""

import math

import numpy as np


def f64(array):
    """Any array-like, bfloat16 included, as float64 numpy."""
    return np.asarray(array).astype(np.float64)


# --- attention


def visible(query_position, key_position, length, causal=True, window=None):
    """May the query read the key? `window` W hides keys W or more behind; its own counts as one."""
    if key_position >= length:
        return False
    if causal and key_position > query_position:
        return False
    return window is None or query_position - key_position < window


def softmax(scores):
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [e / sum(exponentials) for e in exponentials]


def weights(
    q, key, *, start=None, length=None, causal=True, window=None, softcap=None, scale=None, bias=None
):
    """Attention weights [B, T, N, S]; 0 where the key is not visible, all 0 where none is.

    q [B,T,N,H]; key(b, s, n) -> the [H] vector that query head n is multiplied with, called only for rows
    below length[b]; start [B] (default: the queries are the newest of `length`), length [B] valid rows, or
    one int; bias [N,T,S] or [B,N,T,S]. Order: product, scale, softcap, bias, mask.
    """
    batch, tokens, heads, size = q.shape
    length = np.broadcast_to(np.asarray(length), (batch,))
    start = length - tokens if start is None else np.broadcast_to(np.asarray(start), (batch,))
    scale = size**-0.5 if scale is None else scale
    bias = None if bias is None else np.broadcast_to(f64(bias), (batch, *np.shape(bias)[-3:]))
    rows = max(int(length.max()), 0 if bias is None else bias.shape[-1])
    out = np.zeros((batch, tokens, heads, rows))
    for b, t, n in np.ndindex(batch, tokens, heads):
        seen = [s for s in range(int(length[b])) if visible(start[b] + t, s, length[b], causal, window)]
        scores = []
        for s in seen:
            score = scale * float(np.dot(f64(q[b, t, n]), f64(key(b, s, n))))
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            scores.append(score + (0.0 if bias is None else bias[b, n, t, s]))
        if seen:
            out[b, t, n, seen] = softmax(scores)
    return out


def weigh(p, value):
    """Sum of p[b,t,n,s] * value(b, s, n) over the rows with a weight -> [B,T,N,...]; no other is read."""
    batch, tokens, heads, rows = p.shape
    width = len(value(0, 0, 0))
    out = np.zeros((batch, tokens, heads, width))
    for b, t, n, s in np.ndindex(batch, tokens, heads, rows):
        if p[b, t, n, s] > 0:
            out[b, t, n] += p[b, t, n, s] * f64(value(b, s, n))
    return out


def attend(q, k, v, **mask):
    """Scaled dot-product attention (Vaswani et al. 2017), MHA, GQA or MQA.

    q [B,T,N,H], k and v [B,S,K,H] (k already rotated); mask as in `weights`, length S by default.
    """
    group = q.shape[2] // k.shape[2]
    mask.setdefault("length", k.shape[1])
    p = weights(q, lambda b, s, n: k[b, s, n // group], **mask)
    return weigh(p, lambda b, s, n: v[b, s, n // group])


# --- positions


def rope_matrix(position, size, theta=10000.0, interleaved=False):
    """[H,H] rotation of one position (Su et al. 2021): pair i turns by position * theta^(-2 i / H).

    Pairs are (i, i + H/2), or (2 i, 2 i + 1) when interleaved.
    """
    matrix = np.zeros((size, size))
    for i in range(size // 2):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + size // 2)
        angle = position * theta ** (-2 * i / size)
        matrix[first, first] = matrix[second, second] = math.cos(angle)
        matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix


def rotate(x, positions, theta=10000.0, interleaved=False):
    """RoPE of x [B,T,N,H] at positions [T] or [B,T]."""
    positions = np.broadcast_to(np.asarray(positions), x.shape[:2])
    out = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        matrix = rope_matrix(positions[b, t], x.shape[-1], theta, interleaved)
        for n in range(x.shape[2]):
            out[b, t, n] = matrix @ f64(x[b, t, n])
    return out


def unrotate(x, positions, theta=10000.0, interleaved=False):
    """The inverse of `rotate`: the same rotation by the negative position."""
    return rotate(x, -np.asarray(positions), theta, interleaved)


def alibi_slopes(heads):
    """Press et al. 2021: 2^(-8 i / N), i = 1..N; else the power of two below, then every other of 2x."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * power, 2)]
    return np.array(slopes[:heads])


def t5_bucket(relative, bidirectional=False, buckets=32, max_distance=128):
    """Raffel et al. 2020; relative = key position - query position.

    Half of the buckets are exact, the others logarithmic up to max_distance; in integers, so that no rounding
    decides a boundary: floor(log(d/m) / log(M/m) * c) is the largest t with (d/m)^c >= (M/m)^t.
    """
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    logarithmic, step = buckets - exact, 0
    while step < logarithmic and distance**logarithmic * exact ** (step + 1) >= (
        max_distance ** (step + 1) * exact**logarithmic
    ):
        step += 1
    return offset + min(exact + step, buckets - 1)


def additive_bias(of_pair, heads, query_positions, key_positions):
    """[N,T,S] from of_pair(head, query position, key position)."""
    out = np.zeros((heads, len(query_positions), len(key_positions)))
    for n, t, s in np.ndindex(*out.shape):
        out[n, t, s] = of_pair(n, int(query_positions[t]), int(key_positions[s]))
    return out


def alibi(heads):
    """-slope * distance, for `additive_bias`."""
    slopes = alibi_slopes(heads)
    return lambda n, i, j: -slopes[n] * abs(i - j)


def t5(table, bidirectional=False, max_distance=128):
    """Entry of table [buckets, N], for `additive_bias`."""
    return lambda n, i, j: float(table[t5_bucket(j - i, bidirectional, len(table), max_distance)][n])


def fire(w1, b1, w2, b2, c, threshold):
    """FIRE (Li et al. 2023, eq. 4): MLP(psi(i - j) / psi(max(L, i))), psi(x) = log(c x + 1), hidden ReLU.

    w1, b1 [F], w2 [F,N], b2 [N], c > 0, threshold L > 0; a key after the query counts by its distance.
    """

    def of_pair(n, i, j):
        ratio = math.log(c * abs(i - j) + 1) / math.log(c * max(threshold, i) + 1)
        hidden = [max(0.0, float(w1[f]) * ratio + float(b1[f])) for f in range(len(w1))]
        return sum(hidden[f] * float(w2[f, n]) for f in range(len(w1))) + float(b2[n])

    return of_pair


def kerple(r1, r2, power=False):
    """Kerple (Chi et al. 2022): -r1 log(1 + r2 |i - j|), or -r1 |i - j|^r2; r1, r2 [N] positive."""
    if power:
        return lambda n, i, j: -float(r1[n]) * abs(i - j) ** float(r2[n])
    return lambda n, i, j: -float(r1[n]) * math.log(1 + float(r2[n]) * abs(i - j))


# --- bases: what is cached is a row, keys and values follow from it (Graef, Wasielewski, arXiv 2503.05840)


def project(x, w, b=None):
    """x [B,S,D], w [D,K,H], b [K,H] -> [B,S,K,H]."""
    out = np.zeros((*x.shape[:2], *w.shape[1:]))
    for i, s, k in np.ndindex(*out.shape[:3]):
        out[i, s, k] = f64(x[i, s]) @ f64(w[:, k]) + (0.0 if b is None else f64(b[k]))
    return out


def merge(o, wo, bo=None):
    """Heads o [B,T,N,H] times wo [N,H,D], plus bo [D] -> [B,T,D]."""
    out = np.zeros((*o.shape[:2], wo.shape[-1]))
    for b, t, n in np.ndindex(*o.shape[:3]):
        out[b, t] += f64(o[b, t, n]) @ f64(wo[n])
    return out + (0.0 if bo is None else f64(bo))


def change_of_basis(source, target):
    """W_KV = W_K^-1 W_V (or W_VK, arguments swapped) for weights [D,K,H] with K*H = D -> [D,K,H]."""
    square = f64(source).reshape(len(source), -1)
    return np.linalg.solve(square, f64(target).reshape(len(target), -1)).reshape(target.shape)


def _turn(rope, vector, position):
    """rope: None or (theta, interleaved)."""
    return vector if rope is None else rope_matrix(position, len(vector), *rope) @ vector


def from_rows(q, rows, w_key, w_value, *, option, rope=None, key_bias=None, **mask):
    """Attention through cached rows from which keys and values both follow linearly -> [B,T,N,H].

    rows [B,S,C]; w_key [C,K,H]: key = row w_key + key_bias, then rotated; w_value [C,K,H]: value = row w_value.
    q is rotated already. `option` 1 rebuilds keys and values row by row; 2 absorbs the weights (a rotation cannot
    be): the query meets the row itself, whole rows are weighed, w_value comes last.
    """
    group = q.shape[2] // w_key.shape[1]
    mask.setdefault("length", rows.shape[1])
    if option == 2:
        if rope is not None:
            raise ValueError("the oracle absorbs no rotation")
        # One more coordinate, 1 in every row, carries the key bias: q . (row w + b) = (q w^T) . row + (q . b) 1.
        absorbed = np.zeros((*q.shape[:3], rows.shape[-1] + 1))
        for b, t, n in np.ndindex(*q.shape[:3]):
            absorbed[b, t, n, :-1] = f64(w_key[:, n // group]) @ f64(q[b, t, n])
            absorbed[b, t, n, -1] = 0.0 if key_bias is None else f64(q[b, t, n]) @ f64(key_bias[n // group])
        mask["scale"] = q.shape[-1] ** -0.5 if mask.get("scale") is None else mask["scale"]
        p = weights(absorbed, lambda b, s, n: [*f64(rows[b, s]), 1.0], **mask)
        weighed = weigh(p, lambda b, s, n: rows[b, s])
        return _per_head(weighed, w_value, group)

    def key(b, s, n):
        raw = f64(rows[b, s]) @ f64(w_key[:, n // group])
        return _turn(rope, raw if key_bias is None else raw + f64(key_bias[n // group]), s)

    p = weights(q, key, **mask)
    return weigh(p, lambda b, s, n: f64(rows[b, s]) @ f64(w_value[:, n // group]))


def k_basis(q, keys, w_kv, *, option, rope=None, key_bias=None, extra=None, **mask):
    """K-cache (S1, S8): keys [B,S,K,H] = X W_K before bias and RoPE, w_kv [E,K,H] -> [B,T,N,H].

    Option 1 rebuilds V_s = K_s W_KV and weighs it; option 2 weighs whole K rows, then multiplies by W_KV. Further
    coordinates, extra [B,S,R], are of the rows for the values alone; w_kv is then [E+R,K,H].
    """
    group = q.shape[2] // keys.shape[2]
    flat = keys.reshape(*keys.shape[:2], -1)
    if extra is not None:
        flat = np.concatenate([flat, extra], axis=-1)
    mask.setdefault("length", keys.shape[1])

    def key(b, s, n):
        raw = f64(keys[b, s, n // group])
        return _turn(rope, raw if key_bias is None else raw + f64(key_bias[n // group]), s)

    p = weights(q, key, **mask)
    if option == 1:
        return weigh(p, lambda b, s, n: f64(flat[b, s]) @ f64(w_kv[:, n // group]))
    return _per_head(weigh(p, lambda b, s, n: flat[b, s]), w_kv, group)


def v_basis(q, values, w_vk, *, option, rope=None, key_bias=None, **mask):
    """V-cache (S2): values [B,S,K,H] = X W_V, w_vk [E,K,H] = W_V^-1 W_K -> [B,T,N,H]."""
    flat = values.reshape(*values.shape[:2], -1)
    own = np.eye(flat.shape[-1]).reshape(-1, *values.shape[2:])
    return from_rows(q, flat, w_vk, own, option=option, rope=rope, key_bias=key_bias, **mask)


def x_basis(q, x, wk, wv, *, option, rope=None, key_bias=None, **mask):
    """X-cache (S3): x [B,S,D] the layer's input, wk and wv [D,K,H] -> [B,T,N,H]; 2 absorbs, 1 rebuilds."""
    return from_rows(q, x, wk, wv, option=option, rope=rope, key_bias=key_bias, **mask)


def _per_head(weighed, w, group):
    """weighed [B,T,N,C] times its head's w [C,K,H] -> [B,T,N,H]."""
    out = np.zeros((*weighed.shape[:3], w.shape[-1]))
    for b, t, n in np.ndindex(*weighed.shape[:3]):
        out[b, t, n] = weighed[b, t, n] @ f64(w[:, n // group])
    return out


# --- codecs: what a stored row reads back as


def fixed_point(rows, largest_code, axes):
    """Symmetric codes one float32 scale max|.| / largest_code over the last `axes` axes -> codes, scale."""
    rows = f64(rows)
    largest = np.max(np.abs(rows), axis=tuple(range(-axes, 0)), keepdims=True)
    scale = (largest / largest_code).astype(np.float32)
    codes = np.rint(rows / np.where(scale > 0, f64(scale), 1.0))  # half to even
    return np.clip(codes, -largest_code, largest_code).astype(np.int64), scale


def int16_rows(rows):
    """int16, one scale a token of [B,S,K,H]; 32639 = 127 * 256 + 127, so the code splits into two int8."""
    codes, scale = fixed_point(rows, 32639, axes=2)
    return codes * f64(scale)


def int8_rows(rows):
    """int8, one scale a token and head of [B,S,K,H]."""
    codes, scale = fixed_point(rows, 127, axes=1)
    return codes * f64(scale)


def bf16(array):
    """Round float32 to bfloat16, nearest with ties to even, by its bits; finite input -> float64."""
    bits = np.asarray(array, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return f64(rounded.astype(np.uint32).view(np.float32))


def fp16(array):
    """Round to IEEE half precision, ties to even -> float64."""
    return f64(np.asarray(array, np.float32).astype(np.float16))


CODECS = {
    "float64": f64,
    "float32": lambda rows: f64(np.asarray(rows, np.float32)),
    "bf16": bf16,
    "fp16": fp16,
    "int16": int16_rows,
    "int8": int8_rows,
}
