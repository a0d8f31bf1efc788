"""The gates catch what they are for: toy kernels with one fault each, compiled by libtpu."""

import os

import pytest
import tpu_toys as toys

from experiments.tpu_matrix import faults, over_floor
from experiments.tpu_row import measure
from slimjax.kernels import tpu_aot
from slimjax.kernels.tpu.generations import GENERATIONS, MIB

pytestmark = pytest.mark.skipif(
    bool(tpu_aot.missing()) and os.environ.get("SLIMJAX_REQUIRE_TPU") != "1",
    reason=f"{tpu_aot.missing()}; make test-tpu installs it",
)
USUAL = ("v5e", "v6e")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_good_kernel_has_no_fault(generation):
    row = measure(toys.case(toys.build_sum), generation)
    assert row["status"] == "compiled", row["reason"]
    assert faults(row) == []
    # Two blocks of the cache, the sum, and little else.
    assert 4 * MIB <= row["vmem_bytes"] <= 5 * MIB
    assert row["vmem_limit"] == GENERATIONS[generation].scoped
    assert row["temporary_bytes"] == 0


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_hidden_copy_of_the_cache_is_seen(generation):
    row = measure(toys.case(toys.build_hidden_copy), generation)
    assert row["temporary_bytes"] >= row["cached_bytes"] == toys.CACHED
    assert faults(row) == ["temporary 256"]


@pytest.mark.parametrize("generation", USUAL)
def test_a_copy_that_is_no_temporary_is_seen(generation):
    small = measure(toys.case(toys.build_hidden_copy, rows=8192), generation)
    assert small["temporary_bytes"] == 0  # it went to VMEM
    assert faults(small) == ["copies 32"]
    result = measure(toys.case(toys.build_append, donate=()), generation)
    assert result["temporary_bytes"] == 0  # it is the result
    assert faults(result) == ["copies 256"]


@pytest.mark.parametrize("generation", USUAL)
def test_a_donated_cache_is_written_in_place(generation):
    row = measure(toys.case(toys.build_append), generation)
    assert row["donated_bytes"] == row["aliased_bytes"] == toys.CACHED
    assert faults(row) == []


@pytest.mark.parametrize("generation", USUAL)
def test_too_much_vmem_is_a_failed_row(generation):
    row = measure(toys.case(toys.build_much_vmem), generation)
    assert faults(row) == ["failed"]
    assert "memory space vmem" in row["reason"]
    assert f"limit {GENERATIONS[generation].scoped / MIB:.2f}M" in row["reason"]


def test_an_aborted_compiler_is_a_row():
    row = measure(toys.case(toys.build_int2), "v4")
    assert row["status"] == "aborted"
    assert row["reason"].startswith("SIGABRT: ")
    assert measure(toys.case(toys.build_int2), "v5e")["status"] == "compiled"


def test_what_jax_does_not_implement_is_no_refusal():
    row = measure(toys.case(toys.build_of_jax), "v5e")
    assert (row["status"], row["reason"].partition(":")[0]) == ("failed", "NotImplementedError")


@pytest.mark.skipif(bool(tpu_aot.unpinned()), reason=f"cycles are of pinned versions: {tpu_aot.unpinned()}")
@pytest.mark.parametrize("generation", USUAL)
def test_a_slow_twin_takes_more_cycles(generation):
    fast, slow = (
        measure(toys.case(toys.build_sum, slow=slow), generation, cycles=True) for slow in (False, True)
    )
    assert fast["loops"] == slow["loops"] == []
    assert len(fast["blocks"]) == len(slow["blocks"]) == 3  # init, the sum, the end
    floor = GENERATIONS[generation].hbm_cycles(fast["step_bytes"])
    assert fast["cycles"] < 0.5 * floor
    assert not over_floor(fast)
    assert over_floor(slow)  # the gate of test_matrix
    # Of a step in which the last block runs, the sum does not.
    assert (
        fast["total_cycles"] > fast["step_cycles"] > fast["cycles"] > fast["blocks"][1] == max(fast["blocks"])
    )
