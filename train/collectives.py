"""What a compiled program sends between devices: its collectives, read from the text of the optimised HLO.

    step = compile_step(...)
    for each in collectives(step, mesh):
        print(each.kind, each.mesh_axes, each.bytes, each.count)

Understood are synchronous instructions and their `-start` forms, the three spellings of replica groups (lists, iota
`[4,2]<=[2,4]T(1,0)` and `mesh[...] {...}`), collectives in loops (times the known number of turns), in called and fused
computations, and the TPU compiler's own forms: a reduce-scatter as a fusion `all-reduce-scatter`, and an asynchronous
collective that is drawn out over several fusions, which is counted once.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      mesh_axes: the mesh axes, in the mesh's order, along which the devices of a group differ.
      bytes: what one device has in hand, once: the whole array of an all-reduce, the gathered result of an all-gather,
        the operand of the others. A ring sends `(n - 1) / n` of it (an all-reduce twice that) over each link, with
        `n = group_size`; a permute all of it.
      count: how often a call of the program runs it: turns of the loops around it. `None` where these are not known.
        Branches of a conditional count as if all of them ran.
      group_size: devices that take part together. Less than the product of `mesh_axes` where a group does not span
        them; for a permute the length of its longest cycle or chain.
      shapes: dtype and shape of each array that is counted in `bytes`: a compiler merges small collectives.
      name: of the instruction.
      op_name: which operation of the program it comes from, as JAX names it; may be empty.
    """

    kind: str
    mesh_axes: tuple[str, ...]
    bytes: int
    count: int | None
    group_size: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    name: str
    op_name: str


def collectives(compiled: Any, mesh: Mesh) -> list[Collective]:
    """Return the collectives of a program in the order of its text, callees where they are called.

    Those whose groups hold one device only are left out: they move nothing.

    Args:
      compiled: what `jitted.lower(...).compile()` returns, or its text (`as_text()`).
      mesh: the mesh it was compiled for; devices count in the order of `mesh.devices`.

    Raises:
      ValueError: if the text is not that of an HLO module, or a replica group is spelt in an unknown way.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations, entry = read(text)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; pass the text of a compiled program (compiled.as_text())")
    found: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for instruction, count in _walk(computations, entry, 1):
        kind = _kind(instruction)
        if kind is None:
            continue
        # One asynchronous collective of a TPU appears in each fusion that it overlaps with.
        chain = re.search(r'chain_id="([^"]+)"', instruction.rest)
        if chain:
            if (kind, chain[1]) in seen:
                continue
            seen.add((kind, chain[1]))
        groups = _groups(instruction.rest, kind, mesh)
        size = max(map(len, groups), default=1)
        if size > 1:
            shapes = _payload(instruction, kind)
            found.append(
                Collective(
                    kind=kind,
                    mesh_axes=_mesh_axes(groups, mesh),
                    bytes=sum(_bytes(*array) for array in shapes),
                    count=count,
                    group_size=size,
                    shapes=shapes,
                    name=instruction.name,
                    op_name=_op_name(instruction)[len(', op_name="') : -1].replace("\\'", "'"),
                )
            )
    return found


def totals(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], int]:
    """Return the bytes by (kind, mesh axes), each collective times its count (an unknown count as one)."""
    result: dict[tuple[str, tuple[str, ...]], int] = {}
    for each in found:
        key = (each.kind, each.mesh_axes)
        result[key] = result.get(key, 0) + each.bytes * (1 if each.count is None else each.count)
    return result


# Reading the text -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name, without `%`.
      result: dtype, shape and layout of the result, or a tuple of them.
      opcode: what it does.
      operands: what stands between its brackets.
      rest: everything after them: attributes, metadata, the back end's config.
      computation: name of the computation that it stands in.
    """

    name: str
    result: str
    opcode: str
    operands: str
    rest: str
    computation: str


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) (?:\(.*\) -> .* )?\{$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def read(text: str) -> tuple[dict[str, list[Instruction]], str | None]:
    """Return the instructions of every computation of an HLO module, in order, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            name = header["name"]
            computations[name] = []
            entry = name if header["entry"] else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            match = _INSTRUCTION.match(line)
            if match:
                instruction = _split(match["name"], match["rest"], name)
                if instruction:
                    computations[name].append(instruction)
    return computations, entry


def _split(name: str, rest: str, computation: str) -> Instruction | None:
    """Cut `f32[2]{0} add(%a, %b), metadata=...` in result, opcode, operands and the rest."""
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    head = re.match(r" ?([\w-]+)\(", rest[end:]) if end > 0 else None
    if not head:
        return None
    start = end + head.end() - 1
    stop = start + _closing(rest[start:])
    return Instruction(name, rest[:end], head[1], rest[start + 1 : stop - 1], rest[stop:], computation)


def _closing(text: str) -> int:
    """Return the index after the bracket that closes the first one."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index + 1
    return len(text)


def _walk(
    computations: Mapping[str, list[Instruction]], name: str, count: int | None
) -> Iterator[tuple[Instruction, int | None]]:
    """Yield every instruction that runs, with the number of times."""
    for instruction in computations.get(name, ()):
        yield instruction, count
        if instruction.opcode == "while":
            trips = turns(instruction, computations)
            inner = None if trips is None or count is None else count * trips
            for key in ("body", "condition"):
                called = re.search(rf"\b{key}=%?([\w.-]+)", instruction.rest)
                if called:
                    yield from _walk(computations, called[1], inner)
        elif _kind(instruction) is None:  # what a collective calls is its reduction
            for name_called in _called(instruction):
                for called_instruction, times in _walk(computations, name_called, count):
                    yield _named_after(called_instruction, instruction), times


def _named_after(instruction: Instruction, caller: Instruction) -> Instruction:
    """Return an instruction that has lost its name in the program, as in some fusions, with that of its caller."""
    if "op_name=" in instruction.rest:
        return instruction
    return dataclasses.replace(instruction, rest=instruction.rest + _op_name(caller))


def _op_name(instruction: Instruction) -> str:
    found = re.search(r'op_name="(?:[^"\\]|\\.)*"', instruction.rest)
    return f", {found[0]}" if found else ""


def _called(instruction: Instruction) -> Iterator[str]:
    if instruction.opcode.endswith(("-update", "-done")):
        return  # the rest of what `-start` has begun
    one = r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    yield from re.findall(one, instruction.rest)
    for several in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.rest):
        yield from (name.strip().lstrip("%") for name in several.split(","))


def turns(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int | None:
    """Return the turns of a `while`: what the compiler says, else those of a counter; `None` where neither tells.

    A counter begins at a constant, is compared with one by the condition and has one added by the body, as that of a
    JAX loop. Programs for TPU have it without the compiler's number.
    """
    start = loop.rest.find("backend_config={")
    if start >= 0:
        with contextlib.suppress(json.JSONDecodeError):
            config = json.JSONDecoder().raw_decode(loop.rest[start + len("backend_config=") :])[0]
            known = config.get("known_trip_count", {}).get("n")
            if known is not None:
                return int(known)
    parts = [computations.get(_attribute(loop, key), []) for key in ("condition", "body")]
    tests, steps = ({each.name: each for each in part} for part in parts)
    outside = {each.name: each for each in computations.get(loop.computation, ())}
    root = parts[0][-1] if parts[0] else None
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest or not parts[1]:
        return None
    counter, bound = (tests.get(name) for name in _names(root.operands))
    index = None if counter is None else re.search(r"\bindex=(\d+)", counter.rest)
    end = _constant(bound, tests)
    if index is None or end is None:
        return None
    first = outside.get(_names(loop.operands)[0])
    begin = _constant(_element(first, int(index[1]), outside), outside)
    after = _element(parts[1][-1], int(index[1]), steps)
    if begin is None or after is None or after.opcode != "add":
        return None
    added = [_constant(steps.get(name), steps) for name in _names(after.operands)]
    by = next((number for number in added if number is not None), None)
    return None if not by else max(0, -((begin - end) // by))


def _attribute(instruction: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.-]+)", instruction.rest)
    return found[1] if found else ""


def _names(operands: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", operands)


def _element(made: Instruction | None, index: int, among: Mapping[str, Instruction]) -> Instruction | None:
    """Return what stands at a place of a tuple."""
    if made is None or made.opcode != "tuple":
        return None
    names = _names(made.operands)
    return among.get(names[index]) if index < len(names) else None


def _constant(made: Instruction | None, among: Mapping[str, Instruction]) -> int | None:
    """Return the whole number that an instruction is, or a copy of."""
    while made is not None and made.opcode in ("copy", "bitcast"):
        made = among.get(_names(made.operands)[0])
    return int(made.operands) if made is not None and re.fullmatch(r"-?\d+", made.operands) else None


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind == "ragged-all-to-all":
        return "all-to-all"
    if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # all-reduce and slice, which a TPU fuses in one operation
    return kind if kind in KINDS else None


def _payload(instruction: Instruction, kind: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the arrays that `Collective.bytes` counts.

    Results are annotated with their shapes; operands need not be. A `-start` of a gather or permute returns operands
    and results side by side.
    """
    arrays = [
        (dtype, tuple(int(length) for length in shape.split(",") if length))
        for dtype, shape in _ARRAY.findall(instruction.result)
        if dtype != "token"
    ]
    if instruction.opcode == "all-gather-start":
        return tuple(arrays[len(arrays) // 2 :])
    if instruction.opcode == "collective-permute-start":
        return tuple(arrays[:1])
    if instruction.opcode.startswith("reduce-scatter"):
        # The result is a part of the operand along `dimensions`, one for each device of a group.
        size = len(_raw_groups(instruction.rest)[0])
        axis = int(re.search(r"\bdimensions=\{(\d+)\}", instruction.rest)[1])  # type: ignore[index]
        return tuple(
            (dtype, tuple(length * size if i == axis else length for i, length in enumerate(shape)))
            for dtype, shape in arrays
        )
    return tuple(arrays)


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
    return -(-bits * math.prod(shape) // 8)


# Replica groups -------------------------------------------------------------------------------------------------------


def _groups(rest: str, kind: str, mesh: Mesh) -> list[list[int]]:
    """Return the devices, by their place in the mesh, that take part together."""
    if kind == "collective-permute":
        return _chains(rest)
    groups = _raw_groups(rest)
    return groups or [list(range(mesh.size))]


def _raw_groups(rest: str) -> list[list[int]]:
    start = rest.find("replica_groups=")
    if start < 0:
        return []
    spelt = rest[start + len("replica_groups=") :]
    lists = re.match(r"\{((?:\{[\d,]*\},?)*)\}", spelt)
    if lists:
        return [
            [int(number) for number in group.split(",") if number] for group in re.findall(r"\{([\d,]*)\}", lists[1])
        ]
    iota = re.match(r"(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", spelt)
    if iota:
        return _iota(iota[1]).tolist()
    named = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", spelt)
    if named:
        axes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        count = math.prod(axes.values())
        return _named(axes, _device_ids(named[2], count), re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3]))
    raise ValueError(f"replica groups {spelt[:80]!r} are spelt in an unknown way; read another version of HLO")


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(text: str) -> np.ndarray:
    """Return `[4,2]<=[2,4]T(1,0)`: 0, 1, ... as `[2, 4]`, transposed by (1, 0) and read as `[4, 2]`."""
    shape, source, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # type: ignore[union-attr]
    ids = np.arange(math.prod(_ints(source))).reshape(_ints(source))
    return (ids.transpose(_ints(order)) if order else ids).reshape(_ints(shape))


def _device_ids(text: str | None, count: int) -> np.ndarray:
    """Return the devices in the order of a named mesh: `[4,2]T(1,0)` (of an iota) or a list."""
    if not text:
        return np.arange(count)
    iota = re.match(r"\[([\d,]+)\](?:<=\[[\d,]+\])?(?:T\(([\d,]+)\))?$", text.strip())
    if iota and "<=" in text:
        return _iota(text.strip()).reshape(-1)
    if iota and (iota[2] or math.prod(_ints(iota[1])) == count):
        ids = np.arange(count).reshape(_ints(iota[1]))
        return (ids.transpose(_ints(iota[2])) if iota[2] else ids).reshape(-1)
    return np.asarray(_ints(text.strip().strip("[]{}")))


def _named(axes: Mapping[str, int], ids: np.ndarray, parts: Sequence[tuple[str, str, str]]) -> list[list[int]]:
    """Return the groups along some axes of a named mesh; `'x':(2)4` is the part of `x` after a factor 2, of size 4."""
    sizes, chosen = [], []
    for axis, size in axes.items():
        mine = sorted((int(before or 1), int(length or size)) for name, before, length in parts if name == axis)
        position = 1
        for before, length in mine:
            if before > position:
                sizes.append(before // position)
            chosen.append(len(sizes))
            sizes.append(length)
            position = before * length
        if size // position > 1 or not mine:
            sizes.append(size // position)
    grid = ids.reshape(sizes)
    others = [axis for axis in range(len(sizes)) if axis not in chosen]
    members = math.prod(sizes[axis] for axis in chosen)
    return grid.transpose([*others, *chosen]).reshape(-1, members).tolist()


def _chains(rest: str) -> list[list[int]]:
    """Return the cycles and chains that the pairs of a permute form."""
    spelt = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
    pairs = [tuple(_ints(pair)) for pair in re.findall(r"\{(\d+,\d+)\}", spelt[1])] if spelt else []
    target = {source: to for source, to in pairs if source != to}
    chains = []
    # Beginnings of chains first; what is left are cycles.
    starts = [source for source in target if source not in target.values()]
    for start in (*starts, *target):
        chain = [start]
        while chain[-1] in target:
            chain.append(target.pop(chain[-1]))
        if len(chain) > 1:
            chains.append(list(dict.fromkeys(chain)))
    return chains


def _mesh_axes(groups: Sequence[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    shape = tuple(mesh.shape.values())
    differ = [False] * len(shape)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group, int), shape))
        differ = [old or bool(np.ptp(row)) for old, row in zip(differ, places, strict=True)]
    return tuple(name for name, differs in zip(mesh.shape, differ, strict=True) if differs)
