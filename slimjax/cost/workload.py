"""A whole model at work: what a decoding step moves and computes, how long that takes at least, and what fits.

A step makes one token for each of B sequences. It reads all weights once and every sequence's cache once, so the
time of a step is at least max(bytes / bandwidth, operations / peak) (the roofline of arXiv 2503.05840, section 2).
"""

import dataclasses

from slimjax.cost import model
from slimjax.cost.architectures import Architecture
from slimjax.cost.chips import Chip
from slimjax.scheme import Scheme, parse_scheme

VANILLA = "kv:bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its cache schemes and what is asked of them.

    Attributes:
        architecture: the sizes.
        schemes: (self,), or (cross, self) where there is an encoder.
        batch: B, sequences decoded together.
        context: S, tokens in a (self-attention) cache.
        encoder_tokens: rows of the encoder's output; None: the architecture's.
        kept, solved: bytes of a trained weight and of a solved one (W_KV stays in float32: rounded to 16 bits
            it costs as much accuracy as rounding the cache).
        encoder_on_chip: the encoder's output never leaves the chip, so that basis e reads it for nothing,
            as the paper assumes; else every layer reads it again.

    Raises:
        ValueError: a batch or context below 1, or another number of schemes than attention kinds.
        NotImplementedError: a scheme that these layers cannot use, with the reason.
    """

    architecture: Architecture
    schemes: tuple[Scheme, ...]
    batch: int = 1
    context: int = 1
    encoder_tokens: int | None = None
    kept: float = 2.0
    solved: float = 4.0
    encoder_on_chip: bool = False

    def __post_init__(self) -> None:
        a, kinds = self.architecture, 2 if self.architecture.encoder_decoder else 1
        if self.batch < 1 or self.context < 0 or (self.context < 1 and kinds == 1):
            raise ValueError(f"{a.name}: {self.batch=} and {self.context=} must be at least 1")
        if len(self.schemes) != kinds:
            wanted = "two schemes, cross attention's and self attention's" if kinds == 2 else "one scheme"
            raise ValueError(
                f"{a.name} takes {wanted}, not {len(self.schemes)}: {', '.join(map(str, self.schemes))}"
            )
        for scheme, cross in [(self.own, False)] + ([(self.schemes[0], True)] if kinds == 2 else []):
            if reason := model.refusal(a, scheme, cross=cross):
                raise NotImplementedError(f"scheme {scheme}: {reason}")

    @property
    def own(self) -> Scheme:
        """Self attention's scheme."""
        return self.schemes[-1]

    @property
    def cross(self) -> Scheme | None:
        """Cross attention's scheme, where there is an encoder."""
        return self.schemes[0] if self.architecture.encoder_decoder else None

    @property
    def rows(self) -> int:
        """Rows of the encoder's output; 0 without one."""
        return (self.encoder_tokens or self.architecture.encoder_tokens or 0) if self.cross else 0


def schemes_for(a: Architecture, text: str) -> tuple[Scheme, ...]:
    """`CROSS,SELF`, or one scheme for both; e and h alone leave self attention its keys and values."""
    found = tuple(parse_scheme(part) for part in text.split(","))
    if not a.encoder_decoder or len(found) != 1:
        return found
    return found[0], dataclasses.replace(found[0], basis="kv", option=0) if found[0].basis in (
        "e",
        "h",
    ) else found[0]


def vanilla(w: Workload) -> Workload:
    """The same workload on bf16 keys and values."""
    return dataclasses.replace(w, schemes=(parse_scheme(VANILLA),) * len(w.schemes))


def placed(w: Workload, chip: Chip) -> Workload:
    """The workload with a shared cross cache (e, h) kept on the chip where all sequences' fit there."""
    shared = w.cross is not None and w.cross.basis in ("e", "h")
    fits = shared and chip.on_chip is not None and cross_cache(w) <= chip.on_chip * 1e6
    return dataclasses.replace(w, encoder_on_chip=fits)


def _cross_layers(w: Workload) -> list[Scheme]:
    """The scheme of each cross-attention layer; the first of h is k, whose cache the others share."""
    if w.cross is None:
        return []
    first = dataclasses.replace(w.cross, basis="k") if w.cross.basis == "h" else w.cross
    return [first] + [w.cross] * (w.architecture.layers - 1)


def cross_cache(w: Workload) -> int:
    """Bytes of the cross caches of all layers and sequences, e and h counted once (E is there, wherever it lies)."""
    if w.cross is None or not w.rows:
        return 0
    caches = 1 if w.cross.basis in ("e", "h") else w.architecture.layers
    return caches * model.cache_bytes(w.architecture, w.cross, batch=w.batch, tokens=w.rows)


def self_cache(w: Workload) -> int:
    """Bytes of the self-attention caches of all layers and sequences."""
    if not w.context:
        return 0
    return w.architecture.layers * model.cache_bytes(w.architecture, w.own, batch=w.batch, tokens=w.context)


def cache_bytes(w: Workload) -> int:
    """All cache bytes."""
    return cross_cache(w) + self_cache(w)


def cache_reads(w: Workload) -> int:
    """Cache bytes that a step reads: a shared cache once per layer, unless it stays on the chip."""
    if w.cross is None or w.cross.basis not in ("e", "h"):
        return cache_bytes(w)
    return self_cache(w) + (0 if w.encoder_on_chip else w.architecture.layers * cross_cache(w))


def attention_weights(w: Workload) -> model.Weights:
    """Weights of all attention layers that a step reads."""
    a = w.architecture
    parts = [model.weights(a, w.own)] * a.layers
    parts += [model.weights(a, scheme, cross=True) for scheme in _cross_layers(w)]
    return model.Weights(sum(part.kept for part in parts), sum(part.solved for part in parts))


def other_weights(a: Architecture) -> float:
    """Weights outside attention that a step reads: MLPs and the output embedding, L*m*D*F + D*V.

    Without F and V, what the known number of (active) parameters leaves after attention's L*(2DA + 2DE).
    Raises ValueError where neither is known.
    """
    if a.mlp_width and a.vocab:
        return a.layers * a.mlp_matrices * a.width * a.mlp_width + a.width * a.vocab
    total = a.active or a.parameters
    if total is None or a.encoder_decoder:
        raise ValueError(f"{a.name}: the MLP width and the vocabulary are not known")
    return max(0.0, total - a.layers * 2 * a.width * (a.query_width + a.key_width))


def weight_reads(w: Workload) -> float:
    """Bytes of the weights that a step reads."""
    return other_weights(w.architecture) * w.kept + attention_weights(w).nbytes(w.kept, w.solved)


def read_bytes(w: Workload) -> float:
    """All that a step reads."""
    return weight_reads(w) + cache_reads(w)


def operations(w: Workload) -> float:
    """Operations of a step: 2 per weight outside attention and token, and the layers' own."""
    a = w.architecture
    total = 2 * other_weights(a) + a.layers * _layer(a, w.own, w.context, cross=False)
    total += sum(_layer(a, scheme, w.rows, cross=True) for scheme in _cross_layers(w))
    return w.batch * total


def _layer(a: Architecture, scheme: Scheme, tokens: int, *, cross: bool) -> float:
    of_weights = model.projections(a, scheme, tokens, cross=cross).operations
    heads = a.heads * (
        model.score_operations(a, scheme, tokens) + model.weighing_operations(a, scheme, tokens)
    )
    return of_weights + heads


def seconds(w: Workload, chip: Chip, bits: int = 16) -> float:
    """Least time of a step: max(bytes / bandwidth, operations / peak), operands of `bits` bits."""
    return max(read_bytes(w) / (chip.bandwidth * 1e9), operations(w) / chip.peak(bits))


def memory_bound(w: Workload, chip: Chip, bits: int = 16) -> bool:
    """Whether reading takes longer than computing."""
    return read_bytes(w) / (chip.bandwidth * 1e9) >= operations(w) / chip.peak(bits)


def speedup(w: Workload, chip: Chip, bits: int = 16) -> float:
    """Time of a step with bf16 keys and values over the time with this scheme, both at their bounds."""
    return seconds(vanilla(w), chip, bits) / seconds(w, chip, bits)


def cross_phase_operations(w: Workload) -> float:
    """Operations per sequence between the encoder and the first token: keys and values of its output, all layers.

    kv 4pDE per layer, one of the two 2pDE, h one layer of 2pDE, e none (p rows of the encoder's output).
    """
    if w.cross is None:
        return 0.0
    a = w.architecture
    one = 2 * w.rows * a.width * a.key_width
    return {"kv": 2 * one * a.layers, "e": 0, "h": one}.get(
        w.cross.basis, (one + 2 * w.rows * a.width * w.cross.extra) * a.layers
    )


def first_token_seconds(w: Workload, chip: Chip, bits: int = 16) -> float:
    """Least time from the prompt, or from the encoder's output, to the first token.

    A prompt of S tokens: 2 operations per weight and token and 2S^2*A per layer (causal), weights read once and the
    caches written. With an encoder: the cross phase (weights read, caches written), then one step on an empty cache.
    """
    a = w.architecture
    if w.cross is None:
        rest = other_weights(a) + a.layers * 2 * a.width * (a.query_width + a.key_width)
        extra = a.layers * a.width * w.own.extra
        work = w.batch * w.context * (2 * (rest + extra) + a.layers * 2 * w.context * a.query_width)
        moved = (rest + extra) * w.kept + cache_bytes(w)
        return max(moved / (chip.bandwidth * 1e9), work / chip.peak(bits))
    matrices = {"kv": 2 * a.layers, "e": 0, "h": 1}.get(w.cross.basis, a.layers)
    written = 0 if w.cross.basis == "e" else cross_cache(w)
    moved = matrices * a.width * a.key_width * w.kept + written
    phase = max(moved / (chip.bandwidth * 1e9), w.batch * cross_phase_operations(w) / chip.peak(bits))
    return phase + seconds(dataclasses.replace(w, context=1), chip, bits)


def stored_weights(w: Workload) -> float:
    """Bytes of all weights: the known parameters (else those a step reads), with the scheme's in their place."""
    a = w.architecture
    if a.parameters is None:
        return weight_reads(w)
    parts = attention_weights(w), attention_weights(vanilla(w))
    added = parts[0].nbytes(w.kept, w.solved) - parts[1].nbytes(w.kept, w.solved)
    if w.cross is not None:
        # Of the cross W_K and W_V in the total a vanilla step reads none. e reads both, so they were added twice;
        # k makes keys and can drop every W_V; h makes one layer's keys and can drop all else.
        again = {"kv": 0, "e": 2 * a.layers, "h": 2 * a.layers - 1}.get(w.cross.basis, a.layers)
        added -= again * a.width * a.key_width * w.kept
    return a.parameters * w.kept + added


def largest_batch(w: Workload, chip: Chip) -> int | None:
    """Sequences whose caches fit beside the weights; 0: not one; None: the chip's memory is not known."""
    if chip.memory is None:
        return None
    one = cache_bytes(dataclasses.replace(w, batch=1))
    return max(0, int((chip.memory * 1e9 - stored_weights(w)) // one))


def largest_context(w: Workload, chip: Chip) -> int | None:
    """Tokens per sequence whose caches fit beside the weights; 0: not one; None: the chip's memory is not known."""
    if chip.memory is None:
        return None
    per_token = w.architecture.layers * w.batch * model.per_token(w.architecture, w.own)
    return max(0, int((chip.memory * 1e9 - stored_weights(w) - cross_cache(w)) // per_token))


def break_even(w: Workload) -> int | None:
    """B*S from which a step reads less than vanilla's; with an encoder B, at this context. None: never."""
    if w.cross is None:
        return model.break_even(w.architecture, w.own, parse_scheme(VANILLA), kept=w.kept, solved=w.solved)
    one, other = dataclasses.replace(w, batch=1), dataclasses.replace(vanilla(w), batch=1)
    return model.first_gain(weight_reads(one) - weight_reads(other), cache_reads(other) - cache_reads(one))
