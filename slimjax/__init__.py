"""slimjax: small attention caches and fast decoding for JAX, with proof."""

from slimjax.attention.cross import attend_filled, cross_full, fill
from slimjax.attention.layer import CachedAttention, attend_cached, attend_full, init_cache, prefill
from slimjax.attention.positions import Position
from slimjax.attention.projections import DecodeWeights, Projections
from slimjax.cache import Cache, Codec, codec
from slimjax.kernels.api import decode, decode_part
from slimjax.kernels.combine import combine
from slimjax.kernels.spec import DecodeSpec
from slimjax.scheme import Scheme, parse_scheme, parse_schemes
from slimjax.solve import Converted, Figures, convert

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CachedAttention",
    "Codec",
    "Converted",
    "DecodeSpec",
    "DecodeWeights",
    "Figures",
    "Position",
    "Projections",
    "Scheme",
    "attend_cached",
    "attend_filled",
    "attend_full",
    "codec",
    "combine",
    "convert",
    "cross_full",
    "decode",
    "decode_part",
    "fill",
    "init_cache",
    "parse_scheme",
    "parse_schemes",
    "prefill",
]
