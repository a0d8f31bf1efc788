"""Readers of Llama-like decoders: what they read, what they refuse, and what they say of files that lie."""

import dataclasses
import json
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama as tiny
from flax import nnx

from slimjax.models.load import load_decoder
from slimjax.models.load.gguf import GGUFFile
from slimjax.models.load.llama import open_decoder
from slimjax.models.load.text_tokens import gguf_tokenizer, tokenizer_of


def assert_same(loaded, model, config):
    ours, theirs = (jax.tree.leaves_with_path(nnx.state(each, nnx.Param)) for each in (loaded.model, model))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, mine), (_, other) in zip(ours, theirs, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_array_equal(mine, other, err_msg=jax.tree_util.keystr(path))
    assert loaded.config == config
    assert nnx.graphdef(loaded.model) == nnx.graphdef(model)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_huggingface(tmp_path, kind):
    model = tiny.write_huggingface(tmp_path, kind)
    loaded = load_decoder(tmp_path)
    assert_same(loaded, model, tiny.CONFIGS[kind])
    assert loaded.layout == "huggingface"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(tiny.WORDS).ids) == tiny.WORDS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_shards_and_dtypes(tmp_path, dtype):
    model = tiny.write_huggingface(tmp_path, "llama", shards=3, dtype=dtype)
    (tmp_path / "tokenizer.json").unlink()
    loaded = load_decoder(tmp_path)
    assert_same(loaded, model, tiny.CONFIGS["llama"])
    assert loaded.tokenizer is None
    stored = open_decoder(tmp_path).parameters.dtype("embedding")
    assert stored.itemsize == (2 if "16" in dtype else 4)


def bare(said, tensors):
    """As a decoder without its logits is saved; what RoPE computes is saved, too."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    del said["num_key_value_heads"], said["head_dim"], said["tie_word_embeddings"], said["rope_theta"]
    said["rope_parameters"] = {"rope_type": "default", "rope_theta": 250.0}


def test_what_a_config_leaves_out_the_tensors_say(tmp_path):
    config = dataclasses.replace(tiny.CONFIGS["llama-gqa"], head_dim=16, rope_theta=250.0)
    model = tiny.write_huggingface(tmp_path, "llama-gqa", change=bare, config=config)
    assert_same(load_decoder(tmp_path), model, config)


@pytest.mark.parametrize("kind", ["llama", "llama-gqa", "qwen2"])
def test_gguf_is_the_same_model(tmp_path, kind):
    model = tiny.write_gguf(tmp_path / "model.gguf", kind)
    epsilon = float(np.float32(1e-5))  # GGUF holds floats
    wanted = dataclasses.replace(tiny.CONFIGS[kind], norm_epsilon=epsilon)
    loaded = load_decoder(tmp_path)
    for block in (*model.blocks, model):
        for name in ("attention_norm", "mlp_norm", "norm"):
            if hasattr(block, name):
                getattr(block, name).epsilon = epsilon
    assert_same(loaded, model, wanted)
    assert loaded.layout == "gguf"
    own = tiny.tokenizer()
    for text in (tiny.WORDS, "1999 <|end|>", "naïve\n\n  é 2x", ""):
        assert loaded.tokenizer.encode(text, add_special_tokens=False).ids == own.encode(text).ids
        cut, wanted = (each.pre_tokenizer.pre_tokenize_str(text) for each in (loaded.tokenizer, own))
        assert cut == wanted
    assert loaded.tokenizer.decode(own.encode("<|end|>the cat").ids) == "the cat"
    own.save(str(tmp_path / "tokenizer.json"))  # goes before the file's own
    (tmp_path / "tokenizer.json").write_text(
        (tmp_path / "tokenizer.json").read_text().replace("<|end|>", "<|e|>")
    )
    assert load_decoder(tmp_path / "model.gguf").tokenizer.token_to_id("<|e|>") is not None


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 1e-2), ("Q4_1", 1e-1), ("BF16", 0.0), ("F16", 0.0)])
def test_quantised_gguf(tmp_path, kind, error):
    model = tiny.write_gguf(tmp_path / "model.gguf", "llama", quantised=kind)
    opened = open_decoder(tmp_path)
    for path, parameter in (
        ("embedding", model.embedding),
        ("blocks.1.attention.query.kernel", model.blocks[1].attention.query.kernel),
        ("blocks.1.attention.out.kernel", model.blocks[1].attention.out.kernel),
    ):
        wanted = np.asarray(parameter[...])
        found = opened.parameters.read(path, wanted.shape)
        assert np.linalg.norm(found.astype(np.float32) - wanted) <= error * np.linalg.norm(wanted)
        assert found.dtype == opened.parameters.dtype(path)
        assert found.dtype.itemsize == (2 if "F16" in kind else 4)


def refused(place, error=ValueError):
    with pytest.raises(error) as caught:
        load_decoder(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SAYINGS = {
    "another architecture": ({"model_type": "gemma3"}, ValueError, "architecture 'gemma3' is not known here; 'llama'"),
    "no architecture": ({"model_type": None}, ValueError, "architecture None"),
    "scaled": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, NotImplementedError, "'default'. is"),
    "old scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, NotImplementedError, "rope_scaling = "),
    "partly rotated": ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor = 0.5"),
    "one bias": ({"attention_bias": True}, NotImplementedError, "attention_bias = True .* mlp_bias = False"),
    "activation": ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act = 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, NotImplementedError, "read from GGUF alone"),
    "huge": ({"hidden_size": 10**15}, ValueError, "hidden_size = 1000000000000000, the tensors have 64"),
    "more layers": ({"num_hidden_layers": 3}, ValueError, "num_hidden_layers = 3, the tensors have 2"),
    "heads": ({"num_attention_heads": 8}, ValueError, "8 heads and 4 of keys, of 16 each; the tensors have 64 and 64"),
    "text": ({"num_attention_heads": "4"}, ValueError, "num_attention_heads = '4', expected a positive whole"),
    "kv heads": ({"num_key_value_heads": 3}, ValueError, "4 heads and 3 of keys"),
    "absent": ({"vocab_size": None}, ValueError, "vocab_size = None, expected a positive whole number"),
    "epsilon": ({"rms_norm_eps": float("nan")}, ValueError, "rms_norm_eps = nan, expected a positive number"),
    "theta": ({"rope_theta": -1.0}, ValueError, "rope_theta = -1.0, expected a positive number"),
    "flag": ({"tie_word_embeddings": 1}, ValueError, "tie_word_embeddings = 1, expected true or false"),
    "rope": ({"rope_parameters": [1]}, ValueError, "rope_parameters = .1., expected an object"),
    "some windows": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        NotImplementedError,
        "max_window_layers = 1 is not read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAYINGS)
def test_variants_and_false_sayings_are_named(tmp_path, name):
    said, error, reason = SAYINGS[name]
    tiny.write_huggingface(tmp_path, "llama", change=lambda config, _: config.update(said))
    message = refused(tmp_path, error)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert re.search(reason, message), message


QUERY = "model.layers.1.self_attn.q_proj.weight"
TENSORS = {
    "missing": (lambda t: t.pop(QUERY), ValueError, f"{QUERY}' of shape \\(64, 64\\) is missing"),
    "no logits": (lambda t: t.pop("lm_head.weight"), ValueError, "lm_head.weight' of shape .* is missing"),
    "not a number": (lambda t: t[QUERY].__setitem__((0, 1), np.nan), ValueError, f"{QUERY}' holds values that are not"),
    "wrong shape": (lambda t: t.update({QUERY: np.zeros((64, 65), np.float32)}), ValueError, "has shape \\(64, 65\\)"),
    "flat": (
        lambda t: t.update({"model.embed_tokens.weight": np.zeros(3, np.float32)}), ValueError, "expected 2 dimensions"
    ),
    "one more": (
        lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": np.ones(16, np.float32)}),
        NotImplementedError,
        "q_norm.weight' has no place in 'llama'",
    ),
    "a bias": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.bias": np.ones(64, np.float32)}),
        NotImplementedError,
        "k_proj.bias' has no place in 'llama'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_named(tmp_path, name):
    change, error, reason = TENSORS[name]
    tiny.write_huggingface(tmp_path, "llama", change=lambda _, tensors: change(tensors))
    message = refused(tmp_path, error)
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: ")
    assert re.search(reason, message), message


def test_windows_of_qwen2(tmp_path):
    def window(**said):
        tiny.write_huggingface(tmp_path, "qwen2", change=lambda config, _: config.update(said))
        return open_decoder(tmp_path).config.window

    assert window(sliding_window=4) is None  # which it also says of models that use none
    assert window(sliding_window=4, use_sliding_window=True, max_window_layers=2) is None
    assert window(sliding_window=4, use_sliding_window=True, max_window_layers=0) == 4
    assert window(sliding_window=4, use_sliding_window=True, layer_types=["sliding_attention"] * 2) == 4


def test_files_that_are_missing_or_too_many(tmp_path):
    assert "no model there" in refused(tmp_path, FileNotFoundError)
    assert "no model there" in refused(tmp_path / "absent.gguf", FileNotFoundError)
    for name in ("a.gguf", "b.gguf"):
        tiny.write_gguf(tmp_path / name, "llama-gqa")
    assert "holds several models (a.gguf, b.gguf); name one" in refused(tmp_path)
    tiny.write_huggingface(tmp_path, "llama")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert "tokenizer.json: not a readable tokenizer" in refused(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json" in refused(tmp_path, FileNotFoundError)


VALUES = {
    "another architecture": ({"general.architecture": "mamba"}, ValueError, "'mamba' is not known here; 'llama' and"),
    "experts": ({"llama.expert_count": 8}, NotImplementedError, "llama.expert_count = 8"),
    "scaled": ({"llama.rope.scaling.type": "yarn"}, NotImplementedError, "llama.rope.scaling.type = 'yarn'"),
    "parts": ({"split.count": 3}, NotImplementedError, "one of 3 parts"),
    "partly rotated": ({"llama.rope.dimension_count": 8}, NotImplementedError, "dimension_count = 8"),
    "values of their own": ({"llama.attention.value_length": 8}, NotImplementedError, "value_length = 8"),
    "blocks": ({"llama.block_count": 9}, ValueError, "llama.block_count = 9, the tensors have 2"),
    "heads of layers": ({"llama.attention.head_count_kv": [1, 4]}, ValueError, "head_count_kv = .1, 4., expected a"),
    "no width": ({"llama.embedding_length": "x"}, ValueError, "llama.embedding_length = 'x', expected"),
    "another tokenizer": ({"tokenizer.ggml.model": "llama"}, NotImplementedError, "put the model's tokenizer.json"),
    "another cut": ({"tokenizer.ggml.pre": "deepseek-llm"}, NotImplementedError, "'gpt2', 'deepseek-llm'"),
    "merges": ({"tokenizer.ggml.merges": ["a b c"]}, ValueError, "'a b c' is no pair"),
    "unknown merge": ({"tokenizer.ggml.merges": ["zq zq"]}, ValueError, "tokenizer.ggml: "),
    "tokens": ({"tokenizer.ggml.tokens": ["a", "a"]}, ValueError, "2 tokens, some alike"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_what_a_gguf_says(tmp_path, name):
    said, error, reason = VALUES[name]
    tiny.write_gguf(tmp_path / "model.gguf", "llama", change=lambda values, _: values.update(said))
    message = refused(tmp_path, error)
    assert message.startswith(f"{tmp_path / 'model.gguf'}: ")
    assert re.search(reason, message), message


@pytest.mark.parametrize(("name", "pieces"), [("gpt-2", ["in", "Ġ42"]), ("smollm", ["in", "Ġ", "4", "2"])])
def test_digits_are_cut_as_the_model_was_trained(name, pieces):
    values = tiny.gguf_values("llama", tiny.CONFIGS["llama"]) | {"tokenizer.ggml.pre": name}
    found = tokenizer_of(gguf_tokenizer(values, Path()), Path())
    assert [piece for piece, _ in found.pre_tokenizer.pre_tokenize_str("in 42")] == pieces


def test_a_gguf_without_tokens_has_weights(tmp_path):
    def change(values, tensors):
        values.pop("tokenizer.ggml.tokens")

    tiny.write_gguf(tmp_path / "model.gguf", "llama", change=change)
    opened = open_decoder(tmp_path)
    assert opened.parameters.read("norm.scale", (64,)).shape == (64,)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.tokens: expected a list of strings"):
        opened.tokenizer()
    with pytest.raises(NotImplementedError, match="tokenizer is None"):
        gguf_tokenizer({}, tmp_path)


def damaged(folder, content, error=ValueError):
    path = folder / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=r"hostile\.gguf: ") as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gguf(*values, tensors=(), count=None, version=3, data=b"\0" * 64):
    """A file of raw values (name, type, data) and tensors (name, dims, type, offset)."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(values) if count is None else count)]
    parts += [text(name) + struct.pack("<I", kind) + raw for name, kind, raw in values]
    for name, dims, kind, offset in tensors:
        parts.append(
            text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)
        )
    whole = b"".join(parts)
    return whole + b"\0" * (-len(whole) % 32) + data


def test_a_gguf_cut_off_anywhere_is_refused(tmp_path):
    tiny.write_gguf(tmp_path / "model.gguf", "llama-gqa", quantised="Q8_0")
    whole = (tmp_path / "model.gguf").read_bytes()
    header = whole.index(b"blk.0.attn_q")
    for length in {*range(0, 300, 7), *range(300, header + 800, 997), len(whole) - 100}:
        reason = damaged(tmp_path, whole[:length])
        assert "empty" in reason or "no GGUF" in reason or f"of {length}" in reason


def test_hostile_lengths_claim_no_memory(tmp_path):
    huge = struct.pack("<Q", 2**62)
    assert "takes 4611686018427387904 bytes" in damaged(tmp_path, gguf(("a", 8, huge)))
    assert "the array 'a' takes" in damaged(tmp_path, gguf(("a", 9, struct.pack("<I", 8) + huge)))
    assert "the array 'a' takes" in damaged(tmp_path, gguf(("a", 9, struct.pack("<I", 4) + huge)))
    assert "members of type 9" in damaged(tmp_path, gguf(("a", 9, struct.pack("<I", 9) + huge)))
    assert "of type 77" in damaged(tmp_path, gguf(("a", 77, b"")))
    assert "damaged at byte" in damaged(tmp_path, gguf(count=2**63))
    one = ("a", 4, struct.pack("<I", 1))
    assert "'a' is there twice" in damaged(tmp_path, gguf(one, one))
    assert "no UTF-8" in damaged(tmp_path, gguf(("a", 8, struct.pack("<Q", 1) + b"\xff")))
    for alignment in (0, 2**31):
        said = ("general.alignment", 4, struct.pack("<I", alignment))
        assert f"general.alignment = {alignment}" in damaged(tmp_path, gguf(said))
    assert "no GGUF file" in damaged(tmp_path, b"GGML" + gguf()[4:])
    assert "version 1 of GGUF" in damaged(tmp_path, gguf(version=1))
    assert "big-endian" in damaged(tmp_path, gguf(version=3 << 24), NotImplementedError)


def test_hostile_tensors(tmp_path):
    def of(*dims, kind=0, offset=0, error=ValueError):
        return damaged(tmp_path, gguf(tensors=[("t", dims, kind, offset)]), error)

    assert "'t' takes 68719476736 bytes" in of(2**17, 2**17)
    assert "'t' takes" in of(2**63, 2**63)
    assert "'t' takes 64 bytes at" in of(16, offset=4)
    assert "is empty" in of(3, 0)
    assert "rank 5" in of(1, 1, 1, 1, 1)
    assert "no whole number of blocks of 32" in of(16, kind=8)
    assert "type 199, not known" in of(16, kind=199, error=NotImplementedError)
    twice = [("t", (4,), 0, 0)] * 2
    assert "'t' is there twice" in damaged(tmp_path, gguf(tensors=twice))
    (tmp_path / "whole.gguf").write_bytes(gguf(tensors=[("t", (4,), 26, 0), ("f", (2, 3), 0, 32)]))
    file = GGUFFile(tmp_path / "whole.gguf")
    assert file.shapes == {"t": (4,), "f": (3, 2)}
    with pytest.raises(NotImplementedError, match="'t' holds whole numbers"):
        file.read("t")


def test_noise_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    for size in (1, 5, 64, 4_096):
        for start in (b"", b"GGUF", b"GGUF" + struct.pack("<I", 3), b"GGUF" + struct.pack("<IQQ", 3, 2, 2)):
            for _ in range(10):
                assert damaged(tmp_path, start + rng.bytes(size), (ValueError, NotImplementedError))


def test_quantised_weights_without_the_package(tmp_path, monkeypatch):
    tiny.write_gguf(tmp_path / "model.gguf", "llama-gqa", quantised="Q8_0")
    tiny.write_gguf(tmp_path / "plain.gguf", "llama-gqa")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(NotImplementedError, match=r"pip install 'slimjax\[gguf\]'"):
        load_decoder(tmp_path / "model.gguf")
    assert load_decoder(tmp_path / "plain.gguf").config.kv_heads == 2


def test_the_config_of_a_converted_model_is_json(tmp_path):
    """What is younger than models in use is left out at its default, and read where it is not."""
    from slimjax.config import ModelConfig, resolved

    assert resolved(ModelConfig()).keys().isdisjoint({"norm_epsilon", "qkv_bias"})
    config = tiny.CONFIGS["qwen2"]
    assert ModelConfig(**json.loads(json.dumps(resolved(config)))) == config
