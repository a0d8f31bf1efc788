"""Tables, sentences and plots of the comparison, of figures made up: each sentence turns with its figures."""

import numpy as np
import pytest

from slimjax.records import Record
from slimjax.report import findings, report_tables, write_report
from slimjax.report.ablation import PUBLISHED
from slimjax.report.ablation_plots import pareto, positions

NOISE = np.random.default_rng(0).normal(size=32).tolist()
SIZES = {
    "bf16": 1024,
    "flashq4": 272,
    "flashq2-4": 208,
    "flashq2": 144,
    "gear_l4": 320,
    "kivi4": 288,
    "xquant4": 130,
}


def record(scheme, kl, *, study="main", model="lm", noise=0.01, **more):
    """A record of a scheme: its blocks are the KL, 1 + noise times; noise is the same one for every scheme."""
    basis, _, rest = scheme.partition(":")
    name = rest.partition("@")[0].partition("#")[0].partition("(")[0].partition("/")[0].partition("+")[0]
    codec, bits = name.rstrip("0123456789-"), name[len(name.rstrip("0123456789-")) :] or None
    if name == "bf16":
        codec, bits = "bf16", None
    cell = {"experiment": "compare", "study": study, "model": model, "scheme": scheme, "basis": basis[0:1] if
            basis[1:].isdigit() else basis, "codec": codec, "bits": bits, "softmax": "sas" if "@sas" in scheme else
            "exact", "compute": scheme.partition("#")[2], "seed": 0}  # fmt: skip
    blocks = [kl * (1 + noise * each) for each in NOISE]
    size = SIZES.get(name, 200)
    metrics = {
        "logit_kl": kl,
        "logit_kl_blocks": blocks,
        "logit_kl_low": kl * 0.9,
        "logit_kl_high": kl * 1.1,
        "perplexity": 10 * (1 + kl),
        "bytes_per_token": size,
        "compression": 1024 / size,
        "count": 4096,
    }
    place = {
        key: value
        for key, value in more.items()
        if key in ("selector", "fraction", "protected", "protection")
    }
    extra = {key: value for key, value in more.items() if key not in place}
    return Record(cell | place, metrics | extra)


def said(records, start):
    """The one sentence that has this in it."""
    (text,) = (text for text in findings(records) if start in text)
    return text


@pytest.mark.parametrize(
    ("kls", "verdict"),
    [
        ((0.1, 0.2, 0.3), "is supported."),
        ((0.1, 0.3, 0.2), "is contradicted."),
        ((0.3, 0.2, 0.1), "is contradicted."),
    ],
)
def test_the_papers_order_of_methods(kls, verdict):
    schemes = ("kv:flashq4@sas", "kv:gear_l4", "kv:kivi4")
    rows = [record("kv:bf16", 1e-4), *(record(s, kl) for s, kl in zip(schemes, kls, strict=True))]
    assert said(rows, "lm, 4 bits: KL").endswith(verdict)
    assert "from 10.001 to" in said(rows, "raises perplexity")


def test_what_noise_hides_is_neither():
    rng = np.random.default_rng(1)
    rows = []
    for scheme in ("kv:flashq4@sas", "kv:gear_l4", "kv:kivi4"):
        made = record(scheme, 0.1)
        rows.append(Record(made.cell, made.metrics | {"logit_kl_blocks": rng.normal(0.1, 1, 32).tolist()}))
    assert "neither supported nor contradicted" in said(rows, "lm, 4 bits: KL")


def test_the_main_table_has_the_papers_means():
    assert len(PUBLISHED) == 7
    rows = [
        record(s, 0.1, model=m)
        for m in ("a", "b")
        for s in ("kv:bf16", "kv:flashq4@sas", "kv:kivi4", "kv:kivi2")
    ]
    table = report_tables(rows)["main"]
    assert [row[-1] for row in table.rows] == [61.89, 60.27, 51.85, None]
    assert [column.title for column in table.columns][1:4] == [
        "a: bf16 KV / this cache",
        "a: logit KL (nats)",
        "a: perplexity",
    ]
    assert set(report_tables(rows)) == {"main", "main_a", "main_b"}


def test_components_and_options():
    rows = [
        record("kv:bf16@sas", 0.01, study="components"),
        record("kv:flashq4", 0.05, study="components"),
        record("kv:flashq4@sas", 0.06, study="components"),
        record("kv:bf16#int8", 0.002, study="components"),
        record("kv:flashq4#float", 0.04, study="components"),
        record("kv:flashq4@sas#int8(p=row)", 0.05, study="components"),
        record("kv:flashq4@sas#int8(p=static)", 0.06, study="components"),
    ]
    assert said(rows, "SAS alone").endswith("is supported.")
    assert "kv:bf16#int8 has less KL than kv:flashq4#float (2.0e-3 against 4.0e-2)" in said(rows, "halves")
    assert (
        "of 2 choices that the paper leaves open, by their KL, kv:flashq4@sas#int8(p=row) (-1.0e-2) can"
        in said(rows, "choices")
    )


@pytest.mark.parametrize(
    ("rival", "verdict"),
    [
        (0.2, "is supported against entropy."),
        (0.05, "is contradicted by entropy."),
        (0.1, "is neither supported nor"),
    ],
)
def test_selectors(rival, verdict):
    common = {"study": "selectors", "fraction": 0.5}
    rows = [
        record("kv:flashq2-4(share=0.5)", 0.1, selector="priority", **common),
        record("kv:flashq2-4(share=0.5)", rival, selector="entropy", **common),
    ]
    assert verdict in said(rows, "that priority chooses best")


@pytest.mark.parametrize(("last", "verdict"), [(0.105, "supported"), (0.2, "contradicted")])
def test_tiles(last, verdict):
    rows = [record("kv:flashq4/32", 0.1, study="tiles"), record("kv:flashq4/128", last, study="tiles")]
    assert said(rows, "size of a tile").endswith(f"is {verdict}.")


def test_protection_and_its_price():
    rows = [
        record("kv:flashq2", 0.4, study="protection", protected=0, protection=None),
        record("kv:flashq2", 0.3, study="protection", protected=1, protection="kv:int8", bytes_per_token=180),
    ]
    text = said(rows, "protected layer at either end")
    assert "for 25 % more bytes" in text
    assert text.endswith("sensitive is supported.")


@pytest.mark.parametrize(("slim", "reached"), [(0.01, "reached"), (0.5, "not reached")])
def test_slim_in_few_bits(slim, reached):
    rows = [
        record("k:flashq4", slim, study="slim_turbo", bytes_per_token=131),
        record("x1:xquant4", 0.02, study="slim_turbo"),
        record("kv:flashq2", 0.3, study="slim_turbo"),
    ]
    assert said(rows, "first target").endswith(f"the first target is {reached}.")
    assert said(rows, "second target").endswith(f"4-bit X, is {reached}.")


def test_context_and_pareto_and_plots(tmp_path):
    rows = [
        record(s, kl, study="context", positions=[64.0, 128.0], logit_kl_by_position=[kl, 2 * kl],
               attention_error_by_position=[0.1, 0.2])
        for s, kl in (("kv:flashq4", 0.1), ("kv:kivi4", 0.2))
    ]  # fmt: skip
    assert "2.00 kv:flashq4 and 2.00 kv:kivi4; it grows with context in 2 of 2." in said(
        rows, "KL of tokens 64 to 127"
    )
    table = report_tables(rows)["positions_lm"]
    assert table.rows[0] == ("kv:flashq4", 0.1, 0.2, 0.1, 0.2)
    assert positions(rows) is not None
    wide = [record("kv:bf16", 1e-4, study="pareto"), record("kv:flashq4", 0.1, study="pareto"),
            record("kv:kivi4", 0.2, study="pareto"), record("x1:xquant4", 0.3, study="pareto")]  # fmt: skip
    assert said(wide, "on the front").startswith(
        "lm: of 4 caches 3 are on the front of bytes and KL, from the smallest: x1:xquant4 (130 bytes, 3.0e-1)"
    )
    assert pareto(wide) is not None
    write_report(tmp_path, rows + wide, title="t", config={})
    assert {path.stem for path in (tmp_path / "plots").glob("*.png")} == {
        "kl_bytes_context",
        "kl_bytes_pareto",
        "kl_position",
    }


def test_answers_are_told_with_their_test():
    right, wrong = [1] * 40, [1] * 20 + [0] * 20
    rows = [
        record("kv:flashq4@sas", 0.1, accuracy=1.0, accuracy_low=0.9, accuracy_high=1.0, accuracy_change=0.0,
               p_value=1.0, problems=40, solved_samples=right),
        record("kv:kivi4", 0.2, accuracy=0.5, accuracy_low=0.3, accuracy_high=0.7, accuracy_change=-0.5,
               p_value=1e-6, problems=40, solved_samples=wrong),
    ]  # fmt: skip
    assert "1 of 2 caches lose no answers" in said(rows, "40 problems")
    assert "kv:kivi4 (-50.0 points)" in said(rows, "40 problems")
    assert (
        "solves 20 problems that kv:kivi4 does not, and kv:kivi4 0 that it does not (p = 1.907e-6)"
        in said(rows, "solves 20")
    )
    titles = [column.title for column in report_tables(rows)["main_lm"].columns]
    assert "p (McNemar)" in titles


def test_a_half_finished_run_has_a_page(tmp_path):
    rows = [record("kv:flashq4", 0.1)]
    planned = [dict(rows[0].cell), dict(record("kv:kivi4", 0.1).cell)]
    write_report(tmp_path, rows, title="half", config={}, planned=planned)
    assert "1 of 2 cells are done" in (tmp_path / "report.html").read_text()
    write_report(tmp_path, [], title="none", config={}, planned=planned)
