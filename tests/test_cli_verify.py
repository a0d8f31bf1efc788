"""``slimjax verify``: passes what is good, fails what is not, and tells a stale plan from a bad one."""

import json
import struct

import numpy as np
import pytest
import tiny_cli as cli
from tiny_cli import refuse, run, succeed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, data and calibrated plans."""
    path = tmp_path_factory.mktemp("verify")
    # Ill-conditioned, as trained weights are: plain K-only caches fail on it.
    cli.write_whisper(path / "whisper", change=lambda arrays: cli.lose_directions(arrays, 3))
    cli.write_decoder(path / "decoder")
    cli.write_speech(path / "speech")
    cli.write_text(path / "text")
    for model, data in (("whisper", "speech"), ("decoder", "text")):
        budget = ("--max-error", "2e-3", "--schemes", "k:int16+4,kv:int16")
        arguments = ["plan", path / model, "--calibrate", path / data, *budget, "-o", path / f"{model}.json"]
        assert cli.main(list(map(str, arguments))) == 0
    return path


def verify(place, model, *options, plan=None):
    data = place / ("speech" if model == "whisper" else "text")
    return ("verify", place / model, "--plan", plan or place / f"{model}.json", "--data", data, *options)


@pytest.mark.parametrize("model", ["whisper", "decoder"])
@pytest.mark.slow
def test_a_good_plan_passes(place, capsys, model):
    report = succeed(capsys, *verify(place, model, "--json"))
    assert report["passed"]
    assert report["failures"] == []
    for line in report["layers"]:
        assert 0 < line["error"] <= line["limit"] == pytest.approx(4e-3)
    assert report["planned"]["logit_kl"] <= 2 * report["kv_bf16"]["logit_kl"]
    assert report["limits"]["logit_kl"] == pytest.approx(2 * report["kv_bf16"]["logit_kl"])
    assert report["planned"]["top1_agreement"] > 0.9
    if model == "whisper":
        assert report["planned"]["same"] == 1.0
        assert len(report["planned"]["details"]["transcripts"]) == 5
    else:
        assert abs(report["planned"]["details"]["bits_per_token_change"]) < 1e-2
        assert succeed(capsys, *verify(place, model)).endswith("passed\n")


def test_a_threshold_past_is_status_1(place, capsys):
    for options, reason in (
        (("--max-error", "1e-9"), "decoder.0.self: "),
        (("--max-kl", "-1"), "KL of the logits is"),
        (("--min-agreement", "1.1"), "top-1 agreement is"),
    ):
        status, out, _ = run(capsys, *verify(place, "whisper", *options))
        assert status == 1
        assert f"past its limit: {reason}" in out
        assert out.rstrip().endswith("failed")


def edited(place, tmp_path, model="whisper", **fields):
    """The plan with its first line changed, by hand."""
    plan = json.loads((place / f"{model}.json").read_text())
    plan["layers"][0] |= fields
    plan["maps"] = None
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    return tmp_path / "edited.json"


def test_a_cache_that_loses_the_values_fails(place, tmp_path, capsys):
    bad = edited(place, tmp_path, "decoder", scheme="k:int8", how="")
    status, out, _ = run(capsys, *verify(place, "decoder", "--json", plan=bad))
    report = json.loads(out)
    assert (status, report["passed"]) == (1, False)
    assert not report["layers"][0]["passed"]
    assert report["layers"][0]["error"] > report["layers"][0]["limit"]
    assert report["planned"]["logit_kl"] > report["kv_bf16"]["logit_kl"]


def test_stale_and_foreign_plans(place, tmp_path, capsys):
    other = cli.write_whisper(tmp_path / "updated", seed=1)
    speech = ("--data", place / "speech")
    line = refuse(capsys, "verify", other, "--plan", place / "whisper.json", *speech)
    assert "made for other weights" in line
    assert "plan again" in line
    line = refuse(capsys, "convert", other, "--plan", place / "whisper.json", "-o", tmp_path / "out")
    assert "made for other weights" in line
    renamed = edited(place, tmp_path, name="decoder.7.self")
    assert "decoder.7.self, which" in refuse(capsys, *verify(place, "whisper", plan=renamed))
    twice = edited(place, tmp_path, name="decoder.0.cross")
    assert "a layer twice" in refuse(capsys, *verify(place, "whisper", plan=twice))
    unknown = edited(place, tmp_path, scheme="k:int17")
    assert "not a plan" in refuse(capsys, *verify(place, "whisper", plan=unknown))
    (tmp_path / "cut.json").write_text('{"format":')
    assert "not a plan" in refuse(capsys, *verify(place, "whisper", plan=tmp_path / "cut.json"))
    assert "No such file" in refuse(capsys, *verify(place, "whisper", plan=tmp_path / "absent.json"))
    assert "name its plan" in refuse(capsys, "verify", place / "whisper", *speech)


def test_a_plan_whose_maps_were_changed(place, tmp_path, capsys):
    (tmp_path / "whisper.json").write_bytes((place / "whisper.json").read_bytes())
    (tmp_path / "whisper.safetensors").write_bytes(
        (place / "whisper.safetensors").read_bytes()[:-4] + b"abcd"
    )
    line = refuse(capsys, *verify(place, "whisper", plan=tmp_path / "whisper.json"))
    assert "whisper.safetensors: not the maps" in line


def test_models_that_cannot_be_read(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no model there" in refuse(capsys, "inspect", tmp_path / "empty")
    assert "no such directory" in refuse(capsys, "inspect", tmp_path / "absent")

    def spoil(arrays):
        arrays["decoder/layer_1/attention/linear_1/weight"][3, 3] = np.nan

    sick = cli.write_whisper(tmp_path / "nan", change=spoil)
    line = refuse(capsys, "inspect", sick)
    assert "linear_1/weight" in line
    assert "not finite" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "perceiver"}')
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    assert "'perceiver' is not known" in refuse(capsys, "inspect", tmp_path / "other")
    known = {"model_type": "whisper", "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    (tmp_path / "other" / "config.json").write_text(json.dumps(known))
    for hostile in (
        b"",
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 8) + b"notjson!",
        struct.pack("<Q", 2) + b"{}",
    ):
        (tmp_path / "other" / "model.safetensors").write_bytes(hostile)
        assert "model.safetensors" in refuse(capsys, "inspect", tmp_path / "other")
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "model.json").write_text("{}")
    assert "model.json: not the description of a model" in refuse(capsys, "inspect", tmp_path / "decoder")


def test_the_held_out_part_of_the_corpus(place, tmp_path, capsys):
    """``corpus``: fitted on what training saw, checked on what it did not."""
    plan, few = tmp_path / "plan.json", ("--tokens", "1280")
    data = ("--calibrate", "corpus", *few)
    out = succeed(capsys, "plan", place / "decoder", *data, "--max-error", "1e-2", "-o", plan)
    assert "windows of 64 tokens of corpus" in out
    succeed(capsys, "verify", place / "decoder", "--plan", plan, "--data", "corpus", *few, "--max-kl", "1")
