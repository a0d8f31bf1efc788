"""The root `slim_whisper` on a tiny Whisper, what a thresholded softmax spares, and the tables of both."""

import numpy as np
import pytest
import small_runs
import tiny_cli

from experiments import run
from experiments.launch import checked_units
from experiments.slim_sparse import attention_error, skipped
from slimjax.attention.projections import Projections
from slimjax.kernels.spec import DecodeSpec
from slimjax.records import Record, read
from slimjax.report import report_tables
from slimjax.scheme import parse_scheme
from slimjax.solve import convert

HEADS, KV_HEADS, SIZE, WIDTH = 4, 2, 4, 8


def layer(causal, scheme):
    """A layer with random weights, its keys narrow enough that weights differ a lot."""
    rng = np.random.default_rng(3)

    def drawn(*shape):
        return np.asarray(rng.standard_normal(shape), np.float32)

    trained = Projections(
        wq=2 * drawn(WIDTH, HEADS, SIZE),
        wk=drawn(WIDTH, KV_HEADS, SIZE),
        wv=drawn(WIDTH, KV_HEADS, SIZE),
        wo=drawn(HEADS, SIZE, WIDTH),
        bq=drawn(HEADS, SIZE),
    )
    spec = DecodeSpec(
        scheme=parse_scheme(scheme), heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE, width=WIDTH, causal=causal
    )
    clips = [np.asarray(rng.standard_normal((1, tokens, WIDTH)), np.float32) for tokens in (5, 9)]
    longer = [np.asarray(rng.standard_normal((1, slots, WIDTH)), np.float32) for slots in (11, 6)]
    return trained, spec, [(x, x if causal else memory) for x, memory in zip(clips, longer, strict=True)]


def counted(trained, inputs, threshold, causal):
    """Pair by pair: of the pairs that a query sees, those that a head, a group and all heads drop."""
    head = group = row = pairs = 0
    for x, memory in inputs:
        for t, token in enumerate(x[0].astype(np.float64)):
            seen = memory[0][: t + 1] if causal else memory[0]
            dropped = np.zeros((HEADS, len(seen)), bool)
            for n in range(HEADS):
                q = token @ np.asarray(trained.wq)[:, n] + np.asarray(trained.bq)[n]
                k = seen @ np.asarray(trained.wk)[:, n // (HEADS // KV_HEADS)]
                weight = np.exp(k @ q / np.sqrt(SIZE))
                dropped[n] = weight / weight.sum() < threshold
            groups = dropped.reshape(KV_HEADS, -1, len(seen)).all(axis=1)
            head, group, row = (
                head + dropped.mean(0).sum(),
                group + groups.mean(0).sum(),
                row + dropped.all(0).sum(),
            )
            pairs += len(seen)
    return head / pairs, group / pairs, row / pairs


@pytest.mark.parametrize("causal", [True, False])
def test_skip_rates_are_those_counted_pair_by_pair(causal):
    trained, spec, inputs = layer(causal, "kv:float32@sparse(0.05)")
    found = skipped(trained, spec, inputs)
    assert list(found) == ["skipped_by_head", "skipped_by_group", "skipped_by_all"]
    wanted = counted(trained, inputs, 0.05, causal)
    np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-6)
    assert 0 < wanted[2] < wanted[1] < wanted[0] < 1


@pytest.mark.parametrize("causal", [True, False])
def test_a_threshold_costs_something_and_an_exact_cache_nothing(causal):
    errors = []
    for scheme in (
        "kv:float32",
        "kv:float32@sparse(0)",
        "kv:float32@sparse(0.05)",
        "k1:int16",
        "k1:int16@sparse(0.05)",
    ):
        trained, spec, inputs = layer(causal, scheme)
        errors.append(attention_error(convert(trained, spec).layer, trained, inputs))
    plain, nothing, dropping, keys, both = errors
    assert max(plain, nothing) < 1e-6 < keys < dropping / 3 < 0.1
    assert both == pytest.approx(dropping, rel=0.2)


# The whole program ------------------------------------------------------------------------------------------

SCHEMES = ("kv:bf16",)
TRANSCRIPTS = ("kv:bf16", "e:bf16,k:bf16")
SPARSE = ("k:int16+2", "k:int16+2@sparse(0.05)")
SAID = "one two"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config, and the directory of its run."""
    folder = tmp_path_factory.mktemp("slim_whisper")
    tiny_cli.write_whisper(folder / "tiny")
    tiny_cli.write_speech(folder / "speech")
    lines = [f"<s> {SAID} </s> ({clip})\n" for clip in range(5)]
    (folder / "speech" / "transcription").write_text("".join(lines))
    config = small_runs.write(
        folder,
        "slim_whisper",
        f"SlimWhisper.model = {str(folder / 'tiny')!r}\nSlimWhisper.speech = {str(folder / 'speech')!r}\n",
        f"SlimWhisper.layer_schemes = {SCHEMES!r}\nSlimWhisper.product_scheme = 'k:int16+2'\n",
        "SlimWhisper.products = ('bf16 map',)\n",
        f"SlimWhisper.sparse_schemes = {SPARSE!r}\nSlimWhisper.schemes = {TRANSCRIPTS!r}\n",
    )
    assert small_runs.launched(config, folder / "out") == 0
    return config, folder / "out"


@pytest.mark.slow
def test_every_cell_is_measured(finished):
    config, out = finished
    records = read(out / "records.jsonl")
    assert [dict(record.cell) for record in records] == [
        cell for unit in checked_units(run.load(config, [])) for cell in unit.cells
    ]
    assert {record.status for record in records} == {"ok"}
    sparse = [record for record in records if record.cell["experiment"] == "whisper_sparse"]
    assert [record.cell["scheme"] for record in sparse] == [*SPARSE] * len(tiny_cli.LAYERS)
    for record in sparse:
        assert record.metrics["attention_error"] > 0
        assert ("skipped_by_all" in record.metrics) == ("sparse" in str(record.cell["scheme"]))


@pytest.mark.slow
def test_the_encoders_output_is_counted_and_left_out(finished):
    """The paper's 8.7 is keys and values of both kinds of attention over the keys of self-attention alone."""
    found = {str(record.cell["scheme"]): record.metrics for record in read(finished[1] / "records.jsonl")}
    plain, shared = found["kv:bf16"], found["e:bf16,k:bf16"]
    assert "compression_without_e" not in plain
    assert shared["cross_cache_bytes"] == 20 * 16 * 2  # positions of the encoder, width, bytes
    assert shared["compression"] == plain["cache_bytes"] / shared["cache_bytes"]
    assert shared["compression_without_e"] == plain["cache_bytes"] / shared["self_cache_bytes"]
    assert shared["compression_without_e"] > shared["compression"] > 2


@pytest.mark.slow
def test_its_page_has_the_worst_layers(finished):
    names = {path.stem for path in (finished[1] / "tables").iterdir()}
    kinds = ("whisper_layers", "whisper_products", "whisper_sparse")
    assert names == {f"{table}_{kind}" for table in ("cells", "worst") for kind in kinds} | {
        "cells_whisper_transcripts"
    }
    assert not list((finished[1] / "plots").iterdir())


# Its tables -------------------------------------------------------------------------------------------------


def made(experiment, metrics, **cell):
    """Records of two layers of each kind, each number of the second twice that of the first; cross ten times."""
    return [
        Record(
            {"experiment": experiment, "model": "tiny", "layer": index, "attention": kind, **cell},
            {
                name: value
                if name == "bytes_per_token"
                else value * (index + 1) * (1 if kind == "self" else 10)
                for name, value in metrics.items()
            },
        )
        for index in range(2)
        for kind in ("self", "cross")
    ]


def rows_of(records):
    return {row[0]: row[1:] for row in report_tables(records)["worst"].rows}


def test_the_table_of_layers():
    records = made(
        "whisper_layers", {"value_error": 1e-4, "bytes_per_token": 64}, scheme="kv:bf16", basis="kv"
    )
    records += made(
        "whisper_layers",
        {"value_error": 5e-4, "exact_error": 1e-3, "bytes_per_token": 32},
        scheme="k:int16",
        basis="k",
    )
    records += [
        Record({**each.cell, "scheme": "v:int8", "basis": "v"}, status="refused", reason="no")
        for each in records[:4]
    ]
    rows = rows_of(records)
    assert rows["kv:bf16"] == (256, 1.0, None, 2e-4, None, 2e-3, "4 of 4")
    assert rows["k:int16"] == (128, 2.0, 2e-3, 1e-3, 2e-2, 1e-2, "2 of 4")
    assert rows["v:int8"] == (None,) * 7
    assert report_tables(records)["worst"].remarks == ("", "", "refused: no")


def test_the_table_of_products():
    records = made("whisper_products", {"value_error": 1e-4}, scheme="k:int16+2", compute="float32")
    records += made("whisper_products", {"value_error": 2e-3}, scheme="k:int16+2", compute="bf16 map")
    assert rows_of(records) == {"float32": (2e-4, 2e-3, "4 of 4"), "bf16 map": (4e-3, 4e-2, "1 of 4")}
    assert "k:int16+2" in report_tables(records)["worst"].note


def test_the_table_of_thresholds():
    rates = {"skipped_by_head": 0.04, "skipped_by_group": 0.02, "skipped_by_all": 0.01}
    records = made(
        "whisper_sparse", {"attention_error": 1e-3, **rates}, scheme="k:int16@sparse(0.1)", basis="k"
    )
    records += made("whisper_sparse", {"attention_error": 1e-4}, scheme="k:int16", basis="k")
    rows = rows_of(records)
    means = [pytest.approx(1.5 * rate) for rate in rates.values()]
    assert list(rows["k:int16@sparse(0.1)"][:4]) == [2e-3, *means]
    assert rows["k:int16@sparse(0.1)"][4] == pytest.approx(2e-2)
    assert rows["k:int16"] == (2e-4, None, None, None, pytest.approx(2e-3), None, None, None)
