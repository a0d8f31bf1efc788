"""The error of one scheme on given inputs of one layer: what a plan promised, measured on other data."""

import numpy as np

from slimjax.attention.bases import basis
from slimjax.cache import codec_of, row_bytes
from slimjax.numerics import relative_l2
from slimjax.scheme import Scheme
from slimjax.solve.augment import Solution, exact_solution
from slimjax.solve.calibrate import Calibration
from slimjax.solve.convert import through_codec
from slimjax.solve.fit import key_error, value_error
from slimjax.solve.linear import solve_map
from slimjax.solve.options import Layer, Option, option
from slimjax.solve.scales import needs_scale


def scheme_error(
    layer: Layer,
    scheme: Scheme,
    rows: np.ndarray,
    *,
    solution: Solution | None = None,
    first: Layer | None = None,
) -> float:
    """Relative L2 error of keys or values, whichever is larger, as attention reads them from the cache.

    Args:
        layer: the layer.
        scheme: what it caches.
        rows: [n, D], the layer's inputs.
        solution: for bases k and kr, a map from calibration; None: the exact one.
        first: for basis h, the layer whose keys are cached; None: this one.

    Raises:
        NotImplementedError: the layer cannot use the scheme.
    """
    spec, inputs = layer.under(scheme), np.asarray(rows, np.float64)
    if scheme.basis == "h":
        return _from_first(layer, scheme, inputs, first or layer)
    if scheme.basis not in ("k", "kr"):
        found = option(layer, scheme, _seen(inputs))
        if found.refused:
            raise NotImplementedError(f"{layer.name}: {found.refused}")
        return found.error
    basis(spec)
    needs_scale(spec, solution, layer.name)
    used = solution or exact_solution(layer.keys, layer.values, scheme.extra)
    keys = key_error(inputs, layer.keys, used, spec)
    return max(keys, value_error(inputs, layer.keys, layer.values, used, spec))


def first_layer_option(layer: Layer, scheme: Scheme, calibration: Calibration | None, first: Layer) -> Option:
    """Basis h on a layer that reads the keys of ``first``; bytes are those of the cache that all share."""
    if calibration is None:
        inputs = np.random.default_rng(0).standard_normal((256, layer.spec.width))
    else:
        inputs = np.asarray(calibration.held_out, np.float64)
    spec = layer.under(scheme)
    try:
        error = _from_first(layer, scheme, inputs, first)
        streams = basis(spec).streams(spec)
    except NotImplementedError as refusal:
        return Option(scheme=scheme, refused=str(refusal))
    size = row_bytes(streams, codec_of(scheme))
    # K and V are absorbed from float32 maps where a KV cache's layer would read its own projections.
    wide, plain = spec.key_width, spec.width * spec.key_width * layer.bytes_per_weight
    return Option(
        scheme=scheme,
        error=error,
        bytes_per_token=size,
        weight_bytes=2 * (4 * wide * wide - plain),
        how=f"through the keys of {first.name}",
    )


def _from_first(layer: Layer, scheme: Scheme, inputs: np.ndarray, first: Layer) -> float:
    """Basis h: this layer's keys and values from the first layer's keys as stored."""
    spec = layer.under(scheme)
    basis(spec)
    both = np.concatenate([layer.keys, layer.values], axis=1)
    weight = solve_map(first.keys, both).astype(spec.accumulation).astype(np.float64)
    found, exact = through_codec(inputs @ first.keys, spec, 1) @ weight, inputs @ both
    width = spec.key_width
    return max(
        relative_l2(found[:, :width], exact[:, :width]), relative_l2(found[:, width:], exact[:, width:])
    )


def _seen(inputs: np.ndarray) -> Calibration:
    """Rows to measure on, as a calibration that nothing is fitted on."""
    width = inputs.shape[1]
    return Calibration(
        second=np.zeros((width, width)), fit=inputs, choose=inputs, held_out=inputs, count=len(inputs)
    )
