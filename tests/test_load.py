"""Readers of Whisper checkpoints: what they read, and what they say of files that lie."""

import json
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_whisper as tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from slimjax.models.load import load_whisper
from slimjax.models.load.ctranslate2 import CTranslate2File


@pytest.fixture(scope="module")
def model():
    return tiny.random_model()


@pytest.fixture(scope="module")
def arrays(model):
    return tiny.ctranslate2_arrays(model)


def assert_same(loaded, model):
    ours, theirs = (jax.tree.leaves_with_path(nnx.split(each)[1]) for each in (loaded.model, model))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, mine), (_, other) in zip(ours, theirs, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_array_equal(mine, other, err_msg=jax.tree_util.keystr(path))
    assert loaded.model.config == model.config


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_ctranslate2(tmp_path, model, dtype):
    tiny.write_ctranslate2(tmp_path, model, dtype=dtype)
    loaded = load_whisper(tmp_path)
    assert_same(loaded, model)
    assert loaded.layout == "ctranslate2"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_huggingface(tmp_path, model, shards, prefix, dtype):
    tiny.write_huggingface(tmp_path, model, shards=shards, prefix=prefix, dtype=dtype)
    loaded = load_whisper(tmp_path)
    assert_same(loaded, model)
    assert loaded.layout == "huggingface"


def test_special_tokens_are_found_by_name(tmp_path, model):
    tiny.write_huggingface(tmp_path, model)
    english = load_whisper(tmp_path).tokens
    number = {name: tiny.LETTERS + i for i, name in enumerate(tiny.SPECIAL)}
    assert english.prompt() == (number["startoftranscript"], number["notimestamps"])
    assert english.end == number["endoftext"]
    assert english.text([1, 2, number["endoftext"], number["en"]]) == "12"
    with pytest.raises(ValueError, match="knows English"):
        english.prompt("de")
    tiny.write_huggingface(tmp_path, model, multilingual=True)
    many = load_whisper(tmp_path).tokens
    wanted = [number[name] for name in ("startoftranscript", "de", "transcribe", "notimestamps")]
    assert list(many.prompt("de")) == wanted
    assert set(many.languages) == {"en", "de"}
    with pytest.raises(ValueError, match=r"language='fr' is not known to this model: de, en"):
        many.prompt("fr")


def damaged(folder, content):
    path = folder / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.bin: ") as caught:
        CTranslate2File(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_cut_off_anywhere_is_refused(tmp_path, arrays):
    whole = tiny.ctranslate2_bytes({name: arrays[name] for name in list(arrays)[:4]})
    for length in {*range(200), *range(0, len(whole), 97), len(whole) - 1}:
        reason = damaged(tmp_path, whole[:length])
        assert "empty" in reason or f"of {length}" in reason


def test_hostile_lengths_are_refused_and_claim_no_memory(tmp_path, arrays):
    name = "decoder/embeddings/weight"
    whole = tiny.ctranslate2_bytes({name: arrays[name]})
    at = whole.index(name.encode()) + len(name) + 1  # behind the name: rank, dimensions, dtype, size
    rows, width = arrays[name].shape
    assert struct.unpack_from("<BII", whole, at) == (2, rows, width)

    def patched(offset, layout, *values):
        return whole[:offset] + struct.pack(layout, *values) + whole[offset + struct.calcsize(layout) :]

    assert "rank 255" in damaged(tmp_path, patched(at, "<B", 255))
    assert "says that it has" in damaged(tmp_path, patched(at + 1, "<I", 2**32 - 1))
    assert "dtype 9" in damaged(tmp_path, patched(at + 9, "<B", 9))
    assert "says that it has 4294967295" in damaged(tmp_path, patched(at + 10, "<I", 2**32 - 1))
    huge = patched(at + 1, "<II", 2**16, 2**14)
    huge = huge[: at + 10] + struct.pack("<I", 2**31) + huge[at + 14 :]
    assert "takes 2147483648 bytes" in damaged(tmp_path, huge)
    count = 4 + 2 + len("WhisperSpec") + 1 + 4
    assert "at byte" in damaged(tmp_path, patched(count, "<I", 2**32 - 1))  # reads on into the aliases
    assert "version 7" in damaged(tmp_path, patched(0, "<I", 7))
    assert "left behind the end" in damaged(tmp_path, whole + b"x")
    assert "no UTF-8" in damaged(tmp_path, whole.replace(name.encode(), b"\xff" * len(name), 1))
    twice = patched(count, "<I", 2)
    assert damaged(tmp_path, twice[:-4])


def test_noise_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    for size in (1, 5, 64, 4_096):
        for _ in range(20):
            assert damaged(tmp_path, rng.bytes(size))
            assert damaged(tmp_path, struct.pack("<I", 6) + rng.bytes(size))


def test_an_alias_of_nothing(tmp_path, arrays):
    name = "decoder/embeddings/weight"
    whole = tiny.ctranslate2_bytes({name: arrays[name]})
    at = whole.rindex(name.encode())
    assert "stands for 'Xecoder/" in damaged(tmp_path, whole[:at] + b"X" + whole[at + 1 :])


def refused(folder, error=ValueError):
    with pytest.raises(error) as caught:
        load_whisper(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CHANGES = {
    "missing": (lambda a: a.pop("decoder/layer_1/ffn/linear_0/bias"), "linear_0/bias' of shape .* is missing"),
    "no layers": (lambda a: [a.pop(n) for n in list(a) if "encoder/layer_0" in n], "ffn/linear_0/weight' is missing"),
    "wrong shape": (
        lambda a: a.update({"decoder/layer_1/attention/linear_1/weight": np.zeros((32, 15), np.float32)}),
        r"attention/linear_1/weight' has shape \(32, 15\), expected \(32, 16\)",
    ),
    "flat": (
        lambda a: a.update({"encoder/conv1/weight": np.zeros(3, np.float32)}),
        r"encoder/conv1/weight' is of shape \(3,\), expected 3 dimensions",
    ),
    "not a number": (
        lambda a: a["decoder/layer_0/self_attention/linear_0/weight"].__setitem__((-1, 2), np.nan),
        "self_attention/linear_0/weight' holds values that are not finite",
    ),
    "heads": (lambda a: a.update({"encoder/num_heads": np.int16(4)}), r"heads of encoder and decoder = \(4, 2\)"),
    "indivisible": (
        lambda a: a.update({f"{half}/num_heads": np.int16(3) for half in ("encoder", "decoder")}),
        "must be even and a multiple of self.heads=3",
    ),
    "no heads": (lambda a: a.pop("encoder/num_heads"), "'encoder/num_heads' is missing"),
    "another activation": (lambda a: a.update({"decoder/activation": np.int8(0)}), "decoder/activation = 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_named(tmp_path, model, name):
    change, reason = CHANGES[name]
    arrays = {key: np.array(array) for key, array in tiny.ctranslate2_arrays(model).items()}
    change(arrays)
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "model.bin").write_bytes(tiny.ctranslate2_bytes(arrays))
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'model.bin'}: ")
    assert re.search(reason, message)


def test_other_architectures_and_quantised_weights(tmp_path, model, arrays):
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "model.bin").write_bytes(tiny.ctranslate2_bytes(arrays, spec="TransformerSpec"))
    assert "architecture 'TransformerSpec' is not known" in refused(tmp_path)
    small = dict(arrays)
    small["encoder/layer_0/ffn/linear_0/weight"] = np.zeros((24, 16), np.int8)
    (tmp_path / "model.bin").write_bytes(tiny.ctranslate2_bytes(small))
    assert "ffn/linear_0/weight' is int8; quantised" in refused(tmp_path, NotImplementedError)


def test_missing_files(tmp_path, model):
    assert "no such directory" in refused(tmp_path / "absent", FileNotFoundError)
    assert "no model there" in refused(tmp_path, FileNotFoundError)
    tiny.write_ctranslate2(tmp_path, model)
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in refused(tmp_path, FileNotFoundError)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a readable tokenizer" in refused(tmp_path)
    tiny.write_tokenizer(tmp_path, special=("endoftext", "startoftranscript"))
    assert "<|notimestamps|> is missing" in refused(tmp_path)
    tiny.write_tokenizer(tmp_path, special=("endoftext", *"abcdefghijklmnopq", "startoftranscript"))
    assert "<|startoftranscript|> is 68, the model knows 64" in refused(tmp_path)


def test_huggingface_mistakes(tmp_path, model):
    tiny.write_huggingface(tmp_path, model)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good = config.read_text()
    config.write_text(good.replace('"whisper"', '"llama"'))
    assert "config.json: architecture 'llama' is not known" in refused(tmp_path)
    config.write_text(good.replace('"d_model": 16', '"d_model": 1000000000000'))
    assert "config.json: d_model = 1000000000000, the tensors have 16" in refused(tmp_path)
    config.write_text(good.replace('"decoder_attention_heads": 2', '"decoder_attention_heads": "2"'))
    assert "heads of encoder and decoder = (2, '2')" in refused(tmp_path)
    for text in ("", "{", "[1]", '{"a": ' * 100_000):
        config.write_text(text)
        assert str(config) in refused(tmp_path)
    config.unlink()
    assert "config.json" in refused(tmp_path, FileNotFoundError)
    config.write_text(good)
    tensors = load_file(weights)
    tensors["model.decoder.layers.1.fc1.weight"][0, 0] = np.inf
    save_file(tensors, weights)
    assert "model.safetensors: tensor 'model.decoder.layers.1.fc1.weight' holds values" in refused(tmp_path)
    whole = weights.read_bytes()
    for length in (0, 3, 8, 100, len(whole) - 1):
        weights.write_bytes(whole[:length])
        assert "model.safetensors: damaged or no safetensors file" in refused(tmp_path)
    weights.write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    assert "damaged or no safetensors file" in refused(tmp_path)


def test_sharded_mistakes(tmp_path, model):
    tiny.write_huggingface(tmp_path, model, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = min(good["weight_map"])
    for shard in ("../model.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], first: shard}}))
        assert "is not the name of a safetensors file" in refused(tmp_path)
    index.write_text(json.dumps({"weight_map": []}))
    assert "expected an object 'weight_map'" in refused(tmp_path)
    other = next(shard for shard in good["weight_map"].values() if shard != good["weight_map"][first])
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], first: other}}))
    assert f"{other}: damaged or no safetensors file: tensor '{first}'" in refused(tmp_path)
    index.write_text(json.dumps(good))
    (tmp_path / other).unlink()
    assert other in refused(tmp_path, FileNotFoundError)
