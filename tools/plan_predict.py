"""From what a compiler says to a report: memory by kind, time, use of the peak, and what each figure rests on.

Plain data in, plain data out; no JAX.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from tools.chips import Topology

SPARE = 0.98
"""Share of a device's published memory that is taken for usable where the compiler has not said how much is."""

REACHED = 0.5
"""Share of the peak that products are taken to reach where there is no compiler's estimate (GPUs, no libtpu)."""


def report(answer: Mapping[str, Any], place: Topology, config: str) -> dict[str, Any]:
    """Return the report of one answer of `tools.plan_compile`.

    Args:
      answer: with `count`, and `train` where the step was compiled.
      place: the topology.
      config: the config's path.
    """
    counted, train = answer["count"], answer.get("train")
    found: dict[str, Any] = {
        "config": config,
        "title": answer["title"],
        "topology": {
            "name": place.name,
            "chips": place.chips,
            "devices": place.devices,
            "peak_flops": place.peak,
            "memory": place.memory,
            "bandwidth": place.bandwidth,
            "clock": place.chip.clock,
            "source": place.chip.source,
        },
        "versions": answer.get("versions", {}),
        "mesh": dict(answer["mesh"]),
        "batch_size": answer["batch_size"],
        "batch_per_device": answer["batch_size"] / place.devices,
        "accumulate": answer["accumulate"],
        "remat": answer["remat"],
        "parameters": counted["parameters"],
        "records": answer["records"],
        "compiled": bool(train and "reading" in train),
        "by_libtpu": bool(train) and place.chip.is_tpu,
        "compile_seconds": train.get("compile_seconds") if train else None,
    }
    found["memory"] = memory(answer, place)
    found["work"] = work(answer, place)
    found["time"] = times(answer, place, found["work"])
    if found["compiled"]:
        reading = train["reading"]  # type: ignore[index]
        found["collectives"] = reading["sent"]
        found["heaviest"] = [
            {**heavy, "share": heavy["cycles"] / max(1, reading["cycles"])} for heavy in reading["heaviest"]
        ]
        found["cycles"] = {"total": reading["cycles"], "by_kind": reading["by_kind"], "by_kernel": reading["by_kernel"]}
        found["kernels"] = train["kernels"]  # type: ignore[index]
        found["modules"] = by_module(reading["by_module"], reading["cycles"])
    else:
        found |= {"collectives": [], "heaviest": [], "cycles": None, "kernels": []}
        found["modules"] = [
            {"module": name, "forward": share, "backward": 0.0, "share": share}
            for name, share in sorted(counted["modules"].items(), key=lambda pair: -pair[1])
        ]
    found["evaluation"] = evaluation(answer, place)
    found["assumptions"] = assumptions(answer, place, found)
    return found


def memory(answer: Mapping[str, Any], place: Topology) -> dict[str, Any]:
    """Return bytes by kind on one device, what is available, and whether it fits (`None` = not known).

    `spare` is negative by what is missing. Without a compiled program what is needed is estimated: the state, the
    gradients and the activations that JAX keeps.
    """
    counted, train = answer["count"], answer.get("train")
    kinds = {name: float(size) for name, size in counted["bytes"].items() if size}
    available = (train or {}).get("available") or answer.get("calibration", {}).get("available") or 0.0
    limit = available or SPARE * place.memory
    if train and "memory" in train:
        sizes, live = train["memory"], train["reading"]["live"]
        kinds["padding of arguments"] = max(0.0, sizes["argument"] - sum(kinds.values()))
        # What lives in the entry at its fullest, as shares of the compiler's own sum.
        total = max(1.0, sum(live.values()))
        kept = (
            min(sizes["temp"], live["activations"])
            if total <= sizes["temp"]
            else (sizes["temp"] * live["activations"] / total)
        )
        kinds["activations"] = kept
        kinds["temporaries"] = sizes["temp"] - kept
        kinds["results"] = max(0.0, float(sizes["output"] - sizes["alias"]))
        kinds["program"] = float(sizes["generated_code"])
        needed = sum(kinds.values())
        # A program that was compiled fits: the compiler refuses those that do not. The CPU's refuses none.
        fits = True if place.chip.is_tpu else needed <= limit
    elif train and "refused" in train:
        held, fits = sum(kinds.values()), False
        # The compiler tells either all of a program's memory or its temporaries alone, or nothing.
        rest = train.get("temporaries") or max(0.0, train.get("needed", 0.0) - held)
        kinds["activations and temporaries"] = rest
        needed = held + rest
    else:
        kinds["gradients (estimate)"] = kinds.get("parameters", 0.0)
        kinds["activations (estimate)"] = float(counted["activation_bytes"])
        needed = sum(kinds.values())
        fits = needed <= limit
    return {
        "kinds": {name: size for name, size in kinds.items() if size},
        "needed": needed,
        "published": place.memory,
        "available": available or None,
        "limit": limit,
        "fits": fits,
        "spare": limit - needed,
        "refused": (train or {}).get("refused"),
        "exact": bool(train and "memory" in train and place.chip.is_tpu),
    }


def work(answer: Mapping[str, Any], place: Topology) -> dict[str, Any]:
    """Return operations and bytes of a step."""
    counted, train = answer["count"], answer.get("train") or {}
    moved = train["reading"]["bytes"] if "reading" in train else None
    each = counted["program_flops"] / place.devices
    return {
        "model_flops": counted["model_flops"],
        "program_flops": counted["program_flops"],
        "flops_per_device": each,
        "bytes_per_device": moved,
        "intensity": each / moved if moved else None,
        "balance": place.peak / place.bandwidth,
        "compiler_flops": train.get("compiler_flops"),
        "compiler_bytes": train.get("compiler_bytes"),
    }


def times(answer: Mapping[str, Any], place: Topology, done: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return predicted seconds of a step, `None` where the compiler refused it.

    On TPU the larger of cycles over clock and bytes over bandwidth, and the collectives that nothing hides; else a
    roofline at `REACHED` of the peak.
    """
    train = answer.get("train") or {}
    if "refused" in train:
        return None
    reading = train.get("reading")
    sent = sum(each["seconds"] for each in reading["sent"]) if reading else 0.0
    through = (done["bytes_per_device"] or 0) / place.bandwidth
    if reading and place.chip.is_tpu:
        computing, exposed = reading["cycles"] / place.chip.clock, reading["exposed"]
    else:
        # Nothing is known of what a GPU's program overlaps.
        computing, exposed = done["flops_per_device"] / (REACHED * place.peak), sent
    step = max(computing, through) + exposed
    rate = answer["batch_size"] / step if step else 0.0
    ideal = done["model_flops"] / place.devices / place.peak
    return {
        "step": step,
        "least": max(computing, through),
        "most": max(computing, through) + sent,
        "computing": computing,
        "memory": through,
        "collectives": sent,
        "exposed": exposed,
        "examples_per_second": rate,
        "examples_per_second_per_chip": rate / place.chips,
        "mfu": ideal / step if step else 0.0,
        "estimate": not (reading and place.chip.is_tpu),
    }


def by_module(found: list[Mapping[str, Any]], total: int, depth: int = 2) -> list[dict[str, Any]]:
    """Return the share of all cycles of each module down to a depth, forwards and backwards, the heaviest first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in found:
        path = "/".join(each["module"].split("/")[:depth]) or "(outside of modules)"
        sums[path][bool(each["backward"])] += each["cycles"] / max(1, total)
    return [
        {"module": path, "forward": ahead, "backward": back, "share": ahead + back}
        for path, (ahead, back) in sorted(sums.items(), key=lambda pair: -sum(pair[1]))
    ]


def evaluation(answer: Mapping[str, Any], place: Topology) -> dict[str, Any] | None:
    """Return memory and time of an evaluation step; `None` where it was not compiled."""
    found = answer.get("evaluation")
    if not found:
        return None
    if "refused" in found:
        return {"batch_size": found["batch_size"], "fits": False, "refused": found["refused"], "step": None}
    reading, sizes = found["reading"], found["memory"]
    flops = found["model_flops"] / place.devices
    if place.chip.is_tpu:
        step = max(reading["cycles"] / place.chip.clock, reading["bytes"] / place.bandwidth) + reading["exposed"]
    else:
        step = max(flops / (REACHED * place.peak), reading["bytes"] / place.bandwidth)
    needed = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"] + sizes["generated_code"]
    return {
        "batch_size": found["batch_size"],
        "fits": True if place.chip.is_tpu else needed <= SPARE * place.memory,
        "needed": needed,
        "step": step,
        "examples_per_second": found["batch_size"] / step if step else 0.0,
        "use_of_peak": flops / place.peak / step if step else 0.0,
    }


def assumptions(answer: Mapping[str, Any], place: Topology, found: Mapping[str, Any]) -> list[str]:
    """Return in words what is exact and what is assumed."""
    chip, train = place.chip, answer.get("train") or {}
    lines = [
        f"Published figures of {chip.name}: {chip.peak / 1e12:,.0f} TFLOP/s in bfloat16, {chip.memory / 2**30:,.1f} "
        f"GiB at {chip.bandwidth / 1e9:,.0f} GB/s a chip ({chip.source}).",
        f"Shapes of a batch: {answer['records']}.",
        "Parameters, optimiser, averages and batch are exact, by the shardings of train/mesh.py; operations are those "
        "of matrix products and convolutions of the traced step, exact. MFU counts them without recomputation.",
    ]
    if not train:
        lines += [
            "Nothing was compiled: activations are what JAX's linearisation keeps, split over data, fsdp and sequence, "
            "not over tensor; gradients are counted once; a compiler may need more or less.",
            f"The time is a guess: products at {REACHED:.0%} of the peak, no collectives, no memory traffic.",
        ]
        return lines
    if "refused" in train:
        return [*lines, "The compiler refused the program for its memory, so there is no time."]
    reading = train["reading"]
    if chip.is_tpu:
        measured = answer.get("calibration", {})
        if measured:
            ideal = 2 * measured["product"] ** 3 / place.peak
            lines.append(
                f"Calibration: the compiler estimates {measured['cycles']:,.0f} cycles for a bfloat16 product of "
                f"{measured['product']:,.0f} cubed, at {chip.clock / 1e9:.3f} GHz (the published peak over the "
                f"operations of all matrix units in a cycle) {ideal * chip.clock / measured['cycles']:.0%} of the peak."
            )
        lines += [
            "Memory is the compiler's own sum. How its temporaries divide into activations and others is read from the "
            "schedule: what was made before the backward pass and is read in it.",
            "Cycles are the compiler's estimates, summed: loops times their turns, a conditional by its dearest "
            "branch.",
            "Collectives run on rings along the torus at the published rate of the links; those that are asynchronous "
            "overlap with what is scheduled between their start and end, one at a time. Latency is not counted.",
            "Nothing of the host counts: reading data, Python, the network between slices.",
        ]
    else:
        lines += [
            "ESTIMATE: the step was compiled for virtual CPU devices. Its collectives are those of the mesh; memory "
            "and traffic are those of the CPU's compiler, which computes half precision in float32 and fuses less.",
            f"The time is a roofline of published figures: products at {REACHED:.0%} of the peak, or the memory's "
            f"traffic, and all collectives at {chip.link / 1e9:,.0f} GB/s in each direction, not overlapped.",
        ]
    if reading["unknown_loops"]:
        lines.append(f"{reading['unknown_loops']} loops of unknown length count as one turn each.")
    if reading["by_kernel"]:
        lines.append(
            "Cycles of Pallas kernels are the bundles of the schedule that the compiler makes of each, or their bytes "
            "to and from HBM or their operations where these take longer: a lower bound, since memory never stalls."
        )
    uncertain = sorted({each["name"] for each in train["kernels"] if each["unknown_loops"]})
    if uncertain:
        lines.append(f"Kernels with loops of unknown length, counted as one turn each: {', '.join(uncertain)}.")
    if reading["opaque"]:
        failed = {each["name"]: each["error"] for each in train["kernels"] if each["error"]}
        why = "".join(f"; {name}: {error}" for name, error in failed.items())
        lines.append(f"{reading['opaque']} calls of custom kernels have no estimate and count as nothing{why}.")
    return lines
