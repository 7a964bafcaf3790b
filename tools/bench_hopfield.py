"""Hopfield layers beside attention and the reference code, retrieval by the number of patterns; see `tools.bench`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tools.bench_measure import OURS, Job, Measured, Page, Session, cell_bytes, curve, markdown, product_jobs
from tools.bench_worker import Program, Ready, compiled, leaf_count, needed

AGAINST = ("torch", "hflayers")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "hopfield-layers", "numpy")
HERE = "tools.bench_hopfield"

BATCH, FEATURES, HEADS = 2, 256, 8
BETA, UPDATES = 4.0 * 8, 3
TRAINED = 256
"""Patterns of a chunk where layers are trained."""
CHUNKED = f"{OURS}, chunks of {TRAINED}"

TEXT = """
Layers map {batch} x {states} states of {features} features over as many patterns as the name says, with {heads} heads,
in float32. Inference is the forward pass; training is the forward pass and the gradient of a sum of squares with
respect to parameters, states and patterns. "Attention" is `Hopfield` without norms, which is multi-head attention, and
stands beside `torch.nn.MultiheadAttention` without returned weights. "Hopfield" has the three norms and stands beside
`hflayers.Hopfield` (ml-jku/hopfield-layers), with one update and with four. Parameters are equally many. Training is
also measured in chunks of patterns (`Hopfield(streaming=Streaming({trained}, ()))`), which computes the weights of a
chunk anew in the backward pass instead of keeping them all.

Retrieval is {updates} updates of 64 states over stored patterns of 64 features; beside PyTorch it is
`scaled_dot_product_attention`, repeated. Its memory is the compiler's plan of what lies between operands and results,
or of what a device holds in all, for the gradient with the patterns split over virtual devices.
"""


def _inputs(patterns: int, states: int) -> tuple[Any, Any]:
    import jax

    shapes = ((BATCH, states, FEATURES), (BATCH, patterns, FEATURES))
    return tuple(jax.random.normal(jax.random.key(key), shape) for key, shape in enumerate(shapes))  # type: ignore[return-value]


def name_of(kind: str, updates: int, train: bool, patterns: int) -> str:
    """Return the name of a program."""
    steps = f", {updates} updates" if updates > 1 else ""
    return f"{kind}{steps}, {'training' if train else 'inference'}, patterns {patterns}"


def ours(
    kind: str, updates: int, train: bool, patterns: Sequence[int], states: int, chunk: int | None = None
) -> list[Program]:
    """Return our layer over several numbers of patterns, in chunks or as one product."""
    import jax
    import jax.numpy as jnp

    from jaxlayers.hopfield import Hopfield, Streaming

    norms: dict[str, Any] = {"state_norm": None, "stored_norm": None, "value_norm": None} if kind == "attention" else {}
    streaming = Streaming(chunk, ()) if chunk else None
    layer = Hopfield(num_heads=HEADS, update_steps=updates, streaming=streaming, **norms)
    programs = []
    for count in patterns:
        state, stored = _inputs(count, states)
        params = jax.jit(layer.init)(jax.random.key(2), state, stored)

        def loss(params: Any, state: jax.Array, stored: jax.Array) -> jax.Array:
            found: Any = layer.apply(params, state, stored)
            return jnp.sum(jnp.square(found))

        function = jax.value_and_grad(loss, argnums=(0, 1, 2)) if train else layer.apply
        name = name_of(kind, updates, train, count)
        programs.append(compiled(name, function, params, state, stored, parameters=leaf_count(params)))
    return programs


def theirs(kind: str, updates: int, train: bool, patterns: Sequence[int], states: int) -> list[Program]:
    """Return PyTorch's attention, or the reference's Hopfield layer, over several numbers of patterns."""
    torch = needed("torch")
    if kind == "attention":
        layer = torch.nn.MultiheadAttention(FEATURES, HEADS, batch_first=True)

        def apply(state: Any, stored: Any) -> Any:
            return layer(state, stored, stored, need_weights=False)[0]
    else:
        # Updates after the first, with a threshold that nothing falls below: all are made, as ours are.
        layer = needed("hflayers").Hopfield(
            input_size=FEATURES, num_heads=HEADS, update_steps_max=updates - 1, update_steps_eps=1e-30
        )

        def apply(state: Any, stored: Any) -> Any:
            return layer((stored, state, stored))

    layer.train(train)
    programs = []
    for count in patterns:
        state, stored = (torch.randn(BATCH, rows, FEATURES, requires_grad=train) for rows in (states, count))

        def infer(state: Any = state, stored: Any = stored) -> None:
            with torch.inference_mode():
                apply(state, stored)

        def step(state: Any = state, stored: Any = stored) -> None:
            for one in (*layer.parameters(), state, stored):
                one.grad = None
            apply(state, stored).square().sum().backward()

        count_all = sum(parameter.numel() for parameter in layer.parameters())
        name = name_of(kind, updates, train, count)
        programs.append(Program(name, lambda turn=step if train else infer: Ready(turn), count_all))  # type: ignore[misc]
    return programs


def retrieval(patterns: Sequence[int], chunk: int | None) -> list[Program]:
    """Return the retrieval of 64 states from several numbers of patterns, in chunks or as one product."""
    import jax

    from jaxlayers.hopfield import Streaming
    from jaxlayers.hopfield.hopfield import retrieve

    streaming = Streaming(chunk, ()) if chunk else None
    programs = []
    for count in patterns:
        state, stored = (jax.random.normal(jax.random.key(key), (rows, 64)) for key, rows in enumerate((64, count)))

        def find(state: Any, stored: Any) -> Any:
            return retrieve(state, stored, beta=BETA, update_steps=UPDATES, streaming=streaming).state

        programs.append(compiled(f"{'chunks' if chunk else 'retrieval'} {count}", find, state, stored))
    return programs


def torch_retrieval(patterns: Sequence[int]) -> list[Program]:
    """Return the same by PyTorch's fused attention."""
    torch = needed("torch")
    programs = []
    for count in patterns:
        state, stored = torch.randn(1, 1, 64, 64), torch.randn(1, 1, count, 64)

        def turn(state: Any = state, stored: Any = stored) -> None:
            with torch.inference_mode():
                for _ in range(UPDATES):
                    state = torch.nn.functional.scaled_dot_product_attention(state, stored, stored, scale=BETA)

        programs.append(Program(f"retrieval {count}", lambda turn=turn: Ready(turn)))  # type: ignore[misc]
    return programs


def sharded(patterns: int, devices: Sequence[int], chunk: int) -> list[Program]:
    """Return the gradient of an update, compiled with the patterns split over several devices."""
    import jax

    from tools import bench_memory

    size = bench_memory.Size(patterns, 64, 64, chunk)

    def program(count: int) -> Program:
        def prepare() -> Ready:
            run = bench_memory.RUNS["sharded-gradient"]
            memory = bench_memory.compiled(size, run, jax.devices()[:count]).memory_analysis()
            return Ready(None, facts={"bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes})

        return Program(f"devices {count}", prepare)

    return [program(count) for count in devices]


def in_chunks(found: Sequence[Measured]) -> list[Measured]:
    """Return what was measured in chunks as ours, under names of its own, beside the rivals of the same rounds.

    Work is counted as that of the plain form, without what is computed twice.
    """
    macs = {one.name: one.macs for one in found if one.label == OURS}
    return [
        dataclasses.replace(
            one,
            label=OURS if one.label == CHUNKED else one.label,
            name=one.name.replace(", training", f" in chunks of {TRAINED}, training"),
            macs=macs[one.name],
        )
        for one in found
        if one.label != OURS
    ]


def bench(session: Session, against: Sequence[str], quick: bool) -> Page:
    """Measure and return the page."""
    states = 16 if quick else 256
    sizes = {"batch": BATCH, "states": states, "features": FEATURES, "heads": HEADS, "updates": UPDATES}
    page = Page("hopfield", "Hopfield layers and large memories", PACKAGES, TEXT.format(**sizes, trained=TRAINED))
    patterns = (16, 32) if quick else (256, 1024, 4096)
    libraries = ("jax", "torch") if against else ("jax",)
    for kind, rival, updates in (("attention", "torch", 1), ("Hopfield", "hflayers", 1), ("Hopfield", "hflayers", 4)):
        for train in (False, True):
            settings = {"kind": kind, "updates": updates, "train": train, "patterns": patterns, "states": states}
            jobs = [Job(OURS, HERE, "ours", settings)]
            if train:
                jobs.append(Job(CHUNKED, HERE, "ours", settings | {"chunk": TRAINED}))
            if rival in against:
                label = "torch.nn.MultiheadAttention" if rival == "torch" else "hflayers"
                jobs.append(
                    Job(label, HERE, "theirs", settings, imports=("torch", *(["hflayers"] * (rival != "torch"))))
                )
            if not page.product:
                jobs += product_jobs(128 if quick else 2048, *libraries)
            found = session.measure(jobs)
            page.product += [one for one in found if one.name == "product"]
            found = [one for one in found if one.name != "product"]
            page.found += [one for one in found if one.label != CHUNKED]
            page.found += in_chunks(found) if train else []
    chunk = 64 if quick else 4096
    stored = (256, 512) if quick else (16_384, 65_536, 262_144)
    jobs = [
        Job(OURS, HERE, "retrieval", {"patterns": stored, "chunk": None}),
        Job(f"{OURS}, chunks of {chunk}", HERE, "retrieval", {"patterns": stored, "chunk": chunk}),
    ]
    if "torch" in against:
        jobs.append(Job("torch, fused attention", HERE, "torch_retrieval", {"patterns": stored}, imports=("torch",)))
    found = session.measure(jobs)
    # Chunks are ours and the form to use where memory is short; the rival stands beside the plain one.
    page.found += [one for one in found if one.name.startswith("retrieval")]
    for job, kind, note in ((jobs[0], "retrieval", "one product"), (jobs[1], "chunks", f"chunks of {chunk}")):
        common: Any = {"x_name": "patterns", "shown": f"retrieval, {note}"}
        page.curves.append(curve(found, job.label, kind, title="Retrieval, time", **common))
        page.curves.append(
            curve(
                found,
                job.label,
                kind,
                title="Retrieval, memory between",
                y_name="bytes",
                value=lambda one: one.facts["temporary_bytes"],
                **common,
            )
        )
    counts, many = ((1, 2), 512) if quick else ((1, 2, 4, 8), 262_144)
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={max(counts)}"}
    settings = {"patterns": many, "devices": counts, "chunk": chunk}
    split = session.measure([Job(OURS, HERE, "sharded", settings, environment=flags)])
    page.curves.append(
        curve(
            split,
            OURS,
            "devices",
            title="Gradient of an update, memory of a device",
            x_name="devices",
            y_name="bytes",
            value=lambda one: one.facts["bytes"],
            shown=f"gradient, {many:,} patterns over devices",
        )
    )
    page.tables["A large memory"] = large(20_000 if quick else 1_000_000, 64, 512 if quick else 8192)
    return page


def large(patterns: int, states: int, chunk: int) -> str:
    """Return what retrieval from a large memory takes, in chunks and as one product."""
    from tools import bench_memory

    size = bench_memory.Size(patterns, 64, states, chunk)
    rows = []
    for name in ("streamed", "plain"):
        one = bench_memory.in_a_process(name, size)
        cells = [cell_bytes(one[key]) for key in ("peak_bytes", "device_operand_bytes", "device_spare_bytes")]
        rows.append([bench_memory.RUNS[name].name, f"{one['recalled']:.3f}", *cells, f"{one['seconds']:.2f} s"])
    heads = ["form", "recalled", "peak of the whole process", "patterns and queries", "memory between", "once"]
    words = (
        f"{states} noisy queries of {patterns:,} stored patterns of 64 features, three updates, once "
        f"(`python -m tools.bench_memory --patterns {patterns} --chunk-size {chunk}`)."
    )
    return f"{words}\n\n{markdown(heads, rows)}"
