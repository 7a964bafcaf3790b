"""Published figures of accelerators, and topologies by name (`v5e:16x16`, `h100:8`).

What is published is of a *chip*; what a program sees is a *device*, of which some chips have two.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: as topologies begin.
      kind: JAX's name of a device.
      peak: dense bfloat16 operations a second.
      memory: bytes of its HBM (or GDDR).
      bandwidth: bytes a second between it and the chip.
      link: bytes a second of one link, in one direction. A GPU's links are counted together.
      links: number of links; 2 for each axis of a torus.
      source: where these figures are published.
      devices: JAX devices of a chip.
      clock: cycles a second: `peak` over the operations of all matrix units in a cycle; 0 = a GPU. With it the
        compiler's estimates of large bfloat16 products come to 80 to 97 % of the peak.
      slices: topologies that are offered, or of their form.
      wraps: length from which an axis of the slice closes to a ring; 0 = never.
    """

    name: str
    kind: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    links: int
    source: str
    devices: int = 1
    clock: float = 0.0
    slices: tuple[str, ...] = ()
    wraps: int = 0

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.clock > 0

    @property
    def axes(self) -> int:
        """Axes of the torus; 1 for GPUs, which a switch joins."""
        return self.links // 2 if self.is_tpu else 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_GPUS = ("1", "2", "4", "8", "16", "32", "64", "128", "256")

_V5E = "https://cloud.google.com/tpu/docs/v5e"
_V6E = "https://cloud.google.com/tpu/docs/v6e"
_V7X = "https://docs.cloud.google.com/tpu/docs/tpu7x"  # its table has v5p too
_V4 = "https://cloud.google.com/tpu/docs/v4"

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # The links: published is the sum over a chip's links and both directions.
        Chip("v4", "TPU v4", 275e12, 32 * GIB, 1200 * GB, 50 * GB, 6, _V4, 1, 1.049e9, _CUBES, 4),
        Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 819 * GB, 50 * GB, 4, _V5E, 1, 1.503e9, _FLAT, 16),
        Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2765 * GB, 100 * GB, 6, _V7X, 1, 1.751e9, (*_CUBES, "16x16x24"), 4),
        Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1638 * GB, 100 * GB, 4, _V6E, 1, 1.751e9, _FLAT, 16),
        Chip("tpu7x", "TPU7x", 2307e12, 192 * GIB, 7380 * GB, 100 * GB, 6, _V7X, 2, 2.2e9, _CUBES, 4),
        # A GPU's link is half of what is published, which counts both directions.
        Chip(
            "a100",
            "NVIDIA A100",
            312e12,
            80 * GB,
            2039 * GB,
            300 * GB,
            1,
            "https://www.nvidia.com/en-us/data-center/a100/",
            slices=_GPUS,
        ),
        Chip(
            "h100",
            "NVIDIA H100",
            989e12,
            80 * GB,
            3350 * GB,
            450 * GB,
            1,
            "https://www.nvidia.com/en-us/data-center/h100/",
            slices=_GPUS,
        ),
        Chip(
            "h200",
            "NVIDIA H200",
            989e12,
            141 * GB,
            4800 * GB,
            450 * GB,
            1,
            "https://www.nvidia.com/en-us/data-center/h200/",
            slices=_GPUS,
        ),
        Chip(
            "l4",
            "NVIDIA L4",
            121e12,
            24 * GB,
            300 * GB,
            32 * GB,
            1,
            "https://www.nvidia.com/en-us/data-center/l4/",
            slices=_GPUS,
        ),
    )
}
"""What is known, by name."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some chips and how they are joined.

    Attributes:
      name: such as `v5e:16x16`.
      chip: what they are.
      grid: their number along each axis of the torus; GPUs have one axis.
    """

    name: str
    chip: Chip
    grid: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.grid)

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.chip.devices

    # Of one device:

    @property
    def peak(self) -> float:
        """Dense bfloat16 operations a second of a device."""
        return self.chip.peak / self.chip.devices

    @property
    def memory(self) -> float:
        """Bytes of memory of a device."""
        return self.chip.memory / self.chip.devices

    @property
    def bandwidth(self) -> float:
        """Bytes a second between a device and its memory."""
        return self.chip.bandwidth / self.chip.devices

    def ring(self, size: int) -> float:
        """Return the bytes a second that a device sends in a collective of `size` devices.

        Assumed is one ring along one axis of the torus, in both directions where the axis closes; over a group larger
        than the longest axis, two such rings, along two axes. The devices of a chip share its links.
        """
        chip = self.chip
        if not chip.is_tpu:
            return chip.link
        longest = max(self.grid)
        both = 2 if longest >= chip.wraps else 1
        rings = 2 if size > longest * chip.devices else 1
        return chip.link * both * rings / chip.devices


def topology(name: str) -> Topology:
    """Return the topology of that name.

    Raises:
      ValueError: if the chip or the form is not known, with those that are.
    """
    kind, colon, form = name.lower().partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(re.split(r"[-_]", kind)[0], CHIPS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}:{CHIPS[near[0]].slices[-1]}?" if near else ""
        raise ValueError(f"--topology {name!r} must be a known chip and its slice{hint}; known are\n{known()}")
    chip = CHIPS[kind]
    dimensions = len(chip.slices[0].split("x"))
    numbers = form.split("x")
    if not colon or len(numbers) != dimensions or not all(re.fullmatch(r"[1-9]\d*", number) for number in numbers):
        shape = "x".join("ABC"[:dimensions]) if chip.is_tpu else "N"
        raise ValueError(f"--topology {name!r} must be of the form {kind}:{shape}; known are\n{known(kind)}")
    return Topology(f"{kind}:{form}", chip, tuple(int(number) for number in numbers))


def known(kind: str | None = None) -> str:
    """Return the known topologies, a line a chip."""
    chips = CHIPS.values() if kind is None else [CHIPS[kind]]
    return "\n".join(f"  {chip.name}:{{{','.join(chip.slices)}}}" for chip in chips)
