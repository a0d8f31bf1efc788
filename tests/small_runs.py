"""Runs of a few hundred numbers and a few steps: a text with something to learn, and configs around it."""

import random

import tiny_cli
from flax import nnx

from experiments import run
from slimjax import checkpoint
from slimjax.models.decoder import DecoderLM
from slimjax.pretrained import describe

MODEL = """
Data.path = {text!r}
Data.held_out_percent = 30.0
Model.layers = 1
Model.width = 16
Train.steps = 6
Train.warmup = 1
Train.batch = 2
Train.length = 16
Train.log_every = 2
"""
HEADS = "Model.heads = 2\n"
MEASURED = """
Equivalence.schemes = ('kv:bf16', 'k:int16', 'x:bf16')
Equivalence.dtypes = ('float32',)
Equivalence.tokens = 64
Equivalence.length = 16
Equivalence.generated = 4
Equivalence.prompts = 2
Equivalence.prompt_length = 8
"""


def write(folder, experiment, *parts):
    """A config of an experiment in `folder`, beside its text; `{text}` in a part is where that lies."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    words = random.Random(0)
    for index in range(10):
        sentence = " ".join(words.choices(("cache", "key", "value", "query", "head"), k=200))
        (text / f"{index}.txt").write_text(sentence)
    path = folder / f"{experiment}.gin"
    body = f"Run.experiment = {experiment!r}\n" + "".join(parts)
    path.write_text(body.replace("{text!r}", repr(str(text))))
    return path


def write_model(folder, sizes, data, seed=0):
    """A decoder of those sizes, untrained, as training leaves one."""
    describe(folder, sizes, data)
    params = nnx.state(DecoderLM(sizes, rngs=nnx.Rngs(seed)), nnx.Param)
    checkpoint.save(folder, 1, tiny_cli.State(params=params))


def launched(config, out, *arguments):
    """The exit status of the config's run in `out`."""
    return run.main([str(config), "--out", str(out), *map(str, arguments)])
