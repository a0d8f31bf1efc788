"""``slimjax transcribe``: what it prints, and the one line that every mistake gets."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_whisper as tiny
from sounds import tone, write_pcm

from slimjax.cli import main, one_line
from slimjax.cli.transcribe import cache_choice
from slimjax.scheme import parse_scheme


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "model").mkdir()
    tiny.write_ctranslate2(path / "model", tiny.random_model())
    write_pcm(path / "a.wav", tone(440, 16_000))
    write_pcm(path / "b.wav", tone(300, 44_100, channels=2), rate=44_100)
    (path / "bad.wav").write_bytes(b"no sound")
    return path


def test_json_of_two_files(folder, capsys):
    files = [str(folder / name) for name in ("a.wav", "b.wav")]
    arguments = ["transcribe", str(folder / "model"), *files, "--cache", "e:bf16,k:int16", "--json"]
    assert main(arguments) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert [first["audio"], second["audio"]] == files
    assert isinstance(first["text"], str)
    assert first["tokens_per_second"] > 0
    slots, width = tiny.CONFIG.audio_positions, tiny.CONFIG.width
    assert first["cache_bytes"]["cross"] == slots * width * 2
    assert first["cache_bytes"]["self"] == 2 * tiny.CONFIG.text_positions * (width * 2 + 4)
    assert main([*arguments[:-1]]) == 0
    out = capsys.readouterr().out
    assert f"{files[0]}: {first['text']}\n" in out
    assert f"cross {slots * width * 2:,}" in out


def mistakes(folder):
    model, wav = str(folder / "model"), str(folder / "a.wav")
    return {
        "no model": ([str(folder / "absent"), wav], "absent: no such directory"),
        "no weights": ([str(folder), wav], "no model there"),
        "no sound": ([model, str(folder / "absent.wav")], "absent.wav: No such file"),
        "broken sound": ([model, wav, str(folder / "bad.wav")], "bad.wav cannot be read as a wav file"),
        "a directory of sound": ([model, str(folder)], "Is a directory"),
        "no scheme": ([model, wav, "--cache", "kv"], "scheme 'kv' is not of the form"),
        "unknown codec": ([model, wav, "--cache", "kv:bf17"], "unknown codec 'bf17'; did you mean 'bf16'"),
        "three schemes": ([model, wav, "--cache", "kv:bf16,kv:bf16,x:bf16"], "has 3 schemes"),
        "encoder output alone": ([model, wav, "--cache", "e:bf16"], "for example e:bf16,k:int16"),
        "encoder output for both": ([model, wav, "--cache", "e:bf16,e:bf16"], "decoder.0.self: scheme e:bf16"),
        "no plan": ([model, wav, "--cache", "plan.json"], "plan.json: no such plan"),
        "language": ([model, wav, "--language", "de"], "knows English"),
    }  # fmt: skip


def test_every_mistake_is_one_line(folder, capsys):
    for name, (arguments, reason) in mistakes(folder).items():
        assert main(["transcribe", *arguments]) == 2, name
        out, err = capsys.readouterr()
        assert not out, name
        assert err.startswith("slimjax transcribe: error: "), name
        assert err.count("\n") == 1, name
        assert reason in err, (name, err)


def test_no_arguments_and_help(capsys):
    for arguments, status in (([], 2), (["transcribe"], 2), (["nonsense"], 2), (["transcribe", "--help"], 0)):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == status
    assert "cross, then self" in " ".join(capsys.readouterr().out.split())


def test_the_traceback_on_demand(folder):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        main(["transcribe", str(folder / "absent"), str(folder / "a.wav"), "--traceback"])


def test_a_fault_of_ours_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("slimjax.cli.transcribe.load_whisper", lambda _: np.zeros(3)[5])
    with pytest.raises(IndexError):
        main(["transcribe", str(folder / "model"), str(folder / "a.wav")])


def test_choices():
    kv, e, k = map(parse_scheme, ("kv:bf16", "e:bf16", "k:int16+16"))
    assert cache_choice("kv:bf16") == (kv, kv)
    assert cache_choice("e:bf16,k:int16+16") == (e, k)
    assert one_line(ValueError("two\nlines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"


def test_as_a_module(folder):
    command = [sys.executable, "-m", "slimjax.cli", "transcribe", "absent", str(folder / "a.wav")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "slimjax transcribe: error: absent: no such directory\n")
