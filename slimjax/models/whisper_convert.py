"""A loaded Whisper model made ready for cache schemes, layer by layer."""

from collections.abc import Mapping, Sequence

from slimjax.models.whisper import DecoderBlock, WhisperModel
from slimjax.models.whisper_caches import SHARED, WhisperLayers, sharing
from slimjax.scheme import Scheme, parse_scheme
from slimjax.solve import Figures, Solution, convert

Schemes = str | Scheme | Sequence[str | Scheme]


def layer_names(layers: int) -> tuple[tuple[str, str], ...]:
    """The names of each decoder layer's self-attention and cross-attention, in messages, figures and plans."""
    return tuple((f"decoder.{index}.self", f"decoder.{index}.cross") for index in range(layers))


def convert_whisper(
    model: WhisperModel,
    cross: Schemes,
    own: Schemes,
    dtype: str = "float32",
    *,
    solutions: Mapping[str, Solution] | None = None,
) -> tuple[WhisperLayers, dict[str, Figures]]:
    """Solve for what every attention layer of the decoder needs under its scheme, on the host.

    Args:
        model: loaded.
        cross: the scheme of the cross-attention layers: one for all, or one for each.
        own: that of the self-attention layers.
        dtype: compute dtype of q, P and the attention output.
        solutions: maps found from calibration data, by layer name; absent: the exact ones.

    Returns:
        The converted layers, and each layer's figures by its name (``layer_names``).

    Raises:
        NotImplementedError: a layer cannot use its scheme; the message names both and the alternative.
        ValueError: as many schemes as layers are needed; a solution for a layer that there is not.
    """
    blocks = tuple(model.decoder)
    across, within = _each(cross, len(blocks), "cross"), _each(own, len(blocks), "self")
    given, figures = dict(solutions or {}), {}
    names = layer_names(len(blocks))
    unknown = sorted(given.keys() - {name for pair in names for name in pair})
    if unknown:
        raise ValueError(f"solutions for {unknown}, which are no layers of this model ({names[0][0]}, ...)")
    reads = sharing(across)
    self_layers, cross_layers = [], []
    for index, (block, (self_name, cross_name)) in enumerate(zip(blocks, names, strict=True)):
        done = convert(
            block.self_attention.projections(),
            block.self_spec(within[index], dtype),
            layer=self_name,
            solution=given.get(self_name),
        )
        self_layers.append(done.layer)
        figures[self_name] = done.figures
        done = convert(
            block.cross_attention.projections(),
            block.cross_spec(across[index], dtype),
            layer=cross_name,
            solution=given.get(cross_name),
            first=_first(blocks, reads, index) if across[index].basis in SHARED else None,
        )
        cross_layers.append(done.layer)
        figures[cross_name] = done.figures
    return WhisperLayers(self_layers=tuple(self_layers), cross_layers=tuple(cross_layers)), figures


def _first(blocks: Sequence[DecoderBlock], reads: tuple[int, ...], index: int):
    """The projections of the layer that fills the cache which layer ``index`` reads."""
    return blocks[reads.index(reads[index])].cross_attention.projections()


def _each(schemes: Schemes, layers: int, kind: str) -> tuple[Scheme, ...]:
    """One scheme for each layer."""
    several = [schemes] * layers if isinstance(schemes, str | Scheme) else list(schemes)
    if len(several) != layers:
        raise ValueError(
            f"{len(several)} {kind} schemes for {layers} decoder layers: give one, or one for each"
        )
    return tuple(parse_scheme(each) if isinstance(each, str) else each for each in several)
