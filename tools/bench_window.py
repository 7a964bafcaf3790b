"""Swin, Swin V2 and ConvNeXt beside timm, and how window attention grows; see `tools.bench`."""

from collections.abc import Sequence
from typing import Any

from tools.bench_measure import OURS, Job, Page, Session, curve, peak_of, product_jobs
from tools.bench_worker import Program, Ready, compiled, leaf_count, needed, torchvision

MODELS = {
    "Swin-T": ("swin_tiny", "swin_tiny_patch4_window7_224", 224),
    "SwinV2-T": ("swin_v2_tiny_window8_256", "swinv2_tiny_window8_256", 256),
    "ConvNeXt-T": ("convnext_tiny", "convnext_tiny", 224),
}
"""Our name, timm's name and the size of the image, by title."""

QUICK = {"Swin-T": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}}
PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm", "numpy")
AGAINST = ("timm", "torch.compile")
RATE = 1e-3
SIDES = {"windows": (28, 56, 112, 224), "one window": (14, 28, 42, 56)}

TEXT = """
Inference gives the logits; a training step is the forward pass, the cross-entropy, the backward pass and one step of
plain gradient descent, with nothing dropped. Both have the same number of parameters, batch ({batch}) and float32.
timm is run as it comes, with its fused attention where it has one, eagerly and through `torch.compile`. The attention
block is one of Swin-T's first stage (96 features, 3 heads) on one map; "one window" gives it a single window over the
whole map, which is dense attention, and must grow faster.
"""


def ours(title: str, batch: int, train: bool, quick: bool) -> list[Program]:
    """Return inference or a training step of one of our models."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlayers import create_model

    name, _, size = MODELS[title]
    size = 32 if quick else size
    model = create_model(name, **(QUICK[title] | {"num_classes": 10} if quick else {}))
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jnp.arange(batch) % 10
    params = jax.jit(model.init)(jax.random.key(1), images[:1])

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = model.apply(params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def step(params: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, images, labels)
        return jax.tree.map(lambda leaf, slope: leaf - RATE * slope, params, gradient), value

    count = leaf_count(params)
    if train:
        return [compiled(f"{title} training", step, params, images, labels, carry=1, parameters=count)]
    return [compiled(f"{title} inference", model.apply, params, images, parameters=count)]


def timm(title: str, batch: int, train: bool, optimised: bool) -> list[Program]:
    """Return inference or a training step of one of timm's models, compiled by torch or not."""
    torch = needed("torch")
    torchvision()
    models = needed("timm")
    _, name, size = MODELS[title]
    torch.manual_seed(0)
    model = models.create_model(name, pretrained=False, drop_path_rate=0.0)
    model.train(train)
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
    descent = torch.optim.SGD(model.parameters(), lr=RATE)

    def prepare() -> Ready:
        called = torch.compile(model) if optimised else model

        def infer() -> None:
            with torch.inference_mode():
                called(images)

        def step() -> None:
            descent.zero_grad()
            torch.nn.functional.cross_entropy(called(images), labels).backward()
            descent.step()

        return Ready(step if train else infer)

    count = sum(parameter.numel() for parameter in model.parameters())
    return [Program(f"{title} {'training' if train else 'inference'}", prepare, count)]


def growth(sides: dict[str, Sequence[int]], features: int, num_heads: int) -> list[Program]:
    """Return a block with windows of 7 x 7, and with one over the map, on maps of several sides."""
    import jax

    from jaxlayers.window import SwinBlock

    programs = []
    for kind, lengths in sides.items():
        for side in lengths:
            block = SwinBlock(num_heads, window_size=7 if kind == "windows" else side)
            x = jax.random.normal(jax.random.key(0), (1, side, side, features))
            params = jax.jit(block.init)(jax.random.key(1), x)
            programs.append(compiled(f"{kind} {side * side}", block.apply, params, x))
    return programs


def sharded(batch: int, devices: Sequence[int], quick: bool) -> list[Program]:
    """Return a training step of Swin-T compiled for several devices, the batch split over them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from jaxlayers import create_model

    model = create_model("swin_tiny", **(QUICK["Swin-T"] if quick else {}))
    size = 32 if quick else 224
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(params, images)
        return jnp.mean(jnp.square(logits))

    def program(count: int) -> Program:
        def prepare() -> Ready:
            mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
            whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
            step = jax.jit(jax.value_and_grad(loss), in_shardings=(whole, split), out_shardings=whole)
            with jax.set_mesh(mesh):
                made = step.lower(params, images).compile()
            memory: Any = made.memory_analysis()
            cost: Any = made.cost_analysis()
            return Ready(None, facts={"temporary_bytes": memory.temp_size_in_bytes, "flops": cost["flops"]})

        return Program(f"devices {count}", prepare)

    return [program(count) for count in devices]


def bench(session: Session, against: Sequence[str], quick: bool, models: Sequence[str] | None = None) -> Page:
    """Measure and return the page."""
    page = Page("window", "Window transformers and ConvNeXt", PACKAGES, "")
    batch = 2 if quick else 4
    page.text = TEXT.format(batch=batch)
    here = "tools.bench_window"
    libraries = ("jax", "torch") if against else ("jax",)
    for title in models or (list(QUICK) if quick else list(MODELS)):
        for train in (False, True):
            common = {"title": title, "batch": batch, "train": train}
            jobs = [Job(OURS, here, "ours", common | {"quick": quick})]
            for name in against:
                jobs.append(
                    Job(
                        "timm, eager" if name == "timm" else "timm, torch.compile",
                        here,
                        "timm",
                        common | {"optimised": name == "torch.compile"},
                        imports=("torch", "torchvision", "timm"),
                        optional=name == "torch.compile",
                        limit=600.0,
                    )
                )
            if not page.product:
                jobs += product_jobs(128 if quick else 2048, *libraries)
            found = session.measure(jobs)
            page.product += [one for one in found if one.name == "product"]
            page.found += [one for one in found if one.name != "product"]
    sides = {"windows": (14, 28), "one window": (14, 28)} if quick else SIDES
    grown = session.measure([Job(OURS, here, "growth", {"sides": sides, "features": 96, "num_heads": 3}, alike=False)])
    for kind, note in (("windows", "windows of 7 x 7"), ("one window", "one window: dense")):
        for y_name, value in (("seconds", lambda one: one.median), ("bytes", _temporary)):
            page.curves.append(
                curve(
                    grown,
                    OURS,
                    kind,
                    title=f"Attention block, {'time' if y_name == 'seconds' else 'memory between'}",
                    x_name="tokens",
                    y_name=y_name,
                    value=value,
                    shown=note,
                )
            )
    counts = (1, 2) if quick else (1, 2, 4, 8)
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={max(counts)}"}
    split = session.measure(
        [Job(OURS, here, "sharded", {"batch": max(counts), "devices": counts, "quick": quick}, environment=flags)]
    )
    for fact, y_name in (("temporary_bytes", "bytes"), ("flops", "operations")):
        page.curves.append(
            curve(
                split,
                OURS,
                "devices",
                title=f"Swin-T training step, {y_name} of a device",
                x_name="devices",
                y_name=y_name,
                value=lambda one, fact=fact: one.facts[fact],
                shown=f"Swin-T training step, batch {max(counts)}, compiled",
            )
        )
    session.report(f"matrix peak {2 * peak_of(page.product) / 1e9:.0f} GFLOP/s")
    return page


def _temporary(one: Any) -> float:
    return one.facts["temporary_bytes"]
