"""The oracle itself, against closed forms and numbers worked out by hand."""

import math

import ml_dtypes
import numpy as np
import pytest

import oracle


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- attention


def test_equal_scores_average_what_is_visible(rng):
    v = rng.standard_normal((2, 5, 1, 3))
    q, k = np.zeros((2, 5, 2, 3)), rng.standard_normal((2, 5, 1, 3))
    out = oracle.attend(q, k, v)
    for t in range(5):
        np.testing.assert_allclose(out[:, t, 0], v[:, : t + 1, 0].mean(1), rtol=1e-14)
    np.testing.assert_allclose(oracle.attend(q, k, v, causal=False)[:, 2, 1], v[:, :, 0].mean(1), rtol=1e-14)
    np.testing.assert_allclose(oracle.attend(q, k, v, window=2)[:, 4, 0], v[:, 3:, 0].mean(1), rtol=1e-14)


def test_two_keys_by_hand():
    q, k = np.array([[[[2.0]]]]), np.array([[[[0.0]], [[math.log(3.0) / 2]]]])
    v = np.array([[[[1.0]], [[5.0]]]])
    # Weights 1/4 and 3/4.
    np.testing.assert_allclose(oracle.attend(q, k, v, scale=1.0), [[[[4.0]]]], rtol=1e-14)
    bias = np.array([[[math.log(3.0), 0.0]]])
    np.testing.assert_allclose(oracle.attend(q, k, v, scale=1.0, bias=bias), [[[[3.0]]]], rtol=1e-14)
    capped = math.exp(0.5 * math.tanh(math.log(3.0) / 0.5))
    expected = (1 + 5 * capped) / (1 + capped)
    np.testing.assert_allclose(oracle.attend(q, k, v, scale=1.0, softcap=0.5), [[[[expected]]]], rtol=1e-14)


def test_scale_is_one_over_root_of_head_size():
    q, k = np.ones((1, 1, 1, 16)), np.zeros((1, 2, 1, 16))
    k[0, 1] = 1.0  # score 16 / 4
    p = oracle.weights(q, lambda b, s, n: k[b, s, n], length=2)
    np.testing.assert_allclose(p[0, 0, 0, 1], 1 / (1 + math.exp(-4)), rtol=1e-14)


def test_query_positions_come_from_start():
    q, k, v = np.zeros((1, 2, 1, 1)), np.zeros((1, 4, 1, 1)), np.arange(4.0).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(oracle.attend(q, k, v)[0, :, 0, 0], [1.0, 1.5])  # the newest two
    np.testing.assert_allclose(oracle.attend(q, k, v, start=0)[0, :, 0, 0], [0.0, 0.5])


def test_rows_past_the_length_are_never_read(rng):
    q, k, v = rng.standard_normal((3, 2, 1, 2, 4))
    k[:, 1:], v[:, 1:] = np.nan, np.nan
    out = oracle.attend(q[:, :1], k, v, length=[1, 0], causal=False)
    np.testing.assert_array_equal(out[0, 0], v[0, 0])
    np.testing.assert_array_equal(out[1], 0)  # nothing to read: zero


def test_query_heads_share_their_groups_head(rng):
    q, k, v = (
        rng.standard_normal((1, 3, 4, 2)),
        rng.standard_normal((1, 3, 2, 2)),
        rng.standard_normal((1, 3, 2, 2)),
    )
    grouped = oracle.attend(q, k, v)
    repeated = oracle.attend(q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2))
    np.testing.assert_array_equal(grouped, repeated)


# --- positions


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_orthogonal_inverted_and_relative(rng, interleaved):
    q, k = rng.standard_normal((2, 1, 5, 2, 8))
    at = np.arange(5) * 7
    turned = oracle.rotate(q, at, interleaved=interleaved)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-13)
    np.testing.assert_allclose(oracle.unrotate(turned, at, interleaved=interleaved), q, atol=1e-13)
    np.testing.assert_array_equal(turned[:, 0], q[:, 0])  # position 0
    options = {"theta": 50.0, "interleaved": interleaved}
    shifted = [
        np.sum(oracle.rotate(q, at + d, **options) * oracle.rotate(k, at + d + 3, **options), axis=-1)
        for d in (0, 11)
    ]
    np.testing.assert_allclose(shifted[0], shifted[1], rtol=1e-10)


def test_rotation_by_hand():
    x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    c0, s0, c1, s1 = math.cos(3), math.sin(3), math.cos(0.03), math.sin(0.03)  # theta^(-1/2) = 0.01
    half = [c0 - 3 * s0, 2 * c1 - 4 * s1, s0 + 3 * c0, 2 * s1 + 4 * c1]
    pairs = [c0 - 2 * s0, s0 + 2 * c0, 3 * c1 - 4 * s1, 3 * s1 + 4 * c1]
    np.testing.assert_allclose(oracle.rotate(x, [3])[0, 0, 0], half, rtol=1e-14)
    np.testing.assert_allclose(oracle.rotate(x, [3], interleaved=True)[0, 0, 0], pairs, rtol=1e-14)


def test_alibi_slopes():
    np.testing.assert_allclose(oracle.alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(oracle.alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    assert oracle.additive_bias(oracle.alibi(8), 8, [5], [2])[0, 0, 0] == -1.5


def test_t5_buckets():
    causal = [oracle.t5_bucket(-d) for d in (0, 1, 15, 16, 18, 19, 64, 127, 128, 1000)]
    assert causal == [0, 1, 15, 16, 16, 17, 26, 31, 31, 31]
    assert oracle.t5_bucket(4) == 0  # the future, causal
    both = [oracle.t5_bucket(d, bidirectional=True) for d in (-7, -8, -16, -32, 0, 1, 8, 16, 128)]
    assert both == [7, 8, 10, 12, 0, 17, 24, 26, 31]


def test_fire_is_its_network_of_a_ratio():
    # Identity network: max(0, ratio) * 2 + 1.
    pair = oracle.fire(np.ones(1), np.zeros(1), np.full((1, 1), 2.0), np.ones(1), c=1.0, threshold=4.0)
    np.testing.assert_allclose(pair(0, 1, 0), 2 * math.log(2) / math.log(5) + 1)  # below the threshold
    np.testing.assert_allclose(pair(0, 9, 0), 3.0)  # psi(9) / psi(9)


def test_kerple():
    log, power = oracle.kerple([2.0], [0.5]), oracle.kerple([2.0], [0.5], power=True)
    np.testing.assert_allclose([log(0, 6, 0), power(0, 9, 0)], [-2 * math.log(4), -6.0])


# --- bases


def projections(rng, width=6, heads=2):
    wq, wk, wv = rng.standard_normal((3, width, heads, width // heads))
    return rng.standard_normal((2, 4, width)), wq, wk, wv


@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("rope", [None, (100.0, False), (100.0, True)])
@pytest.mark.parametrize("basis", ["k", "v", "x"])
def test_every_basis_is_attention(rng, basis, option, rope):
    x, wq, wk, wv = projections(rng)
    key_bias = rng.standard_normal(wk.shape[1:])
    q, k, v = oracle.project(x, wq), oracle.project(x, wk, key_bias), oracle.project(x, wv)
    if rope is not None:
        q, k = oracle.rotate(q, range(4), *rope), oracle.rotate(k, range(4), *rope)
    bias = rng.standard_normal((2, 4, 4))
    mask = {"window": 3, "bias": bias, "length": [4, 3], "start": 0, "softcap": 2.0}
    run = {
        "k": lambda: oracle.k_basis(
            q, oracle.project(x, wk), oracle.change_of_basis(wk, wv),
            option=option, rope=rope, key_bias=key_bias, **mask),
        "v": lambda: oracle.v_basis(
            q, oracle.project(x, wv), oracle.change_of_basis(wv, wk),
            option=option, rope=rope, key_bias=key_bias, **mask),
        "x": lambda: oracle.x_basis(q, x, wk, wv, option=option, rope=rope, key_bias=key_bias, **mask),
    }[basis]  # fmt: skip
    if rope is not None and option == 2 and basis != "k":
        with pytest.raises(ValueError, match="rotation"):
            run()
        return
    np.testing.assert_allclose(run(), oracle.attend(q, k, v, **mask), rtol=1e-10, atol=1e-12)


def test_change_of_basis_maps_keys_to_values(rng):
    x, _, wk, wv = projections(rng)
    keys = oracle.project(x, wk).reshape(2, 4, -1)
    values = np.einsum("bse,ekh->bskh", keys, oracle.change_of_basis(wk, wv))
    np.testing.assert_allclose(values, oracle.project(x, wv), rtol=1e-10, atol=1e-12)


def test_merge_with_identity_concatenates_heads(rng):
    o = rng.standard_normal((1, 2, 3, 2))
    np.testing.assert_allclose(oracle.merge(o, np.eye(6).reshape(3, 2, 6)), o.reshape(1, 2, 6))


# --- codecs


def test_fixed_point_by_hand():
    row = np.array([[[[32639.0, -32639.0], [1.4, 0.5]]]])  # B S K H: one token, scale 1
    np.testing.assert_array_equal(oracle.int16_rows(row), [[[[32639, -32639], [1, 0]]]])
    row = np.array([[[[127.0, -1.5], [0.0, 0.0]]]])  # one scale a head; a zero head stays zero
    np.testing.assert_array_equal(oracle.int8_rows(row), [[[[127, -2], [0, 0]]]])


def test_fixed_point_error_is_half_a_step(rng):
    rows = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    step = np.abs(rows).max((-2, -1), keepdims=True) / 32639
    assert np.all(np.abs(oracle.int16_rows(rows) - rows) <= step * 0.501)


def test_half_precisions_round_to_nearest_even(rng):
    x = np.concatenate(
        [rng.standard_normal(1000) * 10.0 ** rng.integers(-4, 4, 1000), [1 + 2**-8, 1 + 3 * 2**-8]]
    )
    x = x.astype(np.float32)
    np.testing.assert_array_equal(oracle.bf16(x), x.astype(ml_dtypes.bfloat16).astype(np.float64))
    np.testing.assert_array_equal(oracle.bf16([1 + 2**-8, 1 + 3 * 2**-8]), [1.0, 1 + 2**-6])
    np.testing.assert_array_equal(oracle.fp16([1 + 2**-11]), [1.0])
