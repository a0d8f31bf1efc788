"""Plots and sentences of decoding speed, on records with made-up figures."""

import numpy as np
import pytest

from experiments import readme
from slimjax.records import Record
from slimjax.report import findings, write_report
from slimjax.report.decoding import decoding_plots

CONTEXTS = (1024, 2048, 4096, 16384)


def record(scheme, context, milliseconds, *, batch=1, per_token=1000, **more):
    cell = {"experiment": "decode_bench", "shape": "small", "scheme": scheme, "backend": "reference"}
    cell |= {"batch": batch, "context": context, "dtype": "float32"}
    metrics = {
        "milliseconds": milliseconds,
        "gigabytes_per_second": per_token * batch * context / milliseconds / 1e6,
        "share_of_copy_bandwidth": 0.01 * context / milliseconds / 1e6,
    }
    return Record(cell, metrics | more)


LINEAR = [record("kv:bf16", context, 1e-3 * context) for context in CONTEXTS]
CONSTANT = [record("k:int16", context, 1.0 + 1e-4 * context, batch=8) for context in CONTEXTS]


def growth(records):
    return [text for text in findings(records) if "grows as its bytes" in text]


def test_growth_is_told_from_the_longest_context_and_one_four_times_shorter():
    (said,) = growth(LINEAR)
    assert said.endswith("within 10%, in 1 of 1 cells.")
    (said,) = growth(LINEAR + CONSTANT)
    # From 1 + 0.4096 to 1 + 1.6384.
    assert "in 1 of 2 cells; not in k:int16 (reference, small, batch 8, float32: 1.87 for 4.00)." in said


@pytest.mark.parametrize("times", [1.09, 1.11])
def test_a_tenth_is_the_bound(times):
    rows = [*LINEAR[:-1], record("kv:bf16", 16384, times * 16.384)]
    (said,) = growth(rows)
    assert ("in 1 of 1" in said) == (times < 1.1)


def test_without_two_such_contexts_nothing_is_said_of_growth():
    assert growth(LINEAR[:2]) == []
    assert growth([record("kv:bf16", 4096, 1.0)]) == []


def test_every_line_is_drawn_once_in_its_panel():
    made = decoding_plots(LINEAR + CONSTANT)
    assert set(made) == {"decode_time", "bandwidth"}
    for _, figure in made.values():
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_title() for axes in panels] == [
            "small, batch 1, float32", "small, batch 8, float32"
        ]  # fmt: skip
        assert [len(axes.lines) for axes in panels] == [1, 1]
        assert [np.asarray(axes.lines[0].get_xdata()).tolist() for axes in panels] == [list(CONTEXTS)] * 2
    assert decoding_plots(LINEAR[:1]) == {}


def test_the_page_shows_them(tmp_path):
    page = write_report(tmp_path, LINEAR + CONSTANT, title="Decoding", config={})
    assert "Milliseconds of a step against the tokens in the cache." in page.read_text()
    assert (tmp_path / "plots" / "bandwidth.png").stat().st_size > 1000


def test_a_part_without_a_gpu_is_said_to_be_not_run(tmp_path):
    mark = "<!-- table:gpu_decode/cells -->\nold\n<!-- /table -->"
    assert "Not run: no GPU was at hand. `make gpu PART=decode` runs it." in readme.render(mark, tmp_path)
    with pytest.raises(ValueError, match="no records"):
        readme.render(mark.replace("gpu_decode", "decode_bench"), tmp_path)
