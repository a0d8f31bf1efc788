"""The generations of TPU that kernels are compiled for: their memories and clocks, and which one is running."""

from dataclasses import dataclass

import jax

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation of TPU.

    Attributes:
        topology: its name for libtpu; a few chips of one host.
        kinds: what jax calls its devices.
        hbm: bytes a second of a chip.
        cores: TensorCores a chip, which share that.
        clock: Hz; for v7x inferred from its peak rates, not published.
        vmem: bytes a core.
        scoped: bytes of it that a kernel may take that asks for no other limit.
        int8: whether its matrix unit multiplies INT8.
        joined: whether its cores are one device to jax, which shares a parallel grid out to them.
    """

    topology: str
    kinds: tuple[str, ...]
    hbm: float
    cores: int
    clock: float
    vmem: int
    scoped: int
    int8: bool
    joined: bool = False

    def parts(self, batch: int) -> int:
        """Parts of so many sequences that leave no core of a device without work."""
        return self.cores if self.joined and batch < self.cores else 1

    @property
    def room(self) -> int:
        """VMEM, bytes, that our kernels ask for: half of a core's, or what every kernel may take."""
        return max(self.scoped, self.vmem // 2)

    def hbm_cycles(self, size: float) -> float:
        """Cycles in which `size` bytes come from HBM to one core while the others read as much."""
        return size * self.cores / self.hbm * self.clock


GENERATIONS = {
    "v4": Generation(
        topology="v4:2x2x1",
        kinds=("TPU v4",),
        hbm=1.23e12,
        cores=2,
        clock=1.05e9,
        vmem=16 * MIB,
        scoped=16 * MIB,
        int8=False,
        joined=True,
    ),
    "v5e": Generation(
        topology="v5e:2x2",
        kinds=("TPU v5 lite", "TPU v5e"),
        hbm=0.82e12,
        cores=1,
        clock=1.5e9,
        vmem=128 * MIB,
        scoped=16 * MIB,
        int8=True,
    ),
    "v5p": Generation(
        topology="v5p:2x2x1",
        kinds=("TPU v5", "TPU v5p"),
        hbm=2.77e12,
        cores=2,
        clock=1.75e9,
        vmem=64 * MIB,
        scoped=16 * MIB,
        int8=True,
        joined=True,
    ),
    "v6e": Generation(
        topology="v6e:2x2",
        kinds=("TPU v6 lite", "TPU v6e"),
        hbm=1.64e12,
        cores=1,
        clock=1.75e9,
        vmem=128 * MIB,
        scoped=32 * MIB,
        int8=True,
    ),
    "v7x": Generation(
        topology="tpu7x:2x2x1",
        kinds=("TPU7x", "TPU v7x"),
        hbm=7.40e12,
        cores=2,
        clock=1.9e9,
        vmem=64 * MIB,
        scoped=32 * MIB,
        int8=False,
    ),
}


def running() -> Generation | None:
    """The generation of the TPU in use; None where there is none, or one that is not known."""
    if jax.default_backend() != "tpu":
        return None
    kind = jax.devices()[0].device_kind
    return next((found for found in GENERATIONS.values() if kind in found.kinds), None)


def known() -> Generation | None:
    """The generation of the TPU in use; None where there is none. Raises NotImplementedError of one not known.

    Its compiler might refuse what a guess would ask of it, which is too late to take another implementation.
    """
    found = running()
    if found is None and jax.default_backend() == "tpu":
        kind = jax.devices()[0].device_kind
        raise NotImplementedError(
            f"TPU {kind!r} is not known here, only {', '.join(GENERATIONS)}: its memory and whether it multiplies INT8"
        )
    return found
