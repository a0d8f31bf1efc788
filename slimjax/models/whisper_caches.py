"""The caches of an encoder-decoder: one per self-attention layer; for cross-attention one each, or one shared."""

from slimjax.attention.cross import Memory, fill
from slimjax.attention.layer import CachedAttention, init_cache
from slimjax.axes import Lengths
from slimjax.cache import Cache
from slimjax.pytree import pytree, static

# Bases whose rows do not depend on the layer that reads them.
SHARED = ("e", "h")


@pytree
class WhisperLayers:
    """The decoder's attention layers made ready for their schemes, by ``convert_whisper``."""

    self_layers: tuple[CachedAttention, ...]
    cross_layers: tuple[CachedAttention, ...]

    @property
    def sharing(self) -> tuple[int, ...]:
        """For each layer, which of the cross caches it reads: layers of one shared scheme read one cache."""
        return sharing(tuple(layer.spec.scheme for layer in self.cross_layers))


@pytree
class WhisperCaches:
    """The self caches, which grow, and the cross caches, filled once from the encoder's output.

    Attributes:
        self_caches: one per decoder layer.
        cross_caches: one per decoder layer, or fewer where layers share one (bases e and h).
        reads: for each layer, which of ``cross_caches`` it reads.

    Bytes are those of the caches' leaves, a shared cache counted once.
    """

    self_caches: tuple[Cache, ...]
    cross_caches: tuple[Cache, ...]
    reads: tuple[int, ...] = static()

    def cross(self, layer: int) -> Cache:
        """The cross cache that a layer reads."""
        return self.cross_caches[self.reads[layer]]

    @property
    def self_bytes(self) -> int:
        """Measured bytes of the self caches, at their full capacity."""
        return sum(cache.nbytes for cache in self.self_caches)

    @property
    def cross_bytes(self) -> int:
        """Measured bytes of the cross caches."""
        return sum(cache.nbytes for cache in self.cross_caches)


def sharing(schemes: tuple[object, ...]) -> tuple[int, ...]:
    """For each layer's scheme, the number of the cross cache it reads; equal shared schemes read one."""
    caches: dict[object, int] = {}
    return tuple(
        caches.setdefault(
            scheme if getattr(scheme, "basis", None) in SHARED else (index, scheme), len(caches)
        )
        for index, scheme in enumerate(schemes)
    )


def begin(
    layers: WhisperLayers, memory: Memory, *, capacity: int, count: Lengths | None = None
) -> WhisperCaches:
    """The cross phase: cross caches filled from ``memory`` [B, S, D], and empty self caches.

    Args:
        layers: from ``convert_whisper``.
        memory: the encoder's output.
        capacity: tokens that each self cache can hold.
        count: [B], positions of each memory that count; None: all S.
    """
    batch, slots, _ = memory.shape
    reads = layers.sharing
    filled = []
    for number in range(max(reads) + 1):
        first = layers.cross_layers[reads.index(number)]  # of the layers that share one, the first fills it
        filled.append(fill(memory, first, init_cache(first.spec, batch=batch, capacity=slots), count=count))
    return WhisperCaches(
        self_caches=tuple(
            init_cache(layer.spec, batch=batch, capacity=capacity) for layer in layers.self_layers
        ),
        cross_caches=tuple(filled),
        reads=reads,
    )
