"""``slimjax inspect`` and ``slimjax plan``: what they say of a model, and that a plan keeps its budget."""

import json

import numpy as np
import pytest
import tiny_cli as cli
from tiny_cli import refuse, succeed

from slimjax.config import ModelConfig
from slimjax.models.opened import open_model
from slimjax.scheme import parse_scheme


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with models, speech and text in it."""
    path = tmp_path_factory.mktemp("plan")
    cli.write_whisper(path / "whisper")
    cli.write_decoder(path / "decoder")
    cli.write_speech(path / "speech")
    cli.write_text(path / "text")
    return path


def test_inspect_says_what_the_layers_are(place, capsys):
    report = succeed(capsys, "inspect", place / "whisper", "--json")
    assert [line["name"] for line in report["layers"]] == list(cli.LAYERS)
    first = report["layers"][0]
    assert {name: first[name] for name in ("attention", "D", "E", "N", "K", "H", "E/D")} == {
        "attention": "MHA", "D": 16, "E": 16, "N": 2, "K": 2, "H": 8, "E/D": 1.0
    }  # fmt: skip
    layer = next(open_model(place / "whisper").layers())
    singular = np.linalg.svd(layer.keys, compute_uv=False)
    assert first["condition_number_wk"] == pytest.approx(singular[0] / singular[-1])
    singular = np.linalg.svd(layer.values, compute_uv=False)
    assert first["condition_number_wv"] == pytest.approx(singular[0] / singular[-1])
    assert first["rank_wk"] == 16
    schemes = {line["scheme"]: line for line in first["schemes"]}
    assert schemes["k:int16"]["predicted_error"] < schemes["k:bf16"]["predicted_error"]
    assert not schemes["k:int16+16"]["applies"]  # as wide as the values would be
    assert "kv or x" in schemes["k:int16+16"]["refused"]
    assert "e:bf16" not in schemes
    cross = {line["scheme"]: line for line in report["layers"][1]["schemes"]}
    assert cross["e:bf16"]["predicted_error"] < 4e-3
    assert cross["h:int16"]["applies"]


def test_inspect_prints_tables(place, capsys):
    out = succeed(capsys, "inspect", place / "whisper", "--schemes", "kv:bf16,k:int16+4,k:int16+16")
    lines = out.splitlines()
    assert lines[2].split() == ["layer", "kind", *"DENKH", "E/D", "cond(W_K)", "cond(W_V)", "rank(W_K)"]
    assert sum(line.startswith(cli.LAYERS) for line in lines) == 8  # in both tables
    assert any(line.startswith("k:int16+16, 4 layers: ") for line in lines)


def test_inspect_counts_lost_directions_and_refuses_narrow_keys(tmp_path, capsys):
    model = cli.write_whisper(tmp_path / "lost", change=lambda arrays: cli.lose_directions(arrays, 3))
    lost, *others = succeed(capsys, "inspect", model, "--json")["layers"]
    assert (lost["rank_wk"], others[0]["rank_wk"]) == (13, 16)
    plain = next(line for line in lost["schemes"] if line["scheme"] == "k:int16")
    assert not plain["applies"] or plain["predicted_error"] > 1.0
    narrow = ModelConfig(layers=1, width=16, heads=4, kv_heads=1, mlp_width=16)
    (layer,) = succeed(capsys, "inspect", cli.write_decoder(tmp_path / "mqa", narrow), "--json")["layers"]
    assert (layer["attention"], layer["E/D"], layer["position"]) == ("MQA", 0.25, "rope")
    reasons = {line["scheme"]: line.get("refused") for line in layer["schemes"]}
    assert "do not determine values" in reasons["k:int16"]
    assert "use x1" in reasons["x:bf16"]
    assert reasons["kv:bf16"] is None


def planned(capsys, place, *options, model="whisper"):
    """A plan as JSON, which is also what the file holds."""
    data = place / ("speech" if model == "whisper" else "text")
    found = succeed(
        capsys, "plan", place / model, "--calibrate", data, *options, "-o", place / "plan.json", "--json"
    )
    held = json.loads((place / "plan.json").read_text())
    held.pop("maps", None)
    assert held == found
    return found


@pytest.mark.parametrize("model", ["whisper", "decoder"])
def test_tighter_budgets_never_err_more(place, capsys, model):
    worst, size = np.inf, 0
    for budget in (1e-1, 2e-3, 2e-4):
        plan = planned(capsys, place, "--max-error", budget, model=model)
        errors = [line["error"] for line in plan["layers"]]
        assert max(errors) <= budget
        assert max(errors) <= worst
        assert plan["totals"]["bytes_per_token"] >= size
        worst, size = max(errors), plan["totals"]["bytes_per_token"]
        for line in plan["layers"]:
            assert line["reason"].startswith("fewest bytes")
            assert len(line["tried"]) > 3
    assert plan["totals"]["kv_bf16_bytes_per_token"] == 4 * 16 * len(plan["layers"])


def test_a_byte_budget_is_kept(place, capsys):
    plan = planned(capsys, place, "--max-bytes-per-token", 230)
    assert plan["totals"]["bytes_per_token"] <= 230
    assert plan["budget"] == {"max_bytes_per_token": 230}
    looser = planned(capsys, place, "--max-bytes-per-token", 256)
    assert max(line["error"] for line in looser["layers"]) <= max(line["error"] for line in plan["layers"])
    line = refuse(capsys, "plan", place / "whisper", "--max-bytes-per-token", 8, "-o", place / "no.json")
    assert "the smallest takes" in line
    assert not (place / "no.json").exists()


def test_lost_directions_are_cached_or_refused(tmp_path, place, capsys):
    model = cli.write_whisper(tmp_path / "lost", change=lambda arrays: cli.lose_directions(arrays, 3))
    keys = ",".join(f"k:int16+{rank}" for rank in (1, 2, 3, 4, 6))
    common = ("plan", model, "--calibrate", place / "speech", "--max-error", 1e-2, "-o", tmp_path / "p.json")
    plan = succeed(capsys, *common, "--schemes", keys, "--json")
    assert parse_scheme(plan["layers"][0]["scheme"]).extra >= 3
    line = refuse(capsys, *common, "--schemes", "k:int16,k:int16+2")
    assert "decoder.0.self: no scheme has an error of at most 1.0e-02" in line


def test_layers_that_share_a_cache_count_it_once(place, capsys):
    plan = planned(capsys, place, "--max-error", 4e-3, "--cross", "e:bf16")
    lines = {line["name"]: line for line in plan["layers"]}
    assert list(lines) == list(cli.LAYERS)
    assert [lines[name]["bytes_per_token"] for name in cli.LAYERS[1::2]] == [32, 0]
    assert lines["decoder.1.cross"]["scheme"] == "e:bf16"
    assert 0 < lines["decoder.1.cross"]["error"] < 4e-3
    assert plan["totals"]["bytes_per_token"] == sum(line["bytes_per_token"] for line in plan["layers"])
    text = succeed(
        capsys, "plan", place / "whisper", "--cross", "e:bf16", "--max-error", 1e-4, "--schemes",
        "kv:int16,k:int16,k:int16+4", "-o", place / "plan.json",
    )  # fmt: skip
    assert "its error exceeds 1.0e-04" in text
    line = refuse(
        capsys, "plan", place / "decoder", "--cross", "e:bf16", "--max-error", 1, "-o", place / "plan.json"
    )
    assert "this model has none" in line


def test_the_table_says_what_was_measured_and_when_it_pays(place, capsys):
    data = ("--calibrate", place / "speech")
    out = succeed(capsys, "plan", place / "whisper", *data, "--max-error", 4e-3, "-o", place / "plan.json")
    assert "5 recordings" in out
    assert "three of five fitted, one held out" in out
    assert "cached tokens on" in out
    assert sum(line.startswith(cli.LAYERS) for line in out.splitlines()) == 4
    out = succeed(capsys, "plan", place / "whisper", "--max-error", 4e-3, "-o", place / "plan.json")
    assert "calibration: none: errors are predicted for white inputs" in out


def test_few_clips_are_cut_and_the_plan_says_so(place, capsys):
    one = ("--calibrate", place / "speech" / "0.wav")
    out = succeed(capsys, "plan", place / "whisper", *one, "--max-error", 1, "-o", place / "plan.json")
    assert "1 recordings" in out
    assert "each cut into 5 because" in out


def test_mistakes_of_a_plan_are_one_line(place, tmp_path, capsys):
    model, out = place / "whisper", ("-o", tmp_path / "plan.json")
    budget = ("--max-error", "1e-2")
    assert "no such directory" in refuse(capsys, "plan", tmp_path / "absent", *budget, *out)
    assert "no such file" in refuse(capsys, "plan", model, "--calibrate", tmp_path / "a.wav", *budget, *out)
    assert "wav" in refuse(capsys, "plan", model, "--calibrate", place / "text", *budget, *out)
    assert "unknown codec" in refuse(capsys, "plan", model, "--schemes", "k:int17", *budget, *out)
    assert "is a .json file" in refuse(capsys, "plan", model, *budget, "-o", tmp_path / "plan")
    assert "no such directory" in refuse(capsys, "plan", model, *budget, "-o", tmp_path / "no" / "plan.json")
    assert "budget is positive" in refuse(capsys, "plan", model, "--max-error", "-1", *out)
    assert "too few" in refuse(
        capsys, "plan", place / "decoder", "--calibrate", _short(tmp_path), *budget, *out
    )
    with pytest.raises(SystemExit):
        cli.main(["plan", str(model), *map(str, out)])


def _short(folder):
    (folder / "short").write_bytes(b"abc")
    return folder / "short"
