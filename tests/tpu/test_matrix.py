"""Every kernel for every generation: it compiles without a fault, or is refused by a message of our own."""

import os

import pytest

from experiments.tpu_matrix import RECORDS, faults, key, over_floor
from experiments.tpu_row import measure
from slimjax.kernels import tpu_aot
from slimjax.kernels.tpu.generations import GENERATIONS
from slimjax.kernels.tpu_cases import cases
from slimjax.records import read_lines

pytestmark = pytest.mark.skipif(
    bool(tpu_aot.missing()) and os.environ.get("SLIMJAX_REQUIRE_TPU") != "1",
    reason=f"{tpu_aot.missing()}; make test-tpu installs it",
)
# Where the schedule is to be the shorter: memory decides how fast these are.
BOUND_BY_MEMORY = [
    *(("kv:bf16", "smollm2-1.7b", name) for name in ("v4", "v5e", "v5p", "v6e")),
    ("k2:bf16", "smollm2-1.7b", "v5e"),
    *(("k2:bf16", "whisper-large-self", name) for name in ("v5e", "v5p", "v6e")),
    ("k2:int16+16", "whisper-large-self", "v5e"),
    ("kv:flashq4", "llama-2-7b", "v5e"),
    *(("e2:bf16", "whisper-large-cross", name) for name in ("v5e", "v5p", "v6e")),
]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "case", [case for case in cases() if case.ci], ids=lambda case: f"{case.kernel}-{case.shape}"
)
def test_compiles_or_is_refused(case, generation):
    row = measure(case, generation)
    assert faults(row) == [], row["reason"]
    assert row["reason"] or row["status"] == "compiled"


@pytest.mark.skipif(bool(tpu_aot.unpinned()), reason=f"cycles are of pinned versions: {tpu_aot.unpinned()}")
@pytest.mark.parametrize("name", BOUND_BY_MEMORY, ids="-".join)
def test_the_schedule_takes_no_longer_than_the_bytes(name):
    kernel, shape, generation = name
    (case,) = (case for case in cases() if (case.kernel, case.shape) == (kernel, shape))
    row = measure(case, generation, cycles=True)
    assert not over_floor(row)
    (committed,) = (row for row in read_lines(RECORDS) if key(row) == name)
    assert row["cycles"] == pytest.approx(committed["cycles"], rel=0.05), "run make tpu-matrix"
