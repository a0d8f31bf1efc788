"""The root `synthetic`: figures that are known from elsewhere, and its bound."""

import numpy as np
import pytest
import small_runs

from experiments import synthetic
from slimjax.records import Record, read
from slimjax.report import findings, report_tables


def test_emulated_attention_errs_as_others_have_measured():
    """Of one head with N(0, 1) numbers; theirs were other draws."""
    found = synthetic.scheme_errors("kv:flashq4", np.random.default_rng(0), 1024, 64)
    assert 1 - found["attention_cosine"] == pytest.approx(1 - 0.99107, rel=0.05)
    assert found["attention_l1"] == pytest.approx(0.134, rel=0.05)
    # 4 bits, 4 bytes a channel and 8 bits of step and least code a tile's channel, and a buffer of 64 INT8 codes.
    assert found["bits_per_value"] == pytest.approx(4.25 + 32 / 4096 + 0.5, abs=0.05)


def test_kivi_by_encode_and_decode_alone_errs_as_others_have_measured():
    """99.233 % and 0.124 with all tokens in 4 bits; a buffer of 64 tokens in bfloat16 errs less and takes more."""
    alone = synthetic.codec_errors("kv:kivi4", np.random.default_rng(0), 1024, 64)
    assert alone["attention_cosine"] == pytest.approx(0.99233, abs=5e-6)
    assert alone["attention_l1"] == pytest.approx(0.124, abs=5e-4)
    assert alone["bits_per_value"] == 4.5
    alone, cached = (
        errors("kv:kivi4(window=64)", np.random.default_rng(0), 128, 16)
        for errors in (synthetic.codec_errors, synthetic.scheme_errors)
    )
    assert cached["bits_per_value"] == pytest.approx(alone["bits_per_value"] + 64 / 128 * 16, abs=0.02)
    assert cached["attention_l1"] < 0.8 * alone["attention_l1"]


def test_integer_products_of_a_prompt_err_as_others_have_measured():
    """99.964 % and 0.0256, with a scale of P for every 64 queries and keys; theirs was another draw."""
    together, alone = (
        errors("kv:bf16#int8", np.random.default_rng(0), 1024, 64)
        for errors in (synthetic.prompt_errors, synthetic.scheme_errors)
    )
    assert 1 - together["attention_cosine"] == pytest.approx(1 - 0.99964, rel=0.1)
    assert together["attention_l1"] == pytest.approx(0.0256, rel=0.05)
    assert alone["attention_l1"] < 0.75 * together["attention_l1"]  # a scale for every query


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
        "Synthetic.alone = ('kv:int8',)\nSynthetic.prompts = ('kv:bf16#int8',)\n",
        "Synthetic.degrees = (3, 5)\nSynthetic.contexts = (32, 64)\nSynthetic.seeds = (0, 1)\nSynthetic.queries = 8\n",
    )
    assert small_runs.launched(config, tmp_path / "out") == 0
    records = read(tmp_path / "out" / "records.jsonl")
    assert [record.status for record in records] == ["ok"] * (4 * 2 + 2 * 2 * 2 * 2)
    assert set(report_tables(records)) == {"sas", "emulated"}
    said = findings(records)
    assert any(text.startswith("SAS at threshold 6 loses") for text in said)
    assert any("kv:int4" in text and "kv:int8 by encode and decode alone" in text for text in said)


def emulated(scheme, cosines, l1s, context=1024):
    """A record per draw."""
    cell = {
        "experiment": "synthetic",
        "scheme": scheme,
        "backend": "cache",
        "context": context,
        "head_dim": 64,
    }
    return [
        Record(cell | {"seed": seed}, {"attention_cosine": cosine, "attention_l1": l1})
        for seed, (cosine, l1) in enumerate(zip(cosines, l1s, strict=True))
    ]


def test_figures_of_others_are_beside_ours_and_held_against_their_spread():
    near = emulated("kv:kivi4(window=64)", (0.9922, 0.9924, 0.9923), (0.123, 0.125, 0.126))
    far = emulated("kv:flashq4", (0.9951, 0.9952, 0.9953), (0.13, 0.131, 0.132))
    text = next(text for text in findings([*near, *far]) if text.startswith("What others found"))
    assert "one more draw here: kv:kivi4(window=64) (99.233 % and 0.124; here 99.230 % and 0.125)" in text
    assert "not within it: kv:flashq4 (99.107 % and 0.134; here 99.520 % and 0.131)." in text
    assert report_tables(near)["emulated"].rows[0][-2:] == (0.99233, 0.124)
    other = emulated("kv:kivi4", (0.9, 0.9), (0.1, 0.1), context=512)
    assert not any("others found" in text for text in findings(other))
    assert not any("others found" in text for text in findings(near[:1]))


@pytest.mark.parametrize(
    ("uncut", "verdict"),
    [((0.01, 0.02), "supported"), ((0.3, 0.31), "contradicted"), ((0.09, 0.2), "not shown")],
)
def test_the_cut_is_the_error_where_all_draws_say_so(uncut, verdict):
    rows = []
    for context, threshold, degree, errors in (
        (1024, 6, 3, (0.1, 0.1)),
        (2048, 6, 3, (0.15, 0.16)),
        (2048, 0, 3, uncut),
        (2048, 6, 5, (0.15, 0.161)),
    ):
        for seed, error in enumerate(errors):
            cell = {"experiment": "synthetic", "threshold": threshold, "degree": degree, "context": context}
            rows.append(Record(cell | {"seed": seed}, {"attention_error": error, "lost_mass": 0.05}))
    (text,) = (text for text in findings(rows) if text.startswith("SAS at threshold 6"))
    assert text.endswith(f"is the error is {verdict}.")
