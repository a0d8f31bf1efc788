"""Models of a few kilobytes on disk, and speech and text for them: what the command line is tried on."""

import json
from typing import Any

import numpy as np
import tiny_whisper as tiny
from flax import nnx
from sounds import tone, write_pcm

from slimjax import checkpoint
from slimjax.cli import main
from slimjax.config import DataConfig, ModelConfig
from slimjax.models.decoder import DecoderLM
from slimjax.pretrained import describe
from slimjax.pytree import pytree

LAYERS = ("decoder.0.self", "decoder.0.cross", "decoder.1.self", "decoder.1.cross")
CHUNK = tiny.SAMPLES  # of the tiny Whisper's encoder
DECODER = ModelConfig(layers=2, width=16, heads=2, mlp_width=16, max_length=64)


@pytree
class State:
    """What training saves, as far as ``slimjax.pretrained`` looks at it."""

    params: Any


def write_speech(folder, count=5):
    """Clips of one chunk, each another tone; their paths."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        write_pcm(folder / f"{index}.wav", tone(300 + 150 * index, 16_000, CHUNK / 16_000))
    return [str(folder / f"{index}.wav") for index in range(count)]


def write_whisper(folder, seed=0, change=None):
    """A CTranslate2 directory in float32; ``change`` may alter the arrays."""
    folder.mkdir()
    arrays = tiny.ctranslate2_arrays(tiny.random_model(seed=seed))
    if change is not None:
        change(arrays)
    (folder / "model.bin").write_bytes(tiny.ctranslate2_bytes(arrays, dtype="float32"))
    tiny.write_tokenizer(folder)
    return str(folder)


def write_decoder(folder, config=DECODER, seed=0):
    """A folder of checkpoints with a random decoder in it."""
    model = DecoderLM(config, rngs=nnx.Rngs(seed))
    describe(folder, config, DataConfig())
    checkpoint.save(folder, 1, State(params=nnx.state(model, nnx.Param)))
    return str(folder)


def write_text(path, size=2000):
    """Letters and spaces."""
    letters = np.random.default_rng(1).integers(97, 123, size)
    path.write_bytes(bytes(letters.astype(np.uint8).tolist()))
    return str(path)


def self_keys(arrays, layer=0):
    """W_K of a self-attention in CTranslate2's arrays, [E, D]: a view to write to."""
    fused = arrays[f"decoder/layer_{layer}/self_attention/linear_0/weight"]
    return fused[len(fused) // 3 : 2 * len(fused) // 3]


def lose_directions(arrays, count, layer=0):
    """Make ``count`` input directions invisible to a self-attention's keys."""
    keys = self_keys(arrays, layer)
    values = np.linalg.svd(keys)
    keys[:] = (values.U[:, :-count] * values.S[:-count]) @ values.Vh[:-count]


def run(capsys, *arguments):
    """Status, stdout and stderr of a command."""
    status = main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def succeed(capsys, *arguments):
    """stdout of a command that must do well; JSON where it was asked for."""
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    return json.loads(out) if "--json" in arguments else out


def refuse(capsys, *arguments):
    """The one line of a command that must refuse with status 2."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, ""), (status, out, err)
    assert err.startswith(f"slimjax {arguments[0]}: error: ")
    assert err.count("\n") == 1, err
    return err
