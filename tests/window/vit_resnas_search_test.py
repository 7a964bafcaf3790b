import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import vit_resnas, vit_resnas_search
from jaxlayers.window.vit_resnas import Architecture, ViTResNAS
from jaxlayers.window.vit_resnas_search import SearchSpace, SuperNetwork
from tests.window.vit_resnas_test import IMAGES, SMALL, SUPER, build, normal, random_variables, stack

# Four architectures of two stages, with a block that may be left out in each.
SPACE = SearchSpace(
    embed_dim=((6, 4), (10, 8)),
    num_heads=((3, 2, 1), (2, 1)),
    hidden_features=((12, 9, 6), (10, 5)),
    removable=((False, True), (True,)),
)
# One stage of one block.
SMALL_SPACE = SearchSpace(((6, 4),), ((3, 2, 1),), ((12, 9, 6),), ((True,),))

CASES = (
    Case(
        name="super_network",
        module=SuperNetwork(SMALL, SMALL_SPACE, examples_per_architecture=2),
        inputs=lambda rng: (rng.normal(size=(2, 10, 8, 3)),),
        leading_axes=True,
        zero_gradients={"key/bias": "adds the same to all scores of a query"},
        bad_inputs=(
            BadInput(
                match="must have the largest widths of the space",
                module=SuperNetwork(SMALL.clone(embed_dim=(4,)), SMALL_SPACE),
            ),
        ),
    ),
)


@pytest.fixture(scope="module")
def variables():
    return random_variables(SUPER, IMAGES)


@pytest.mark.parametrize(
    ("name", "space", "budget"), [("tiny", "tiny", 1.7944e9), ("small", "small", 2.9e9), ("medium", "small", 4.6e9)]
)
def test_published_networks_lie_in_their_space_and_budget(name, space, budget):
    model, _ = build(f"vit_resnas_{name}")
    space = vit_resnas_search.SEARCH_SPACES[space]
    assert 0.975 * budget <= vit_resnas.multiply_accumulates(model) <= budget
    for stage, removable in enumerate(space.removable):
        assert model.embed_dim[stage] in space.embed_dim[stage]
        assert set(model.num_heads[stage]) <= set(space.num_heads[stage])
        assert set(model.hidden_features[stage]) <= set(space.hidden_features[stage])
        depth = len(model.num_heads[stage])
        assert len(removable) - sum(removable) <= depth <= len(removable)
    # The defaults of the class are the smallest.
    assert dataclasses.replace(build("vit_resnas_tiny")[0]) == ViTResNAS()


# Search space ---------------------------------------------------------------------------------------------------------


def is_in(space, architecture):
    for stage, removable in enumerate(space.removable):
        assert architecture.embed_dim[stage] in space.embed_dim[stage]
        stays = True
        heads, hidden = architecture.num_heads[stage], architecture.hidden_features[stage]
        for may, number, width in zip(removable, heads, hidden, strict=True):
            assert isinstance(number, int)
            if number == 0:
                assert may
                assert width == 0
            else:
                assert number in space.num_heads[stage]
                assert width in space.hidden_features[stage]
                # Of neighbours that may be left out, the last go first.
                assert stays or not may
            stays = number > 0 if may else True
    return True


RUNS = SearchSpace(((4, 2),), ((3, 2, 1),), ((8, 4),), ((False, True, True, False, True),))


@pytest.mark.parametrize("space", [SPACE, RUNS, *vit_resnas_search.SEARCH_SPACES.values()])
def test_samples_mutants_and_children_lie_in_the_space(space, rng):
    sampled = [vit_resnas_search.sample_architecture(rng, space) for _ in range(60)]
    mutants = [vit_resnas_search.mutate(rng, space, one, 0.5) for one in sampled]
    couples = zip(sampled, mutants[::-1], strict=True)
    children = [vit_resnas_search.crossover(rng, space, *parents) for parents in couples]
    assert all(is_in(space, one) for one in (*sampled, *mutants, *children))
    assert len(set(sampled)) > 30
    for one, first, second in zip(children, sampled, mutants[::-1], strict=True):
        for entry, *parents in zip(*map(jax.tree.leaves, (one, first, second)), strict=True):
            assert entry in (0, *parents)
    # Everything is chosen some time, also leaving a block out.
    for stage, choices in enumerate(space.embed_dim):
        assert {one.embed_dim[stage] for one in sampled} == set(choices)
        gone = [number == 0 for one in sampled for number in one.num_heads[stage]]
        assert any(gone) == any(space.removable[stage])


def test_drawn_architectures_are_balanced_and_in_the_space():
    number = 24
    draw = jax.jit(lambda key: vit_resnas_search.draw_architectures(key, RUNS, number))
    drawn, other = jax.device_get((draw(jax.random.key(3)), draw(jax.random.key(4))))
    each = [jax.tree.map(lambda leaf, index=index: int(leaf[index]), drawn) for index in range(number)]
    assert all(is_in(RUNS, one) for one in each)
    counts = np.unique(drawn.embed_dim[0], return_counts=True)[1]
    assert counts.tolist() == [12, 12]
    for block in (0, 3):
        assert np.unique(drawn.num_heads[0][block], return_counts=True)[1].tolist() == [8, 8, 8]
    assert np.sum(drawn.num_heads[0][1] == 0) == 12
    # Entries are drawn apart from each other.
    assert len(set(each)) > 18
    assert np.any(other.embed_dim[0] != drawn.embed_dim[0])


def test_warm_up_starts_from_the_largest_network(rng):
    start, half, end = (vit_resnas_search.narrow(RUNS, progress) for progress in (0.0, 0.5, 1.0))
    assert {vit_resnas_search.sample_architecture(rng, start) for _ in range(20)} == {vit_resnas_search.largest(RUNS)}
    assert (half.num_heads, half.embed_dim, half.keep) == (((3, 2),), ((4,),), (True, True))
    assert end == RUNS
    assert vit_resnas_search.largest(RUNS) == Architecture((4,), ((3,) * 5,), ((8,) * 5,))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"embed_dim": ((6, 4),)}, "must have one entry a stage"),
        ({"embed_dim": ((6, 4), (10, 5))}, "must not decrease from any choice"),
        ({"num_heads": ((1, 2, 3), (2, 1))}, r"choices=\(1, 2, 3\) must have the largest first"),
        ({"hidden_features": ((12,), ())}, r"choices=\(\) must have the largest first"),
        ({"keep": (False,)}, r"choices=\(False,\) must have"),
    ],
)
def test_wrong_search_spaces_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(SPACE, **change)


def test_multiply_accumulates_fall_with_every_choice():
    # From the largest to the smallest, one choice at a time.
    rng = np.random.default_rng(1)
    architecture, chain = vit_resnas_search.largest(SPACE), []
    while architecture is not None:
        chain.append(architecture)
        architecture = vit_resnas_search._shrink(rng, SPACE, architecture)
    chain.append(dataclasses.replace(chain[-1], num_heads=((1, 0), (1,)), hidden_features=((6, 0), (5,))))
    chain.append(dataclasses.replace(chain[-1], num_heads=((1, 0), (0,)), hidden_features=((6, 0), (0,))))
    assert len(chain) == 1 + (2 * 2 + 1) + (2 * 2 + 1) + 2 + 2
    models = [vit_resnas.sub_network(SUPER, one) for one in chain]
    closed = [vit_resnas.multiply_accumulates(model) for model in models]
    assert all(before > after for before, after in itertools.pairwise(closed))
    # What is counted in the program is the same.
    x = jax.ShapeDtypeStruct((1, 10, 8, 3), jnp.float32)
    for index in (0, 5, len(chain) - 1):
        model = models[index]
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        assert count_macs(model.apply, shapes, x) == closed[index]


# The super-network ----------------------------------------------------------------------------------------------------

NETWORK = SUPER.clone(patch_output=False)


def test_a_batch_is_divided_among_sub_networks(variables):
    # Two sub-networks, which differ in the last stage's width.
    space = SearchSpace(((6,), (10, 8)), ((3,), (2,)), ((12,), (10,)), ((False, False), (False,)))
    model = SuperNetwork(NETWORK, space, examples_per_architecture=2)
    same = jnp.broadcast_to(IMAGES[:1], (4, 10, 8, 3))
    outer = {name: {"network": tree} for name, tree in variables.items()}

    @jax.jit
    def train(x):
        return model.apply(outer, x, deterministic=False, mutable=["batch_stats"], rngs={"architecture": KEY})

    found, state = train(same)
    widths = stack([Architecture((6, width), ((3, 3), (2,)), ((12, 12), (10,))) for width in (10, 8)] * 2)
    expected, _ = jax.jit(lambda x: NETWORK.apply(variables, x, widths, deterministic=False, mutable=["batch_stats"]))(
        same
    )
    # Which of the two comes first is drawn.
    order = np.argsort([np.abs(found[0] - expected[index]).max() for index in (0, 1)])
    np.testing.assert_allclose(found, expected[np.tile(order, 2)], atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.05
    # The statistics of the patch embedding have moved.
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), outer["batch_stats"], state["batch_stats"])
    assert all(jax.tree.leaves(moved))
    # Two leading axes are one batch.
    shapes = jax.eval_shape(train, jax.ShapeDtypeStruct((2, 2, 10, 8, 3), jnp.float32))
    assert shapes[0].shape == (2, 2, 3)
    with pytest.raises(ValueError, match="batch of 3 must be divisible by examples_per_architecture=2; set either"):
        train(same[:3])


KEY = jax.random.key(0)


@pytest.mark.slow
def test_one_program_trains_all_sub_networks():
    space = SearchSpace(((6, 4),), ((3, 2, 1),), ((12, 9, 6),), ((False, True),))
    network = NETWORK.clone(embed_dim=(6,), head_dim=(2,), num_heads=((3, 3),), hidden_features=((12, 12),))
    model = SuperNetwork(network, space, examples_per_architecture=2)
    x = normal(12, 10, 8, 3)
    # The label is the sign of a channel's mean: easy, so that a few steps show.
    labels = (x[..., 0].mean(axis=(1, 2)) > 0).astype(jnp.int32)
    variables = jax.jit(model.init)(KEY, x)
    traced = []

    def score(logits):
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    @jax.jit
    def step(variables, key):
        traced.append(key)

        def loss(params):
            logits, state = model.apply(
                {**variables, "params": params},
                x,
                deterministic=False,
                mutable=["batch_stats"],
                rngs={"architecture": key},
            )
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(12), labels]), state

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, variables["params"], gradient)
        return {"params": params, **state}, value

    losses = []
    for number in range(30):
        variables, value = step(variables, jax.random.fold_in(KEY, number))
        losses.append(float(value))
    assert len(traced) == 1
    assert np.mean(losses[-5:]) < 0.5 * losses[0]

    # The largest sub-network has learned and the least too.
    @jax.jit
    def accuracy(architecture):
        inner = {name: tree["network"] for name, tree in variables.items()}
        return score(network.apply(inner, x, architecture, deterministic=False, mutable=["batch_stats"])[0])

    ends = (vit_resnas_search.largest(space), Architecture((4,), ((1, 0),), ((6, 0),)))
    assert min(float(accuracy(jax.tree.map(jnp.asarray, one))) for one in ends) >= 0.75


# Evolutionary search --------------------------------------------------------------------------------------------------

# 21600 networks of two stages, whose worth is known.
PUZZLE = SearchSpace(
    embed_dim=((8, 6, 4), (16, 12, 10, 8)),
    num_heads=((4, 3, 2), (4, 2)),
    hidden_features=((24, 16, 8), (32, 16)),
    removable=((False, True), (False, True)),
)


def puzzle_cost(one):
    """Multiply-accumulates of a made-up network."""
    return float(
        one.embed_dim[0] * one.embed_dim[1]
        + sum(
            (4 - 2 * stage) * width * (2 * heads + hidden)
            for stage, width in enumerate(one.embed_dim)
            for heads, hidden in zip(one.num_heads[stage], one.hidden_features[stage], strict=True)
        )
    )


def puzzle_score(one):
    """Diminishing returns of every width, later stages worth more, and one pair of entries that must agree."""
    worth = sum((2 + stage) * np.sqrt(width) for stage, width in enumerate(one.embed_dim))
    for stage in range(2):
        for heads, hidden in zip(one.num_heads[stage], one.hidden_features[stage], strict=True):
            worth += (1 + stage) * np.log1p(heads) + np.log1p(hidden) + 2 * (hidden == 8 * heads)
    return float(worth)


def all_architectures(space):
    blocks = []
    for stage, removable in enumerate(space.removable):
        kept = list(itertools.product(space.num_heads[stage], space.hidden_features[stage]))
        blocks += [kept + [(0, 0)] * may for may in removable]
    for chosen in itertools.product(*space.embed_dim, *blocks):
        pairs = np.reshape(np.array(chosen[2:]), (2, 2, 2)).tolist()
        yield Architecture(
            chosen[:2],
            tuple(tuple(heads for heads, _ in stage) for stage in pairs),
            tuple(tuple(hidden for _, hidden in stage) for stage in pairs),
        )


@pytest.fixture(scope="module")
def solved():
    """All architectures within the budget, and the best of them, by brute force."""
    every = list(all_architectures(PUZZLE))
    costs = np.array([puzzle_cost(one) for one in every])
    budget = float(np.quantile(costs, 0.4))
    fitting = [one for one, cost in zip(every, costs, strict=True) if 0.9 * budget <= cost <= budget]
    return budget, fitting, max(fitting, key=puzzle_score)


SETTINGS = {"least": 0.9, "initial": 40, "rounds": 14, "parents": 20, "offspring": 12}


def test_evolution_finds_the_optimum_where_random_search_does_not(solved):
    budget, fitting, best = solved
    evaluations = 40 + 14 * 24
    # It looks at a part of the space.
    assert len(fitting) > 7 * evaluations
    found, random = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        calls = []

        def score(one, calls=calls):
            calls.append(one)
            return puzzle_score(one)

        candidates = vit_resnas_search.evolutionary_search(rng, PUZZLE, score, puzzle_cost, budget, **SETTINGS)
        assert len(calls) == len(set(calls)) == len(candidates) == evaluations
        assert [one.score for one in candidates] == sorted(map(puzzle_score, calls), reverse=True)
        assert all(0.9 * budget <= one.cost == puzzle_cost(one.architecture) <= budget for one in candidates)
        found.append(candidates[0].score)
        # Random search among the same, as many.
        chosen = rng.choice(len(fitting), size=evaluations, replace=False)
        random.append(max(puzzle_score(fitting[index]) for index in chosen))
    optimum = puzzle_score(best)
    assert found == [optimum] * 3
    assert optimum not in random


def test_search_is_a_function_of_its_generator(solved):
    budget, _, _ = solved
    first, second, other = (
        vit_resnas_search.evolutionary_search(
            np.random.default_rng(seed), PUZZLE, puzzle_score, puzzle_cost, budget, **{**SETTINGS, "rounds": 1}
        )
        for seed in (0, 0, 1)
    )
    assert first == second
    assert first != other


def test_search_ends_when_the_space_is_exhausted(monkeypatch):
    monkeypatch.setattr(vit_resnas_search, "_ATTEMPTS", 100)
    space = SearchSpace(((4, 2),), ((2, 1),), ((4,),), ((False,),))
    found = vit_resnas_search.evolutionary_search(
        np.random.default_rng(0),
        space,
        lambda one: one.embed_dim[0] + one.num_heads[0][0] / 8,
        lambda one: one.embed_dim[0] + float(one.num_heads[0][0]),
        budget=6.0,
        least=0.4,
        initial=3,
        rounds=3,
        parents=2,
        offspring=5,
    )
    assert [(one.architecture.embed_dim[0], one.architecture.num_heads[0][0]) for one in found] == [
        (4, 2),
        (4, 1),
        (2, 2),
        (2, 1),
    ]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"budget": np.inf}, "budget=inf must be positive and finite"),
        ({"budget": 1.0}, r"no architecture of the space was found between .* budget=1.0; the largest costs 8"),
        ({"least": 1.5}, "least=1.5 and"),
        ({"mutation_rate": 0.0}, "mutation_rate=0.0 in"),
        ({"parents": 1}, "parents=1 at least 2"),
        ({"initial": 0}, "initial=0 and"),
    ],
)
def test_wrong_searches_are_refused(change, match):
    settings = {"budget": 6.0, "least": 0.1, "initial": 2, "rounds": 1, "offspring": 2, **change}
    space = SearchSpace(((6, 4),), ((2, 1),), ((4,),), ((False,),))

    def cost(one):
        return float(one.embed_dim[0] + one.num_heads[0][0])

    with pytest.raises(ValueError, match=match):
        vit_resnas_search.evolutionary_search(np.random.default_rng(0), space, cost, cost, **settings)
