"""The root `synthetic`: figures that are known from elsewhere, and its bound."""

import numpy as np
import pytest
import small_runs

from experiments import synthetic
from slimjax.records import read
from slimjax.report import findings, report_tables


@pytest.mark.parametrize(
    ("scheme", "cosine", "l1"),
    [("kv:flashq4", 0.99107, 0.134)],
)
def test_emulated_attention_errs_as_others_have_measured(scheme, cosine, l1):
    """Of one head with N(0, 1) numbers; theirs were other draws."""
    found = synthetic.scheme_errors(scheme, np.random.default_rng(0), 1024, 64)
    assert 1 - found["attention_cosine"] == pytest.approx(1 - cosine, rel=0.05)
    assert found["attention_l1"] == pytest.approx(l1, rel=0.05)


def test_sas_is_within_its_bound_and_the_cut_is_most_of_its_error():
    draw = {"context": 2048, "head_dim": 16, "spread": 2.0, "seed": 0}
    errors = {}
    for threshold, degree in ((6, 3), (0, 3), (6, 1), (0, 1)):
        cell = draw | {"threshold": threshold, "degree": degree, "softmax": f"sas({threshold},{degree})"}
        found = synthetic.sas_errors(cell, np.random.default_rng(0), 32)
        assert found["weight_error"] <= found["error_bound"]
        errors[threshold, degree] = found
    assert errors[0, 3]["lost_mass"] == 0
    assert 0.01 < errors[6, 3]["lost_mass"] < 0.2
    assert errors[6, 3]["attention_error"] > 20 * errors[0, 3]["attention_error"]
    assert errors[0, 1]["attention_error"] > 5 * errors[0, 3]["attention_error"]


def test_the_root(tmp_path):
    config = small_runs.write(
        tmp_path,
        "synthetic",
        "Synthetic.schemes = ('kv:int8', 'kv:int4')\nSynthetic.tokens = 32\nSynthetic.thresholds = (6, 0)\n",
        "Synthetic.degrees = (3, 5)\nSynthetic.contexts = (32, 64)\nSynthetic.seeds = (0, 1)\nSynthetic.queries = 8\n",
    )
    assert small_runs.launched(config, tmp_path / "out") == 0
    records = read(tmp_path / "out" / "records.jsonl")
    assert [record.status for record in records] == ["ok"] * (2 * 2 + 2 * 2 * 2 * 2)
    assert set(report_tables(records)) == {"sas", "emulated"}
    said = findings(records)
    assert any(text.startswith("SAS at threshold 6 loses") for text in said)
    assert any("kv:int8 and" in text and "kv:int4" in text for text in said)
