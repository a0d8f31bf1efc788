"""A language model through a cache against the same model without one, token by token.

``slimjax.windows`` keeps what the exact model makes of its text; ``choose`` makes the layers of one way to cache,
``measure`` holds them against it: after a prompt, whose rows are those of the exact model, every key and value that a
token sees comes out of the cache.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slimjax.attention.bases import basis
from slimjax.attention.layer import CachedAttention
from slimjax.kernels.spec import DecodeSpec
from slimjax.models.decoder import init_caches
from slimjax.numerics import four_errors, logit_kl, relative_l2
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve.convert import convert
from slimjax.solve.fit import fit
from slimjax.solve.heads import permute_heads
from slimjax.solve.mixing import for_prompt, protected
from slimjax.statistics import blocks, mean_interval
from slimjax.windows import Exact, Part, continued

HEADED = ("kv", "k", "kr", "v")  # bases whose rows have heads
SOLVED = ("k", "kr")  # bases whose values come from a map that calibration chooses
BLOCK = 64  # tokens whose mean KL is one sample
DYNAMIC = "dynamic"  # the selector that chooses anew for every prompt, by priority


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to cache a model's keys and values.

    Attributes:
        scheme: of the layers that are not protected.
        selector: how the heads with fewer bits are chosen (``slimjax.solve.mixing``); "none": in their order;
            "dynamic": by priority, for every prompt anew (``for_prompt``).
        protected: so many first, and so many last, layers are under ``protection`` instead.
        protect: "ends", or "middle": as many layers, but in the middle.
        seed: of the random selector.
        dtype: compute dtype.
    """

    scheme: Scheme
    selector: str = "none"
    protected: int = 0
    protection: Scheme | None = None
    protect: str = "ends"
    seed: int = 0
    dtype: str = "float32"

    def schemes(self, layers: int) -> tuple[Scheme, ...]:
        """Of every layer. Raises NotImplementedError where all layers would be protected."""
        if not self.protected or self.protection is None:
            return (self.scheme,) * layers
        if 2 * self.protected >= layers:
            raise NotImplementedError(
                f"{self.protected} protected layers at either end leave none of {layers}; protect fewer"
            )
        if self.protect == "ends":
            return protected(self.scheme, self.protection, layers, self.protected, self.protected)
        first = layers // 2 - self.protected
        inside = range(first, first + 2 * self.protected)
        return tuple(self.protection if index in inside else self.scheme for index in range(layers))

    def check_selector(self) -> None:
        """Raise NotImplementedError, with the reason, where there are no heads to choose from."""
        if self.selector == "none":
            return
        if self.scheme.basis not in HEADED:
            raise NotImplementedError(
                f"selector {self.selector} orders heads; basis {self.scheme.basis} has one row for all of them"
            )
        if "-" not in (self.scheme.bits or ""):
            raise NotImplementedError(f"selector {self.selector}: {self.scheme} has one width for all heads")


def choose(exact: Exact, choice: Choice) -> tuple[CachedAttention, ...]:
    """The layers of a choice, heads of fewer bits first (of "dynamic" in the model's order, until a prompt is known).

    Of bases k and kr the maps are the best on the calibration tokens, for the heads in that order. Raises
    NotImplementedError, with the reason, where the model cannot be cached so.
    """
    schemes, layers = choice.schemes(len(exact.model.blocks)), []
    choice.check_selector()
    for index, (block, scheme) in enumerate(zip(exact.model.blocks, schemes, strict=True)):
        weights, spec = block.attention.projections(), block.attention.decode_spec(scheme, choice.dtype)
        name, solution = f"layer {index}", None
        _refuse(spec, name)  # before anything is fitted
        if choice.selector not in ("none", DYNAMIC):
            order = exact.order(index, scheme, choice.selector, choice.seed)
            weights = permute_heads(weights, order, spec.position)
        if scheme.basis in SOLVED:
            wk, wv = (np.asarray(w, np.float64).reshape(spec.width, -1) for w in (weights.wk, weights.wv))
            solution = fit(wk, wv, spec, exact.calibrations[index]).solution
        layers.append(convert(weights, spec, layer=name, solution=solution).layer)
    return tuple(layers)


def _refuse(spec: DecodeSpec, layer: str) -> None:
    """Raise NotImplementedError, naming the layer, where its scheme cannot be had."""
    try:
        basis(spec)
    except NotImplementedError as refusal:
        raise NotImplementedError(f"{layer}: {refusal}") from None


def measure(
    exact: Exact, layers: Sequence[CachedAttention], *, context: int, dynamic: bool = False
) -> dict[str, float | list]:
    """What the caches of these layers change, behind the prompts.

    Args:
        layers: from ``choose``.
        context: tokens of the cache whose bytes are told.
        dynamic: every prompt orders the heads for itself.

    Returns:
        perplexity, bits_per_byte, bits_per_byte_change; logit_kl with its 95 % interval (over blocks of 64 tokens,
        which are logit_kl_blocks; nats_blocks: of the targets) and by position; top1_agreement; count (of scored
        targets); of attention's output on exact inputs, worst and mean layer: cosine, relative L1, RMSE, relative L2
        (attention_error), the last by position, too; and what ``stored`` says of ``context`` tokens.
    """
    scores, outputs = [], [[] for _ in layers]
    for part, ready in _ready(exact, layers, dynamic):
        logits, probes = continued(exact.model, ready, part)
        scores.append(np.asarray(_scores(logits, jnp.asarray(part.logits), part.targets), np.float64))
        for found, probe in zip(outputs, probes, strict=True):
            found.append(np.asarray(probe))
    kl, nats, same = np.concatenate(scores, axis=1)
    bits = float(nats.mean()) / math.log(2) / exact.bytes_per_token
    samples = blocks(kl, BLOCK)
    found = {
        "perplexity": math.exp(float(nats.mean())),
        "bits_per_byte": bits,
        "bits_per_byte_change": bits - exact.bits_per_byte,
        "logit_kl": max(0.0, float(kl.mean())),  # rounding can leave -1e-10
        "logit_kl_blocks": samples.tolist(),
        "nats_blocks": blocks(nats, BLOCK).tolist(),
        "top1_agreement": float(same.mean()),
        "count": int(kl.size),
    }
    if samples.size > 1:
        interval = mean_interval(samples)
        found |= {"logit_kl_low": interval.low, "logit_kl_high": interval.high}
    ours = [np.concatenate(each) for each in outputs]
    wanted = [np.concatenate([part.outputs[index] for part in exact.parts]) for index in range(len(layers))]
    places = _by_position(kl, ours, wanted, exact.parts[0].prompt)
    return found | attention_errors(ours, wanted) | places | stored(layers, context)


def _ready(
    exact: Exact, layers: Sequence[CachedAttention], dynamic: bool
) -> Iterator[tuple[Part, Sequence[CachedAttention]]]:
    """The parts, each with the layers that read it."""
    for part in exact.parts:
        if not dynamic:
            yield part, layers
            continue
        for window in part.alone():
            yield window, for_prompt(exact.model, window.tokens[:, : window.prompt], layers)


def attention_errors(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> dict[str, float]:
    """Of arrays of each layer, the four measures of 01-methods 2.4 of the worst layer and their means over layers."""
    measured = [four_errors(a, b) for a, b in zip(found, wanted, strict=True)]
    names = ("attention_cosine", "attention_l1", "attention_rmse", "attention_error")
    each = dict(zip(names, zip(*measured, strict=True), strict=True))
    worst = {
        name: min(values) if name == "attention_cosine" else max(values) for name, values in each.items()
    }
    return worst | {f"{name}_mean": math.fsum(values) / len(values) for name, values in each.items()}


def edges(length: int, start: int = 0) -> list[int]:
    """Ends of ranges of positions from ``start`` on: the powers of two from 64 on, and the length itself."""
    ends, end = [], BLOCK
    while end < length:
        ends += [end] if end > start else []
        end *= 2
    return [*ends, length]


def _by_position(
    kl: np.ndarray, outputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray], prompt: int
) -> dict[str, list[float]]:
    """KL and mean relative L2 of attention's output over the layers, by ranges of positions; none of a single one."""
    ends = edges(prompt + kl.shape[1], prompt)
    if len(ends) < 2:
        return {}
    places = [slice(a - prompt, b - prompt) for a, b in itertools.pairwise([prompt, *ends])]
    return {
        "positions": [float(end) for end in ends],
        "logit_kl_by_position": [max(0.0, float(kl[:, place].mean())) for place in places],
        "attention_error_by_position": [
            math.fsum(relative_l2(x[:, place], y[:, place]) for x, y in zip(outputs, wanted, strict=True))
            / len(outputs)
            for place in places
        ],
    }


def stored(layers: Sequence[CachedAttention], context: int) -> dict[str, float]:
    """Cache bytes per token of all layers, scales, windows and buffers included, and how many times less than bf16 KV.

    Of one sequence of ``context`` tokens (rounded up to whole buffers): a buffer does not grow with the sequence.
    ``map_bytes``: of the weights that stand for W_V or W_K where only the other's rows are cached, if any do.
    """
    caches = jax.eval_shape(lambda: init_caches(layers, 1, context))
    size = sum(cache.bytes_per_token for cache in caches)
    found = {
        "bytes_per_token": size,
        "compression": sum(4 * layer.spec.key_width for layer in layers) / size,  # K and V, 2 bytes each
    }
    maps = [(layer.weights.w_kv, layer.weights.extra, layer.weights.w_vk) for layer in layers]
    if leaves := jax.tree.leaves(maps):
        found["map_bytes"] = float(sum(leaf.nbytes for leaf in leaves))
    return found


def named(scheme: str, fraction: float | None) -> Scheme:
    """The scheme, with another share of its heads in fewer bits where one is given."""
    chosen = parse_scheme(scheme)
    if fraction is None or "-" not in (chosen.bits or ""):
        return chosen
    options = tuple(sorted({**dict(chosen.options), "share": fraction}.items()))
    return dataclasses.replace(chosen, options=options)


@jax.jit
def _scores(
    logits: Float[Array, "B T V"], exact: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "3 B T"]:
    """KL to the exact model, nats of the target, and whether the likeliest token is the same, of every token."""
    nats = (
        jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    )
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(exact, axis=-1)
    return jnp.stack([logit_kl(logits, exact), nats, same.astype(logits.dtype)])
