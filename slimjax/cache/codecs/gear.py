"""GEAR-L (Kang et al., arXiv 2403.05527): KIVI's groups, and a low-rank approximation of what they lose."""

from slimjax.cache.codecs.corrected import Corrected
from slimjax.cache.codecs.kivi import Kivi


def gear_l(
    *,
    bits: int = 4,
    group: int = 64,
    tile: int | None = None,
    window: int = 0,
    rank: int = 4,
    decode_rank: int = 2,
    loops: int = 3,
    scale_dtype: str = "float16",
) -> Corrected:
    """KIVI's codes plus, for each tile and head, a low-rank approximation of their error; no sparse outliers ("-L").

    The paper's ranks: 4 for the prompt, 2 for every 64 tokens that decoding adds, by 3 loops of power iteration.
    The paper approximates a prompt's error as one matrix; here a tile is one, so ``tile`` as long as the prompt is
    the paper's form, and shorter tiles are corrected more closely for more bytes: a tile of G tokens stores
    (G + H)*4 factors for each head where the paper, sharing those of the channels, stores about G*4. Under
    ``rank=2`` a tile stores (G + H)*2, as much as the paper at G = H.

    Args:
        bits, group, tile, window: KIVI's; ``tile`` None: one group.
        rank, decode_rank, loops: ``Corrected``'s.
        scale_dtype: of KIVI's scales and of the factors.

    Raises:
        ValueError: a field that is none of these.
    """
    base = Kivi(
        bits=bits, group=group, tile=group if tile is None else tile, window=window, scale_dtype=scale_dtype
    )
    return Corrected(
        base=base,
        tile=base.tile,
        window=window,
        rank=rank,
        decode_rank=decode_rank,
        loops=loops,
        factor_dtype=scale_dtype,
    )
