"""Which meshes, batches, recomputation policies and pieces to try, and in which order. Plain data; no JAX."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.chips import Topology

AXES = ("data", "fsdp", "sequence", "tensor")
REACHED = 0.3
"""Share of the peak that products are guessed to reach before anything is compiled: it orders, it predicts nothing."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config.

    Attributes:
      mesh: sizes by axis.
      batch_size: examples a step.
      accumulate: pieces that a batch is taken in.
      remat: recomputation policy.
      needed: bytes of a device, estimated.
      seconds: of a step, estimated.
    """

    mesh: Mapping[str, int]
    batch_size: int
    accumulate: int
    remat: str
    needed: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Examples a second."""
        return self.batch_size / self.seconds if self.seconds else 0.0


def meshes(
    devices: int, *, tensor: int = 8, sequence: int = 8, given: Mapping[str, int] | None = None
) -> list[dict[str, int]]:
    """Return the meshes to consider, the plainest first.

    Powers of two only: `data` and `fsdp` take what is left, `tensor` and `sequence` go up to a size.

    Args:
      devices: whose number the sizes multiply to.
      tensor: largest size of that axis.
      sequence: largest size of that axis.
      given: sizes that are settled; -1 = what is left.
    """
    if given is not None and -1 not in given.values():
        return [{axis: given.get(axis, 1) for axis in AXES}]
    found = []
    for across in _powers(tensor):
        for along in _powers(sequence):
            rest = devices // (across * along)
            if rest * across * along != devices:
                continue
            for split in _powers(rest):
                mesh = {"data": rest // split, "fsdp": split, "sequence": along, "tensor": across}
                fits = all(mesh[axis] == length for axis, length in (given or {}).items() if length != -1)
                if math.prod(mesh.values()) == devices and fits:
                    found.append(mesh)
    return sorted(found, key=lambda mesh: (mesh["tensor"] * mesh["sequence"], mesh["fsdp"]))


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def candidates(
    survey: Mapping[str, Any],
    tried: Sequence[Mapping[str, int]],
    place: Topology,
    *,
    batch_size: int,
    surveyed: int,
    batches: Sequence[int],
    policies: Sequence[str] = (),
    pieces: Sequence[int] = (1, 2, 4, 8),
    activations: float = 1.0,
) -> Iterator[Candidate]:
    """Yield every candidate with its estimates.

    Args:
      survey: what `tools.plan_count.survey` counted at a batch of `surveyed` on each of `tried`.
      tried: the meshes.
      place: the topology.
      batch_size: the config's.
      surveyed: examples of the batch that was surveyed.
      batches: batch sizes to try; those that do not divide over a mesh are left out.
      policies: recomputation policies to try; empty = all that were surveyed.
      pieces: numbers of pieces to try.
      activations: what the compiler was found to need, over what was estimated.
    """
    everything = max(counted["activation_bytes"] for counted in survey["policies"].values())
    for held, mesh in zip(survey["meshes"], tried, strict=True):
        rows = mesh["data"] * mesh["fsdp"]
        for batch in batches or (batch_size,):
            for count in pieces:
                if batch % (rows * count):
                    continue
                for name in policies or survey["policies"]:
                    counted = survey["policies"][name]
                    one = Candidate(mesh, batch, count, name)
                    yield estimated(one, counted, held, place, batch / surveyed, everything, activations)


def estimated(
    given: Candidate,
    counted: Mapping[str, float],
    held: Mapping[str, int],
    place: Topology,
    scale: float,
    everything: float,
    activations: float = 1.0,
) -> Candidate:
    """Return a candidate with estimates of bytes and seconds.

    Memory: the state, a gradient like the parameters (whole where `fsdp` gathers them a layer at a time, two layers of
    fifty taken for that), the batch and the activations of a piece. Time: products at `REACHED` of the peak; all that a
    forward pass makes written once and read twice, and once more what is recomputed; state and gradients read and
    written once; a ring's all-reduce of the gradients; under `fsdp` a gather of the parameters for each pass and piece,
    and a scatter of the gradients; for `tensor` half of what the forward pass makes, as of a transformer's four
    all-reduces a block, and for `sequence` a twentieth.
    """
    mesh, rows = given.mesh, given.mesh["data"] * given.mesh["fsdp"]
    kept = scale * counted["activation_bytes"] / (rows * mesh["sequence"] * given.accumulate) * activations
    whole = held["parameters"] * mesh["fsdp"]
    gathered = 0.04 * whole if mesh["fsdp"] > 1 else 0.0
    batch = held["batch"] * scale
    state = held["parameters"] + held["optimiser"] + held["averages"] + held["other state"]
    gradients = held["parameters"] * (2 if given.accumulate > 1 else 1)
    computing = scale * counted["program_flops"] / place.devices / (REACHED * place.peak)
    made = scale * everything / (rows * mesh["sequence"])
    computing += (3 + 1 - counted["activation_bytes"] / max(1.0, everything)) * made / mesh["tensor"] / place.bandwidth
    computing += 2 * (held["parameters"] + held["optimiser"] + gradients) / place.bandwidth
    sent = 0.0
    if rows > 1:
        sent += 2 * held["parameters"] / place.ring(mesh["data"] if mesh["data"] > 1 else rows)
    if mesh["fsdp"] > 1:
        sent += (2 * given.accumulate + 1) * whole / place.ring(mesh["fsdp"])
    if mesh["tensor"] > 1:
        sent += 0.5 * made / place.ring(mesh["tensor"])
    if mesh["sequence"] > 1:
        sent += 0.05 * made / place.ring(mesh["sequence"])
    # A piece too small keeps no matrix unit busy: a little for each.
    overhead = 2e-4 * given.accumulate
    return dataclasses.replace(
        given, needed=state + gradients + gathered + batch + kept, seconds=computing + sent + overhead
    )


def ranked(found: Sequence[Candidate], limit: float) -> list[Candidate]:
    """Return the candidates, those that are estimated to fit first, by examples a second; near ties the plainer."""

    def key(each: Candidate) -> tuple[float, ...]:
        mesh = each.mesh
        plain = (mesh["tensor"] * mesh["sequence"], mesh["fsdp"], each.accumulate)
        if each.needed > limit:
            return (1, each.needed, *plain)
        # Steps of two hundredths: the estimates are not that good.
        return (0, -round(50 * math.log(each.rate)) if each.rate else 0, *plain)

    return sorted(found, key=key)


def chosen(order: Sequence[Candidate], count: int, *, alike: int = 2) -> list[Candidate]:
    """Return the first of an order, at most `alike` of a mesh, so that a few compilations see several meshes."""
    found: list[Candidate] = []
    for each in order:
        if sum(other.mesh == each.mesh for other in found) < alike:
            found.append(each)
        if len(found) == count:
            break
    return found


def best(reports: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return reports in order: what fits, by examples a second; then what does not, by what it needs; then failures."""

    def key(report: Mapping[str, Any]) -> tuple[int, float]:
        if "error" in report:
            return (2, 0.0)
        if report["memory"]["fits"] and report["time"]:
            return (0, -report["time"]["examples_per_second"])
        return (1, report["memory"]["needed"])

    return sorted(reports, key=key)
