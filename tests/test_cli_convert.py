"""``slimjax convert``: what is left out of OUT, that OUT is a model like any other, and that it is whole or absent."""

import dataclasses
import gc
import json
import weakref

import numpy as np
import pytest
import tiny_cli as cli
import tiny_whisper as tiny
from safetensors.numpy import load_file
from tiny_cli import refuse, succeed

from slimjax.models.convert import convert_model
from slimjax.models.load.parameters import build
from slimjax.models.opened import open_model
from slimjax.models.whisper import WhisperConfig
from slimjax.solve.planfile import load_plan

KEYS = "k:int16,k:int16+2,k:int16+4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with models, their plans and what was made of them."""
    path = tmp_path_factory.mktemp("convert")
    cli.write_whisper(path / "whisper")
    cli.write_decoder(path / "decoder")
    cli.write_speech(path / "speech")
    cli.write_text(path / "text")
    for model, data in (("whisper", "speech"), ("decoder", "text")):
        plan = path / f"{model}.json"
        schemes = ("--max-error", "1", "--schemes", KEYS)
        arguments = ["plan", path / model, "--calibrate", path / data, *schemes, "-o", plan]
        assert cli.main(list(map(str, arguments))) == 0
        arguments = ["convert", path / model, "--plan", plan, "-o", path / f"{model}-out"]
        assert cli.main(list(map(str, arguments))) == 0
    return path


def tensors(folder):
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.mark.parametrize("model", ["whisper", "decoder"])
def test_value_weights_are_dropped_and_nothing_else(place, model):
    source, out = open_model(place / model), open_model(place / f"{model}-out")
    held = tensors(place / f"{model}-out")
    gone = {each.kernels[1] for each in source.places}
    assert set(source.shapes) - set(held) == gone
    assert all(name.startswith("solved.") for name in set(held) - set(source.shapes))
    for path, shape in source.shapes.items():
        if path not in gone:
            np.testing.assert_array_equal(held[path], source.parameters.read(path, shape))
    # What stands for W_V is W_V but for what the noise-aware map gives up.
    for layer, again in zip(source.layers(), out.layers(), strict=True):
        error = np.linalg.norm(again.values - layer.values) / np.linalg.norm(layer.values)
        assert 0 < error < 0.05
        np.testing.assert_array_equal(again.keys, layer.keys)
    assert out.digest == source.digest
    assert out.plan.schemes == load_plan(place / f"{model}.json").schemes


def test_the_files_are_what_the_library_reads(place):
    config = json.loads((place / "whisper-out" / "config.json").read_text())
    assert config["model_type"] == "slimjax"
    assert set(config["slimjax"]["files"]) == {"model.safetensors", "tokenizer.json"}
    assert sorted(config["slimjax"]["dropped"]) == sorted(
        each.kernels[1] for each in open_model(place / "whisper").places
    )


@pytest.mark.slow
def test_out_and_plan_hear_the_same(place, capsys):
    clip = place / "speech" / "0.wav"
    (first,) = succeed(
        capsys, "transcribe", place / "whisper", clip, "--cache", place / "whisper.json", "--json"
    )
    (second,) = succeed(capsys, "transcribe", place / "whisper-out", clip, "--json")
    for name in ("text", "cache_bytes"):
        assert first[name] == second[name]
    ordinary = succeed(capsys, "transcribe", place / "whisper-out", clip, "--cache", "kv:bf16", "--json")
    assert ordinary[0]["cache_bytes"]["self"] > second["cache_bytes"]["self"]


def test_calibration_on_the_way(place, capsys):
    speech = ("--cache", "e:bf16,k:int16+4", "--calibrate", place / "speech")
    (heard,) = succeed(capsys, "transcribe", place / "whisper", place / "speech" / "1.wav", *speech, "--json")
    assert heard["cache_bytes"]["cross"] == tiny.CONFIG.audio_positions * tiny.CONFIG.width * 2


@pytest.mark.slow
def test_every_command_takes_out(place, tmp_path, capsys):
    out, data, loose = place / "decoder-out", place / "text", ("--max-error", "1", "--max-kl", "9")
    assert succeed(capsys, "inspect", out, "--json")["converted"]
    succeed(capsys, "plan", out, "--calibrate", data, "--max-error", "1", "-o", tmp_path / "again.json")
    succeed(capsys, "convert", out, "--plan", tmp_path / "again.json", "-o", tmp_path / "again")
    assert "multiplied out" in succeed(capsys, "verify", out, "--data", data, *loose)
    succeed(capsys, "verify", out, "--reference", place / "decoder", "--data", data, *loose)
    out = place / "whisper-out"
    assert succeed(capsys, "inspect", out, "--json")["converted"]
    speech = place / "speech" / "0.wav"
    succeed(capsys, "verify", out, "--reference", place / "whisper", "--data", speech, *loose)


def test_a_finished_out_is_left_alone_and_bytes_are_the_same(place, tmp_path, capsys):
    arguments = ("convert", place / "whisper", "--plan", place / "whisper.json", "-o")
    before = {file.name: file.stat().st_mtime_ns for file in (place / "whisper-out").iterdir()}
    assert "there already" in succeed(capsys, *arguments, place / "whisper-out")
    assert {file.name: file.stat().st_mtime_ns for file in (place / "whisper-out").iterdir()} == before
    (tmp_path / ".out.part").mkdir()  # of a conversion that was killed
    (tmp_path / ".out.part" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()
    succeed(capsys, *arguments, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    for file in (place / "whisper-out").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_another_model_or_plan_does_not_overwrite(place, tmp_path, capsys):
    out = place / "whisper-out"
    line = refuse(capsys, "convert", place / "decoder", "--plan", place / "decoder.json", "-o", out)
    assert "holds something else" in line
    plan = json.loads((place / "whisper.json").read_text())
    plan["layers"][1]["scheme"] = "kv:bf16"
    (tmp_path / "edited.json").write_text(json.dumps(plan | {"maps": None}))
    assert "holds something else" in refuse(
        capsys, "convert", place / "whisper", "--plan", tmp_path / "edited.json", "-o", out
    )
    succeed(capsys, "convert", place / "whisper", "--plan", tmp_path / "edited.json", "-o", tmp_path / "out")
    assert "decoder.0.cross_attention.value.kernel" in tensors(tmp_path / "out")

    def louder(arrays):  # weights that no plan looks at
        arrays["decoder/layer_0/ffn/linear_0/weight"] = 2 * arrays["decoder/layer_0/ffn/linear_0/weight"]

    updated = cli.write_whisper(tmp_path / "updated", change=louder)
    assert "holds something else" in refuse(
        capsys, "convert", updated, "--plan", place / "whisper.json", "-o", out
    )


def test_shards(place, tmp_path, capsys):
    arguments = ("convert", place / "whisper", "--plan", place / "whisper.json", "-o", tmp_path / "out")
    succeed(capsys, *arguments, "--shard-bytes", 8000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        assert set(held) == {name for name, file in index["weight_map"].items() if file == shard}
        assert sum(array.nbytes for array in held.values()) <= 8000 or len(held) == 1
    whole = tensors(place / "whisper-out")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    for name, array in tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(array, whole[name])
    succeed(capsys, "inspect", tmp_path / "out")


class Watched:
    """Parameters that know how many bytes of what they gave out are alive."""

    def __init__(self, parameters):
        self.parameters, self.alive, self.most = parameters, 0, 0

    def dtype(self, path):
        return self.parameters.dtype(path)

    def file(self, path):
        return self.parameters.file(path)

    def read(self, path, shape):
        array = self.parameters.read(path, shape).copy()
        self.alive += array.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._gone, array.nbytes)
        return array

    def _gone(self, size):
        self.alive -= size


@pytest.mark.slow
def test_many_layers_take_the_memory_of_a_few(tmp_path):
    sizes = dataclasses.asdict(tiny.CONFIG) | {"width": 32, "mlp_width": 32, "decoder_layers": 6}
    (tmp_path / "deep").mkdir()
    tiny.write_huggingface(tmp_path / "deep", tiny.random_model(WhisperConfig(**sizes)), dtype="float16")
    assert cli.main(
        ["plan", str(tmp_path / "deep"), "--max-error", "1", "--schemes", "k:int16+8", "-o", str(tmp_path / "p.json")]
    ) == 0  # fmt: skip
    model = open_model(tmp_path / "deep")
    watched = Watched(model.parameters)
    gc.collect()
    assert convert_model(
        dataclasses.replace(model, parameters=watched), load_plan(tmp_path / "p.json"), tmp_path / "out"
    )
    # Of one attention layer in float16: four kernels and their float32 copies.
    assert watched.most < 3 * (2 + 4) * 4 * 32 * 32
    assert watched.most < sum(2 * int(np.prod(shape)) for shape in model.shapes.values()) / 2


def test_a_failure_leaves_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "slimjax.models.convert.write_text", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    arguments = ("convert", place / "whisper", "--plan", place / "whisper.json", "-o")
    assert "disk full" in refuse(capsys, *arguments, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    assert "file" in refuse(capsys, *arguments, tmp_path / "file" / "out")
    assert "holds something else" in refuse(capsys, *arguments, tmp_path / "file")
    assert "No such file or directory" in refuse(capsys, *arguments, tmp_path / "no" / "where" / "out")


def damaged(place, tmp_path, name):
    """A copy of the converted Whisper, and the bytes of one of its files."""
    out = tmp_path / "copy"
    out.mkdir()
    for file in (place / "whisper-out").iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out, (out / name).read_bytes()


def test_a_damaged_out_is_refused(place, tmp_path, capsys):
    out, data = damaged(place, tmp_path, "model.safetensors")
    flipped = bytearray(data)
    flipped[-5] ^= 1
    for wrong in (bytes(flipped), data[:-7], b""):
        (out / "model.safetensors").write_bytes(wrong)
        assert "model.safetensors: not what was written" in refuse(capsys, "inspect", out)
    (out / "model.safetensors").unlink()
    assert "model.safetensors: No such file" in refuse(capsys, "inspect", out)


def test_a_hostile_config_is_refused(place, tmp_path, capsys):
    out, data = damaged(place, tmp_path, "config.json")
    config = json.loads(data)

    def changed(**section):
        (out / "config.json").write_text(json.dumps(config | {"slimjax": config["slimjax"] | section}))
        return refuse(capsys, "inspect", out)

    assert "layers" in changed(model=config["slimjax"]["model"] | {"decoder_layers": 10**9})
    assert "sizes of the converted model" in changed(model={"width": 16})
    assert "not the name of a file" in changed(files={"../whisper-out/model.safetensors": ""})
    assert "of format" in changed(format="slimjax model 2")
    assert "not a plan" in changed(plan={})
    wrong = {"layer": "decoder.7.self", "kept": "embedding"}
    gone = dict.fromkeys(config["slimjax"]["dropped"], wrong)
    assert "embedding" in changed(dropped=gone)
    assert "is str" in changed(dropped="none")
    (out / "config.json").write_text('{"model_type": "slimjax"}')
    assert "expected a section 'slimjax'" in refuse(capsys, "inspect", out)


def test_a_converted_model_has_the_parameters_of_its_source(place):
    source, out = open_model(place / "decoder"), open_model(place / "decoder-out")
    one, other = (build(each.make, each.parameters) for each in (source, out))
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_allclose(one(tokens), other(tokens), atol=0.05)
