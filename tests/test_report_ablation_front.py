"""What the comparison says of bytes and KL together, and of KL along the windows, of figures made up."""

import dataclasses

import numpy as np
import pytest
from made_records import noisy, record, said

from slimjax.report import findings, load, report_tables, write_joined
from slimjax.report.ablation_front import collected
from slimjax.report.ablation_plots import ablation_plots, pareto, positions


@pytest.mark.parametrize(
    ("slim", "size", "first", "second"),
    [
        (0.01, 131, "is reached by k:flashq4", "is reached"),
        (0.5, 131, "is not reached", "is not reached"),
        (0.25, 131, "is not reached", "is not reached"),  # under flashq2 alone
        (0.01, 150, "is not reached", ": none; the target"),  # smaller than kivi2 alone
    ],
)
def test_slim_in_few_bits(slim, size, first, second):
    rows = [
        record("k:flashq4", slim, study="slim_turbo", bytes_per_token=size),
        record("x1:xquant4", 0.02, study="slim_turbo"),
        record("kv:flashq2", 0.3, study="slim_turbo"),
        record("kv:kivi2", 0.2, study="slim_turbo"),
    ]
    text = said(rows, "keys alone at fewer bytes than 2-bit keys")
    assert text.endswith(f"less KL than each of kv:flashq2 and kv:kivi2 at fewer bytes, {first}.")
    assert ("p < 1e-6 by Holm over 2" in text) == (size == 131)
    assert second in said(rows, "within the bytes of x1:xquant4")
    fronts = [
        sentence for sentence in findings(rows) if "the front of bytes and KL is x1:xquant4 (130" in sentence
    ]
    assert len(fronts) == (second != "is reached")


def test_slim_that_noise_hides_neither_reaches_nor_misses():
    rows = [
        noisy("k:flashq4", 0.021, 1, study="slim_turbo", bytes_per_token=131),
        noisy("x1:xquant4", 0.02, 2, study="slim_turbo"),
    ]
    assert "is neither reached nor missed: the difference is within" in said(
        rows, "within the bytes of x1:xquant4"
    )


def test_why_slim_loses():
    rows = [
        record("k:flashq4+16", 0.5, study="slim_turbo", bytes_per_token=131),
        record("k:int16+16", 0.001, study="slim_turbo", bytes_per_token=500),
        record("kv:flashq4", 0.05, study="slim_turbo"),
        record("x1:xquant4", 0.02, study="slim_turbo"),
    ]
    assert "k:flashq4+16 has more KL than kv:flashq4 (" in said(rows, "the same codes of keys")
    assert said(rows, "why: k:int16+16 has less KL than k:flashq4+16").endswith("passes on to the values.")


def along(scheme, growth, seed=0, prompt=128):
    """Four windows of 1,024 tokens, 14 blocks each behind the prompt; growth: of KL, where 512 tokens are reached."""
    draw = np.random.default_rng(seed)
    blocks = 0.1 + draw.normal(0, 0.01, (4, (1024 - prompt) // 64))
    blocks[:, (512 - prompt) // 64 :] *= growth
    ends = [256, 512, 1024]
    starts = [prompt, *ends[:-1]]
    means = [
        float(blocks[:, (a - prompt) // 64 : (b - prompt) // 64].mean())
        for a, b in zip(starts, ends, strict=True)
    ]
    return record(
        scheme, 0.1, study="context", length=1024, prompt=prompt, positions=[float(end) for end in ends],
        logit_kl_by_position=means, attention_error_by_position=[0.1, 0.2, 0.3],
        logit_kl_blocks=blocks.ravel().tolist(), count=4 * (1024 - prompt),
    )  # fmt: skip


def test_growth_is_from_a_cache_that_holds_more_than_its_buffer():
    rows = [along("kv:flashq4", 2.0), along("kv:kivi4", 1.0, 1), along("kv:kivi2", 0.5, 2)]
    text = said(rows, "grows with context")
    assert (
        "KL of tokens 512 to 1,023 (n = 2,048) over that of tokens 256 to 511 (n = 1,024), by Welch's t"
        in text
    )
    assert text.endswith("grows with context in 1 of 3, falls in 1, and is not told apart in the others.")
    table = report_tables(rows)["positions_lm"]
    titles = [column.title for column in table.columns]
    assert titles[1:4] == ["KL, tokens 128 to 255 (n = 512)", "95 % from", "to"]
    assert titles[-1] == "attention error, tokens 512 to 1,023 (n = 2,048)"
    low, high = table.rows[0][2:4]
    assert low < table.rows[0][1] < high
    assert table.rows[0][-3:] == (0.1, 0.2, 0.3)
    assert positions(rows) is not None


def test_windows_of_two_lengths_are_two_tables():
    short = [record("kv:flashq4", 0.1, study="context", length=1024, prompt=256)]
    long = [record("kv:flashq4", 0.3, study="context", length=2048, prompt=256)]
    tables = report_tables(short + long)
    assert tables["context_lm_windows-of-2048_prompt-256"].rows[0][4] == pytest.approx(0.3)
    assert len(tables["context_lm_windows-of-1024_prompt-256"].rows) == 1


def test_pareto_and_plots():
    rows = [along("kv:flashq4", 2.0), along("kv:kivi4", 1.0)]
    wide = [record("kv:bf16", 1e-4, study="pareto"), record("kv:flashq4", 0.1, study="pareto"),
            record("kv:kivi4", 0.2, study="pareto"), record("x1:xquant4", 0.3, study="pareto")]  # fmt: skip
    text = said(wide, "on the front")
    assert text.startswith(
        "lm: of 4 caches 3 are on the front of bytes and KL, from the smallest: x1:xquant4 (130 bytes, 3.0e-1)"
    )
    assert text.endswith("1 of them is TurboAttention's; each is told from the next by a paired test.")
    assert pareto(wide) is not None
    assert set(ablation_plots(rows + wide)) == {
        "kl_bytes",
        "kl_bytes_context",
        "kl_bytes_pareto",
        "kl_position",
    }


def test_a_slim_cache_in_flashqs_codes_is_not_turboattention():
    rows = [
        record("kv:bf16", 1e-4, study="pareto"),
        record("k:flashq4", 0.1, study="pareto", bytes_per_token=130),
    ]
    assert "0 of them are TurboAttention's" in said(rows, "on the front")


def test_a_front_has_one_way_of_each_scheme():
    """Not the luckiest of its variants: no protected layers, heads by the paper's priority."""
    rows = [
        record("kv:flashq2-4", 0.1, study="selectors", selector=name)
        for name in ("entropy", "priority", "none")
    ]
    rows += [record("kv:flashq2-4", 0.01, study="protection", selector="priority", protected=1)]
    rows += [record("kv:kivi2", 0.2, study="pareto")]
    table = report_tables(rows)["front_lm"]
    assert [(row[0], row[1]) for row in table.rows] == [("kv:kivi2", None), ("kv:flashq2-4", "priority")]
    assert "front_lm" not in report_tables(rows[:3])
    assert pareto(rows[:3]) is None  # all of one size


def test_one_front_of_several_runs(tmp_path):
    """What two studies share is one point; what was read in other windows is none."""
    studies = {
        "main": [record("kv:bf16", 1e-4, length=1024), record("kv:flashq4", 0.1, length=1024)],
        "pareto": [
            record("kv:flashq4", 0.1, study="pareto", length=1024),
            noisy("kv:kivi4", 0.1, 1, study="pareto", length=1024, bytes_per_token=250),
        ],
        "context": [record("kv:nvfp4", 0.05, study="context", length=2048)],
    }
    for name, records in studies.items():
        lines = "".join(f"{made.to_json()}\n" for made in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    runs = [
        dataclasses.replace(load(tmp_path / f"{name}.jsonl"), config={"grid": {"study": name}})
        for name in studies
    ]
    write_joined(tmp_path / "out", runs)
    every = [made for run in runs for made in run.records]
    table = report_tables(every)["front_lm"]
    assert [row[0] for row in table.rows] == ["kv:kivi4", "kv:flashq4", "kv:bf16"]
    assert [row[-2:] for row in table.rows] == [("front", "pareto"), ("", "main, pareto"), ("front", "main")]
    assert table.note.endswith("Left out, of other windows: 1.")
    assert len(collected(every).points) == 3
    assert "lm, all studies: of 3 caches 2 are on the front" in said(every, "lm, all studies")
    for suffix in ("md", "csv", "tex"):
        assert "kv:kivi4" in (tmp_path / "out" / "tables" / f"front_lm.{suffix}").read_text()
    assert (tmp_path / "out" / "plots" / "kl_bytes.png").stat().st_size > 1000
    assert "differ in more than the seed" not in (tmp_path / "out" / "report.html").read_text()
