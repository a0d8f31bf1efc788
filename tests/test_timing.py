"""Timing: against a clock that is wound by hand, so that no machine's speed matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimjax import timing


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        """A call that takes these seconds in turn, the last for ever."""
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return self.now

        return call


def timed(clock, call, **options):
    return timing.time_calls(call, clock=clock, wait=lambda value: value, **options)


def test_warm_up_is_left_out_and_every_sample_kept():
    clock = Clock()
    run = timed(clock, clock.work(9.0, 9.0, 0.001, 0.003, 0.002), seconds=0.0, least=3, warmup=2)
    assert run.samples == pytest.approx((1.0, 3.0, 2.0))
    assert run.milliseconds == pytest.approx(2.0)
    assert run.metrics() == {"milliseconds": run.milliseconds, "milliseconds_samples": [1.0, 3.0, 2.0]}


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 3), (0.45, 5), (100.0, 7)])
def test_calls_end_with_the_time_but_within_their_bounds(seconds, calls):
    clock = Clock()
    assert len(timed(clock, clock.work(0.1), seconds=seconds, least=3, most=7).samples) == calls


def test_a_call_lasts_until_its_result_is_there():
    clock = Clock()

    def wait(_):
        clock.now += 0.5

    run = timing.time_calls(lambda: None, seconds=0.0, least=1, warmup=0, wait=wait, clock=clock)
    assert run.samples == (500.0,)


def test_bounds_that_contradict_each_other():
    with pytest.raises(ValueError, match="least=3 most=2"):
        timing.time_calls(lambda: None, least=3, most=2)


def test_compilation_is_apart_and_past_the_persistent_cache(tmp_path):
    seen = []

    def function(x):
        seen.append(jax.config.values["jax_enable_compilation_cache"])
        return x + 1

    before = jax.config.values["jax_enable_compilation_cache"]
    ticks = iter([10.0, 12.5])
    program, seconds = timing.compiled(function, jnp.zeros(3), clock=lambda: next(ticks))
    assert seconds == 2.5
    assert seen == [False]
    assert jax.config.values["jax_enable_compilation_cache"] == before
    assert program(jnp.zeros(3)).tolist() == [1, 1, 1]
    assert timing.Timing((1.0,), 2.5).metrics()["compile_seconds"] == 2.5


def test_ceilings_are_the_fastest_of_each_kind():
    class Steady(Clock):
        """Every look at it takes a millisecond, so every call does."""

        def __call__(self):
            self.now += 0.001
            return self.now

    found = timing.ceilings(4000, seconds=0.02, clock=Steady())
    passes = 10  # a call of one takes a millisecond, and one that is timed should take ten
    assert found.copy == pytest.approx(passes * 8000 / 1e-3 / 1e9)
    assert found.read == pytest.approx(passes * 4000 / 1e-3 / 1e9)
    assert found.best == found.copy
    with pytest.raises(ValueError, match="nbytes"):
        timing.ceilings(0)


def test_every_pass_goes_through_the_array():
    """What a compiler would leave out would raise the ceiling."""
    x = jax.random.normal(jax.random.key(0), (1000,))
    np.testing.assert_allclose(timing._copies(x, times=5), x + 5, rtol=1e-5)
    level = np.zeros(())
    for _ in range(3):
        level = np.mean(np.abs(np.asarray(x) - level))
    np.testing.assert_allclose(timing._sums(x, times=3), level, rtol=1e-5)
    for passes in (timing._copies, timing._sums):
        text = str(timing.compiled(functools.partial(passes, times=7), x)[0].as_text())
        assert "while(" in text
        assert '"n":"7"' in text.replace(" ", "") or "constant(7)" in text
