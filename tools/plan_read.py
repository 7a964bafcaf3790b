"""Read a compiled program's text: cycles by module and kind, bytes to and from HBM, collectives, live memory.

Text in, plain data out. What the text says is exact, the cycles are the compiler's own estimate, and times of
collectives are a model (`tools.chips.Topology.ring`). Loops count times their turns where these can be known, a
conditional by its dearest branch.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.collectives import Instruction, collectives, read, turns

MEMORY = 0
"""Memory space of HBM; what lies in another (`S(1)` is the vector memory) costs no HBM."""


@dataclasses.dataclass(frozen=True)
class Heavy:
    """One instruction and what it costs in a step.

    Attributes:
      name: as in the text.
      kind: "product" (a matrix product or convolution is in it), "copy" (layout only), "kernel" (of Pallas) or "other".
      module: the layer it belongs to, as a path, backward passes like forward ones; empty = none.
      backward: it belongs to a gradient.
      what: the end of JAX's name for it, such as `dot_general`.
      cycles: estimated, over the whole step.
      count: times that it runs.
    """

    name: str
    kind: str
    module: str
    backward: bool
    what: str
    cycles: int
    count: int


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one kind along the same axes.

    Attributes:
      kind: such as "all-reduce".
      axes: the mesh axes.
      bytes: what one device has in hand, over a step; see `train.collectives.Collective`.
      count: how many, over a step.
      group_size: devices of a group.
      seconds: modelled, were nothing done meanwhile.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    group_size: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a program's text says of one step of one device.

    Attributes:
      cycles: estimated, summed.
      by_kind: cycles by kind (see `Heavy`).
      by_module: cycles by (module, backward).
      by_kernel: cycles of Pallas kernels by name, where the text has them (see `tools.plan_kernels`).
      heaviest: the instructions with the most cycles, first the heaviest.
      bytes: to and from HBM, at the boundaries of fusions.
      sent: collectives by kind and axes.
      exposed: seconds of collectives that nothing runs beside, when asynchronous ones overlap with what is scheduled
        between their start and end.
      unknown_loops: loops whose turns are not known; each counted once.
      opaque: Pallas kernels run without an estimate of their cycles.
      live: bytes at the moment when most temporary values of the entry live, by kind: `activations` (made by the
        forward pass, read by the backward pass) and `temporaries`. What loops and fusions hold inside is not seen.
    """

    cycles: int
    by_kind: Mapping[str, int]
    by_module: Mapping[tuple[str, bool], int]
    by_kernel: Mapping[str, int]
    heaviest: tuple[Heavy, ...]
    bytes: int
    sent: tuple[Sent, ...]
    exposed: float
    unknown_loops: int
    opaque: int
    live: Mapping[str, int]


def reading(text: str, mesh: Any, *, clock: float = 0.0, ring: Any = None, keep: int = 20) -> Reading:
    """Return the reading of a scheduled HLO module.

    Args:
      text: of a compiled program (`compiled.as_text()`).
      mesh: that it was compiled for (an `AbstractMesh` of the same sizes does).
      clock: cycles a second; 0 = collectives overlap with nothing.
      ring: from the number of devices of a group to the bytes a second that a device sends; `None` = no times.
      keep: instructions to name.

    Raises:
      ValueError: if the text is no HLO module.
    """
    computations, entry = read(text)
    found = collectives(text, mesh)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; pass the text of a compiled program (compiled.as_text())")
    program = _Program(computations)
    costs = list(program.costs(entry, 1))
    by_kind: dict[str, int] = defaultdict(int)
    by_module: dict[tuple[str, bool], int] = defaultdict(int)
    by_kernel: dict[str, int] = defaultdict(int)
    merged: dict[str, Heavy] = {}
    for instruction, times in costs:
        cycles = times * estimated_cycles(instruction)
        if not cycles:
            continue
        path, backward, what = place(program.op_name(instruction))
        kind = program.kind(instruction)
        if kind == "kernel":
            # JAX names the operation alike for all, and the kernel as if it were a module.
            what = re.sub(r"\.\d+$", "", instruction.name)
            path = re.sub(rf"(^|/){re.escape(what)}$", "", path)
            by_kernel[what] += cycles
        by_kind[kind] += cycles
        by_module[(path, backward)] += cycles
        old = merged.get(instruction.name)
        merged[instruction.name] = Heavy(
            instruction.name,
            kind,
            path,
            backward,
            what,
            cycles + (old.cycles if old else 0),
            times + (old.count if old else 0),
        )
    seconds = {each.name: link_seconds(each, ring) for each in found} if ring else {}
    timeline = _Timeline(program, clock, seconds)
    return Reading(
        cycles=sum(by_kind.values()),
        by_kind=dict(by_kind),
        by_module=dict(by_module),
        by_kernel=dict(by_kernel),
        heaviest=tuple(sorted(merged.values(), key=lambda heavy: -heavy.cycles)[:keep]),
        bytes=sum(times * program.traffic(instruction) for instruction, times in costs),
        sent=tuple(_summed(found, seconds)),
        exposed=timeline.run(entry),
        unknown_loops=len(program.unknown_loops),
        opaque=sum(times for one, times in costs if is_kernel(one) and not estimated_cycles(one)),
        live=program.live(entry),
    )


def link_seconds(each: Any, ring: Any) -> float:
    """Return the seconds of one collective by itself on a ring of n: `(n - 1) / n` of the bytes, twice to reduce."""
    n = each.group_size
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(each.kind, (n - 1) / n)
    return share * each.bytes / ring(n)


def _summed(found: Sequence[Any], seconds: Mapping[str, float]) -> Iterator[Sent]:
    groups: dict[tuple[str, tuple[str, ...], int], list[Any]] = defaultdict(list)
    for each in found:
        groups[(each.kind, each.mesh_axes, each.group_size)].append(each)
    for (kind, axes, size), members in sorted(groups.items()):
        times = [each.count or 1 for each in members]
        yield Sent(
            kind,
            axes,
            sum(each.bytes * count for each, count in zip(members, times, strict=True)),
            sum(times),
            size,
            sum(seconds.get(each.name, 0.0) * count for each, count in zip(members, times, strict=True)),
        )


def estimated_cycles(instruction: Instruction) -> int:
    """Return the compiler's estimate for an instruction; 0 where it has none."""
    if instruction.opcode in ("while", "conditional", "call"):
        return 0
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    return int(found[1]) if found else 0


_TRANSFORMED = re.compile(r"^(\w+)\((.*)\)$")
_SCOPES = ("while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "branch_0_fun", "branch_1_fun")


def place(op_name: str) -> tuple[str, bool, str]:
    """Return (module path, whether of a gradient, operation) of JAX's name for an operation.

    `jit(step)/transpose(jvp(Swin))/Swin.features/stages_0/blocks_1/up/dot_general` is `stages_0/blocks_1/up`, True,
    `dot_general`: transformations, methods and the model's own name are left out.
    """
    parts = _split(op_name)
    what = parts.pop() if parts else ""
    backward = any(part.startswith("transpose(") for part in parts)
    path: list[str] = []
    inside = False  # the first name under a derivative is the model's class
    for part in parts:
        transformed = _TRANSFORMED.match(part)
        while transformed:
            part = transformed[2] if transformed[1] in ("jvp", "transpose", "vmap", "remat", "checkpoint") else ""
            transformed = _TRANSFORMED.match(part)
            inside = True
        if not part or part in _SCOPES or "." in part or not re.fullmatch(r"\w+", part):
            continue
        if part[0].isupper():
            continue
        path.append(part)
    return "/".join(dict.fromkeys(path)) if inside else "", backward, what


def _split(op_name: str) -> list[str]:
    """Cut a name at the slashes outside brackets."""
    parts, depth, current = [], 0, ""
    for letter in op_name:
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [part for part in (*parts, current) if part]


def out_of_memory(message: str) -> dict[str, float] | None:
    """Return what a compiler's refusal for memory says; `None` if it is another refusal.

    `available` bytes, and either `needed` in all or `temporaries` alone; empty where it gives no figures.
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    unit = r"([\d.]+)\s*([KMGT]?)i?B?\b"
    patterns = {
        "needed": rf"Used {unit} of {unit}",
        "temporaries": rf"\({unit}\) exceeds available HBM \({unit}\)",
    }
    for name, pattern in patterns.items():
        found = re.search(pattern, message)
        if found:
            return {name: _size(found[1], found[2]), "available": _size(found[3], found[4])}
    return {}


def _size(number: str, unit: str) -> float:
    return float(number) * 2 ** (10 * " KMGT".index(unit or " "))


# Arrays ---------------------------------------------------------------------------------------------------------------

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def array_bytes(spelt: str, *, memory: int | None = None) -> int:
    """Return the bytes of the arrays in a result such as `(bf16[49,96]{1,0:T(8,128)(2,1)S(1)}, s32[])`.

    Tiles count whole: the last axes of a layout are padded to the first tile.

    Args:
      spelt: the result.
      memory: count only the arrays in that memory space; `None` = all.
    """
    total = 0
    for dtype, shape, order, rest in _ARRAY.findall(spelt):
        space = re.search(r"S\((\d+)\)", rest)
        if memory is not None and (int(space[1]) if space else MEMORY) != memory:
            continue
        lengths = [int(length) for length in shape.split(",") if length]
        tile = re.search(r"T\(([\d,]+)\)", rest)
        if tile and order:
            # The order names the fastest axis first, a tile the fastest last.
            minor_first = [int(axis) for axis in order.split(",")]
            for axis, length in zip(minor_first, reversed(tile[1].split(",")), strict=False):
                lengths[axis] = -(-lengths[axis] // int(length)) * int(length)
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
        total += -(-bits * math.prod(lengths) // 8)
    return total


_FREE = frozenset(
    ("parameter", "constant", "iota", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "domain")
) | {"while", "conditional", "call", "partition-id", "replica-id"}


def is_kernel(instruction: Instruction) -> bool:
    """Return whether an instruction runs a Pallas kernel."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return instruction.opcode == "custom-call" and bool(target) and target[1] == "tpu_custom_call"  # type: ignore[index]


def operand_names(instruction: Instruction) -> list[str]:
    """Return the names of an instruction's operands."""
    return re.findall(r"%([\w.-]+)", instruction.operands)


class _Program:
    """The computations of a module, with what is asked of them."""

    def __init__(self, computations: Mapping[str, list[Instruction]]) -> None:
        self.computations = computations
        self.unknown_loops: set[str] = set()
        self._results = {each.name: each.result for body in computations.values() for each in body}
        self._kinds: dict[str, str] = {}
        self._slices: dict[str, tuple[dict[int, int], int | None]] = {}

    def called(self, instruction: Instruction, key: str) -> str:
        """Return the computation that an attribute names, or an empty string."""
        found = re.search(rf"\b{key}=%?([\w.-]+)", instruction.rest)
        return found[1] if found else ""

    def branches(self, instruction: Instruction) -> list[str]:
        """Return the computations of a conditional."""
        several = re.search(r"\bbranch_computations=\{([^}]*)\}", instruction.rest)
        if several:
            return [name.strip().lstrip("%") for name in several[1].split(",")]
        return [self.called(instruction, key) for key in ("true_computation", "false_computation")]

    def costs(self, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        """Yield what runs, with the number of times; fusions whole."""
        for instruction in self.computations.get(name, ()):
            yield instruction, times
            if instruction.opcode == "while":
                trips = turns(instruction, self.computations)
                if trips is None:
                    self.unknown_loops.add(instruction.name)
                yield from self.costs(self.called(instruction, "body"), times * (trips or 1))
            elif instruction.opcode == "conditional":
                ways = [list(self.costs(branch, times)) for branch in self.branches(instruction)]
                yield from max(ways, key=lambda way: sum(n * estimated_cycles(each) for each, n in way), default=[])
            elif instruction.opcode == "call":
                yield from self.costs(self.called(instruction, "to_apply"), times)
            elif instruction.opcode == "async-start":
                yield from self.costs(self.called(instruction, "calls"), times)

    def op_name(self, instruction: Instruction) -> str:
        """Return JAX's name of an instruction; of a fusion without one, that of its last part that has one."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.rest)
        if found:
            return found[1]
        for inner in reversed(self.computations.get(self.called(instruction, "calls"), [])):
            found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', inner.rest)
            if found:
                return found[1]
        return ""

    def kind(self, instruction: Instruction) -> str:
        """Return "product", "copy", "kernel" or "other"."""
        if is_kernel(instruction):
            return "kernel"
        if instruction.opcode in ("convolution", "dot"):
            return "product"
        if instruction.opcode in ("copy", "transpose", "reshape"):
            return "copy"
        name = self.called(instruction, "calls") if instruction.opcode == "fusion" else ""
        if not name:
            return "other"
        if name not in self._kinds:
            inner = [each for each in self.computations.get(name, ()) if each.opcode not in _FREE]
            kinds = {self.kind(each) for each in inner}
            self._kinds[name] = "product" if "product" in kinds else "copy" if kinds == {"copy"} else "other"
        return self._kinds[name]

    def traffic(self, instruction: Instruction) -> int:
        """Return the bytes that an instruction reads from and writes to HBM."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or "ConcatBitcast" in instruction.rest:
            return 0
        if opcode in ("copy-start", "slice-start"):
            # (destination, source, context) and ((source), slice, context): the smaller side is what moves.
            arrays = [found[0] for found in re.finditer(_ARRAY, instruction.result)][:2]
            moved = min(array_bytes(each) for each in arrays)
            return moved * sum(array_bytes(each, memory=MEMORY) > 0 for each in arrays)
        operands = operand_names(instruction)
        reads = [array_bytes(self._results.get(name, ""), memory=MEMORY) for name in operands]
        writes = array_bytes(instruction.result, memory=MEMORY)
        if opcode == "dynamic-slice":
            return 2 * writes
        if opcode == "dynamic-update-slice":
            return 2 * array_bytes(self._results.get(operands[1], ""))
        if opcode == "fusion":
            sliced, written = self._sliced(self.called(instruction, "calls"))
            reads = [min(size, sliced.get(index, size)) for index, size in enumerate(reads)]
            writes = writes if written is None else min(writes, written)
        return sum(reads) + writes

    def _sliced(self, name: str) -> tuple[dict[int, int], int | None]:
        """Return, of a fused computation, the bytes read of each parameter that is only sliced, and those written.

        Loops over stacked parameters read and write one slice a turn of an array that stays where it is.
        """
        if name in self._slices:
            return self._slices[name]
        body = self.computations.get(name, [])
        users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
        for each in body:
            for index, operand in enumerate(operand_names(each)):
                users[operand].append((each, index))
        reads: dict[int, int] = {}
        for each in body:
            if each.opcode != "parameter":
                continue
            uses, waiting = [], list(users[each.name])
            while waiting:
                use, index = waiting.pop()
                if use.opcode == "bitcast":
                    waiting += users[use.name]
                else:
                    uses.append((use, index))
            if uses and all(
                use.opcode == "dynamic-slice" or (use.opcode == "dynamic-update-slice" and index == 0)
                for use, index in uses
            ):
                reads[int(each.operands or 0)] = sum(
                    array_bytes(use.result) for use, _ in uses if use.opcode == "dynamic-slice"
                )
        by_name = {each.name: each for each in body}
        root = body[-1] if body else None
        while root is not None and root.opcode == "bitcast":
            root = by_name.get(operand_names(root)[0])
        written = None
        if root is not None and root.opcode == "dynamic-update-slice":
            written = array_bytes(self._results.get(operand_names(root)[1], ""))
        self._slices[name] = reads, written
        return self._slices[name]

    def live(self, name: str) -> dict[str, int]:
        """Return what lives in HBM at the moment when most does, parameters and results aside.

        Activations are what was made before the backward pass and is read in it; it begins where the fewest cycles
        stand on the wrong side.
        """
        body = self.computations.get(name, [])
        # What an instruction's result refers to: for each element of a tuple the arrays that may be there.
        holds: dict[str, list[set[str]]] = {}
        last: dict[str, int] = {}
        made: dict[str, tuple[int, int]] = {}
        for index, each in enumerate(body):
            operands = [holds.get(operand, [set()]) for operand in operand_names(each)]
            if each.opcode == "get-tuple-element":
                element = int(_index(each))
                holds[each.name] = [operands[0][element] if element < len(operands[0]) else set().union(*operands[0])]
                continue
            if each.opcode == "tuple":
                holds[each.name] = [set().union(*operand) for operand in operands]
                continue
            sources = set().union(*(part for operand in operands for part in operand))
            last.update(dict.fromkeys(sources, index))
            if each.opcode in ("parameter", "constant"):
                holds[each.name] = [set()]
            elif each.opcode in ("while", "opt-barrier"):
                holds[each.name] = operands[0]
            elif each.opcode == "bitcast" or each.opcode.endswith("-done"):
                holds[each.name] = [sources]
            elif each.opcode in ("copy-start", "slice-start"):  # the source stands beside the result
                arrays = [found[0] for found in re.finditer(_ARRAY, each.result)]
                made[each.name] = (index, array_bytes(arrays[each.opcode == "slice-start"], memory=MEMORY))
                holds[each.name] = [sources | {each.name}]
            else:
                arrays = [found[0] for found in re.finditer(_ARRAY, each.result)]
                keys = [f"{each.name}#{number}" for number in range(len(arrays))]
                made |= {
                    key: (index, array_bytes(array, memory=MEMORY)) for key, array in zip(keys, arrays, strict=True)
                }
                holds[each.name] = [{key} for key in keys] or [set()]
        turn = self._turn(body)
        outputs = set().union(*holds[body[-1].name]) if body else set()
        changes: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for key, (start, size) in made.items():
            if size and key not in outputs and key in last:
                kind = 0 if start < turn <= last[key] else 1
                changes[start][kind] += size
                changes[last[key] + 1][kind] -= size
        best, now = [0, 0], [0, 0]
        for index in sorted(changes):
            now = [old + change for old, change in zip(now, changes[index], strict=True)]
            best = max(best, now, key=sum)
        return {"activations": best[0], "temporaries": best[1]}

    def _turn(self, body: Sequence[Instruction]) -> int:
        """Return the place in a schedule before which the forward pass stands and after which the backward pass."""
        wrong = best = 0
        turn = len(body)
        for index, each in reversed(list(enumerate(body))):
            cycles = estimated_cycles(each)
            if each.opcode == "while":
                cycles = sum(times * estimated_cycles(one) for one, times in self.costs(self.called(each, "body"), 1))
                cycles *= turns(each, self.computations) or 1
            if cycles:
                wrong += -cycles if place(self.op_name(each))[1] else cycles
                if wrong < best:
                    best, turn = wrong, index
        return turn


def _index(instruction: Instruction) -> str:
    found = re.search(r"\bindex=(\d+)", instruction.rest)
    return found[1] if found else "0"


class _Timeline:
    """Lets the schedule run: collectives that were started go on beside what follows, one after the other."""

    def __init__(self, program: _Program, clock: float, seconds: Mapping[str, float]) -> None:
        self._program, self._clock, self._seconds = program, clock, seconds

    def run(self, name: str) -> float:
        """Return the seconds that a computation waits for collectives."""
        now = waited = free = 0.0
        ends: dict[str, float] = {}
        for each in self._program.computations.get(name, ()):
            taken = self._seconds.get(each.name)
            if taken is not None and each.opcode.endswith("-start"):
                free = max(free, now) + taken
                ends[each.name] = free
            elif taken is not None:
                begin = max(free, now)
                waited += begin + taken - now
                now = free = begin + taken
            elif each.opcode.endswith("-done"):
                end = max((ends.get(operand, 0.0) for operand in operand_names(each)), default=0.0)
                waited += max(0.0, end - now)
                now = max(now, end)
            elif each.opcode == "while":
                body = self._program.called(each, "body")
                trips = turns(each, self._program.computations) or 1
                waited += trips * self.run(body)
                now += trips * (self.run(body) + self._cycles(body) / self._clock) if self._clock else 0.0
            elif each.opcode == "call":
                waited += self.run(self._program.called(each, "to_apply"))
            elif each.opcode == "conditional":
                waited += max(map(self.run, self._program.branches(each)), default=0.0)
            elif each.opcode == "fusion" and self._inside(each):
                waited += self._inside(each)
            elif self._clock:
                now += estimated_cycles(each) / self._clock
        return waited

    def _cycles(self, name: str) -> int:
        return sum(times * estimated_cycles(each) for each, times in self._program.costs(name, 1))

    def _inside(self, fusion: Instruction) -> float:
        """Return the seconds of collectives fused with other work beyond what that work takes."""
        inner = self._program.computations.get(self._program.called(fusion, "calls"), ())
        taken = sum(self._seconds.get(each.name, 0.0) for each in inner)
        return max(0.0, taken - (estimated_cycles(fusion) / self._clock if self._clock else 0.0)) if taken else 0.0
