"""EGNN, the SE(3)-Transformer, group and tensor-field convolutions, and how they grow; see `tools.bench`.

Beside plain PyTorch stand the same networks as their authors' equations read, written here with edge lists and turned
filters; beside e3nn-jax the convolution of its tensor product.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tools.bench_measure import OURS, Job, Measured, Page, Session, cell_bytes, curve, markdown, product_jobs
from tools.bench_worker import Program, Ready, compiled, leaf_count, needed

AGAINST = ("torch", "e3nn")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "e3nn-jax", "numpy")
HERE = "tools.bench_equivariant"

FEATURES, DEPTH = 64, 4
FIELDS, TAPS = 16, 3
CHANNELS, HIDDEN, NEIGHBOURS = 8, 32, 16

TEXT = """
Each turn is a forward pass and the gradient of a sum of squares with respect to parameters and inputs, in float32.

- EGNN: {depth} layers of width {features}, all points attend to all, positions out. The rival is the edge-list form of
  the paper's equations in plain PyTorch, with as many parameters; both compute the same function.
- Group convolution: C4, {fields} regular fields to {fields}, {taps} x {taps} taps, one map. The rival turns a plain
  filter by quarter turns and convolves, in PyTorch, with as many parameters.
- Tensor-field convolution: {channels} channels of degrees 0 and 1, {neighbours} neighbours a point, radial perceptrons
  of width {hidden}. The rival is its counterpart of `e3nn_jax.tensor_product` with the harmonics, mixed by
  `e3nn_jax.FunctionalLinear` with weights for every edge. It has one radial perceptron for all paths where ours has one
  for each pair of degrees, with layer norm: its work differs a little, see the MACs.
- SE(3)-Transformer: {se3}, all attending to all and, compiled only, to {neighbours} neighbours. Its memory is the
  compiler's plan of what lies between operands and results, with all edges at once and in chunks of points. Escnn, the
  Torch version of e3nn and the SE(3)-Transformer's own code are not among the packages that the parity tests install,
  and are not measured.
"""


# Ours ----------------------------------------------------------------------------------------------------------------


def _gradient(name: str, apply: Callable[..., Any], params: Any, *inputs: Any) -> Program:
    """Return the program of the gradient of a sum of squares."""
    import jax
    import jax.numpy as jnp

    def loss(params: Any, inputs: Any) -> jax.Array:
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(apply(params, *inputs)))  # type: ignore[return-value]

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return compiled(name, gradient, params, inputs, parameters=leaf_count(params))


def egnn(points: Sequence[int], features: int, depth: int) -> list[Program]:
    """Return EGNN on fully connected clouds."""
    import jax

    from jaxlayers.equivariant import EGNN

    model = EGNN(features=features, depth=depth)
    programs = []
    for count in points:
        x = jax.random.normal(jax.random.key(0), (count, 3))
        params = jax.jit(model.init)(jax.random.key(1), x)
        programs.append(_gradient(f"EGNN {count * (count - 1)}", model.apply, params, x))
    return programs


def group_conv(sides: Sequence[int], fields: int) -> list[Program]:
    """Return the group convolution on maps of several sides."""
    import jax

    from jaxlayers.equivariant import SteerableConv
    from jaxlayers.geometry.groups import Cyclic
    from jaxlayers.geometry.planar_fields import FieldType

    kind = FieldType.regular(Cyclic(4), fields)
    layer = SteerableConv(kind, kind, kernel_size=TAPS)
    programs = []
    for side in sides:
        x = jax.random.normal(jax.random.key(0), (1, side, side, 4 * fields))
        params = jax.jit(layer.init)(jax.random.key(1), x)
        programs.append(_gradient(f"group convolution {side * side}", layer.apply, params, x))
    return programs


def _cloud(count: int) -> tuple[Any, Any, Any]:
    import jax

    x = jax.random.normal(jax.random.key(0), (count, 3))
    scalars = jax.random.normal(jax.random.key(1), (count, CHANNELS, 1))
    vectors = jax.random.normal(jax.random.key(2), (count, CHANNELS, 3))
    return x, scalars, vectors


def tensor_field(points: Sequence[int]) -> list[Program]:
    """Return the tensor-field convolution over nearest neighbours."""
    import jax

    from jaxlayers.equivariant import TensorFieldConv
    from jaxlayers.equivariant.fibers import edges_of
    from jaxlayers.ops.neighbours import k_nearest

    layer = TensorFieldConv((CHANNELS, CHANNELS), self_interaction=False, hidden_features=HIDDEN)
    programs = []
    for count in points:
        x, scalars, vectors = _cloud(count)
        lists = k_nearest(x, NEIGHBOURS)

        def apply(params: Any, x: Any, scalars: Any, vectors: Any, lists: Any = lists) -> Any:
            return layer.apply(params, {0: scalars, 1: vectors}, edges_of(x, lists))

        params = jax.jit(lambda *inputs, apply=apply: layer.init(jax.random.key(3), *inputs))(
            {0: scalars, 1: vectors}, edges_of(x, lists)
        )
        name = f"tensor-field convolution {count * NEIGHBOURS}"
        programs.append(_gradient(name, apply, params, x, scalars, vectors))
    return programs


def se3(points: Sequence[int], size: Sequence[int], chunk: int, neighbours: int | None) -> list[Program]:
    """Return the SE(3)-Transformer's gradient, with all edges at once and in chunks of points.

    Where all attend to all it is run too; with fewer neighbours it is compiled only, for its memory.
    """
    import jax
    import numpy as np

    from tools import bench_se3

    def program(count: int, chunk: int | None) -> Program:
        def prepare() -> Ready:
            made, operands = bench_se3.program(bench_se3.Size(*size), count, chunk, neighbours)
            facts = {"temporary_bytes": made.memory_analysis().temp_size_in_bytes}
            if neighbours is not None:
                return Ready(None, facts=facts)
            rng = np.random.default_rng(0)
            values = jax.tree.map(
                lambda leaf: jax.numpy.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), operands
            )
            return Ready(lambda: jax.block_until_ready(made(*values)), facts=facts)

        edges = count * (count - 1 if neighbours is None else neighbours)
        return Program(f"{'chunks' if chunk else 'at once'} {edges}", prepare)

    return [program(count, one) for count in points for one in (None, chunk)]


# Theirs --------------------------------------------------------------------------------------------------------------


def torch_egnn_module(features: int, depth: int) -> Any:
    """Return EGNN with edge lists in plain PyTorch: positions of all points, everyone a neighbour."""
    torch = needed("torch")
    nn = torch.nn

    class Layer(nn.Module):  # type: ignore[name-defined]
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.message = nn.Sequential(
                nn.Linear(2 * features + 1, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU()
            )
            self.move = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, 1, bias=False))
            self.node = (
                None
                if last
                else nn.Sequential(nn.Linear(2 * features, features), nn.SiLU(), nn.Linear(features, features))
            )

        def forward(self, h: Any, x: Any, receivers: Any, senders: Any) -> Any:
            difference = x[receivers] - x[senders]
            squared = difference.square().sum(-1, keepdim=True)
            messages = self.message(torch.cat([h[receivers], h[senders], squared], -1))
            moves = torch.zeros_like(x).index_add(0, receivers, difference * self.move(messages))
            moved = x + moves / (len(x) - 1)
            if self.node is None:
                return h, moved
            total = torch.zeros_like(h).index_add(0, receivers, messages)
            return h + self.node(torch.cat([h, total], -1)), moved

    class Network(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Linear(1, features)
            self.layers = nn.ModuleList(Layer(index == depth - 1) for index in range(depth))

        def forward(self, x: Any, receivers: Any, senders: Any) -> Any:
            h = self.embedding(torch.ones(len(x), 1))
            for layer in self.layers:
                h, x = layer(h, x, receivers, senders)
            return x

    return Network()


def torch_egnn(points: Sequence[int], features: int, depth: int) -> list[Program]:
    """Return the programs of `torch_egnn_module`."""
    torch = needed("torch")
    network = torch_egnn_module(features, depth)
    programs = []
    for count in points:
        x = torch.randn(count, 3, requires_grad=True)
        pairs = torch.nonzero(~torch.eye(count, dtype=torch.bool)).T.contiguous()
        programs.append(_torch_gradient(f"EGNN {count * (count - 1)}", network, x, pairs[0], pairs[1]))
    return programs


def torch_group_conv_module(fields: int) -> Any:
    """Return the convolution of C4's regular fields in plain PyTorch, channels `fields x 4`."""
    torch = needed("torch")

    class GroupConv(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            scale = (4 * fields * TAPS * TAPS) ** -0.5
            self.weight = torch.nn.Parameter(scale * torch.randn(fields, fields, 4, TAPS, TAPS))
            self.bias = torch.nn.Parameter(torch.zeros(fields))

        def forward(self, x: Any) -> Any:
            # Output r is filtered by the filter turned r times, its input elements shifted by r.
            turned = [torch.rot90(self.weight, r, (-2, -1)).roll(r, 2) for r in range(4)]
            kernel = torch.stack(turned, 1).reshape(4 * fields, 4 * fields, TAPS, TAPS)
            return torch.nn.functional.conv2d(x, kernel, self.bias.repeat_interleave(4), padding=TAPS // 2)

    return GroupConv()


def torch_group_conv(sides: Sequence[int], fields: int) -> list[Program]:
    """Return the programs of `torch_group_conv_module`."""
    torch = needed("torch")
    layer = torch_group_conv_module(fields)
    return [
        _torch_gradient(
            f"group convolution {side * side}", layer, torch.randn(1, 4 * fields, side, side, requires_grad=True)
        )
        for side in sides
    ]


def _torch_gradient(name: str, module: Any, *inputs: Any) -> Program:
    def turn() -> None:
        for one in [*module.parameters(), *inputs]:
            one.grad = None
        module(*inputs).square().sum().backward()

    return Program(name, lambda: Ready(turn), sum(parameter.numel() for parameter in module.parameters()))


def e3nn_convolution() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return initialisation and application of a tensor-field convolution of e3nn-jax's parts, without parity."""
    import jax
    import jax.numpy as jnp

    e3nn = needed("e3nn_jax")
    from e3nn_jax import flax as layers

    features = e3nn.Irreps(f"{CHANNELS}x0e + {CHANNELS}x1e")
    harmonics = e3nn.Irreps("0e + 1e + 2e")
    paths = e3nn.tensor_product(features, harmonics, filter_ir_out=["0e", "1e"])
    mix = e3nn.FunctionalLinear(paths, features)
    radial = layers.MultiLayerPerceptron((HIDDEN, HIDDEN, mix.num_weights), jax.nn.relu)

    def apply(params: Any, x: Any, scalars: Any, vectors: Any, lists: Any) -> Any:
        differences = x[lists.indices] - x[:, None]
        distances = jnp.sqrt(jnp.sum(jnp.square(differences), -1, keepdims=True))
        angular = e3nn.spherical_harmonics(harmonics, e3nn.IrrepsArray("1e", differences), True)
        flat = jnp.concatenate([scalars[..., 0], vectors.reshape(len(x), -1)], -1)
        sources = e3nn.IrrepsArray(features, flat[lists.indices])
        products = e3nn.tensor_product(sources, angular, filter_ir_out=["0e", "1e"])
        mixed = jax.vmap(jax.vmap(mix))(radial.apply(params, distances), products)
        return jnp.mean(mixed.array, axis=1)

    return lambda: radial.init(jax.random.key(0), jnp.ones((1, 1))), apply


def e3nn_programs(points: Sequence[int]) -> list[Program]:
    """Return the programs of `e3nn_convolution`."""
    from jaxlayers.ops.neighbours import k_nearest

    init, apply = e3nn_convolution()
    params = init()
    programs = []
    for count in points:
        x, scalars, vectors = _cloud(count)
        lists = k_nearest(x, NEIGHBOURS)
        programs.append(
            _gradient(
                f"tensor-field convolution {count * NEIGHBOURS}",
                lambda params, x, scalars, vectors, lists=lists: apply(params, x, scalars, vectors, lists),
                params,
                x,
                scalars,
                vectors,
            )
        )
    return programs


# The page ------------------------------------------------------------------------------------------------------------


def bench(session: Session, against: Sequence[str], quick: bool) -> Page:
    """Measure and return the page."""
    size = (4, 1, 1, 1, 1) if quick else (16, 1, 2, 4, 1)
    points = (8, 16) if quick else (32, 64, 128, 256)
    sides = (8, 16) if quick else (16, 32, 64, 128)
    cloud = (32, 64) if quick else (64, 128, 256, 512)
    clouds = (16, 32) if quick else (32, 64, 128)
    sparse = (32, 64) if quick else (128, 512, 2048)
    chunk = 4 if quick else 8
    words = (
        f"width {size[0]}, degrees 0 to {size[1]}, {size[2]} layers and the output, {size[3]} head{'s' * (size[3] > 1)}"
    )
    sizes = {"features": FEATURES, "depth": DEPTH, "fields": FIELDS, "taps": TAPS, "channels": CHANNELS}
    text = TEXT.format(**sizes, neighbours=NEIGHBOURS, hidden=HIDDEN, se3=words)
    page = Page("equivariant", "Equivariant layers", PACKAGES, text)
    torch, e3nn = "torch" in against, "e3nn" in against
    groups: list[tuple[str, str, dict[str, Any], list[Job]]] = []
    for name, function, settings in (
        ("EGNN", "egnn", {"points": points, "features": FEATURES, "depth": DEPTH}),
        ("group convolution", "group_conv", {"sides": sides, "fields": FIELDS}),
    ):
        theirs = [Job("plain PyTorch", HERE, f"torch_{function}", settings, imports=("torch",))] if torch else []
        groups.append((name, function, settings, theirs))
    theirs = [Job("e3nn-jax", HERE, "e3nn_programs", {"points": cloud}, imports=("jax",), alike=False)] if e3nn else []
    groups.append(("tensor-field convolution", "tensor_field", {"points": cloud}, theirs))
    for name, function, settings, theirs in groups:
        jobs = [Job(OURS, HERE, function, settings), *theirs]
        if not page.product:
            jobs += product_jobs(128 if quick else 2048, "jax", *(["torch"] if torch else []))
        found = session.measure(jobs)
        page.product += [one for one in found if one.name == "product"]
        page.found += [one for one in found if one.name != "product"]
        unit, skip = "pixels" if function == "group_conv" else "edges", 0 if quick else 1
        for label in (OURS, *(job.label for job in theirs)):
            page.curves.append(
                curve(found, label, name, title=f"{name}, time", x_name=unit, shown=f"{name}, {label}", fitted=skip)
            )
    for neighbours, counts in ((None, clouds), (NEIGHBOURS, sparse)):
        transformer: dict[str, Any] = {"points": counts, "size": size, "chunk": chunk, "neighbours": neighbours}
        found = session.measure([Job(OURS, HERE, "se3", transformer)])
        who = "all to all" if neighbours is None else f"{neighbours} neighbours"
        for kind, note in (("at once", "all edges at once"), ("chunks", f"chunks of {chunk} points")):
            common: Any = {"x_name": "edges", "shown": f"{who}, {note}"}
            memory = curve(
                found,
                OURS,
                kind,
                title="SE(3)-Transformer, memory between",
                y_name="bytes",
                value=lambda one: one.facts["temporary_bytes"],
                **common,
            )
            page.curves.append(memory)
            if neighbours is None:
                page.curves.append(curve(found, OURS, kind, title="SE(3)-Transformer, time", **common))
        page.tables[f"SE(3)-Transformer, {who}"] = _se3_table(found)
    return page


def _se3_table(found: Sequence[Measured]) -> str:
    """Return the saving of memory and its price in time."""
    rows = []
    named = {one.name: one for one in found}
    for name, whole in named.items():
        kind, _, edges = name.rpartition(" ")
        if kind != "at once":
            continue
        cut = named[f"chunks {edges}"]
        bytes_of = [one.facts["temporary_bytes"] for one in (whole, cut)]
        slower = f"{cut.median / whole.median:.2f}" if whole.seconds else ""
        cells = [cell_bytes(size) for size in bytes_of]
        rows.append([f"{int(edges):,}", *cells, f"{bytes_of[0] / bytes_of[1]:.1f}", *([slower] * bool(slower))])
    heads = ["edges", "all at once", "in chunks", "times less memory", *(["times as long"] * (len(rows[0]) == 5))]
    return markdown(heads, rows)
