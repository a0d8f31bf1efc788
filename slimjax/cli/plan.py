"""Choose for every layer what to cache, within an error or a byte budget, and write that to a plan."""

import argparse
import dataclasses
import json
from pathlib import Path

from slimjax.cli.table import aligned, figure
from slimjax.material import calibrate, material
from slimjax.models.opened import KINDS, open_model
from slimjax.scheme import parse_scheme, parse_schemes
from slimjax.solve.plan import Plan, make_plan
from slimjax.solve.planfile import plan_content, save_plan
from slimjax.solve.together import plan_with_fixed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the data, one budget, OUT."""
    parser.add_argument("model", metavar="MODEL", help=KINDS)
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        nargs="+",
        default=[],
        help="wav files for a Whisper; text files, or corpus (what it was trained on), for a decoder; without "
        "it errors are predicted from the weights",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--max-error", type=float, metavar="ERROR", help="relative error of a layer's keys or values"
    )
    budget.add_argument(
        "--max-bytes-per-token", type=float, metavar="N", help="of all layers' caches together"
    )
    parser.add_argument(
        "--schemes",
        metavar="SCHEME,...",
        help="what may be chosen; default k:int16 with R from 0 on, v:int16 unless keys are narrower than inputs, "
        "x:bf16, x:int16, x:int8 (under RoPE v1 and x1), kv:int8, kv:bf16, kv:int16",
    )
    parser.add_argument(
        "--cross",
        metavar="SCHEME",
        help="of all cross-attention layers, such as e:bf16, one cache for all of them",
    )
    parser.add_argument(
        "--tokens", type=int, default=16_384, metavar="N", help="of text at most; default %(default)s"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PLAN.json", help="where to write the plan"
    )
    parser.add_argument("--json", action="store_true", help="print the plan instead of a table")


def run(options: argparse.Namespace) -> int:
    """Plan, write, print."""
    schemes = None if options.schemes is None else parse_schemes(options.schemes)
    cross = None if options.cross is None else parse_scheme(options.cross)
    if options.output.suffix != ".json":
        raise ValueError(f"{options.output}: a plan is a .json file")
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"{options.output.parent}: no such directory")
    model = open_model(options.model)
    calibrations, described = None, ""
    if options.calibrate:
        calibrations, described = calibrate(material(model, options.calibrate, tokens=options.tokens))
    layers = tuple(model.layers())
    settings = {
        "max_error": options.max_error,
        "max_bytes_per_token": options.max_bytes_per_token,
        "schemes": schemes,
        "described": described,
    }
    if cross is None:
        plan = make_plan(layers, calibrations, **settings)
    else:
        plan = plan_with_fixed(layers, calibrations, cross, **settings)
    plan = dataclasses.replace(plan, digest=model.digest)  # a converted model goes by its source's weights
    save_plan(options.output, plan)
    print(json.dumps(plan_content(plan), indent=2) if options.json else text(plan))
    return 0


def text(plan: Plan) -> str:
    """The table of layers, the totals and the break-even."""
    head = ["layer", "scheme", "error", "fitted on", "exact", "cond", "bytes", "weights", "why"]
    rows = [
        [
            choice.name,
            choice.scheme,
            figure(choice.error),
            figure(choice.calibration_error),
            figure(choice.exact_error),
            figure(choice.condition_number),
            f"{choice.bytes_per_token:,}",
            f"{choice.weight_bytes:+,}",
            f"{choice.reason} ({choice.how})" if choice.how else choice.reason,
        ]
        for choice in plan.layers
    ]
    total, ordinary = plan.bytes_per_token, plan.kv_bytes_per_token
    weights = sum(choice.weight_bytes for choice in plan.layers)
    if plan.break_even is None:
        turn = "it never reads less than kv:bf16"
    else:
        turn = f"reads less than kv:bf16 from batch x context = {plan.break_even:,} cached tokens on"
    return "\n".join(
        [
            f"calibration: {plan.calibration}",
            "error: held-out (or predicted); fitted on: the same on calibration rows; exact: of the exact inverse",
            "",
            aligned(head, rows, (0, 1, 8)),
            "",
            f"bytes per token: {total:,}, kv:bf16 {ordinary:,} ({ordinary / total:.2f}x)",
            f"solved weights: {weights:+,} bytes a step; {turn}",
        ]
    )
