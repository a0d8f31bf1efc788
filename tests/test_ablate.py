"""The root `ablate`: a grid spelt out, its mistakes found before anything runs, every model trained once."""

import json

import pytest
import small_runs

import slimjax.train
from experiments import run
from slimjax import checkpoint, evaluate
from slimjax.records import read, read_lines

GRID = "Ablate.axes = (('Model.heads', (2, 4)), ('Train.seed', (0, 1)))\n"


def planned(folder, *parts):
    return run.load(small_runs.write(folder, "ablate", *parts, small_runs.MODEL, small_runs.MEASURED))


def test_every_combination_is_a_model_and_seeds_are_samples_of_one(tmp_path):
    points = planned(tmp_path, GRID).config.points
    assert [point.label for point in points] == ["heads=2", "heads=2", "heads=4", "heads=4"]
    names = [point.variant.name for point in points]
    assert names == ["heads=2,seed=0", "heads=2,seed=1", "heads=4,seed=0", "heads=4,seed=1"]
    assert [(p.variant.model.heads, p.variant.train.seed) for p in points] == [(2, 0), (2, 1), (4, 0), (4, 1)]


def test_values_that_only_fit_together_are_no_mistake(tmp_path):
    grid = (
        "Ablate.axes = (('Model.heads', (3,)), ('Model.head_dim', (None, 6)), ('Train.weight_decay', (0,)))\n"
    )
    points = planned(tmp_path, grid.replace("None, 6", "6, 8")).config.points
    assert [point.label for point in points] == [
        "heads=3, head_dim=6, weight_decay=0",
        "heads=3, head_dim=8, weight_decay=0",
    ]
    assert points[0].variant.name == "heads=3,head_dim=6,weight_decay=0"
    with pytest.raises(
        run.Fault, match=r"ablate.gin:2: Ablate: axes: with .*head_dim = None.* not a multiple"
    ):
        planned(tmp_path, grid)


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        ("(('Model.headz', (2,)),)", "unknown field Model.headz; did you mean 'heads'?"),
        ("(('Modle.heads', (2,)),)", "expected a field of Model, Train, Data"),
        ("(('heads', (2,)),)", "expected a field of Model, Train, Data"),
        ("(('Equivalence.schemes', (('kv:bf16',),)),)", "its schemes and dtypes are axes as they are"),
        ("(('Model.heads', (2, '4')),)", "with Model.heads = '4': heads = '4': expected int, got str"),
        ("(('Train.learning_rate', (1e-3, -1.0)),)", "with Train.learning_rate = -1.0"),
        ("(('Model.heads', (2, 2)),)", "expected distinct values"),
        ("(('Train.weight_decay', (0, 0.0)),)", "expected distinct values"),
        ("(('Model.kv_heads', (None, 4)),)", "kv_heads=None and kv_heads=4 are the same model"),
        ("(('Model.heads', ()),)", "at least one value"),
        ("(('Model.heads', 2),)", "expected ('Section.field', (value, ...))"),
        ("('Model.heads', (2,))", "expected"),
        ("(('Model.heads', (2,)), ('Model.heads', (4,)))", "expected distinct fields"),
        ("(('Model.width', (8, 16)),)", "Model.width is bound to one value, too"),
    ],
)
def test_a_mistake_in_the_grid_is_one_line_at_its_place(tmp_path, axes, problem):
    with pytest.raises(run.Fault) as caught:
        planned(tmp_path, f"Ablate.axes = {axes}\n")
    assert str(caught.value).startswith(f"{tmp_path / 'ablate.gin'}:2: Ablate: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_models_are_trained_once_and_the_report_has_mean_and_spread(tmp_path, monkeypatch, capsys):
    grid = "Ablate.axes = (('Model.heads', (2,)), ('Train.seed', (0, 1)))\n"
    config = small_runs.write(tmp_path, "ablate", grid, small_runs.MODEL, small_runs.MEASURED)
    out = tmp_path / "out"
    measure, count = evaluate.measure, []

    def stopping(reference, scheme, dtype):
        count.append(scheme)
        if len(count) == 3:
            raise KeyboardInterrupt
        return measure(reference, scheme, dtype)

    monkeypatch.setattr(evaluate, "measure", stopping)
    assert small_runs.launched(config, out) == 130
    assert small_runs.launched(config, out) == 0
    records = read(out / "records.jsonl")
    assert len(records) == 2 * 3 * 2
    assert {record.status for record in records} == {"ok", "refused"}
    for name in ("heads=2,seed=0", "heads=2,seed=1"):
        assert checkpoint.latest_step(out / "models" / name) == 6
        assert (out / "models" / name / "model.json").exists()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in steps if "event" not in line]) == 2 * 6  # no step is taken twice
    table = (out / "tables" / "models.md").read_text()
    assert "| heads=2 | 2 |" in table
    assert "±" in table


TIMES = {"tokens_per_second", "seconds_left"}


@pytest.mark.slow
def test_any_number_of_processes_trains_and_measures_the_same(tmp_path):
    grid = "Ablate.axes = (('Train.learning_rate', (1e-3, 3e-3)),)\n"
    measured = small_runs.MEASURED.replace("'kv:bf16', 'k:int16', 'x:bf16'", "'k:int16',")
    config = small_runs.write(tmp_path, "ablate", grid, small_runs.MODEL, small_runs.HEADS, measured)
    found = {}
    for jobs in (0, 2):
        out = tmp_path / f"out{jobs}"
        assert small_runs.launched(config, out, "--jobs", jobs) == 0
        steps = [
            {name: value for name, value in line.items() if name not in TIMES}
            for line in read_lines(out / "metrics.jsonl")
        ]
        steps.sort(key=lambda line: (line["model"], line["step"]))  # two at work write in turns
        rows = [(dict(r.cell), dict(r.metrics), r.status, r.reason) for r in read(out / "records.jsonl")]
        found[jobs] = rows, steps
    rows, steps = found[0]
    assert len(steps) == 2 * 6
    assert len({line["model"] for line in steps}) == 2
    assert [status for *_, status, _ in rows] == ["ok"] * 4  # two models, an identity and an error each
    assert found[2] == found[0]


def test_models_of_one_shape_are_trained_by_one_program(tmp_path):
    slimjax.train._compiled_step.cache_clear()
    grid = "Ablate.axes = (('Train.learning_rate', (1e-3, 3e-3)),)\n"
    measured = small_runs.MEASURED.replace("'kv:bf16', 'k:int16', 'x:bf16'", "'kv:bf16',")
    config = small_runs.write(tmp_path, "ablate", grid, small_runs.MODEL, small_runs.HEADS, measured)
    assert small_runs.launched(config, tmp_path / "out") == 0
    first, second = run.load(config).config.points
    program = slimjax.train.compiled_step(first.variant.model, first.variant.train)
    assert program is slimjax.train.compiled_step(second.variant.model, second.variant.train)
    assert (slimjax.train._compiled_step.cache_info().misses, program._cache_size()) == (1, 1)
    losses = {}
    for line in read_lines(tmp_path / "out" / "metrics.jsonl"):
        losses.setdefault(line["model"], []).append(line["loss"])
    one, other = losses.values()
    assert one[:2] == other[:2]  # the first step has no learning rate
    assert all(a != b for a, b in zip(one[2:], other[2:], strict=True))
