"""The experiment that makes the paper's tables: records, tables, and what it refuses."""

import pytest

from experiments import paper as experiment
from slimjax import records
from slimjax.config import ConfigError
from slimjax.report import report_tables, tables


def config(**fields: object) -> experiment.Paper:
    return experiment.resolve(lambda section: experiment.PaperConfig(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("table", ["1", "2", "3", "4-5", "6", "7", "8-9", "10"])
def test_each_table_makes_records_and_tables(table):
    chosen = {
        "2": ("CodeLlama-7B",), "3": ("CodeLlama-7B",), "6": ("Whisper-tiny",), "7": ("Whisper-tiny",),
        "8-9": ("MPT-30B",),
    }  # fmt: skip
    run = config(
        table=table, models=chosen.get(table, ()), schemes=("k:int16+16", "x:bf16"),
        encoder_schemes=("e:bf16,k:int16",), chips=("H200", "A18"), context=448,
    )  # fmt: skip
    units = experiment.units(run)
    found = []
    for unit in units:
        measure = experiment.prepare(unit, run, None)  # type: ignore[arg-type]
        assert experiment.forecast(unit, run).bytes == 0
        for cell in unit.cells:
            try:
                found.append(records.Record(cell, measure(cell)))
            except NotImplementedError as error:
                found.append(records.Record(cell, status="refused", reason=str(error)))
    made = report_tables(found)
    slug = "table_" + table.replace("-", "_")
    assert list(made) == [slug, f"{slug}_schemes"]
    assert len(made[slug].rows) == len(units[0].cells)
    assert len(made[f"{slug}_schemes"].rows) == sum(len(unit.cells) for unit in units[1:]) / 3
    for each in made.values():
        assert tables.markdown(each).startswith("| ")
        assert tables.csv(each).count("\n") == len(each.rows) + 1
        assert tables.latex(each).startswith(r"\begin{tabular}")
    titles = [column.title for column in made[f"{slug}_schemes"].columns]
    assert titles[-2:] == ["speed-up, H200", "speed-up, A18"]
    gained = [row[-2] for row in made[f"{slug}_schemes"].rows]
    assert any(isinstance(gain, float) for gain in gained)


def test_the_experiment_refuses_names_it_does_not_know():
    for fields, problem in (
        ({"table": "1", "models": ("Lama",)}, "unknown model"),
        ({"table": "1", "chips": ("H20",)}, "did you mean 'H200'"),
        ({"table": "1", "schemes": ("k:in16",)}, "did you mean 'int16'"),
        ({"table": "2"}, "names no models"),
        ({"table": "11"}, "expected one of"),
        ({"batches": ()}, "at least one"),
        ({"chips": ("H200", "H200")}, "distinct"),
    ):
        with pytest.raises(ConfigError, match=problem):
            config(**fields)
