"""The cost model against real caches, brute force and hand calculation; model files; the command; the experiment."""

import dataclasses
import json
import math

import pytest
import tiny_cli

from slimjax import cli
from slimjax.attention.layer import init_cache
from slimjax.attention.positions import Position
from slimjax.cost import hf, model, paper, workload
from slimjax.cost.architectures import ARCHITECTURES, Architecture, architecture
from slimjax.cost.chips import Chip, chip
from slimjax.cost.workload import Workload, schemes_for
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import parse_scheme

TOY = Architecture(
    name="toy", width=48, heads=4, kv_heads=4, head_dim=12, layers=3, mlp_width=96, vocab=50, context=64
)
LISTENER = dataclasses.replace(TOY, name="listener", position="learned", encoder_tokens=20)


def at(a: Architecture, text: str, batch: int = 1, context: int = 64, **fields: object) -> Workload:
    return Workload(architecture=a, schemes=schemes_for(a, text), batch=batch, context=context, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["none", "rope"])
@pytest.mark.parametrize(
    "text",
    ["kv:bf16", "kv:int8", "k:int16", "k1:bf16", "k:int16+16", "kr:int16+8", "v1:int8", "x1:int8", "e:int8", "h:int8"],
)  # fmt: skip
def test_bytes_are_those_of_real_caches(text, kind):
    scheme = parse_scheme(text)
    a = dataclasses.replace(TOY, position=kind)
    cross = scheme.basis in ("e", "h")
    if reason := model.refusal(a, scheme, cross=cross):
        assert (text, kind) == ("kr:int16+8", "none"), reason
        return
    position = Position(kind="none" if cross else kind)
    spec = DecodeSpec(
        scheme=scheme, heads=4, kv_heads=4, head_dim=12, width=48, position=position, causal=not cross
    )  # fmt: skip
    assert model.cache_bytes(a, scheme, batch=2, tokens=5) == init_cache(spec, batch=2, capacity=5).nbytes


def test_refusals_are_those_of_the_layers():
    narrow = Architecture(name="gqa", width=48, heads=4, kv_heads=2, head_dim=12, layers=1)
    assert "RoPE" in (model.refusal(TOY, parse_scheme("x:bf16")) or "")
    assert "24 extra" in (model.refusal(narrow, parse_scheme("k:int16")) or "")
    assert model.refusal(narrow, parse_scheme("k:int16+24")) is None
    assert "cross attention" in (model.refusal(TOY, parse_scheme("e:bf16")) or "")
    assert "basis e" in (model.refusal(LISTENER, parse_scheme("x:bf16"), cross=True) or "")
    with pytest.raises(NotImplementedError, match=r"x:bf16: RoPE"):
        at(TOY, "x:bf16")
    with pytest.raises(ValueError, match="takes one scheme, not 2"):
        at(TOY, "k:bf16,k:bf16")
    with pytest.raises(ValueError, match="batch"):
        at(TOY, "k:bf16", batch=0)


@pytest.mark.parametrize("name", ["Llama-2-7B", "CodeGemma-7B"])
@pytest.mark.parametrize("text", ["k:bf16", "k:int16", "k:int16+16", "k:int8", "v1:bf16", "x1:bf16"])
def test_break_even_is_where_a_layer_starts_to_read_less(name, text):
    a, scheme, vanilla = architecture(name), parse_scheme(text), parse_scheme("kv:bf16")

    def less(tokens: int) -> bool:
        def reads(each):
            return model.weights(a, each).nbytes() + model.cache_bytes(a, each, tokens=tokens)

        return reads(scheme) < reads(vanilla)

    even = model.break_even(a, scheme, vanilla)
    assert even is not None
    assert less(even)
    assert even == 1 or not less(even - 1)
    assert even == next(n for n in range(1, 10_000) if less(n))


def test_break_even_counts_the_float32_weights():
    """E*E*4 against D*E*2 bytes: 33.5 MB a layer of Llama-2-7B, won back by 2E bytes per token, so past 4096."""
    a = architecture("Llama-2-7B")
    extra = (
        model.weights(a, parse_scheme("k:bf16")).nbytes() - model.weights(a, parse_scheme("kv:bf16")).nbytes()
    )
    assert extra == 4096 * 4096 * 2
    assert round(extra / 1e6, 1) == 33.6
    assert model.break_even(a, parse_scheme("k:bf16"), parse_scheme("kv:bf16")) == 4097
    t5 = architecture("T5-11B")
    assert round(model.weights(t5, parse_scheme("k:bf16")).solved * 4 / 1e9, 2) == 1.07
    assert model.break_even(a, parse_scheme("kv:float32"), parse_scheme("kv:bf16")) is None


@pytest.mark.parametrize("text", ["k:int16+16", "e:bf16,k:int16", "h:int16,k:int16", "kv:int8"])
def test_break_even_of_an_encoder_decoder_is_a_batch(text):
    a = architecture("Whisper-large")
    even = workload.break_even(at(a, text, context=448))
    wins = [
        workload.read_bytes(at(a, text, b, 448)) < workload.read_bytes(at(a, "kv:bf16", b, 448))
        for b in range(1, 9)
    ]
    assert even == wins.index(True) + 1
    assert all(wins[even - 1 :])


@pytest.mark.parametrize(
    ("extra", "saved"), [(10, 3), (9, 3), (-5, 2), (-5, 0), (0, 0), (5, -1), (-5, -1), (0, 2)]
)
def test_first_gain_by_brute_force(extra, saved):
    holds = [n * saved > extra for n in range(1, 100)]
    lasting = [n for n in range(1, 100) if all(holds[n - 1 :])]
    assert model.first_gain(extra, saved) == (lasting[0] if lasting else None)


def test_a_step_by_hand():
    w = at(TOY, "k:int16+4", batch=5, context=10)
    d, n, h, layers, r, s = 48, 4, 12, 3, 4, 10
    kept = layers * (2 * d * n * h + d * d + d * r + 3 * d * 96) + 50 * d
    solved = layers * (d + r) * d
    assert workload.weight_reads(w) == 2 * kept + 4 * solved
    assert workload.cache_bytes(w) == layers * 5 * s * (
        2 * (d + r) + 4 + 4
    )  # two scales: keys, extra coordinates
    rest = layers * 3 * d * 96 + 50 * d
    layer = 4 * d * d + 2 * d * (d + r) + 2 * (d + r) * d + n * (2 * s * h + 2 * s * (d + r))
    assert workload.operations(w) == 5 * (2 * rest + layers * layer)
    slow = Chip(name="slow", tops=1e-6, bandwidth=1e-3, source="")
    assert workload.seconds(w, slow) == max(workload.read_bytes(w) / 1e6, workload.operations(w) / 1e6)
    assert not workload.memory_bound(w, slow)


def test_an_encoder_cache_is_read_by_every_layer_unless_it_stays_on_the_chip():
    w = at(LISTENER, "e:bf16,kv:bf16", batch=2)
    cached = 2 * 20 * 48 * 2
    assert workload.cross_cache(w) == cached
    assert workload.cache_reads(w) - workload.self_cache(w) == 3 * cached
    room = Chip(name="room", tops=1, bandwidth=1, on_chip=cached / 1e6, source="")
    assert workload.cache_reads(workload.placed(w, room)) == workload.self_cache(w)
    tight = dataclasses.replace(room, on_chip=(cached - 1) / 1e6)
    assert not workload.placed(w, tight).encoder_on_chip
    assert not workload.placed(at(LISTENER, "kv:bf16"), room).encoder_on_chip


def test_what_fits_fits_and_one_more_does_not():
    memory = chip("H200")
    for text in ("kv:bf16", "k:int16+16"):
        w = at(architecture("Llama-2-7B"), text, batch=3, context=4096)
        batch, context = workload.largest_batch(w, memory), workload.largest_context(w, memory)
        assert batch is not None
        assert context is not None

        def held(**sizes: int) -> float:
            return workload.stored_weights(w) + workload.cache_bytes(dataclasses.replace(w, **sizes))  # noqa: B023

        assert held(batch=batch) <= 141e9 < held(batch=batch + 1)
        assert held(context=context) <= 141e9 < held(context=context + 1)


def test_an_encoder_leaves_less_room():
    w, memory = at(architecture("Whisper-large"), "k:int16+16", batch=64, context=448), chip("H100")
    context = workload.largest_context(w, memory)
    assert context is not None
    free = 80e9 - workload.stored_weights(w)
    assert workload.cache_bytes(dataclasses.replace(w, context=context)) <= free
    assert workload.cache_bytes(dataclasses.replace(w, context=context + 1)) > free


@pytest.mark.parametrize(
    (
        "text",
        "square",
    ),  # bytes per layer and D^2, over 2-byte W_K and W_V: 4 for a solved matrix, -2 for a dropped one
    [
        ("kv:bf16", 0),
        ("kv:bf16,k:bf16", 2),
        ("k:bf16,kv:bf16", 2),
        ("e:bf16", 0),
        ("h:bf16", 4 - 2 + 3 * (8 - 4)),
    ],
)
def test_stored_weights_by_hand(text, square):
    tiny = architecture("Whisper-tiny")
    layers = 1 if text.startswith("h") else 4
    assert workload.stored_weights(at(tiny, text)) == 38e6 * 2 + layers * square * 384**2


def test_first_token_the_cross_phase_halves_and_vanishes():
    phases = [
        workload.cross_phase_operations(at(LISTENER, text)) for text in ("kv:bf16", "k:bf16", "e:bf16,k:bf16")
    ]
    assert phases == [3 * 4 * 20 * 48 * 48, 3 * 2 * 20 * 48 * 48, 0]
    times = [
        workload.first_token_seconds(at(LISTENER, text), chip("H200"))
        for text in ("kv:bf16", "e:bf16,kv:bf16")
    ]
    assert times[1] < times[0]


@pytest.mark.parametrize("a", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_every_architecture_has_a_cost(a):
    w = at(a, "kv:bf16", batch=2, context=max(a.context or 0, 1))
    assert workload.speedup(w, chip("H200")) == 1
    assert math.isfinite(workload.first_token_seconds(w, chip("TPU v5p")))
    assert workload.read_bytes(at(a, "kv:int8", 2, max(a.context or 0, 1))) < workload.read_bytes(w)


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": 9}
WHISPER = {
    "model_type": "whisper", "d_model": 384, "decoder_attention_heads": 6, "decoder_layers": 4,
    "max_target_positions": 448, "max_source_positions": 1500, "decoder_ffn_dim": 1536, "vocab_size": 51865,
}  # fmt: skip
T5 = {
    "model_type": "t5",
    "d_model": 1024,
    "num_heads": 128,
    "d_kv": 128,
    "num_layers": 24,
    "d_ff": 65536,
    "vocab_size": 32128,
}
MPT = {
    "model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 8, "vocab_size": 9,
    "attn_config": {"alibi": True},
}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 9}


def test_a_config_is_read_from_a_directory_or_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        a = hf.find(str(path))
        assert (a.width, a.heads, a.kv_heads, a.head_dim, a.layers, a.context) == (64, 8, 2, 8, 2, 256)
    (tmp_path / "config.json").write_text(
        json.dumps({"width": 64, "heads": 2, "layers": 1, "position": "alibi"})
    )
    assert hf.find(str(tmp_path)).position == "alibi"


def test_other_families():
    assert hf.from_config(GPT2, "g").position == "learned"
    assert hf.from_config(MPT, "m").position == hf.from_config(BLOOM, "b").position == "alibi"
    whisper, tiny = hf.from_config(WHISPER, "w"), architecture("Whisper-tiny")
    shared = {"name": "w", "parameters": None, "publisher": "", "year": None}
    assert whisper == dataclasses.replace(tiny, **shared)
    t5, big = hf.from_config(T5, "t"), architecture("T5-11B")
    assert (t5.key_width, t5.mlp_matrices) == (big.key_width, 2)
    assert workload.other_weights(t5) == workload.other_weights(big)


@pytest.mark.parametrize("kind", ["whisper", "decoder"])
def test_models_as_every_command_takes_them(kind, tmp_path, capsys):
    """Trained ones, and what `slimjax convert` made of them: one architecture; no weights are read."""
    source, out = tmp_path / kind, tmp_path / "out"
    (tiny_cli.write_whisper if kind == "whisper" else tiny_cli.write_decoder)(source)
    plan = str(tmp_path / "plan.json")
    assert cli.main(["plan", str(source), "--max-error", "1", "--schemes", "k:int16+4", "-o", plan]) == 0
    assert cli.main(["convert", str(source), "--plan", plan, "-o", str(out)]) == 0
    for tensors in out.glob("*.safetensors"):
        tensors.unlink()
    found = [dataclasses.replace(hf.find(str(place)), name="") for place in (source, out)]
    assert found[0] == found[1]
    assert (found[0].width, found[0].heads, found[0].layers, found[0].kv_heads) == (16, 2, 2, 2)
    assert found[0].encoder_decoder == (kind == "whisper")
    capsys.readouterr()
    reports = [
        tiny_cli.succeed(capsys, "cost", place, "--context", "64", "--json") for place in (source, out)
    ]
    assert reports[0]["schemes"] == reports[1]["schemes"]


def test_a_converted_model_that_is_damaged_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "slimjax", "slimjax": {}}))
    assert "expected a section 'slimjax'" in tiny_cli.refuse(capsys, "cost", tmp_path)
    (tmp_path / "config.json").unlink()
    assert "no model there" in tiny_cli.refuse(capsys, "cost", tmp_path)


BROKEN = [
    ("{", "not JSON"),
    ("[]", "not a JSON object"),
    (json.dumps(LLAMA | {"model_type": "lama"}), "unknown architecture 'lama'; did you mean 'llama'"),
    (json.dumps({"architectures": ["X"]}), "unknown architecture None"),
    (json.dumps(LLAMA | {"hidden_size": "64"}), "hidden_size = '64': expected a positive whole number"),
    (json.dumps({k: v for k, v in LLAMA.items() if k != "vocab_size"}), "no field 'vocab_size'"),
    (json.dumps(LLAMA | {"hidden_size": 65}), "not a multiple"),
    (json.dumps(LLAMA | {"num_key_value_heads": 3}), "not a multiple"),
    (json.dumps(LLAMA | {"sliding_window": 64}), "layers that forget"),
]


def command(*words: str) -> int:
    return cli.main(["cost", *words])


@pytest.mark.parametrize(("text", "problem"), BROKEN)
def test_a_broken_config_is_one_line(text, problem, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert command(str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("lama-7b",), "unknown model"),
        (("./none",), "no such file or directory"),
        (("Llama-2-7B", "--chip", "H20"), "did you mean 'H200'"),
        (("Llama-2-7B", "--batch", "0"), "--batch 0: expected a positive number"),
        (("Llama-2-7B", "--schemes", "k:in16"), "did you mean 'int16'"),
        (("Llama-2-7B", "--schemes", "k:bf16,k:bf16"), "takes one scheme"),
        (("Llama-2-7B", "--encoder-tokens", "9"), "no encoder"),
        (("Llama-2-7B", "--weight-bytes", "nan"), "expected a positive number"),
    ],
)
def test_wrong_arguments_are_one_line(words, problem, capsys):
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_the_table_and_the_object_agree(capsys):
    words = ("llama-2-7b", "--batch", "16", "--chip", "tpu-v5p")
    assert command(*words) == 0
    text = capsys.readouterr().out
    assert command(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["scheme"]: row for row in found["schemes"]}
    assert "RoPE" in rows["x:bf16"]["refused"]
    assert "refused: x:bf16: RoPE" in text
    row = rows["k:int16+16"]
    w = at(architecture("Llama-2-7B"), "k:int16+16", 16, 4096)
    assert row["cache_bytes"] == workload.cache_bytes(w)
    assert row["speedup"] == workload.speedup(w, chip("TPU v5p"))
    assert row["break_even"] == 4165
    assert f"{row['speedup']:.2f}x" in text
    assert found["context"] == 4096


def test_an_encoder_decoder_has_two_caches(capsys):
    assert command("whisper-tiny", "--chip", "TPU v4", "--json") == 0
    rows = {row["scheme"]: row for row in json.loads(capsys.readouterr().out)["schemes"]}
    assert rows["e:bf16,k:int16+16"]["encoder_on_chip"]
    assert rows["k:int16+16,k:int16+16"]["compression"] > 1.85
    assert command("whisper-tiny") == 0
    assert "the shared cache stays on the chip" in capsys.readouterr().out


def test_scheme_rows_are_in_bytes_and_count_solved_weights():
    w = paper.on(architecture("CodeLlama-7B"), "k:bf16", 1, None)
    found = paper.scheme_metrics(w)
    assert found["compression"] == 2
    assert found["bytes_per_token"] == 32 * 4096 * 2
    assert found["break_even"] == 4097
    with pytest.raises(ValueError, match="context is not known"):
        paper.on(dataclasses.replace(TOY, context=None), "k:bf16", 1, None)
