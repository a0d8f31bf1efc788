"""The root `slim_rows`: its cells, what they measure, and that what is refused is known before."""

import dataclasses
from pathlib import Path

import pytest

from experiments import run, slim_rows
from experiments.slim_rows import LAYOUTS, ROWS
from slimjax.record_names import METRICS

HERE = Path(__file__).parent.parent / "configs" / "slim_rows.gin"


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(run.load(HERE, []).config, tokens=8)


def cell_of(config, name, **wanted):
    """The first cell of a row with these coordinates, and what measures it."""
    (unit,) = [unit for unit in slim_rows.units(config) if unit.data == name]
    found = [cell for cell in unit.cells if all(cell[key] == value for key, value in wanted.items())]
    return found[0], slim_rows.prepare(unit, config, None)  # type: ignore[arg-type]


def test_every_row_is_there_with_an_exact_cell(config):
    units = slim_rows.units(config)
    assert [unit.name.partition(" ")[0] for unit in units] == [f"S{n}" for n in range(1, 14)]
    for unit in units:
        assert {cell["dtype"] for cell in unit.cells} == {"float64", "float32", "bfloat16"}
        refused = slim_rows.forecast(unit, config).refused
        assert len(refused) < len(unit.cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("S1 K-cache", {"position": "kerple", "option": 1}),
        ("S3 X-cache, E > D", {"position": "t5"}),
        ("S6 encoder-decoder, E", {"kv_heads": 2}),
        ("S7 encoder-decoder, first layer's K", {}),
        ("S9 RoPE, rotated keys", {"position": "interleaved"}),
        ("S10 biases", {"basis": "k", "position": "rope"}),
        ("S11 GQA, D/2 < E < D", {"extra": 16}),
        ("S12 softmax sparsity", {"basis": "k"}),
    ],
)
def test_in_float64_a_row_is_attention_without_a_cache(config, name, wanted):
    cell, measure = cell_of(config, name, dtype="float64", **wanted)
    found = measure(cell)
    assert found["identity_error"] < 1e-11
    assert found.keys() <= METRICS.keys()
    if "sparsity" in name:
        assert 0 <= found["skipped_by_all"] <= found["skipped_by_group"] <= found["skipped_by_head"] < 1


def test_a_wrong_value_is_seen(config, monkeypatch):
    """Values that are not the layer's own: the identity must not hold."""
    cell, measure = cell_of(config, "S1 K-cache", dtype="float64", position="none")
    convert = slim_rows.convert

    def wrong(projections, spec, **options):
        return convert(dataclasses.replace(projections, wv=projections.wv[:, ::-1]), spec, **options)

    monkeypatch.setattr(slim_rows, "convert", wrong)
    assert measure(cell)["identity_error"] > 0.1


def test_what_is_refused_is_refused_by_the_layer_too(config):
    for unit in slim_rows.units(config):
        measure = slim_rows.prepare(unit, config, None)  # type: ignore[arg-type]
        for index, reason in list(slim_rows.forecast(unit, config).refused.items())[:2]:
            with pytest.raises(NotImplementedError) as refusal:
                measure(unit.cells[index])
            assert str(refusal.value) == reason


def test_layouts_are_what_the_rows_say():
    sizes = {name: (kv_heads * size, width) for name, (_, kv_heads, size, width) in LAYOUTS.items()}
    assert sizes["square"][0] == sizes["square"][1]
    assert sizes["wide"][0] > sizes["wide"][1]
    assert sizes["gqa"][1] / 2 < sizes["gqa"][0] < sizes["gqa"][1]
    assert sizes["narrow"][0] * 2 == sizes["narrow"][1]
    assert {layout for row in ROWS.values() for layout in row.layouts} == set(LAYOUTS)
