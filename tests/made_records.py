"""Records of the comparison with figures made up, for tests of its report."""

import numpy as np

from experiments import schemes
from slimjax.records import Record
from slimjax.report import findings
from slimjax.scheme import parse_scheme

NOISE = np.random.default_rng(0).normal(size=32).tolist()
SIZES = {
    "bf16": 1024,
    "flashq4": 272,
    "flashq2-4": 208,
    "flashq2": 144,
    "gear_l4": 320,
    "kivi4": 288,
    "kivi2": 160,
    "xquant4": 130,
    "nvfp4": 280,
}


def record(scheme, kl, *, study="main", model="lm", noise=0.01, **more):
    """A record of a scheme: its blocks are the KL, 1 + noise times; noise is the same one for every scheme."""
    cell = {
        "experiment": "compare",
        "study": study,
        "model": model,
        **schemes.parts(parse_scheme(scheme)),
        "seed": 0,
    }
    name = f"{cell['codec']}{cell['bits'] or ''}"
    blocks = [kl * (1 + noise * each) for each in NOISE]
    size = SIZES.get(name, 200)
    metrics = {
        "logit_kl": kl,
        "logit_kl_blocks": blocks,
        "logit_kl_low": kl * 0.9,
        "logit_kl_high": kl * 1.1,
        "perplexity": 10 * (1 + kl),
        "bytes_per_token": size,
        "compression": 1024 / size,
        "count": 4096,
    }
    place = {
        key: value
        for key, value in more.items()
        if key in ("selector", "fraction", "protected", "protect", "protection", "length", "prompt")
    }
    extra = {key: value for key, value in more.items() if key not in place}
    return Record(cell | place, metrics | extra)


def said(records, start):
    """The one sentence that has this in it."""
    (text,) = (text for text in findings(records) if start in text)
    return text


def noisy(scheme, kl, seed, spread=1.0, **more):
    """A record whose blocks are independent of those of other seeds."""
    made = record(scheme, kl, **more)
    values = np.random.default_rng(seed).normal(kl, spread * kl, 32).tolist()
    return Record(made.cell, made.metrics | {"logit_kl_blocks": values})
