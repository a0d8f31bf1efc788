"""The command line on Whisper tiny.en and real speech: plan, convert, transcribe, verify.

The model and the clips come with ``make models``; without them this test is skipped.
"""

import json
from pathlib import Path

import pytest
from tiny_cli import succeed

MODELS = Path(__file__).parents[1] / "models"
MODEL, SPEECH = MODELS / "whisper-tiny.en", MODELS / "speech"
absent = [path for path in (MODEL / "model.bin", SPEECH / "transcription") if not path.exists()]


@pytest.mark.slow
@pytest.mark.skipif(bool(absent), reason=f"{', '.join(map(str, absent))} absent: run `make models`")
def test_a_planned_and_converted_model_hears_what_bf16_hears(tmp_path, capsys):
    plan, out, clips = tmp_path / "plan.json", tmp_path / "out", sorted(SPEECH.glob("*.wav"))
    budget = ("--max-error", "2e-3", "--schemes", "k:int16+8,k:int16+16")
    found = succeed(capsys, "plan", MODEL, "--calibrate", SPEECH, *budget, "-o", plan, "--json")
    assert max(line["error"] for line in found["layers"]) <= 2e-3
    assert len({line["scheme"] for line in found["layers"]}) > 1  # what suffices depends on the layer
    succeed(capsys, "convert", MODEL, "--plan", plan, "-o", out)
    assert len(json.loads((out / "config.json").read_text())["slimjax"]["dropped"]) == 8
    ours = succeed(capsys, "transcribe", out, *clips, "--json")
    ordinary = succeed(capsys, "transcribe", MODEL, *clips, "--cache", "kv:bf16", "--json")
    assert [line["text"] for line in ours] == [line["text"] for line in ordinary]
    ratio = sum(ordinary[0]["cache_bytes"].values()) / sum(ours[0]["cache_bytes"].values())
    assert ratio >= 1.85
    report = succeed(capsys, "verify", out, "--reference", MODEL, "--data", *clips[:1], "--json")
    assert report["planned"]["logit_kl"] <= 2 * report["kv_bf16"]["logit_kl"]
