"""Compare planned caches with the full-precision model on your own data; status 1 past a threshold."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from slimjax.cli.table import aligned, figure
from slimjax.material import material
from slimjax.models.convert import check_plan
from slimjax.models.opened import KINDS, OpenedModel, open_model
from slimjax.solve.plan import Plan
from slimjax.solve.planfile import load_plan
from slimjax.verify import Verdict, finite_or_none, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the plan, the data, the thresholds."""
    parser.add_argument("model", metavar="MODEL", help=KINDS)
    parser.add_argument(
        "--plan", type=Path, metavar="PLAN.json", help="default: the one that a converted MODEL has"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="DATA",
        help="wav files; text files, or corpus (its held-out part)",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the original of a converted MODEL, to compare with; default MODEL itself",
    )
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="ERROR",
        help="of every layer; default: twice the plan's budget or the layer's planned error",
    )
    parser.add_argument(
        "--max-kl", type=float, metavar="NATS", help="of the logits; default: twice that of kv:bf16"
    )
    parser.add_argument("--min-agreement", type=float, default=0.0, metavar="SHARE", help="of top-1 tokens")
    parser.add_argument(
        "--tokens", type=int, default=16_384, metavar="N", help="of text at most; default %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Measure and judge: 0 where everything is within its limit, else 1."""
    model = open_model(options.model)
    plan = model.plan if options.plan is None else load_plan(options.plan)
    if plan is None:
        raise ValueError(f"{options.model} is not a converted model: name its plan, --plan PLAN.json")
    exact = model if options.reference is None else open_model(options.reference)
    check_plan(plan, model)
    check_plan(plan, exact)
    found = material(exact, options.data, tokens=options.tokens, held_out=True)
    verdict = verify(
        exact,
        plan,
        found,
        max_error=options.max_error,
        max_kl=options.max_kl,
        min_agreement=options.min_agreement,
    )
    if options.json:
        print(json.dumps(as_json(exact, plan, verdict), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(as_text(exact, verdict))
    return 1 if verdict.failures else 0


def as_json(model: OpenedModel, plan: Plan, verdict: Verdict) -> dict[str, Any]:
    """The object that ``--json`` prints."""

    def scores(which: str) -> dict[str, Any]:
        found = dataclasses.asdict(getattr(verdict, which))
        return {name: finite_or_none(x) if isinstance(x, float) else x for name, x in found.items()}

    return {
        "model": str(model.directory),
        "weights": plan.digest,
        "data": verdict.data,
        "passed": not verdict.failures,
        "failures": list(verdict.failures),
        "layers": [
            dataclasses.asdict(e) | {"error": finite_or_none(e.error), "passed": e.passed}
            for e in verdict.layers
        ],
        "planned": scores("scores"),
        "kv_bf16": scores("ordinary"),
        "limits": {"logit_kl": finite_or_none(verdict.max_kl), "top1_agreement": verdict.min_agreement},
    }


def as_text(model: OpenedModel, verdict: Verdict) -> str:
    """Tables, and what failed."""
    layers = [
        [
            each.name,
            each.scheme,
            figure(each.error),
            figure(each.planned),
            figure(each.limit),
            _mark(each.passed),
        ]
        for each in verdict.layers
    ]
    scored = []
    for name, scores in (("planned", verdict.scores), ("kv:bf16", verdict.ordinary)):
        same = "-" if scores.same is None else f"{scores.same:.0%}"
        scored.append([name, f"{scores.logit_kl:.2e}", f"{scores.top1_agreement:.4f}", same])
    note = []
    if model.plan is not None:
        note = [
            "W_V of a converted model was multiplied out of its map; --reference compares with the original"
        ]
    return "\n".join(
        [
            f"{model.directory} on {verdict.data}",
            *note,
            "",
            aligned(["layer", "scheme", "error", "planned", "limit", ""], layers, (0, 1)),
            "",
            aligned(["caches", "KL of logits", "top-1 agreement", "equal transcripts"], scored),
            "",
            *(f"past its limit: {line}" for line in verdict.failures),
            "passed" if not verdict.failures else "failed",
        ]
    )


def _mark(passed: bool) -> str:
    return "ok" if passed else "past"
