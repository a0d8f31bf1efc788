"""The remedies: extra coordinates without calibration, the noise-aware solve, and the choice between them."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from slimjax import DecodeSpec, Projections, convert, parse_scheme
from slimjax.attention.pair import split_bf16
from slimjax.solve.augment import Solution, augmented, exact_solution, lost_directions
from slimjax.solve.calibrate import Calibration, Collector, collect
from slimjax.solve.fit import fit, rounding_noise, value_error
from slimjax.solve.noise import lmmse_maps, residual, worst_values
from slimjax.solve.products import PRODUCTS

WIDTH = 32


def weights(condition, seed=0, width=WIDTH):
    """W_K with singular values down to 1/condition, and a W_V that knows nothing of it."""
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.standard_normal((width, width)))[0] for _ in range(2))
    return (left * np.geomspace(1, 1 / condition, width)) @ right, draw.standard_normal((width, width))


def spec(scheme, width=WIDTH):
    return DecodeSpec(scheme=parse_scheme(scheme), heads=4, kv_heads=4, head_dim=width // 4, width=width)


def inputs(count=4000, seed=1, width=WIDTH, spread=30.0):
    """Coloured: a few loud directions, as real activations have."""
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(99).standard_normal((width, width)))[0]
    return (draw.standard_normal((count, width)) * np.geomspace(spread, 1, width)) @ basis


def calibration(seed=1, count=2000):
    return collect(([inputs(count, seed=seed * 100 + part)] for part in range(5)), 1)[0]


# Coordinates without calibration --------------------------------------------------------------------------


def test_lost_directions_are_the_weakest_singular_vectors():
    wk, _ = weights(1e3)
    lost = lost_directions(wk, 3)
    unit = lost / np.linalg.norm(lost, axis=0)
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=1e-12)
    seen = np.linalg.norm(unit.T @ wk, axis=1)
    np.testing.assert_allclose(np.sort(seen), np.geomspace(1, 1e-3, WIDTH)[::-1][:3], rtol=1e-9)
    # As loud as a key for white inputs, so that one integer scale serves both alike.
    assert np.linalg.norm(lost[:, 0]) == pytest.approx(np.linalg.norm(wk) / np.sqrt(WIDTH))


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_the_exact_solution_is_exact(rank):
    wk, wv = weights(1e4)
    found = exact_solution(wk, wv, rank)
    np.testing.assert_allclose(augmented(wk, found.extra) @ found.weight, wv, atol=1e-9)
    assert found.rank == rank


def test_each_coordinate_takes_the_error_down():
    wk, wv = weights(1e6)
    errors = [
        value_error(
            inputs(), wk, wv, exact_solution(wk, wv, rank), spec(f"k:int16+{rank}" if rank else "k:int16")
        )
        for rank in (0, 2, 4, 8, 14)
    ]
    assert all(after < before / 1.5 for before, after in itertools.pairwise(errors))
    assert errors[0] > 0.1
    assert errors[-1] < 3e-3


# Noise ----------------------------------------------------------------------------------------------------


def noisy_error(wk, wv, second, noise, weight):
    """E|x W_V - (x W_K + n) M|^2 in closed form."""
    miss = wv - wk @ weight
    return np.trace(miss.T @ second @ miss) + np.trace(weight.T @ np.diag(noise) @ weight)


def test_the_noise_aware_map_is_the_minimum():
    """Of the expected squared error: no small change of the map lowers it, and the gradient vanishes."""
    wk, wv = weights(1e2)
    second, noise = np.cov(inputs().T, bias=True), np.geomspace(1e-3, 1e-1, WIDTH)
    (found,) = lmmse_maps(wk, wv, second, noise)
    gradient = -wk.T @ second @ (wv - wk @ found) + np.diag(noise) @ found
    scale = np.linalg.norm(wk.T @ second @ wv)
    assert np.linalg.norm(gradient) < 1e-11 * scale
    least = noisy_error(wk, wv, second, noise, found)
    draw = np.random.default_rng(0)
    for _ in range(5):
        other = found + 1e-3 * np.linalg.norm(found) / WIDTH * draw.standard_normal(found.shape)
        assert noisy_error(wk, wv, second, noise, other) > least


def test_without_noise_it_is_the_inverse_and_ridge_leads_there():
    wk, wv = weights(1e2)
    second = np.cov(inputs().T, bias=True)
    exact = np.linalg.solve(wk, wv)
    (quiet,) = lmmse_maps(wk, wv, second, np.full(WIDTH, 1e-18))
    np.testing.assert_allclose(quiet, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())
    maps = lmmse_maps(wk, wv, second, np.full(WIDTH, 1e-2), (0.0, 1.0, 1e4, 1e8))
    distances = [np.linalg.norm(each - exact) for each in maps]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4 * distances[0]


def test_residual_is_what_noisy_keys_leave_unknown():
    wk, _ = weights(10)
    x = inputs(200_000)
    noise = np.geomspace(1e-2, 1, WIDTH)
    keys = x @ wk + np.random.default_rng(5).standard_normal(x.shape) * np.sqrt(noise)
    left = x - keys @ np.linalg.lstsq(keys, x, rcond=None)[0]
    expected, found = left.T @ left / len(x), residual(wk, x.T @ x / len(x), noise)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_calibrated_coordinates_beat_any_others():
    """They are the best R observations: the expected error of V after them is the sum of the other eigenvalues."""
    wk, wv = weights(1e4)
    second, noise = np.cov(inputs().T, bias=True), np.full(WIDTH, 1e-2)
    error = wv.T @ residual(wk, second, noise) @ wv
    spectrum = np.linalg.eigvalsh(error)

    def left_over(extra):
        whole = augmented(wk, extra)
        quiet = np.concatenate([noise, np.full(extra.shape[1], 1e-12)])
        return np.trace(wv.T @ residual(whole, second, quiet) @ wv)

    best = left_over(worst_values(wk, wv, second, noise, 4))
    assert best == pytest.approx(spectrum[:-4].sum(), rel=1e-6)
    draw = np.random.default_rng(3)
    for other in (lost_directions(wk, 4), draw.standard_normal((WIDTH, 4)), wv[:, :4]):
        assert left_over(other) > best


# Choosing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["k:bf16", "k:int16", "k:int8+4", "k:int16+6"])
def test_never_worse_than_exact_by_more_than_five_percent(scheme):
    for seed, condition in enumerate((1.5, 1e2, 1e4, 1e6)):
        wk, wv = weights(condition, seed)
        found = fit(wk, wv, spec(scheme), calibration(seed))
        assert found.held_out <= 1.05 * found.exact


def test_what_other_arithmetic_makes_of_a_good_map():
    """A pair of bfloat16 arrays keeps it; one bfloat16 array, or jax's default product on TPU and GPU, does not."""
    wk, wv = weights(1e4)
    made, at = exact_solution(wk, wv, 4), spec("k:int16+4")
    error = {name: value_error(inputs(), wk, wv, made, at, name) for name in PRODUCTS}
    assert error["bf16 pair"] < 1.1 * error["float32"]
    assert error["bf16 map"] > 5 * error["float32"]
    assert error["default on TPU"] > 5 * error["float32"]
    assert error["float32"] < error["default on GPU (TF32)"] < error["default on TPU"]


def test_a_float32_is_three_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1000).astype(np.float32))
    high, middle, low = (np.asarray(part, np.float64) for part in split_bf16(x, 3))
    np.testing.assert_array_equal(high + middle + low, np.asarray(x, np.float64))
    assert np.max(np.abs((high + middle) / np.asarray(x, np.float64) - 1)) < 2.0**-16


def test_noise_awareness_pays_where_inversion_fails():
    wk, wv = weights(1e4)
    found = fit(wk, wv, spec("k:bf16"), calibration())
    assert found.exact > 1
    assert found.held_out < 0.3
    assert found.solution.how.startswith("noise-aware")


def test_the_held_out_error_is_of_the_map_that_is_returned():
    """And of rows that nothing was fitted or chosen on: they may be replaced without changing the map."""
    wk, wv = weights(1e3)
    data = calibration()
    found = fit(wk, wv, spec("k:int16+4"), data)
    assert found.held_out == value_error(data.held_out, wk, wv, found.solution, spec("k:int16+4"))
    other = fit(wk, wv, spec("k:int16+4"), dataclasses.replace(data, held_out=inputs(50, seed=7)))
    np.testing.assert_array_equal(other.solution.weight, found.solution.weight)


def test_rounding_noise_is_that_of_the_codec():
    """A twelfth of the squared step, in each stream by its own scale."""
    wk, _ = weights(10)
    rows = inputs() @ augmented(wk, lost_directions(wk, 8))
    noise = rounding_noise(inputs(), wk, lost_directions(wk, 8), spec("k:int16+8"))
    for part, columns in ((rows[:, :WIDTH], noise[:WIDTH]), (rows[:, WIDTH:], noise[WIDTH:])):
        step = np.abs(part).max(axis=1) / 32_639
        # The largest element of a row is a code by itself and has no rounding error.
        assert np.mean(columns) == pytest.approx(np.mean(step**2) / 12, rel=2.5 / part.shape[1])


# Calibration ----------------------------------------------------------------------------------------------


def test_streaming_moments_equal_those_of_all_rows_at_once():
    batches = [inputs(300, seed=part) for part in range(10)]
    (found,) = collect(([batch] for batch in batches), 1)
    fitted = np.concatenate([batch for part, batch in enumerate(batches) if part % 5 < 3])
    np.testing.assert_allclose(found.second, fitted.T @ fitted / len(fitted), rtol=1e-12, atol=1e-9)
    assert found.count == len(fitted)
    assert {len(found.choose), len(found.held_out)} == {600}


def test_parts_do_not_overlap_and_memory_is_bounded():
    collector = Collector(1, sample=100)
    for part in range(25):
        collector.add([np.full((90, 3), float(part))])
    (found,) = collector.finish()
    parts = {name: set(np.unique(getattr(found, name))) for name in ("fit", "choose", "held_out")}
    assert parts["choose"] <= {3.0, 8.0, 13.0, 18.0, 23.0}
    assert parts["held_out"] <= {4.0, 9.0, 14.0, 19.0, 24.0}
    assert not parts["fit"] & (parts["choose"] | parts["held_out"])
    assert all(len(getattr(found, name)) <= 100 for name in parts)


def test_calibration_data_that_cannot_be_used():
    collector = Collector(2)
    with pytest.raises(ValueError, match="inputs of 1 layers, expected 2"):
        collector.add([np.zeros((3, 4))])
    with pytest.raises(ValueError, match="layer 1: inputs that are not finite"):
        collector.add([np.zeros((3, 4)), np.full((3, 4), np.nan)])
    with pytest.raises(ValueError, match="at least 5 are needed"):
        collector.finish()


def test_a_solution_of_another_rank_is_refused():
    wk, wv = (jnp.asarray(w.reshape(WIDTH, 4, 8), jnp.float32) for w in weights(10))
    layer = Projections(wq=wk, wk=wk, wv=wv, wo=jnp.zeros((4, 8, WIDTH)))
    with pytest.raises(ValueError, match="R = 0 for scheme k:int16\\+4"):
        convert(layer, spec("k:int16+4"), solution=Solution(weight=np.eye(WIDTH)))


def test_calibration_is_data():
    assert {field.name for field in dataclasses.fields(Calibration)} == {
        "second",
        "fit",
        "choose",
        "held_out",
        "count",
    }
