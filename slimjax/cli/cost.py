"""What each cache needs at a workload of yours: bytes, reads, time, what fits. From formulas; no weights are read.

MODEL is a published architecture (`slimjax.cost.architectures`), a model on disk as every command takes it, or a
config.json of Hugging Face.
Times are lower bounds: bytes over bandwidth or operations over peak, whichever takes longer.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from slimjax.cost import hf, workload
from slimjax.cost.architectures import Architecture
from slimjax.cost.chips import CHIPS, Chip, chip
from slimjax.cost.workload import Workload

SCHEMES = ("kv:bf16", "kv:int8", "k:bf16", "k:int16", "k:int16+16", "x:bf16", "x1:bf16")
ENCODER_SCHEMES = (
    "kv:bf16",
    "kv:int8",
    "k:bf16",
    "k:int16",
    "k:int16+16",
    "e:bf16,k:int16+16",
    "h:int16,k:int16+16",
)

# Column -> title; the values of `figures` by name.
COLUMNS = {
    "scheme": "scheme",
    "cache_bytes": "cache GB",
    "compression": "of bf16 KV",
    "bytes_read_per_token": "read MB/token",
    "operations_per_byte": "OPs/byte",
    "milliseconds": "ms/step >=",
    "speedup": "speed-up <=",
    "first_token_milliseconds": "first token ms >=",
    "largest_batch": "batch fits",
    "largest_context": "context fits",
    "break_even": "break-even",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="architecture name, model on disk or config.json")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="B", help="sequences decoded together (default: 1)"
    )
    parser.add_argument(
        "--context", type=int, metavar="S", help="cached tokens (default: the model's longest)"
    )
    parser.add_argument("--chip", default="H200", metavar="NAME", help=f"{', '.join(CHIPS)} (default: H200)")
    parser.add_argument("--schemes", nargs="+", metavar="SCHEME", help="caches; with an encoder CROSS,SELF")
    parser.add_argument("--encoder-tokens", type=int, metavar="P", help="rows of the encoder's output")
    parser.add_argument(
        "--weight-bytes", type=float, default=2.0, help="bytes of a trained weight (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Print the table or the object. Raises ValueError where the arguments cannot be used."""
    report = costs(options)
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else _text(report))
    return 0


def costs(options: argparse.Namespace) -> dict[str, Any]:
    """The workload and, per scheme, its figures or the reason why it cannot be used. Raises ValueError."""
    a, where = hf.find(options.model), chip(options.chip)
    for name in ("batch", "context", "encoder_tokens", "weight_bytes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    if options.encoder_tokens and not a.encoder_decoder:
        raise ValueError(f"--encoder-tokens {options.encoder_tokens}: {a.name} has no encoder")
    context = options.context or a.context or (1 if a.encoder_decoder else None)
    if context is None:
        raise ValueError(f"{a.name}: its longest context is not known, give --context")
    texts = options.schemes or (ENCODER_SCHEMES if a.encoder_decoder else SCHEMES)
    rows = [_row(options, a, context, text, where) for text in texts]
    return {
        "model": a.name,
        "batch": options.batch,
        "context": context,
        **({"encoder_tokens": options.encoder_tokens or a.encoder_tokens} if a.encoder_decoder else {}),
        "chip": dataclasses.asdict(where),
        "schemes": rows,
    }


def _row(
    options: argparse.Namespace, a: Architecture, context: int, text: str, where: Chip
) -> dict[str, Any]:
    schemes = workload.schemes_for(a, text)
    name = ",".join(map(str, schemes))
    try:
        w = Workload(
            architecture=a, schemes=schemes, batch=options.batch, context=context,
            encoder_tokens=options.encoder_tokens, kept=options.weight_bytes,
        )  # fmt: skip
    except NotImplementedError as error:
        return {"scheme": name, "refused": str(error).removeprefix("scheme ")}
    return {"scheme": name, **figures(workload.placed(w, where), where)}


def figures(w: Workload, where: Chip) -> dict[str, Any]:
    """What a workload costs on a chip. Bytes and operations; None: not known, or no such number."""
    fits = where.memory is None or workload.stored_weights(w) + workload.cache_bytes(w) <= where.memory * 1e9
    return {
        "cache_bytes": workload.cache_bytes(w),
        "compression": workload.cache_bytes(workload.vanilla(w)) / workload.cache_bytes(w),
        "weight_bytes": workload.stored_weights(w),
        "bytes_read_per_token": workload.read_bytes(w) / w.batch,
        "operations_per_token": workload.operations(w) / w.batch,
        "operations_per_byte": workload.operations(w) / workload.read_bytes(w),
        "memory_bound": workload.memory_bound(w, where),
        "milliseconds": 1e3 * workload.seconds(w, where),
        "tokens_per_second": w.batch / workload.seconds(w, where),
        "speedup": workload.speedup(w, where),
        "first_token_milliseconds": 1e3 * workload.first_token_seconds(w, where),
        "fits": fits,
        "largest_batch": workload.largest_batch(w, where),
        "largest_context": workload.largest_context(w, where),
        "encoder_on_chip": w.encoder_on_chip,
        "break_even": workload.break_even(w),
    }


def _text(report: Mapping[str, Any]) -> str:
    where = report["chip"]
    encoder = f", {report['encoder_tokens']:,} encoder rows" if "encoder_tokens" in report else ""
    memory = f", {where['memory']:g} GB" if where["memory"] else ""
    head = (
        f"{report['model']}, batch {report['batch']}, context {report['context']:,}{encoder}, on {where['name']}: "
        f"{where['bandwidth']:,g} GB/s, {where['tflops'] or where['tops']:,g} TOPS{memory}"
    )
    good = [row for row in report["schemes"] if "refused" not in row]
    lines = _aligned([list(COLUMNS.values()), *([_cell(name, row) for name in COLUMNS] for row in good)])
    notes = [f"{row['scheme']} fits beside the weights only in part" for row in good if not row["fits"]]
    notes += [f"{row['scheme']}: limited by arithmetic" for row in good if not row["memory_bound"]]
    notes += [
        f"{row['scheme']}: the shared cache stays on the chip" for row in good if row["encoder_on_chip"]
    ]
    notes += [f"refused: {row['refused']}" for row in report["schemes"] if "refused" in row]
    unit = "batch" if encoder else "batch x context"
    notes.append(
        f"break-even: {unit} from which less is read than with kv:bf16; solved weights (4 bytes) are counted"
    )
    return "\n".join([head, "", *lines, "", *notes])


def _cell(name: str, row: Mapping[str, Any]) -> str:
    value = row[name]
    if value is None:
        return "never" if name == "break_even" else "?"
    scaled = {"cache_bytes": 1e-9, "bytes_read_per_token": 1e-6}.get(name)
    if name in ("compression", "speedup"):
        return f"{value:.2f}x"
    if scaled or isinstance(value, float):
        return (
            f"{value * (scaled or 1):,.4g}"
            if abs(value * (scaled or 1)) < 1e4
            else f"{value * (scaled or 1):,.0f}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
