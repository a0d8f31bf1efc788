"""Every kernel for every generation: it compiles without a fault, or is refused by a message of our own."""

import os

import pytest

from experiments.tpu_matrix import faults
from experiments.tpu_row import measure
from slimjax.kernels import tpu_aot
from slimjax.kernels.tpu.generations import GENERATIONS
from slimjax.kernels.tpu_cases import cases

pytestmark = pytest.mark.skipif(
    bool(tpu_aot.missing()) and os.environ.get("SLIMJAX_REQUIRE_TPU") != "1",
    reason=f"{tpu_aot.missing()}; make test-tpu installs it",
)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "case", [case for case in cases() if case.ci], ids=lambda case: f"{case.kernel}-{case.shape}"
)
def test_compiles_or_is_refused(case, generation):
    row = measure(case, generation)
    assert faults(row) == [], row["reason"]
    assert row["reason"] or row["status"] == "compiled"
