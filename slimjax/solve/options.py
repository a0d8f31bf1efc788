"""What one attention layer could cache, with the error and the bytes of each way: the planner's menu."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from slimjax.attention.bases import basis
from slimjax.attention.projections import Projections
from slimjax.cache import codec_of, row_bytes
from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import relative_l2
from slimjax.scheme import Scheme
from slimjax.solve.augment import Solution
from slimjax.solve.calibrate import Calibration
from slimjax.solve.convert import convert, through_codec
from slimjax.solve.fit import fit, key_error
from slimjax.solve.linear import condition_number
from slimjax.solve.scales import fixed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """An attention layer to be planned for.

    Attributes:
        name: such as "decoder.3.cross".
        projections: as trained.
        spec: its geometry, under any scheme.
        bytes_per_weight: of the stored projections, 2 for a model kept in 16 bits.
    """

    name: str
    projections: Projections
    spec: DecodeSpec
    bytes_per_weight: int = 2

    def under(self, scheme: Scheme) -> DecodeSpec:
        """The layer's spec with another scheme."""
        return dataclasses.replace(self.spec, scheme=scheme)

    @property
    def keys(self) -> np.ndarray:
        """W_K, float64 [D, E]."""
        return np.asarray(self.projections.wk).astype(np.float64).reshape(self.spec.width, -1)

    @property
    def values(self) -> np.ndarray:
        """W_V, float64 [D, E]."""
        return np.asarray(self.projections.wv).astype(np.float64).reshape(self.spec.width, -1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Option:
    """One scheme on one layer.

    Attributes:
        scheme: the scheme.
        error: relative L2 error of keys or values, whichever is larger, as the attention reads them: on
            held-out inputs, or predicted for white ones where there is no calibration.
        calibration_error: the same on inputs that were fitted on; None where nothing was fitted.
        exact_error: the held-out error of the exact inverse; None where nothing is inverted.
        bytes_per_token: of the cache.
        weight_bytes: read at every step beyond what a KV cache's layer reads (W_KV and U in float32 against
            the W_V that is not needed); what a small batch times context does not earn back.
        condition_number: of what is inverted, or None.
        how: the way the map was found.
        solution: the map, where it came from calibration.
        refused: why the layer cannot use the scheme; then there are no figures.
    """

    scheme: Scheme
    error: float = float("inf")
    calibration_error: float | None = None
    exact_error: float | None = None
    bytes_per_token: float = 0
    weight_bytes: int = 0
    condition_number: float | None = None
    how: str = ""
    solution: Solution | None = None
    refused: str | None = None


def menu(
    layer: Layer, schemes: Sequence[Scheme], calibration: Calibration | None, enough: float | None = None
) -> tuple[Option, ...]:
    """Every scheme on this layer, measured on the calibration's rows or predicted without.

    ``enough``: of bases k and kr, schemes of more bytes than one that errs by at most this are left out.
    """
    options: list[Option] = []
    reached = math.inf
    sized = [(scheme, _size(layer, scheme)) for scheme in schemes]
    for scheme, size in sorted(sized, key=lambda pair: pair[1]):
        keys = scheme.basis in ("k", "kr")
        if keys and size > reached:
            continue
        found = option(layer, scheme, calibration)
        options.append(found)
        if keys and enough is not None and found.refused is None and found.error <= enough:
            reached = min(reached, size)
    where = {scheme: index for index, scheme in enumerate(schemes)}
    return tuple(sorted(options, key=lambda found: where[found.scheme]))


def _size(layer: Layer, scheme: Scheme) -> float:
    """Bytes per token; 0 for what is refused."""
    spec, codec = layer.under(scheme), codec_of(scheme)
    try:
        streams = basis(spec).streams(spec)
    except NotImplementedError:
        return 0
    return row_bytes(streams, codec)


def option(layer: Layer, scheme: Scheme, calibration: Calibration | None) -> Option:
    """One scheme on this layer; what cannot be is an option with a reason."""
    spec = layer.under(scheme)
    try:
        basis(spec)
        fixed(spec)
        if scheme.basis in ("k", "kr"):
            found = _from_keys(layer, spec, calibration)
        else:
            found = _read_back(layer, spec, calibration)
    except NotImplementedError as refusal:
        return Option(scheme=scheme, refused=str(refusal))
    return dataclasses.replace(
        found, bytes_per_token=_size(layer, scheme), weight_bytes=weight_bytes(layer, spec)
    )


def weight_bytes(layer: Layer, spec: DecodeSpec) -> int:
    """Bytes of weights that a decode step reads beyond those of the same layer with a KV cache."""
    wide, extra, width = spec.key_width, spec.scheme.extra, spec.width
    plain = width * wide * layer.bytes_per_weight
    if spec.scheme.basis in ("k", "kr"):
        return (wide + extra) * wide * 4 + width * extra * 4 - plain
    return wide * wide * 4 - plain if spec.scheme.basis == "v" else 0


def _from_keys(layer: Layer, spec: DecodeSpec, calibration: Calibration | None) -> Option:
    """Bases k and kr: the error of V, and that of the keys themselves."""
    if calibration is None:
        figures = convert(layer.projections, spec, layer=layer.name).figures
        assert figures.predicted_error is not None  # basis k always predicts
        return Option(
            scheme=spec.scheme,
            error=figures.predicted_error,
            condition_number=figures.condition_number,
            how="exact, without calibration",
        )
    basis(spec)
    found = fit(layer.keys, layer.values, spec, calibration)
    return Option(
        scheme=spec.scheme,
        error=max(found.held_out, key_error(calibration.held_out, layer.keys, found.solution, spec)),
        calibration_error=found.calibration,
        exact_error=found.exact,
        condition_number=condition_number(found.solution.cached(layer.keys)),
        how=found.solution.how,
        solution=found.solution,
    )


def _read_back(layer: Layer, spec: DecodeSpec, calibration: Calibration | None) -> Option:
    """The other bases: what the codec does to keys and values, or to what they are made of."""
    if calibration is None:
        inputs = np.random.default_rng(0).standard_normal((256, spec.width))
    else:
        inputs = np.asarray(calibration.held_out, np.float64)
    keys, values = inputs @ layer.keys, inputs @ layer.values
    name, condition = spec.scheme.basis, None
    if name == "kv":
        got = through_codec(keys, spec, spec.kv_heads), through_codec(values, spec, spec.kv_heads, "v")
    elif name in ("x", "e"):
        read = through_codec(inputs, spec, 1)
        got = read @ layer.keys, read @ layer.values
    elif name == "v":
        made = convert(layer.projections, spec, layer=layer.name)  # refuses a singular W_V
        condition = made.figures.condition_number
        read = through_codec(values, spec, spec.kv_heads, "v")
        got = read @ np.asarray(made.layer.weights.w_vk).reshape(spec.key_width, -1), read
    else:
        raise NotImplementedError(f"{layer.name}: basis {name!r} is chosen for all layers together")
    error = max(relative_l2(got[0], keys), relative_l2(got[1], values))
    return Option(scheme=spec.scheme, error=error, condition_number=condition, how="as stored")
