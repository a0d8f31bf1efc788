"""Records: the only source of numbers in tables and plots. One JSON object a line in `records.jsonl`.

A `Record` is one cell of an experiment's grid: its coordinates, what was measured there, whether it worked,
and where it comes from. Names of coordinates and metrics come from the two registries below; a new
experiment adds a line there.
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from slimjax.scheme import suggest

CELL = {
    "experiment": "program that made the record",
    "model": "variant of the model, or its name",
    "layer": "attention layer, from 0",
    "attention": "self or cross",
    "scheme": "cache scheme, basis[option]:codec[bits][(options)][/group][+R][@softmax][#compute]",
    "basis": "what is cached",
    "option": "1: rebuild keys or values, 2: absorb their weights",
    "extra": "extra coordinates per cached row, R",
    "codec": "how a cached row is stored",
    "bits": "bits per stored number",
    "group": "numbers or tokens that share a scale",
    "softmax": "how scores are weighed",
    "compute": "arithmetic of the products",
    "backend": "implementation",
    "position": "position scheme",
    "dtype": "compute dtype of queries, probabilities and output",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head_dim": "head size",
    "width": "model width",
    "seed": "root seed",
    "batch": "sequences",
    "context": "cached tokens",
    "table": "table of arXiv 2503.05840",
    "method": "the paper's name for a way to cache",
    "chip": "chip whose peak rates are assumed",
    "layers": "attention layers",
    "key_width": "values of a token's keys in one layer",
    "encoder_tokens": "rows of the encoder's output",
    "steps": "training steps",
    "length": "tokens per sequence of a batch",
    "framework": "program that was timed",
    "shape": "attention layer, a name in slimjax.kernels.shapes",
    "threads": "CPU threads of the peer",
    "study": "table of the comparison of caches, a name of configs/ablation",
    "selector": "how the heads with fewer bits are chosen",
    "fraction": "of the heads, in fewer bits",
    "protected": "layers at either end under a scheme of their own",
    "protection": "that scheme",
    "threshold": "of SAS; 0: no cut",
    "degree": "of SAS's polynomial",
    "spread": "standard deviation of the logits",
}

METRICS = {
    "attention_error": "relative L2 error of the attention output, worst layer",
    "value_error": "relative L2 error of rebuilt values, worst layer",
    "identity_error": "relative L2 error of the attention output in float64 from an exact cache, worst layer",
    "calibration_error": "value error on inputs that were fitted on",
    "exact_error": "value error of the exact inverse on held-out inputs",
    "chosen_error": "value error of the map that calibration chooses on held-out inputs",
    "predicted_error": "attention error the conversion predicts, worst layer",
    "condition_number": "largest over smallest singular value of the inverted weights, worst layer",
    "noise_gain": "how many times larger a relative error of the cached rows is in what is rebuilt, white inputs",
    "rounding_error": "relative L2 error of the cached rows as they are read back",
    "logit_kl": "mean KL divergence of next-token distributions, nats",
    "logit_kl_low": "lower end of its 95 % interval, by Student's t over blocks of 64 tokens",
    "logit_kl_high": "upper end",
    "logit_kl_blocks": "mean of every block of 64 tokens",
    "logit_kl_by_position": "mean of every range of positions",
    "positions": "ends of those ranges",
    "attention_error_by_position": "relative L2 error of the attention output in those ranges, mean over layers",
    "attention_error_mean": "attention_error, mean over layers",
    "attention_cosine": "of the attention output with the exact one, worst layer",
    "attention_cosine_mean": "the same, mean over layers",
    "attention_l1": "relative L1 error of the attention output, worst layer",
    "attention_l1_mean": "the same, mean over layers",
    "attention_rmse": "root mean squared error of the attention output, worst layer",
    "attention_rmse_mean": "the same, mean over layers",
    "bits_per_value": "stored for each, scales included",
    "lost_mass": "share of the softmax's mass below the threshold",
    "error_bound": "of the weights, relative L1, from the lost mass and the polynomial",
    "weight_error": "relative L1 error of the softmax's weights",
    "bits_per_byte": "on held-out text",
    "bits_per_byte_change": "against the same model with exact attention",
    "perplexity": "on held-out text",
    "accuracy": "share of right answers",
    "accuracy_low": "lower end of its 95 % interval, Wilson's",
    "accuracy_high": "upper end",
    "accuracy_change": "against the same model with an unquantised cache",
    "problems": "that were set",
    "solved_samples": "1 for each problem that was solved, else 0",
    "count": "samples (tokens scored, for a language model) behind the other metrics",
    "p_value": "of the test named in the experiment",
    "word_errors": "word error rate",
    "equal_texts": "share of texts equal to those of a bf16 KV cache",
    "top1_agreement": "share of tokens whose most likely successor is unchanged",
    "greedy_agreement": "tokens generated greedily before the first difference, mean over sequences",
    "generated": "tokens generated per sequence, the most greedy_agreement can be",
    "sequences": "sequences generated for greedy_agreement",
    "bytes_per_token": "cache bytes per token, all layers",
    "compression": "bytes per token of a bf16 KV cache over this cache's",
    "compression_without_e": "the same, the encoder's output left out of this cache, as if it were kept on chip",
    "parameters": "trained numbers",
    "tokens_per_second": "tokens over wall time",
    "time_to_first_token": "milliseconds",
    "milliseconds": "median wall time of one call",
    "milliseconds_samples": "every timed call",
    "compile_seconds": "tracing and compiling, apart from the timed calls",
    "speed_over_peer": "median time of the fastest peer over this one's, same run",
    "fastest_over_peer": "the same of each one's fastest call",
    "peer_difference": "relative difference from the peer's output, same weights and inputs",
    "copy_gigabytes_per_second": "what the device reached in a plain copy or sum, same run",
    "gigabytes_per_second": "bytes read and written over wall time",
    "share_of_copy_bandwidth": "gigabytes_per_second over that of a plain copy",
    "cycles": "estimated by a simulator or compiler",
    "vmem_bytes": "on-chip memory a kernel claims",
    "values_per_token": "cached values per token, all layers, keys and values kept",
    "context_memory": "cached values of one sequence at the stated context, all layers",
    "encoder_cache": "values of the encoder's output",
    "cross_cache": "cached values of cross attention",
    "self_cache": "cached values of self attention",
    "cache_reduction": "cached values with keys and values over this one's",
    "step_parameters": "weights that a decoding step reads",
    "reads_per_token": "values read per token and sequence, weights shared by the batch",
    "projection_operations": "of one layer and token, products with weights",
    "projection_reads": "values of one layer's attention weights",
    "projection_intensity": "operations per value read",
    "attention_operations": "of one layer and token, scores and weighted sum, all heads",
    "attention_reads": "values of one layer's cache",
    "attention_intensity": "operations per value read",
    "score_operations": "of one head and token",
    "weighing_operations": "of one head and token",
    "aspect_ratio": "key width over model width",
    "value_weights": "values of W_V or of what stands for it, one layer",
    "self_share": "self-attention cache over the baseline's",
    "cross_share": "cross-attention cache over the baseline's",
    "cross_weights": "cross-attention key and value weights that a token reads, per layer",
    "cross_phase": "operations between encoder and first token over the baseline's",
    "tops": "int8 peak, 10^12 operations per second",
    "bandwidth": "memory bandwidth, 10^9 bytes per second",
    "balance": "operations per byte at which memory and arithmetic take equally long",
    "self_cache_bytes": "of self-attention, at full capacity",
    "cross_cache_bytes": "of cross-attention",
    "cross_milliseconds": "median time between encoder and first token, cross caches filled",
    "cache_bytes": "of all sequences at the stated context, all layers",
    "bytes_read_per_token": "weights and caches of a decoding step over its sequences",
    "operations_per_byte": "of a decoding step",
    "break_even": "batch x context (with an encoder: batch) from which less is read than with bf16 keys and values",
    "skipped_by_head": "share of (query, key) pairs whose weight one head drops",
    "skipped_by_group": "the same, jointly for the query heads of one key/value head",
    "skipped_by_all": "the same, jointly for all heads",
    "milliseconds_bound": "least time of a decoding step: bytes over bandwidth or operations over peak",
    "speedup": "least time of a token with bf16 keys and values (or the baseline) over this one's",
}

Status = Literal["ok", "refused", "failed", "out-of-memory"]
STATUSES: tuple[Status, ...] = get_args(Status)


def _check_names(kind: str, names: Iterable[str], registry: Mapping[str, str]) -> None:
    for name in names:
        if name not in registry:
            raise ValueError(f"unknown {kind} {name!r}{suggest(name, registry)}")


def _check_metric(name: str, value: Any) -> None:
    numbers = value if isinstance(value, list | tuple) else [value]
    for number in numbers:
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"metric {name} = {value!r}: expected a finite number or a list of them")


@dataclass(frozen=True)
class Record:
    """One cell of a grid.

    Raises ValueError for a name outside the registries, a metric that is not a finite number (a cell that
    gives one has failed), an unknown status, or a cell that is not ok without a reason.
    """

    cell: Mapping[str, str | int | float | bool | None]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    status: Status = "ok"
    reason: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names("cell coordinate", self.cell, CELL)
        _check_names("metric", self.metrics, METRICS)
        for name, value in self.metrics.items():
            _check_metric(name, value)
        if self.status not in STATUSES:
            raise ValueError(f"status = {self.status!r}: expected one of {', '.join(STATUSES)}")
        if (self.status == "ok") == bool(self.reason):
            raise ValueError(
                f"status = {self.status!r} with reason = {self.reason!r}: ok has none, the others one"
            )

    @property
    def key(self) -> str:
        """Equal for equal cells, whatever the order of their coordinates."""
        return cell_key(self.cell)

    def to_json(self) -> str:
        """One line, without the newline."""
        return json.dumps(asdict(self), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        return cls(**json.loads(line))


def cell_key(cell: Mapping[str, Any]) -> str:
    """The cell as text, equal for equal cells."""
    return json.dumps(dict(cell), sort_keys=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; a torn last line, left by a killed process, is passed over.

    Raises ValueError, with file and line, for any other line that is not JSON.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {line[:60]!r}") from error
    del torn  # what follows the last newline was never finished
    return objects


def read(path: Path) -> list[Record]:
    """The records of a file, in order. Raises ValueError for equal cells and bad lines."""
    records: dict[str, Record] = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            record = Record(**line)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if record.key in records:
            raise ValueError(f"{path}:{number}: a second record of cell {record.key}")
        records[record.key] = record
    return list(records.values())


def append_line(path: Path, text: str, *, sync: bool = True) -> None:
    """Append one line and flush it, over a torn last line if there is one; with ``sync``, to the disk itself.

    Several processes may append to one file: a lock keeps one from taking another's unfinished line for a torn one.
    """
    path.touch()
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.truncate(_whole_lines(file))
        file.seek(0, os.SEEK_END)
        file.write(text.encode() + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _whole_lines(file: BinaryIO) -> int:
    """Where the last whole line ends; looked for from the end, so that a long file costs no more than a short one."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a file of records by rename: it is whole, or as it was."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(record.to_json() + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class RecordLog:
    """The records of a run on disk: refuses equal cells, each record is safe once `add` returns."""

    def __init__(self, path: Path):
        self.path = path
        self.records = read(path)
        self._keys = {record.key for record in self.records}

    def __contains__(self, cell: Mapping[str, Any]) -> bool:
        return cell_key(cell) in self._keys

    def ordered(self, cells: Iterable[Mapping[str, Any]]) -> list[Record]:
        """The records in the order of the cells, whatever the order they were made in."""
        place = {cell_key(cell): number for number, cell in enumerate(cells)}
        return sorted(self.records, key=lambda record: place.get(record.key, len(place)))

    def add(self, record: Record) -> None:
        if record.key in self._keys:
            raise ValueError(f"{self.path}: a second record of cell {record.key}")
        append_line(self.path, record.to_json())
        self._keys.add(record.key)
        self.records.append(record)


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"python": platform.python_version(), **packages}


def _installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or no git: the source hash still identifies the code
    return done.stdout.strip()


def _processor() -> str:
    """The CPU's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


@functools.cache
def _machine() -> dict[str, Any]:
    """What stays the same while this process lives."""
    import jax  # late: reading records must not start an accelerator

    device = jax.devices()[0]
    return {
        "git": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": versions(),
        "platform": platform.platform(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "cpus": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def provenance(
    *, config: str, seed: int | None = None, seconds: float | None = None, packages: Iterable[str] = ()
) -> dict[str, Any]:
    """Where a record comes from.

    config: the run id; seconds: wall time of the cell; packages: those whose versions count beside `versions()`,
    where they are installed.
    """
    machine = _machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine,
        "versions": machine["versions"] | _installed(packages),
        "config": config,
        "seed": seed,
        "seconds": None if seconds is None else round(seconds, 3),
    }
