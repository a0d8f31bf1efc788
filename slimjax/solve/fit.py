"""The map of one layer, chosen among candidates by their error on real inputs that none was fitted on."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from slimjax.kernels.spec import DecodeSpec
from slimjax.numerics import relative_l2
from slimjax.solve.augment import Solution, augmented, lost_directions
from slimjax.solve.calibrate import Calibration
from slimjax.solve.convert import stored
from slimjax.solve.noise import lmmse_maps, worst_values
from slimjax.solve.products import PRODUCTS
from slimjax.solve.scales import channel_scales, fixed, key_scales

RIDGES = (1e-4, 1e-2, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """The chosen map and its relative L2 errors of V, through the codec.

    Attributes:
        solution: of the candidates the one with the least error on the rows that choose.
        exact: the error of the exact map with calibration-free coordinates, on the held-out rows.
        calibration, held_out: errors of the chosen one on rows fitted on and on rows never seen.
    """

    solution: Solution
    exact: float
    calibration: float
    held_out: float


def value_error(
    rows: np.ndarray,
    wk: np.ndarray,
    wv: np.ndarray,
    solution: Solution,
    spec: DecodeSpec,
    product: str = "float32",
) -> float:
    """Relative L2 error of V for inputs ``rows`` [n, D]: keys encoded and decoded, mapped as decoding does.

    ``product``: a name of ``solve.products``, for what other arithmetic would make of it.
    """
    inputs = np.asarray(rows, np.float64)
    decoded = jnp.asarray(stored(inputs @ solution.cached(wk), spec).astype(spec.accumulation))
    weight = jnp.asarray(solution.weight.astype(spec.accumulation))
    return relative_l2(PRODUCTS[product](decoded, weight), inputs @ wv)


def key_error(rows: np.ndarray, wk: np.ndarray, solution: Solution, spec: DecodeSpec) -> float:
    """Relative L2 error of the keys themselves for inputs ``rows`` [n, D], as they are read back."""
    inputs, width = np.asarray(rows, np.float64), spec.key_width
    read = stored(inputs @ solution.cached(wk), spec)[:, :width]
    return relative_l2(read if solution.scale is None else read * solution.scale, inputs @ wk)


def rounding_noise(
    rows: np.ndarray, wk: np.ndarray, extra: np.ndarray | None, spec: DecodeSpec
) -> np.ndarray:
    """Mean squared rounding error of every cached element on real inputs, [E+R]."""
    exact = np.asarray(rows, np.float64) @ augmented(wk, extra)
    noise = np.mean((stored(exact, spec) - exact) ** 2, axis=0)
    return np.maximum(noise, np.finfo(np.float64).tiny)  # an exact codec has none


def fit(wk: np.ndarray, wv: np.ndarray, spec: DecodeSpec, calibration: Calibration) -> Fitted:
    """Try the exact map and noise-aware ones, on calibration-free and calibrated coordinates; keep the best.

    The exact map is among the candidates, so the chosen one is never worse on the rows that choose; on
    others it may be, by as much as those rows differ.

    Args:
        wk, wv: float64 [D, E].
        spec: its scheme is of basis k or kr. Under a codec without scales the map is of scaled keys.
        calibration: the layer's inputs.

    Raises:
        NotImplementedError: a codec without scales under basis kr.
    """
    codec = fixed(spec)
    scale = None if codec is None else key_scales(np.asarray(calibration.fit, np.float64) @ wk, spec, codec)
    source = wk if scale is None else wk / scale
    coordinates = _coordinates(source, wv, spec, calibration)
    free = coordinates[0][0]
    exact = Solution(weight=_inverse(augmented(source, free), wv), extra=free, scale=scale)
    candidates = [exact]
    for extra, name in coordinates:
        noise = rounding_noise(calibration.fit, source, extra, spec)
        maps = lmmse_maps(augmented(source, extra), wv, calibration.second, noise, RIDGES)
        candidates += [
            Solution(weight=weight, extra=extra, how=f"noise-aware, {name}, ridge {ridge:.0e}", scale=scale)
            for weight, ridge in zip(maps, RIDGES, strict=True)
        ]
    errors = [value_error(calibration.choose, wk, wv, each, spec) for each in candidates]
    best = candidates[int(np.argmin(errors))]
    return Fitted(
        solution=best,
        exact=value_error(calibration.held_out, wk, wv, exact, spec),
        calibration=value_error(calibration.fit, wk, wv, best, spec),
        held_out=value_error(calibration.held_out, wk, wv, best, spec),
    )


def _inverse(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The exact map, of least norm where several are; the best one there is where W_K is singular."""
    return np.linalg.lstsq(source, target, rcond=None)[0]


def _coordinates(
    wk: np.ndarray, wv: np.ndarray, spec: DecodeSpec, calibration: Calibration
) -> list[tuple[np.ndarray | None, str]]:
    """The candidates for U and what to call them, the calibration-free one first."""
    rank, codec = spec.scheme.extra, fixed(spec)
    if not rank:
        return [(None, "keys alone")]
    plain = dataclasses.replace(spec, scheme=dataclasses.replace(spec.scheme, extra=0))
    noise = rounding_noise(calibration.fit, wk, None, plain)
    found = {
        "lost directions of W_K": lost_directions(wk, rank),
        "worst directions of V": worst_values(wk, wv, calibration.second, noise, rank),
    }
    if codec is not None:
        rows = np.asarray(calibration.fit, np.float64)
        found = {name: extra / channel_scales(rows @ extra, codec) for name, extra in found.items()}
    return [(extra, name) for name, extra in found.items()]
