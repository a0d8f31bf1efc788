"""Reports of several runs: seeds together, equal cells refused, what is missing shown, two runs side by side."""

import csv
import dataclasses
import io
import json
import math
import re

import pytest

from experiments import readme, report as command
from slimjax.records import Record
from slimjax.report import compare, findings, front, generic, report_tables, runs, samples, tables
from slimjax.report.equivalence import equivalence_table
from slimjax.report.html import html

PLACES = [(scheme, context) for context in (128, 1024) for scheme in ("kv:bf16", "k:int16")]


def bench(seed: int = 0, shift: float = 0.0, **extra) -> list[Record]:
    """Records of an experiment that reports know nothing about."""
    return [
        Record(
            {
                "experiment": "decode_bench",
                "scheme": scheme,
                "basis": scheme[0],
                "context": context,
                "seed": seed,
            },
            {"milliseconds": context / 100 + shift, "bytes_per_token": 8},
            provenance={"seed": seed, "versions": {"jax": "0.10.2"}, "git": "abc", "device": "Some CPU"}
            | extra,
        )
        for scheme, context in PLACES
    ]


def schemes(seed: int = 0, error: float = 1e-3, **coordinates) -> list[Record]:
    return [
        Record(
            {
                "model": "base",
                "scheme": scheme,
                "basis": "kv",
                "dtype": "float32",
                "seed": seed,
                **coordinates,
            },
            {"attention_error": error * factor, "bytes_per_token": size, "compression": 1024 / size},
        )
        for scheme, size, factor in (("kv:bf16", 1024, 1.0), ("kv:int8", 520, 4.0))
    ]


def save(path, records, **files):
    path.mkdir()
    (path / "records.jsonl").write_text("".join(record.to_json() + "\n" for record in records))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


# Seeds ---------------------------------------------------------------------------------------------------


def test_the_spread_is_the_sample_standard_deviation():
    spread = samples.Spread.of([1.0, 2.0, 4.0])
    assert spread.mean == pytest.approx(7 / 3)
    assert spread.deviation == pytest.approx(math.sqrt(7 / 3))
    assert samples.Spread.of([3, 3]) == samples.Spread(3, 0.0, 2)


def test_seeds_are_one_row_with_mean_spread_and_n():
    table = equivalence_table([*schemes(0, 1e-3), *schemes(1, 3e-3)], "base")
    row = dict(zip([column.title for column in table.columns], table.written()[0], strict=True))
    assert len(table.rows) == 2
    assert row["seeds (n)"] == "2"
    assert row["attention error, float32"] == "2.0e-3 ± 1.4e-3"
    assert row["cache (bytes per token)"] == "1,024"  # equal: no spread
    assert "± is the standard deviation" in table.note
    assert r"2.0e-3 $\pm$ 1.4e-3" in tables.latex(table)
    first, *rows = csv.DictReader(io.StringIO(tables.csv(table)))
    assert len(rows) == 1
    assert float(first["attention error, float32"]) == 2e-3
    assert float(first["attention error, float32: standard deviation"]) == pytest.approx(math.sqrt(2e-6))
    assert first["attention error, float32: n"] == "2"
    assert first["cache (bytes per token)"] == "1024"


def test_a_number_of_fewer_seeds_says_so():
    table = equivalence_table([*schemes(0), *schemes(1), *schemes(2)[:1]], "base")
    counts = [row[1] for row in table.rows]
    assert counts == [3, 2]
    partial = [*schemes(0), *schemes(1)]
    partial[3] = dataclasses.replace(partial[3], metrics={"bytes_per_token": 520})
    written = equivalence_table(partial, "base").written()[1]
    assert "4.0e-3 (n = 1)" in written
    assert "520" in written


def test_one_seed_has_neither_spread_nor_column():
    table = equivalence_table(schemes(), "base")
    assert all("seeds" not in column.title for column in table.columns)
    assert "±" not in table.note
    assert "n = 1" not in tables.markdown(table)


def test_findings_name_the_seeds():
    assert "Numbers are means over the seeds 0 and 1." in findings([*bench(0), *bench(1)])
    assert not any("seeds" in sentence for sentence in findings(bench(0)))


def test_equal_cells_of_one_seed_are_refused_naming_both_runs():
    with pytest.raises(ValueError, match=r"one and two both hold cell .*kv:bf16.* with seed 0: leave one"):
        samples.join([("one", bench(0)), ("two", bench(0, shift=1.0))])
    assert len(samples.join([("one", bench(0)), ("two", bench(1))])) == 8


def test_seeds_of_provenance_count_where_cells_have_none():
    def run(seed):
        return [Record({"model": "a"}, {"accuracy": 0.5}, provenance={"seed": seed})]

    assert len(samples.join([("one", run(0)), ("two", run(1))])) == 2
    with pytest.raises(ValueError, match="with seed 1"):
        samples.join([("one", run(1)), ("two", run(1))])


def test_models_of_one_name_are_not_mixed():
    made = report_tables([*schemes(0, position="rope"), *schemes(0, 2e-3, position="alibi")])
    assert list(made) == ["schemes_base_position-rope", "schemes_base_position-alibi", "models"]
    errors = [made[name].written()[0][2] for name in list(made)[:2]]
    assert errors == ["1.0e-3", "2.0e-3"]
    assert [row[0] for row in made["models"].rows] == ["base, position rope", "base, position alibi"]


# Any experiment ------------------------------------------------------------------------------------------


def test_unknown_experiments_get_a_table_of_what_varies():
    table = report_tables(bench())["cells"]
    assert [column.title for column in table.columns] == [
        "scheme", "context", "cache (bytes per token)", "time of one call (ms)",
    ]  # fmt: skip
    assert [row[:2] for row in table.rows] == PLACES
    assert table.written()[2][-1] == "10.24"
    assert table.note == "All rows: seed 0."


def test_constants_are_said_once_and_refusals_fill_their_row():
    records = [dataclasses.replace(record, cell={**record.cell, "batch": 4}) for record in bench()]
    records[1] = Record(records[1].cell, status="refused", reason="no such peer")
    table = report_tables(records)["cells"]
    assert table.note == "All rows: seed 0, batch 4."
    assert "* k:int16, context 128: refused: no such peer" in tables.markdown(table)
    line = tables.latex(table).splitlines()[5]
    assert line == r"k:int16 & 128 & \multicolumn{2}{p{0.7\linewidth}}{refused: no such peer} \\"


def test_a_remark_does_not_hide_numbers():
    records = [
        *schemes(),
        Record({**schemes()[0].cell, "dtype": "float16"}, status="failed", reason="too large"),
    ]
    text = tables.latex(equivalence_table(records, "base"))
    assert "1.0e-3" in text
    assert "failed: too large" in text
    assert text.index("1.0e-3") < text.index("failed: too large")


def test_the_page_shows_remarks_beside_numbers_and_sorts_by_means():
    failed = Record({**bench(2)[1].cell}, status="failed", reason="too large")
    page = html(
        title="t", facts="", findings=[], config="", records=[],
        parts=[report_tables([*bench(0), *bench(1, 1.0), *bench(2)[:1], failed])["cells"]],
    )  # fmt: skip
    assert re.search(r'data-value="1\.78\d*">1\.78 ± 0\.7071 \(n = 2\)<', page)
    assert "k:int16, context 128: failed: too large</p>" in page
    assert "colspan" not in page


def test_a_table_without_any_number_has_room_for_remarks():
    table = report_tables([Record(bench()[0].cell, status="failed", reason="too large")])["cells"]
    assert table.written() == [["kv:bf16", tables.MISSING]]
    assert r"kv:bf16 & \multicolumn{1}{p{0.7\linewidth}}{failed: too large}" in tables.latex(table)


def test_samples_are_given_by_their_quartiles():
    record = Record({"model": "a"}, {"milliseconds": 3, "milliseconds_samples": [5, 1, 2, 3, 4]})
    table = generic.cells_table([record], "t")
    assert table.columns[-1].title == "time of one call (ms): quartiles (n)"
    assert table.written() == [["a", "3", "2 – 4 (5)"]]


def test_generic_findings_give_the_range_and_where():
    text = findings(bench())
    assert "Time of one call (ms): from 1.28 (kv:bf16, context 128) to 10.24 (kv:bf16, context 1024)." in text
    assert "Cache (bytes per token): 8 in every cell." in text
    assert findings(bench()[:1]) == ["Cache (bytes per token): 8.", "Time of one call (ms): 1.28."]


def test_several_experiments_have_tables_of_their_own():
    made = report_tables(
        [*bench(), *schemes(), Record({"experiment": "train", "model": "a"}, {"accuracy": 1.0})]
    )
    assert list(made) == ["cells_decode_bench", "schemes_base_", "models_", "cells_train"]


def test_readme_tables_of_any_experiment(tmp_path):
    (tmp_path / "bench.jsonl").write_text("".join(record.to_json() + "\n" for record in bench()))
    fresh = readme.render("<!-- table:bench/cells -->\n<!-- /table -->\n", tmp_path)
    assert "| k:int16 | 1024 | 8 | 10.24 |" in fresh
    assert "4 records" in fresh
    assert "Time of one call" in readme.render("<!-- table:bench/findings -->\n<!-- /table -->\n", tmp_path)


# What is missing -----------------------------------------------------------------------------------------


def test_planned_cells_without_a_record_are_shown_as_missing():
    whole = samples.with_planned(bench()[2:3], [record.cell for record in bench()])
    assert [samples.measured(record) for record in whole] == [False, False, True, False]
    table = report_tables(whole)["cells"]
    assert [table.remark(row) for row in range(4)] == [tables.UNMEASURED] * 2 + ["", tables.UNMEASURED]
    assert table.written()[0] == ["kv:bf16", "128", tables.MISSING, tables.MISSING]
    assert "The run is not finished: 1 of 4 cells are done." in findings(whole)
    rows = equivalence_table(samples.with_planned(schemes()[:1], [r.cell for r in schemes()]), "base")
    assert rows.remark(1) == tables.UNMEASURED


def test_a_plan_with_equal_cells_is_counted_once():
    cells = [record.cell for record in bench()]
    assert len(samples.with_planned(bench(), cells * 2)) == 4


# Pareto --------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats():
    def point(size, cost, name):
        return (size, samples.Spread(cost, 0.0, 1), name, "kv")

    points = [point(4, 1, "a"), point(2, 2, "b"), point(3, 2, "c"), point(2, 3, "d"), point(1, 9, "e")]
    assert [name for _, _, name, _ in front.front(points)] == ["e", "b", "a"]
    twins = [point(1, 1, "a"), point(1, 1, "b")]
    assert len(front.front(twins)) == 2


def test_a_change_counts_by_its_size():
    records = [
        Record({"model": "m", "scheme": "k:int8"}, {"bytes_per_token": 1, "bits_per_byte_change": -0.5}),
        Record({"model": "m", "scheme": "k:int16"}, {"bytes_per_token": 2, "bits_per_byte_change": 0.1}),
    ]
    costs = [cost.mean for _, cost, _, _ in front.points(records, "bits_per_byte_change")]
    assert costs == [0.5, 0.1]
    assert front.pareto_plot(bench()) is None


# Two runs ------------------------------------------------------------------------------------------------


def compared(a, b, **files):
    sides = (runs.Run("a", a, config=files.get("left", {})), runs.Run("b", b, config=files.get("right", {})))
    return compare.comparison_tables(*sides), compare.comparison_findings(*sides)


def test_a_comparison_gives_absolute_and_relative_differences():
    made, said = compared(bench(), bench(shift=0.64))
    rows = made["compare_milliseconds"].rows
    assert rows[0] == ("kv:bf16", 128, 1.28, 1.92, pytest.approx(0.64), pytest.approx(0.5))
    assert made["compare_milliseconds"].written()[0][-2:] == ["+0.64", "+50"]
    assert "compare_bytes_per_token" not in made  # equal
    assert [row[1:3] for row in made["summary"].rows] == [(4, 0), (4, 4)]
    assert "Equal to the last bit in both: cache (bytes per token)." in said


def test_equal_runs_compare_equal():
    made, said = compared(bench(), bench())
    assert list(made) == ["summary"]
    assert "Every number that both runs have is equal to the last bit." in said
    assert "Their provenance and settings, as far as they are known, are the same." in said


def test_seeds_are_matched_by_their_means():
    made, _ = compared([*bench(0), *bench(1, 1.0)], bench(2, 2.0))
    row = made["compare_milliseconds"].written()[0]
    assert row[2:] == ["1.78 ± 0.7071", "3.28", "+1.5", "+84.27"]


def test_a_comparison_names_cells_of_one_run_and_changed_outcomes():
    failed = Record(bench()[0].cell, status="failed", reason="out of memory")
    made, said = compared(bench()[:3], [failed, *bench()[1:2], *bench()[3:]])
    assert made["cells"].rows == (
        ("kv:bf16", 128, "ok", "failed: out of memory"),
        ("kv:bf16", 1024, "ok", "absent"),
        ("k:int16", 1024, "absent", "ok"),
    )
    assert said[0] == "2 cells are in both runs; 1 are in A alone, 1 in B alone."
    assert "1 cells worked out in A alone; in the other run they have no numbers." in said


def test_a_comparison_shows_provenance_and_settings_that_differ():
    settings = {"variants": [{"name": "base", "train": {"steps": 10, "seed": 0}}], "kept": [1, 2]}
    other = json.loads(json.dumps(settings).replace("10", "20"))
    newer = {"versions": {"jax": "0.11.0"}, "git": "def"}
    made, said = compared(bench(), bench(**newer), left=settings, right=other)
    assert {row[0]: row[1:] for row in made["provenance"].rows} == {
        "versions.jax": ("0.10.2", "0.11.0"),
        "git": ("abc", "def"),
    }
    assert made["config"].rows == (("variants.base.train.steps", "10", "20"),)
    assert said[-1] == "The runs differ in versions.jax, git, variants.base.train.steps."


# The command ---------------------------------------------------------------------------------------------


def test_the_command_rebuilds_a_report_from_records_alone(tmp_path, capsys):
    run, out = save(tmp_path / "run", bench()), tmp_path / "out"
    assert command.main([str(run / "records.jsonl"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    first = {path.name: path.read_bytes() for path in out.rglob("*.*")}
    assert {"report.html", "cells.md", "cells.csv", "cells.tex"} <= first.keys()
    assert command.main([str(run), "--out", str(out)]) == 0
    assert first == {path.name: path.read_bytes() for path in out.rglob("*.*")}


def test_the_command_joins_runs_and_warns_of_what_else_differs(tmp_path):
    one = save(tmp_path / "one", bench(0), resolved={"config": {"train": {"seed": 0, "rate": 1}}})
    two = save(
        tmp_path / "two", bench(1, device="Other"), resolved={"config": {"train": {"seed": 1, "rate": 2}}}
    )
    assert command.main([str(one), str(two), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "two differ in more than the seed: device (Some CPU / Other); train.rate (1 / 2)." in text
    assert "seeds (n)" in text


def test_the_command_reads_a_run_that_is_still_at_work(tmp_path):
    run = save(tmp_path / "run", bench()[:1])
    with (run / "records.jsonl").open("a") as file:
        file.write('{"cell": {"exper')  # torn
    (run / "cells.jsonl").write_text("".join(json.dumps(dict(record.cell)) + "\n" for record in bench()))
    assert command.main([str(run), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 4 cells" in text
    assert text.count(tables.UNMEASURED) == 3


def test_the_command_compares(tmp_path):
    one, two = save(tmp_path / "one", bench()), save(tmp_path / "two", bench(shift=0.64))
    assert command.main(["--compare", str(one), str(two), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tables" / "compare_milliseconds.csv").exists()
    assert "+50" in (tmp_path / "out" / "report.html").read_text()
    # A report in its place leaves no table of the comparison.
    assert command.main([str(one), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "tables").iterdir()) == [
        "cells.csv", "cells.md", "cells.tex",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{run}", "{run}"], "both hold cell"),
        (["{run}/none"], "no such file or directory"),
        (["{empty}"], "not a run directory, it has no records.jsonl"),
        (["{bad}"], "unknown metric 'speed'"),
        (["{blank}"], "no records"),
    ],
)
def test_every_mistake_is_one_line(tmp_path, capsys, arguments, problem):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "run", bench())
    save(tmp_path / "blank", [])
    (tmp_path / "bad").write_text('{"cell": {"model": "a"}, "metrics": {"speed": 1}}\n')
    names = {name: tmp_path / name for name in ("run", "empty", "bad", "blank")}
    paths = [text.format(**names) for text in arguments]
    assert command.main([*paths, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert problem in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    run = save(tmp_path / "run", bench())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    assert command.main([str(run), "--out", str(tmp_path / "mine")]) == 2
    assert "holds 'notes.md' but no report" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        command.main([str(run), "--compare", str(run), str(run), "--out", str(tmp_path / "out")])
