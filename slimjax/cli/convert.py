"""Write a model by a plan, without the weights that its caches make unnecessary."""

import argparse
from pathlib import Path

from slimjax.models.convert import convert_model, dropped
from slimjax.models.opened import KINDS, open_model
from slimjax.models.store import SHARD_BYTES
from slimjax.solve.planfile import load_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the plan, OUT."""
    parser.add_argument("model", metavar="MODEL", help=KINDS)
    parser.add_argument("--plan", type=Path, required=True, metavar="PLAN.json", help="from slimjax plan")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="directory to be made; every command takes it",
    )
    parser.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="of one file; default %(default)s"
    )


def run(options: argparse.Namespace) -> int:
    """Convert; a finished OUT of the same model and plan is left alone."""
    if options.shard_bytes < 1:
        raise ValueError(f"--shard-bytes {options.shard_bytes}: expected a positive number")
    model = open_model(options.model)
    plan = load_plan(options.plan)
    if not convert_model(model, plan, options.output, shard_bytes=options.shard_bytes):
        print(f"{options.output}: there already, by this plan and from these weights")
        return 0
    gone = dropped(model, plan)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: {size:,} bytes, without {len(gone)} weights: {', '.join(gone) or 'none'}")
    return 0
