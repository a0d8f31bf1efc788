"""What every attention layer of a model could cache, and how well: shapes, conditioning, predicted errors."""

import argparse
import json
from typing import Any

import numpy as np

from slimjax.cli.table import aligned, figure
from slimjax.models.opened import KINDS, OpenedModel, open_model
from slimjax.scheme import Scheme, parse_schemes
from slimjax.solve.linear import condition_number
from slimjax.solve.measure import first_layer_option
from slimjax.solve.options import Layer, Option, option

SCHEMES = "kv:bf16,k:bf16,k:int16,k:int16+16,v:bf16,v:int16,x:bf16,x1:bf16"
SHARED = "e:bf16,h:int16"  # looked at on cross-attention layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the schemes to look at, --json."""
    parser.add_argument("model", metavar="MODEL", help=KINDS)
    parser.add_argument(
        "--schemes",
        metavar="SCHEME,...",
        help=f"what to predict errors of; default {SCHEMES}, and for cross-attention {SHARED}",
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of tables")


def run(options: argparse.Namespace) -> int:
    """Print the figures of every layer; errors are predicted for white inputs, from weights alone."""
    chosen = None if options.schemes is None else parse_schemes(options.schemes)
    model = open_model(options.model)
    layers, first = [], None
    for layer in model.layers():
        if not layer.spec.causal and first is None:
            first = layer
        layers.append(describe(layer, chosen, first))
    report = {
        "model": str(model.directory),
        "kind": model.kind,
        "layout": model.layout,
        "weights": model.digest,
        "converted": model.plan is not None,
        "layers": layers,
    }
    print(json.dumps(report, indent=2, allow_nan=False) if options.json else _text(model, layers))
    return 0


def describe(layer: Layer, schemes: tuple[Scheme, ...] | None, first: Layer | None) -> dict[str, Any]:
    """The figures of a layer as JSON; numbers that are infinite (a singular matrix) are None.

    rank is that of W_K: singular values above the largest times max(D, E) times float32's spacing.
    """
    spec = layer.spec
    if schemes is None:
        schemes = parse_schemes(SCHEMES if spec.causal else f"{SCHEMES},{SHARED}")
    values = np.linalg.svd(layer.keys, compute_uv=False)
    least = values[0] * max(layer.keys.shape) * np.finfo(np.float32).eps
    return {
        "name": layer.name,
        "attention": "MHA" if spec.group == 1 else "MQA" if spec.kv_heads == 1 else "GQA",
        "D": spec.width,
        "E": spec.key_width,
        "N": spec.heads,
        "K": spec.kv_heads,
        "H": spec.head_dim,
        "E/D": spec.key_width / spec.width,
        "position": spec.position.kind,
        "condition_number_wk": _number(condition_number(layer.keys)),
        "condition_number_wv": _number(condition_number(layer.values)),
        "rank_wk": int(np.sum(values > least)),
        "schemes": [_scheme(_option(layer, scheme, first)) for scheme in schemes],
    }


def _option(layer: Layer, scheme: Scheme, first: Layer | None) -> Option:
    if scheme.basis == "h":
        return first_layer_option(layer, scheme, None, first or layer)
    return option(layer, scheme, None)


def _scheme(found: Option) -> dict[str, Any]:
    line: dict[str, Any] = {"scheme": str(found.scheme), "applies": found.refused is None}
    if found.refused is not None:
        return line | {"refused": found.refused}
    return line | {
        "predicted_error": _number(found.error),
        "bytes_per_token": found.bytes_per_token,
        "extra_weight_bytes": found.weight_bytes,
        "condition_number": _number(found.condition_number),
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _text(model: OpenedModel, layers: list[dict[str, Any]]) -> str:
    """Shapes, then predicted errors, then the reasons of what is refused, each reason once."""
    shapes = [
        [
            line["name"],
            line["attention"],
            *(str(line[name]) for name in "DENKH"),
            f"{line['E/D']:.2f}",
            figure(line["condition_number_wk"]),
            figure(line["condition_number_wv"]),
            f"{line['rank_wk']} of {min(line['D'], line['E'])}",
        ]
        for line in layers
    ]
    head = ["layer", "kind", *"DENKH", "E/D", "cond(W_K)", "cond(W_V)", "rank(W_K)"]
    names = list(dict.fromkeys(each["scheme"] for line in layers for each in line["schemes"]))
    errors, reasons = [], {}
    for line in layers:
        found = {each["scheme"]: each for each in line["schemes"]}
        cells = []
        for name in names:
            each = found.get(name)
            if each is None:
                cells.append("")
            elif each["applies"]:
                cells.append(figure(each["predicted_error"]))
            else:
                cells.append("no")
                reason = each["refused"].removeprefix(f"{line['name']}: ")
                reasons.setdefault((name, reason), []).append(line["name"])
        errors.append([line["name"], *cells])
    refused = [
        f"{name}, {where[0] if len(where) == 1 else f'{len(where)} layers'}: {reason}"
        for (name, reason), where in reasons.items()
    ]
    text = [
        f"{model.directory}: {model.kind}, {model.layout}, weights {model.digest}",
        "",
        aligned(head, shapes, (0, 1)),
        "",
        "predicted error of keys or values (relative L2, white inputs; slimjax plan --calibrate measures real ones)",
        aligned(["layer", *names], errors),
    ]
    return "\n".join(text + (["", "refused:", *refused] if refused else []))
