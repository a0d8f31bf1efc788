"""Tables and sentences of the comparison, of figures made up: each sentence turns with its figures."""

import numpy as np
import pytest
from made_records import noisy, record, said

from slimjax.records import Record
from slimjax.report import report_tables, write_report
from slimjax.report.ablation import PUBLISHED
from slimjax.report.paired import compared, versus


@pytest.mark.parametrize(
    ("kls", "verdict"),
    [
        ((0.1, 0.2, 0.3), "is supported, by KL"),
        ((0.1, 0.3, 0.2), "is contradicted, by KL"),
        ((0.3, 0.2, 0.1), "is contradicted, by KL"),
    ],
)
def test_the_papers_order_of_methods(kls, verdict):
    names = ("kv:flashq4@sas", "kv:gear_l4(rank=2)", "kv:kivi4")
    rows = [record(s, kl) for s, kl in zip(names, kls, strict=True)]
    text = said(rows, "lm, 4 bits: that TurboAttention loses least")
    assert verdict in text
    less = "less" if kls[0] < kls[1] else "more"
    assert (
        f"kv:flashq4@sas has {less} KL than kv:gear_l4(rank=2) ({kls[0]:.1e} against".replace("e-0", "e-")
        in text
    )


def test_what_noise_hides_is_neither():
    rows = [noisy(s, 0.1, i) for i, s in enumerate(("kv:flashq4@sas", "kv:gear_l4", "kv:kivi4"))]
    text = said(rows, "lm, 4 bits: that")
    assert "neither supported nor contradicted" in text
    assert text.count("cannot be told apart") == 2


def test_many_tests_find_less():
    """A difference that one test alone would call one does not survive nine others beside it."""
    made = record("kv:bf16", 1.0)
    lift = np.tile([1.0, -1.0], 16) * 0.1 + 0.0385  # t = 2.15 of 31: p = 0.04
    low, high = (
        [Record(made.cell, made.metrics | {"logit_kl_blocks": blocks.tolist()})]
        for blocks in (np.ones(32), 1 + lift)
    )
    (alone,) = compared([(low, high)])
    among, *_ = compared([(low, high), *([(high, high)] * 9)])
    assert alone is not None
    assert among is not None
    assert (alone.less, among.less) == (True, False)
    assert alone.interval == among.interval
    assert among.p == pytest.approx(10 * alone.p)
    assert "p = 0.4 by Holm over 10" in versus(low, high, among)


@pytest.mark.parametrize(
    ("shift", "spread", "said_so"),
    [
        (-0.05, 0.01, "lowers perplexity from 10.001 to 11.000 (-4."),
        (0.05, 0.01, "raises perplexity from 10.001 to 11.000 (+5."),
        (0.05, 1.0, "does not change perplexity beyond the interval: 10.001 to 11.000"),
        (None, 0, "perplexity 11.000, with bf16 KV 10.001; no test of the difference."),
    ],
)
def test_perplexity_changes_only_where_a_test_sees_it(shift, spread, said_so):
    draw = np.random.default_rng(0)
    plain, turbo = draw.normal(2, 1, 32), draw.normal(0, spread, 32)
    more = [
        {} if shift is None else {"nats_blocks": x.tolist()} for x in (plain, plain + (shift or 0) + turbo)
    ]
    rows = [record("kv:bf16", 1e-4, **more[0]), record("kv:flashq4@sas", 0.1, **more[1])]
    text = said(rows, "times fewer bytes than bf16 KV")
    assert text.startswith("lm: kv:flashq4@sas takes 3.76 times fewer")
    assert said_so in text


def test_the_main_table_has_the_papers_means():
    assert {study: len(paper.accuracy) for study, paper in PUBLISHED.items()} == {"main": 7, "components": 4}
    names = (
        "kv:bf16", "kv:flashq4@sas", "kv:kivi4", "kv:kivi2", "kv:gear_l4(rank=2)", "kv:kivi4(window=64)",
        "kv:flashq4(rank=2)@sas", "kv:flashq4@sas#int8(p=static)", "kv:flashq2-4(share=0.25)@sas",
    )  # fmt: skip
    rows = [record(s, 0.1, model=m) for m in ("a", "b") for s in names]
    table = report_tables(rows)["main"]
    assert [row[-1] for row in table.rows] == [61.89, 60.27, 51.85, None, 55.97, 51.85, None, None, None]
    assert [column.title for column in table.columns][1:6] == [
        "a: bf16 KV / this cache",
        "a: logit KL (nats)",
        "a: 95 % from",
        "a: to",
        "a: perplexity",
    ]
    assert table.rows[0][1:6] == (1.0, 0.1, pytest.approx(0.09), pytest.approx(0.11), pytest.approx(11.0))
    assert "a: n = 4,096 tokens in 32 blocks. b: n = 4,096 tokens in 32 blocks." in table.note
    assert set(report_tables(rows)) == {"main", "main_a", "main_b"}


def test_a_refusal_names_its_model():
    rows = [record("kv:bf16", 0.1, model=m) for m in ("a", "b")]
    rows += [record("k:int8", 0.1, model="a")]
    rows += [Record(record("k:int8", 0.1, model="b").cell, status="refused", reason="no room")]
    table = report_tables(rows)["main"]
    assert table.remarks == ("", "b: refused: no room")
    other = Record(rows[2].cell, status="refused", reason="no room")
    assert report_tables([*rows[:2], other, rows[3]])["main"].remarks[1] == "refused: no room"


def test_components_and_options():
    rows = [
        record("kv:bf16@sas", 0.01, study="components"),
        record("kv:flashq4", 0.05, study="components"),
        record("kv:flashq4@sas", 0.06, study="components"),
        record("kv:bf16#int8", 0.002, study="components"),
        record("kv:flashq4#float", 0.04, study="components"),
        record("kv:flashq4@sas#int8(denominator=after)", 0.05, study="components"),
        record("kv:flashq4@sas#int8(p=static)", 0.06, study="components"),
    ]
    assert "both more than either, is supported, by KL" in said(rows, "SAS costs less")
    assert "kv:bf16#int8 has less KL than kv:flashq4#float (2.0e-3 against 4.0e-2; diff" in said(
        rows, "halves"
    )
    text = said(rows, "choices")
    assert (
        "of 2 choices that the paper leaves open, by the KL they add to kv:flashq4@sas, kv:flashq4@sas#int8(d"
        in text
    )
    assert "(difference -1.0e-2, 95 % from" in text
    assert "p=static" not in text


@pytest.mark.parametrize(
    ("rival", "verdict"),
    [
        (0.2, "is supported against entropy (difference -1.0e-1"),
        (0.05, "is contradicted by entropy (difference 5.0e-2"),
        (0.1, "is not told from entropy"),
    ],
)
def test_selectors(rival, verdict):
    common = {"study": "selectors", "fraction": 0.5}
    rows = [
        record("kv:flashq2-4(share=0.5)", 0.1, selector="priority", **common),
        record("kv:flashq2-4(share=0.5)", rival, selector="entropy", **common),
    ]
    assert verdict in said(rows, "that priority chooses best")


def test_a_correction_is_held_against_the_codec_without_one():
    rows = [
        record("kv:flashq2", 0.4, study="selectors"),
        record("kv:flashq2(rank=2)", 0.3, study="selectors", bytes_per_token=180),
    ]
    text = said(rows, "correction of tiles")
    assert text.startswith(
        "lm, correction of tiles, for +25 % bytes: kv:flashq2(rank=2) has less KL than kv:flashq2 ("
    )


@pytest.mark.parametrize(
    ("last", "verdict"), [(0.105, "supported (within 10 %)"), (0.2, "contradicted"), (0.115, "contradicted")]
)
def test_tiles(last, verdict):
    rows = [record("kv:flashq4/32", 0.1, study="tiles"), record("kv:flashq4/128", last, study="tiles")]
    assert said(rows, "size of a tile").endswith(f"is {verdict}.")


def test_flat_is_not_what_noise_hides():
    rows = [noisy(f"kv:flashq4/{tile}", 0.1 + tile / 1e3, tile, study="tiles") for tile in (32, 64, 128)]
    text = said(rows, "size of a tile")
    assert text.endswith("is neither supported nor contradicted.")
    assert "at 95 % for all 3 pairs together" in text


def test_sas_errs_by_its_cut_if_a_test_says_so():
    def rows(uncut, sharper, make):
        return [
            make("kv:bf16@sas", 0.3, 0, study="sas"),
            make("kv:bf16@sas(0)", uncut, 1, study="sas"),
            make("kv:bf16@sas(6,5)", sharper, 2, study="sas"),
        ]

    def plain(scheme, kl, _, **more):
        return record(scheme, kl, **more)

    assert "is the error is supported: kv:bf16@sas(0) has less" in said(
        rows(0.1, 0.3, plain), "the KL of SAS"
    )
    assert "is the error is contradicted: kv:bf16" in said(rows(0.3, 0.1, plain), "the KL of SAS")
    assert "is the error is not shown (within the interval)" in said(rows(0.29, 0.3, noisy), "the KL of SAS")


def test_protection_and_its_price():
    common = {"study": "protection", "protection": "kv:int8"}
    rows = [
        record("kv:flashq2", 0.4, study="protection", protected=0, protection=None),
        record("kv:flashq2", 0.3, protected=1, protect="ends", bytes_per_token=180, **common),
        record("kv:flashq2", 0.2, protected=1, protect="middle", bytes_per_token=180, **common),
    ]
    text = said(rows, "protected layer at either end")
    assert "for 25 % more bytes" in text
    assert text.endswith("that it helps is supported.")
    assert said(rows, "in the middle").endswith("that the ends are the sensitive ones is contradicted.")
    assert said(rows[:2], "protected layer at either end") == text


def asked(scheme, kl, right, p, **more):
    """With answers to 40 problems."""
    share = sum(right) / 40
    return record(
        scheme, kl, accuracy=share, accuracy_low=share - 0.1, accuracy_high=share, accuracy_change=share - 1,
        p_value=p, problems=40, solved_samples=right, **more,
    )  # fmt: skip


def test_answers_are_told_with_their_test():
    rows = [asked("kv:flashq4@sas", 0.1, [1] * 40, 1.0), asked("kv:kivi4", 0.2, [1] * 20 + [0] * 20, 1e-6)]
    text = said(rows, "40 problems")
    assert "of 2 caches 1 lose no answers" in text
    assert "kv:kivi4 (-50.0 points, p = 2e-06) does" in text
    assert said(rows, "solves 20 problems that kv:kivi4 does not, and kv:kivi4 0").endswith(
        "1.9e-06): it solves more."
    )
    titles = [column.title for column in report_tables(rows)["main_lm"].columns]
    assert "p (McNemar)" in titles


def test_answers_lost_by_chance_among_many_are_not_lost():
    lost = asked("kv:kivi4", 0.2, [1] * 34 + [0] * 6, 0.03)
    others = [asked(f"kv:flashq4/{tile}", 0.1, [1] * 40, 1.0) for tile in (32, 64)]
    assert "of 1 caches 0 lose no" in said([lost], "40 problems:")
    assert "of 3 caches 3 lose no answers that McNemar's test would see (p by Holm)." in said(
        [lost, *others], "40 problems:"
    )


def test_a_map_in_the_weights_has_a_column():
    rows = [
        record("k:flashq4", 0.1, study="slim_turbo", map_bytes=4096.0),
        record("kv:bf16", 1e-4, study="slim_turbo"),
    ]
    table = report_tables(rows)["slim_turbo_lm"]
    place = [column.title for column in table.columns].index("map in the weights (bytes)")
    assert [row[place] for row in table.rows] == [4096.0, None]
    assert "stands for W_V, or W_K" in table.note


def test_a_half_finished_run_has_a_page(tmp_path):
    rows = [record("kv:flashq4", 0.1)]
    planned = [dict(rows[0].cell), dict(record("kv:kivi4", 0.1).cell)]
    write_report(tmp_path, rows, title="half", config={}, planned=planned)
    assert "1 of 2 cells are done" in (tmp_path / "report.html").read_text()
    write_report(tmp_path, [], title="none", config={}, planned=planned)
