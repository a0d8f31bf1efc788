"""Reports are pure functions of records: stable, honest about what is missing, escaped, self-contained."""

import itertools
import random
import re
from html.parser import HTMLParser

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from experiments import readme
from slimjax.records import Record
from slimjax.report import facts, findings, front, plots, tables, write_report
from slimjax.report.equivalence import equivalence_table, models_table

DTYPES = ("float64", "float32", "bfloat16", "float16")
SCHEMES = {"kv:bf16": (1024, 2e-3), "k:int16": (516, 1e-4), "k:bf16": (512, 0.4), "x1:bf16": (512, 2e-3)}
REASON = r"layer 0: x & y < 100% of W_K {a} \ b | c"


def cell(model: str, scheme: str, dtype: str) -> dict:
    basis = scheme.split(":", maxsplit=1)[0].rstrip("12")
    return {"model": model, "scheme": scheme, "basis": basis, "dtype": dtype, "steps": 10}


def records(models=("default", "orthogonal")) -> list[Record]:
    made = []
    for model, dtype, (scheme, (size, error)) in itertools.product(models, DTYPES, SCHEMES.items()):
        metrics = {"bytes_per_token": size, "compression": 1024 / size}
        if dtype == "float64":
            metrics = {"identity_error": 1.2e-14}
            if scheme.startswith("k:"):
                metrics["condition_number"] = 4321.0 if model == "default" else 12.0
        else:
            metrics["attention_error"] = error
        if dtype == "float32":
            change = error**2 if model == "default" else 1e-5
            metrics |= {"bits_per_byte": 2 + change, "bits_per_byte_change": change}
            metrics |= {
                "top1_agreement": 0.5,
                "greedy_agreement": 64.0,
                "count": 8192,
                "generated": 128,
                "sequences": 8,
            }
        made.append(Record(cell(model, scheme, dtype), metrics))
    made.append(Record(cell("default", "x:bf16", "float64"), status="refused", reason=REASON))
    return made


def test_rows_are_schemes_in_order_of_appearance():
    table = equivalence_table(records(), "default")
    assert [row[0] for row in table.rows] == [*SCHEMES, "x:bf16"]
    by_title = dict(zip([column.title for column in table.columns], table.written()[1], strict=True))
    assert by_title["attention error, bfloat16"] == "1.0e-4"
    assert by_title["top-1 agreement, % (n = 8,192)"] == "50.00"
    assert by_title["greedy agreement (tokens of 128, n = 8)"] == "64.0"
    assert by_title["cache (bytes per token)"] == "516"
    assert by_title["condition number of W_K (k) or W_V (v)"] == "4,321"


def test_tables_do_not_depend_on_the_order_of_metrics_or_files():
    shuffled = records()
    tail = shuffled[8:]
    random.Random(0).shuffle(tail)  # later models and dtypes; first appearances of schemes stay
    first = tables.csv(equivalence_table(records(), "default"))
    assert first == tables.csv(equivalence_table(shuffled[:8] + tail, "default"))


def test_missing_is_an_en_dash_and_a_refusal_gives_its_reason():
    table = equivalence_table(records(), "default")
    assert table.written()[0][-1] == "–"
    text = tables.markdown(table)
    assert "| x:bf16 | – |" in text
    assert "* x:bf16: refused: layer 0: x & y &lt; 100% of W\\_K {a} \\\\ b \\| c" in text
    assert all(line.count(" | ") == len(table.columns) - 1 for line in text.splitlines() if line[:2] == "| ")


def test_csv_keeps_every_digit():
    lines = tables.csv(equivalence_table(records(), "default")).splitlines()
    assert "4321.0" in lines[2]
    assert str(1e-4**2) in lines[2]
    assert lines[-1].startswith("x:bf16,,,")
    assert lines[-1].endswith(f"refused: {REASON}")


def test_latex_is_booktabs_and_escaped():
    text = tables.latex(equivalence_table(records(), "default"))
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert r"x \& y \textless{} 100\% of W\_K \{a\} \textbackslash{} b | c" in text
    assert r"top-1 agreement, \%" in text
    assert "–" not in text
    assert "×" not in text
    columns = len(re.findall(r"[lr]", re.search(r"tabular}{(\w+)}", text)[1]))  # type: ignore[index]
    assert all(line.count(" & ") == columns - 1 for line in text.splitlines() if line.startswith("kv:"))


def test_models_stand_side_by_side():
    table = models_table(records())
    assert [row[0] for row in table.rows] == ["default", "orthogonal"]
    assert [column.title for column in table.columns][-1] == "bits per byte, change, k:bf16"
    assert table.written()[0][1:4] == ["10", "2.0000", "4,321"]


def test_findings_say_what_the_numbers_say():
    text = "\n".join(findings(records()))
    assert "3 of 4 caches stay within 0.001 of that: kv:bf16, k:int16 and x1:bf16" in text
    assert "k:bf16 does not: it changes bits per byte by +0.1600" in text
    assert "condition number 4,321" in text
    assert "to 2e-14 or better" in text  # a bound is rounded up
    assert "+0.1600 on default (4,321) and 0.0000 on orthogonal (12)" in text
    assert "all 4 caches" in text
    assert "Not measured: x:bf16" in text


def test_identity_claims_no_more_than_what_was_measured():
    whole, *_ = findings(records())
    assert "all 4 schemes measured equal exact attention to 2e-14 or better" in whole
    assert whole.endswith("what they lose elsewhere is precision.")
    one, *_ = findings([record for record in records() if record.cell["scheme"] == "k:bf16"])
    assert "the one scheme measured equals" in one
    wrong, *_ = findings([Record(cell("default", "k:bf16", "float64"), {"identity_error": 0.02})])
    assert wrong.endswith("to 2e-2 or better (relative L2).")


def trained(model: str = "default", seed: int = 0, **metrics) -> Record:
    where = {"experiment": "train", "model": model, "steps": 800, "seed": seed}
    return Record(where, {"bits_per_byte": 2.7453} | metrics, provenance={"seed": seed})


def test_training_is_told_in_sentences():
    full = {"count": 8192, "tokens_per_second": 36123.4, "parameters": 117056}
    (sentence,) = findings([trained(**full)])
    assert sentence == (
        "Model default, 117,056 parameters, needs 2.745 bits per byte on held-out text after 800 steps "
        "(36,000 tokens per second)."
    )
    assert findings([trained(), trained("wide")]) == [
        "Model default needs 2.745 bits per byte on held-out text after 800 steps.",
        "Model wide needs 2.745 bits per byte on held-out text after 800 steps.",
    ]
    seeds = findings([trained(), trained(seed=1, bits_per_byte=2.8453)])
    assert "needs 2.795 bits per byte" in seeds[0]
    assert seeds[1:] == ["Numbers are means over the seeds 0 and 1."]
    failed = Record({"experiment": "train", "model": "a"}, status="failed", reason="no text")
    assert findings([failed]) == ["Not measured: 1 cells (failed: no text)."]


class _Page(HTMLParser):
    """Tags, outside references and balance of a page."""

    VOID = ("meta", "br", "path", "use", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escaped(tmp_path):
    hostile = '<script>alert("x")</script>'
    bad = Record(cell("default", "k:int8", "float32"), status="failed", reason=hostile)
    metrics = [{"model": "default", "step": step, "bits_per_byte": 8.0 / step} for step in (1, 2, 3)]
    path = write_report(tmp_path, [*records(), bad], title=hostile, config={"a": hostile}, metrics=metrics)
    text = path.read_text()
    page = _Page(text)
    assert page.open == []
    assert page.outside == []
    assert page.seen.count("table") == 3
    assert page.seen.count("svg") == 3
    assert page.seen.count("script") == 1
    assert hostile not in text
    assert "&lt;script&gt;alert" in text
    assert "prefers-color-scheme:dark" in text
    ids = re.findall(r'<svg[^>]*>|id="([^"]+)"', text)
    assert len(ids := [name for name in ids if name]) == len(set(ids))
    stems = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert {
        "error.png",
        "error.svg",
        "pareto.png",
        "pareto.svg",
        "loss.png",
        "loss.svg",
        "models.md",
        "models.csv",
        "models.tex",
    } <= stems


def test_equal_records_give_equal_files(tmp_path):
    some = records(("default",))[:8]
    first = write_report(tmp_path / "a", some, title="t", config={}).read_bytes()
    assert first == write_report(tmp_path / "b", some, title="t", config={}).read_bytes()


@pytest.mark.parametrize("count", [0, 1, 5, 10])
def test_a_half_finished_run_has_a_report(tmp_path, count):
    text = write_report(tmp_path, records()[:count], title="t", config={}).read_text()
    assert _Page(text).open == []
    assert ("Nothing is measured yet" in text) == (count == 0)


def test_a_finished_run_leaves_nothing_of_its_half_finished_report(tmp_path):
    """Three models have a table each, nine have one together; and no loss is left of a run without steps."""
    steps = [{"model": "a", "step": step, "steps": 9, "loss": 1.0, "bits_per_byte": 2.0} for step in (1, 9)]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "notes.txt").write_text("mine")
    write_report(tmp_path, records(("a", "b", "c")), title="t", config={}, metrics=steps)
    half = {path.name for part in ("tables", "plots") for path in (tmp_path / part).iterdir()}
    assert {"schemes_a.md", "schemes_c.tex", "models.csv", "loss.png", "loss.svg", "error.png"} <= half
    whole = records([f"m{number}" for number in range(9)])
    write_report(
        tmp_path,
        whole,
        title="t",
        config={},
        sweep={"cells": 1, "seconds": 30, "cells_per_minute": 2, "compile_seconds": 4, "jobs": 2},
    )
    left = {path.name for part in ("tables", "plots") for path in (tmp_path / part).iterdir()}
    assert left - half == {"cells.md", "cells.csv", "cells.tex"}
    assert half - left == {name for name in half if name.startswith(("schemes", "models", "loss"))}
    assert "notes.txt" in left
    assert (
        "1 cell in 30 s with 2 processes (4 s of it compiling), 2 a minute</p>"
        in (tmp_path / "report.html").read_text()
    )


@pytest.mark.parametrize("draw", [plots.equivalence_plot, front.pareto_plot])
def test_plot_labels_cover_neither_each_other_nor_a_mark(draw):
    crowd = [
        Record(
            cell("default", f"{basis}:{codec}", "float32"),
            {"attention_error": 1e-3 * (1 - 0.01 * i), "bytes_per_token": 512 + i},
        )
        for i, (basis, codec) in enumerate(itertools.product(("kv", "k", "x1"), ("bf16", "int16", "int8")))
    ]
    figure = draw(crowd)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in axes.texts]
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)
    for line in axes.lines:
        for x, y in axes.transData.transform(line.get_xydata()):
            assert not any(box.contains(x, y) for box in boxes)


@pytest.mark.parametrize("panels", [1, 2, 3])
@pytest.mark.parametrize("name", ["penalty", "a model whose name alone is much wider than its only panel is"])
def test_the_legend_lies_inside_the_figure(panels, name):
    some = [r for r in records(("default", "orthogonal", name)) if r.cell["dtype"] in DTYPES[1 : 1 + panels]]
    figure = plots.equivalence_plot(some)
    assert len(figure.axes) == panels
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 6
    box, frame = legend.get_window_extent(canvas.get_renderer()), figure.bbox
    assert frame.x0 <= box.x0 and box.x1 <= frame.x1  # noqa: PT018
    assert frame.y0 <= box.y0 and box.y1 <= figure.axes[0].get_window_extent().y0  # noqa: PT018


@pytest.mark.parametrize("draw", [plots.equivalence_plot, front.pareto_plot])
def test_tick_labels_keep_apart_within_and_between_panels(draw):
    sizes = {"kv:float32": 3072, "kv:bf16": 1536, "k:int8": 432, "x1:int8": 396}
    some = [
        Record(
            cell(model, scheme, dtype),
            {"attention_error": 10 / size, "bits_per_byte_change": 1 / size, "bytes_per_token": size},
        )
        for model in ("default", "orthogonal", "penalty")
        for dtype in DTYPES[1:]
        for scheme, size in sizes.items()
    ]
    figure = draw(some)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes, texts = [], []
    for axes in figure.axes:
        low, high = axes.get_xlim()
        for tick in axes.xaxis.get_major_ticks():
            if low <= tick.get_loc() <= high and tick.label1.get_visible():
                boxes.append(tick.label1.get_window_extent(canvas.get_renderer()))
                texts.append(tick.label1.get_text())
    assert len(boxes) >= 9
    assert {"512", "1,024", "2,048"} <= set(texts)
    boxes.sort(key=lambda box: box.x0)
    assert all(b.x0 - a.x1 >= 9 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("top", [0.0, 2.4e-5, 9.9e-5, 3e-2])
def test_the_axis_of_changes_has_round_ticks_from_zero(top):
    some = [
        Record(cell(model, scheme, "float32"), {"bytes_per_token": size, "bits_per_byte_change": change})
        for model in ("default", "orthogonal")
        for scheme, size, change in (("k:bf16", 64, top), ("kv:bf16", 128, -top / 10))
    ]
    figure = front.pareto_plot(some)
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low < 0 <= top < high
    shown = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    ticks = {tick: text.get_text() for tick, text in shown if low <= tick <= high}
    assert len(ticks) >= 3
    assert min(ticks) == 0
    if top < 1e-4:
        assert all(re.fullmatch(r"0|\d(\.5)?e-\d", text) for text in ticks.values())


def test_facts_name_the_device_and_the_date():
    source = {
        "device": "Some CPU",
        "cpus": 2,
        "date": "2026-01-01T00:00:00+00:00",
        "versions": {"jax": "0.10.2"},
    }
    text = facts([Record({"model": "default"}, provenance=source)])
    assert "Some CPU" in text
    assert "2026-01-01" in text
    assert "jax 0.10.2" in text


def test_readme_tables_are_written_from_records(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(record.to_json() + "\n" for record in records()))
    text = "before\n<!-- table:some/models -->\nold\n<!-- /table -->\nafter\n"
    fresh = readme.render(text, tmp_path)
    assert "| default | 10 | 2.0000 |" in fresh
    assert "old" not in fresh
    assert fresh.startswith("before\n")
    assert readme.render(fresh, tmp_path) == fresh
    with pytest.raises(ValueError, match="did you mean 'models'"):
        readme.render(text.replace("models", "model"), tmp_path)
    with pytest.raises(ValueError, match="no records"):
        readme.render(text.replace("some", "none"), tmp_path)
