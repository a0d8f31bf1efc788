"""The command line on Llama-like models: what applies to them, plans, conversions, and text by their own tokenizer."""

import json
import shutil

import numpy as np
import pytest
import tiny_llama as tiny
from tiny_cli import refuse, succeed

from slimjax.material import material
from slimjax.models.opened import open_model

LOOSE = ("--max-error", "1", "--max-kl", "9")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models in both formats and a text."""
    path = tmp_path_factory.mktemp("llama")
    tiny.write_huggingface(path / "mha", "llama")
    tiny.write_huggingface(path / "biased", "qwen2", shards=2, dtype="bfloat16")
    (path / "gguf").mkdir()
    tiny.write_gguf(path / "gguf" / "model.gguf", "llama-gqa", quantised="Q8_0")
    (path / "text").write_text(tiny.WORDS * 12)
    return path


def lines(report):
    return [{each["scheme"]: each for each in layer["schemes"]} for layer in report["layers"]]


def test_grouped_queries_are_refused_with_the_reason(place, capsys):
    report = succeed(capsys, "inspect", place / "gguf", "--json")
    assert (report["kind"], report["layout"]) == ("decoder", "gguf")
    layer = report["layers"][1]
    assert [layer[name] for name in ("attention", "D", "E", "N", "K", "H", "position")] == [
        "GQA", 64, 16, 4, 2, 8, "rope",
    ]  # fmt: skip
    for found in lines(report):
        for scheme in ("k:int16", "k:int16+16"):
            assert not found[scheme]["applies"]
            assert "width E = 16" in found[scheme]["refused"]
            assert "use kv or x" in found[scheme]["refused"]
        assert found["kv:bf16"]["applies"]
        assert found["x1:bf16"]["applies"]
    table = succeed(capsys, "inspect", place / "gguf" / "model.gguf")
    assert "GQA or MQA: keys of width E = 16 do not determine values of inputs of width D = 64" in table


def test_what_applies_to_whole_heads(place, capsys):
    for found in lines(succeed(capsys, "inspect", place / "mha", "--json")):
        applies = {name for name, each in found.items() if each["applies"]}
        assert applies == {"kv:bf16", "k:bf16", "k:int16", "k:int16+16", "x1:bf16"}
        assert "RoPE" in found["x:bf16"]["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mha", "biased"])
def test_plan_convert_verify(place, tmp_path, capsys, name):
    plan, out, text = tmp_path / "plan.json", tmp_path / "out", place / "text"
    budget = ("--calibrate", text, "--max-error", "1e-2", "--schemes", "k:int16,k:int16+4,k:int16+8,kv:bf16")
    found = succeed(capsys, "plan", place / name, *budget, "-o", plan, "--json")
    assert {line["scheme"].partition("+")[0] for line in found["layers"]} == {"k:int16"}
    succeed(capsys, "convert", place / name, "--plan", plan, "-o", out)
    section = json.loads((out / "config.json").read_text())["slimjax"]
    assert set(section["dropped"]) == {f"blocks.{i}.attention.value.kernel" for i in range(2)}
    assert (out / "tokenizer.json").read_text() == (place / name / "tokenizer.json").read_text()
    again, source = open_model(out), open_model(place / name)
    assert again.sizes == source.sizes
    assert again.parameters.dtype("embedding") == source.parameters.dtype("embedding")
    report = succeed(capsys, "verify", out, "--reference", place / name, "--data", text, "--json")
    assert report["planned"]["logit_kl"] < 2 * report["kv_bf16"]["logit_kl"]
    assert "there already" in succeed(capsys, "convert", place / name, "--plan", plan, "-o", out)


def test_gguf_by_the_plan_that_is_left(place, tmp_path, capsys):
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    found = succeed(capsys, "plan", place / "gguf", "--max-error", "1e-2", "-o", plan, "--json")
    assert {line["scheme"].partition(":")[0] for line in found["layers"]} <= {"kv", "x1"}
    succeed(capsys, "convert", place / "gguf", "--plan", plan, "-o", out)
    model = open_model(out)
    held = open_model(place / "gguf")
    for path, shape in held.shapes.items():
        np.testing.assert_array_equal(model.parameters.read(path, shape), held.parameters.read(path, shape))
    assert model.tokenizer() == held.tokenizer()
    succeed(capsys, "verify", out, "--reference", place / "gguf", "--data", place / "text", *LOOSE)


def test_text_is_cut_by_the_models_own_tokenizer(place):
    ids = tiny.tokenizer().encode((place / "text").read_text()).ids
    found = material(open_model(place / "mha"), [str(place / "text")])
    assert found.windows[0].tolist() == ids[: found.windows.shape[1]]
    assert found.windows.shape[1] == 65  # the model's reach


def test_data_that_the_model_does_not_take(place, tmp_path, capsys):
    plan = ("--max-error", "1", "-o", tmp_path / "plan.json")
    line = refuse(capsys, "plan", place / "mha", "--calibrate", "corpus", *plan)
    assert "does not say what text it was trained on" in line
    shutil.copytree(place / "mha", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    line = refuse(capsys, "plan", tmp_path / "mute", "--calibrate", place / "text", *plan)
    assert "no tokenizer.json beside the weights" in line
    (tmp_path / "mute" / "tokenizer.json").write_text("{}")
    line = refuse(capsys, "plan", tmp_path / "mute", "--calibrate", place / "text", *plan)
    assert "not a readable tokenizer" in line
    (tmp_path / "mute" / "config.json").write_text('{"model_type": "gpt_neox"}')
    line = refuse(capsys, "inspect", tmp_path / "mute")
    assert "'gpt_neox' is not known here; 'llama', 'mistral', 'qwen2' and 'whisper' are" in line
