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
