"""The tables of arXiv 2503.05840 from the formulas, in its units: values, not bytes; a weight is a value too.

Each function computes one row of a table as metrics of `slimjax.records`. The paper's methods are schemes here:
its baseline or vanilla is kv, option 1 rebuilds (k1) or keeps keys alone (k), option 2 absorbs (k), caches the
inputs (x) or the encoder's output (e).
"""

from slimjax.cost import model, workload
from slimjax.cost.architectures import Architecture
from slimjax.cost.chips import Chip
from slimjax.cost.workload import Workload
from slimjax.scheme import parse_scheme

# Table -> its rows' names -> the scheme, or (cross, self), each stands for.
COMPLEXITY = {"vanilla": "kv:bf16", "unoptimized": "k1:bf16", "optimized": "k:bf16"}
NON_SQUARE = {"baseline": "kv:bf16", "option 1": "k:bf16", "option 2": "x:bf16"}
ENCODER = {
    "baseline": "kv:bf16,kv:bf16",
    "option 1": "k:bf16,k:bf16",
    "option 2": "e:bf16,k:bf16",
    "option 2, E counted": "e:bf16,k:bf16",
    "hybrid, K counted": "h:bf16,k:bf16",
}

Metrics = dict[str, float]


def context_memory(a: Architecture) -> Metrics:
    """Tables 1 and 10: 2*E*L values per token, times the encoder's and the decoder's tokens together."""
    per_token = model.cached_values(a, parse_scheme("kv:bf16")) * a.layers
    found: Metrics = {"values_per_token": per_token}
    if a.parameters is not None:
        found["parameters"] = a.parameters
    if a.context is not None:
        found["context_memory"] = per_token * (a.context + (a.encoder_tokens or 0))
    return found


def complexity(a: Architecture, method: str, context: int) -> Metrics:
    """Table 2: operations, reads and intensity of projections and attention, one token, one layer, batch 1."""
    scheme = parse_scheme(COMPLEXITY[method])
    found: Metrics = {}
    for name, of in (("projection", model.projections), ("attention", model.attention)):
        work = of(a, scheme, context)
        found |= {
            f"{name}_operations": work.operations,
            f"{name}_reads": work.reads,
            f"{name}_intensity": work.intensity,
        }
    return found


def chip_balance(chip: Chip) -> Metrics:
    """Table 3."""
    return {"tops": chip.tops, "bandwidth": chip.bandwidth, "balance": chip.balance}


def non_square(a: Architecture, method: str, context: int) -> Metrics:
    """Tables 4 and 5: E/D, how much less is cached, the size of W_V or what stands for it, operations per token.

    Positions are passed over, as in the paper: option 2 (x) is refused with RoPE when it is asked for as a scheme.
    """
    scheme, vanilla = parse_scheme(NON_SQUARE[method]), parse_scheme("kv:bf16")
    layer = model.weights(a, scheme)
    shared = 2 * a.width * a.query_width + a.width * a.key_width  # queries, output and keys
    work = model.projections(a, scheme, context), model.attention(a, scheme, context)
    return {
        "aspect_ratio": a.key_width / a.width,
        "cache_reduction": model.cached_values(a, vanilla) / model.cached_values(a, scheme),
        "value_weights": layer.count - shared,
        "projection_operations": work[0].operations,
        "attention_operations": work[1].operations,
    }


def in_values(a: Architecture, method: str, batch: int) -> Workload:
    """A workload whose bytes are twice its values: everything takes 16 bits."""
    schemes = tuple(map(parse_scheme, ENCODER[method].split(",")))
    on_chip = method == "option 2"
    return Workload(
        architecture=a, schemes=schemes, batch=batch, context=a.context or 0, kept=2, solved=2, encoder_on_chip=on_chip
    )  # fmt: skip


def encoder_options(a: Architecture, method: str) -> Metrics:
    """Table 6: shares of the baseline's caches and of its cross phase, and cross weights read per token and layer."""
    w, base = in_values(a, method, 1), in_values(a, "baseline", 1)
    outer = 2 * a.width * a.query_width
    cross = workload.attention_weights(w).count - a.layers * (outer + model.weights(a, w.own).count)
    return {
        "self_share": workload.self_cache(w) / workload.self_cache(base) if a.context else 0.0,
        "cross_share": _counted_cross(w) / workload.cross_cache(base),
        "cross_weights": cross / a.layers,
        "cross_phase": workload.cross_phase_operations(w) / workload.cross_phase_operations(base),
    }


def _counted_cross(w: Workload) -> int:
    """Cross cache bytes; 0 where the encoder's output is taken to live on the chip."""
    return 0 if w.encoder_on_chip else workload.cross_cache(w)


def encoder_caches(a: Architecture, method: str, batch: int) -> Metrics:
    """Table 7: cached values per sequence, weights read per step, values read per token at a batch size, speed-up.

    Option 2 leaves the encoder's output E out of the cache and of the reads, as the paper does; with E counted it is
    held once and read by every layer.
    """
    w, base = in_values(a, method, batch), in_values(a, "baseline", batch)

    def cached(of: Workload) -> float:
        return (workload.self_cache(of) + _counted_cross(of)) / 2 / batch

    def reads(of: Workload) -> float:
        return workload.read_bytes(of) / 2 / batch

    return {
        "encoder_cache": w.rows * a.width,
        "cross_cache": _counted_cross(w) / 2 / batch,
        "self_cache": workload.self_cache(w) / 2 / batch,
        "context_memory": cached(w),
        "cache_reduction": cached(base) / cached(w),
        "step_parameters": workload.weight_reads(w) / 2,
        "reads_per_token": reads(w),
        "speedup": reads(base) / reads(w),
    }


def head_operations(a: Architecture, method: str, context: int) -> Metrics:
    """Tables 8 and 9: operations per head and of all heads."""
    scheme = parse_scheme(COMPLEXITY[method])
    return {
        "score_operations": model.score_operations(a, scheme, context),
        "weighing_operations": model.weighing_operations(a, scheme, context),
        "attention_operations": model.attention(a, scheme, context).operations,
    }


def scheme_metrics(w: Workload) -> Metrics:
    """What a scheme needs on the same model, in bytes: trained weights in 16 bits, solved ones in float32."""
    base = workload.vanilla(w)
    tokens = w.batch * max(w.context, 1) if w.cross is None else w.batch
    reads = workload.read_bytes(w)
    found: Metrics = {
        "cache_bytes": workload.cache_bytes(w),
        "compression": workload.cache_bytes(base) / workload.cache_bytes(w),
        "bytes_read_per_token": reads / w.batch,
        "operations_per_byte": workload.operations(w) / reads,
    }
    if w.cross is None:
        found["bytes_per_token"] = workload.cache_bytes(w) / tokens
    even = workload.break_even(w)
    return found | ({"break_even": even} if even is not None else {})


def chip_metrics(w: Workload, chip: Chip) -> Metrics:
    """The least time of a step on a chip, and the speed-up against bf16 keys and values there.

    A shared cross cache that fits into the chip's own memory, where that is known, is taken to stay there.
    """
    w = workload.placed(w, chip)
    return {"milliseconds_bound": 1e3 * workload.seconds(w, chip), "speedup": workload.speedup(w, chip)}


def on(a: Architecture, scheme: str, batch: int, context: int | None) -> Workload:
    """A workload of a scheme's text on an architecture; context None: the architecture's own.

    Raises ValueError where neither says one, NotImplementedError for a scheme that does not fit.
    """
    chosen = a.context if context is None else context
    if chosen is None:
        raise ValueError(f"{a.name}: its context is not known, give one")
    parsed = workload.schemes_for(a, scheme)
    return Workload(
        architecture=a, schemes=parsed, batch=batch, context=chosen if a.encoder_decoder else max(chosen, 1)
    )
