"""The search for ViT-ResNAS: a super-network whose parts are trained together, and evolution among them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.window.vit_resnas import Architecture, ViTResNAS, architecture_of

# Search space ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The widths to choose from, largest first.

    Attributes:
      embed_dim: choices for each stage; the smallest of a stage not below the largest of the stage before.
      num_heads: choices for the blocks of each stage.
      hidden_features: choices for the blocks of each stage.
      removable: for each block of each stage, whether it may be left out; of neighbouring ones the last are left out
        first.
      keep: choices of whether a removable block stays, true first.
    """

    embed_dim: tuple[tuple[int, ...], ...]
    num_heads: tuple[tuple[int, ...], ...]
    hidden_features: tuple[tuple[int, ...], ...]
    removable: tuple[tuple[bool, ...], ...]
    keep: tuple[bool, ...] = (True, True, False, False)

    def __post_init__(self) -> None:
        """Check the choices."""
        stages = {len(entries) for entries in (self.embed_dim, self.num_heads, self.hidden_features, self.removable)}
        if len(stages) != 1 or 0 in stages:
            raise ValueError(f"a search space must have one entry a stage; got {self}; set its fields alike")
        for choices in (*self.embed_dim, *self.num_heads, *self.hidden_features, self.keep):
            if not choices or list(choices) != sorted(choices, reverse=True) or choices[0] < 1:
                raise ValueError(f"choices={choices} must have the largest first, which must be positive; sort them")
        for before, after in itertools.pairwise(self.embed_dim):
            if before[0] > after[-1]:
                raise ValueError(
                    f"embed_dim={self.embed_dim} must not decrease from any choice of a stage to any of the next; set "
                    "embed_dim"
                )


def _assemble(space: SearchSpace, pick: Callable[[tuple[Any, ...]], Any]) -> Architecture:
    """Return the architecture whose entries `pick` takes from their choices, as integers or as arrays."""
    embed_dim = tuple(pick(choices) for choices in space.embed_dim)
    heads, hidden = [], []
    for stage, removable in enumerate(space.removable):
        kept = _settle(removable, [pick(space.keep) if one else True for one in removable])
        heads.append(tuple(one * pick(space.num_heads[stage]) for one in kept))
        hidden.append(tuple(one * pick(space.hidden_features[stage]) for one in kept))
    return Architecture(embed_dim, tuple(heads), tuple(hidden))


def _settle(removable: Sequence[bool], kept: Sequence[Any]) -> list[Any]:
    """Leave a removable block out after one that is left out."""
    settled: list[Any] = []
    before: Any = True
    for may, stays in zip(removable, kept, strict=True):
        before = before & stays if may else True
        settled.append(before)
    return settled


def largest(space: SearchSpace) -> Architecture:
    """Return the architecture of the super-network, which has the first of all choices."""
    return _assemble(space, lambda choices: choices[0])


def narrow(space: SearchSpace, progress: float) -> SearchSpace:
    """Return the space of the largest choices, for the warm-up of a super-network: all sub-networks are large at first.

    Args:
      space: the whole space.
      progress: the part of the warm-up that has passed; from 0, the largest network alone, to 1, all choices.
    """

    def some(choices: tuple[Any, ...]) -> tuple[Any, ...]:
        return choices[: 1 + min(int(progress * (len(choices) - 1)), len(choices) - 1)]

    names = ("embed_dim", "num_heads", "hidden_features")
    fields: dict[str, Any] = {name: tuple(some(choices) for choices in getattr(space, name)) for name in names}
    return dataclasses.replace(space, **fields, keep=some(space.keep))


def sample_architecture(rng: np.random.Generator, space: SearchSpace) -> Architecture:
    """Return a random architecture, each entry drawn from its choices, in Python integers."""
    return _assemble(space, lambda choices: choices[int(rng.integers(len(choices)))])


def draw_architectures(key: Array, space: SearchSpace, number: int) -> Architecture:
    """Return `number` random architectures as arrays `[number]`, drawn inside a compiled program.

    Of each entry every choice occurs as often as any other, or once more: over the sub-networks of one batch the
    largest and the smallest are trained alike.

    Args:
      key: random key.
      space: the search space.
      number: how many.
    """
    entries = len(space.embed_dim) + sum(2 * len(blocks) + sum(blocks) for blocks in space.removable)
    order, start = jax.random.split(key)
    numbers = jnp.broadcast_to(jnp.arange(number), (entries, number))
    orders = iter(jax.random.permutation(order, numbers, axis=1, independent=True))
    starts = iter(jax.random.uniform(start, (entries,)))

    def pick(choices: tuple[Any, ...]) -> Array:
        first = jnp.floor(next(starts) * len(choices)).astype(int)
        return jnp.asarray(choices)[(next(orders) + first) % len(choices)]

    return _assemble(space, pick)


class SuperNetwork(nn.Module):
    """Train many sub-networks of one network at once: several of them in each forward and backward pass.

    While training, each batch is divided among random sub-networks of the search space, `examples_per_architecture`
    images each, and each image passes the widths of its sub-network, see `ViTResNAS`; otherwise all pass the whole
    network. It stands in a training loop where the network would.

    Symmetry:
      As the network.

    Attributes:
      network: the network with the largest of all choices. Its parameters lie under `network/`.
      space: the search space.
      examples_per_architecture: images that each sub-network of a batch gets; must divide the batch, or exceed it (one
        sub-network a batch).

    Collections:
      Those of the network; the RNG stream `architecture`, when `deterministic=False`.

    Cost:
      That of the whole network, whatever the sub-networks: masked widths are computed and thrown away.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import SuperNetwork, ViTResNAS, vit_resnas, vit_resnas_search
      >>> space = vit_resnas_search.SearchSpace(((12, 8),), ((3, 2, 1),), ((24, 16),), ((False, True),))
      >>> model = vit_resnas.sub_network(ViTResNAS(10, 28, head_dim=(4,)), vit_resnas_search.largest(space))
      >>> images = jnp.ones((4, 28, 28, 3))
      >>> variables = jax.eval_shape(SuperNetwork(model, space, 2).init, jax.random.key(0), images)
      >>> sorted(variables["params"]["network"]["stages_0"])
      ['blocks_0', 'blocks_1']

    Source:
      Liao et al., Searching for Efficient Multi-Stage Vision Transformers, 2021;
      github.com/yilunliao/vit-search.

    Differs:
      Sub-networks are drawn anew in each step, where the code shuffles a list that is drawn once an epoch.
    """

    network: ViTResNAS
    space: SearchSpace
    examples_per_architecture: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True) -> Any:
        """Classify.

        Args:
          x: images, as the network takes them.
          deterministic: run the whole network; else random sub-networks.

        Returns:
          What the network returns.

        Raises:
          ValueError: if the network is not the space's largest, or the batch does not divide.
        """
        if architecture_of(self.network) != largest(self.space):
            raise ValueError(
                f"network of {architecture_of(self.network)} must have the largest widths of the space, "
                f"{largest(self.space)}; make it by sub_network(model, largest(space))"
            )
        if deterministic:
            return self.network(x)
        batch = x.shape[:-3]
        examples = min(self.examples_per_architecture, math.prod(batch))
        if examples < 1 or math.prod(batch) % examples:
            raise ValueError(
                f"batch of {math.prod(batch)} must be divisible by "
                f"examples_per_architecture={self.examples_per_architecture}; set either"
            )
        drawn = draw_architectures(self.make_rng("architecture"), self.space, math.prod(batch) // examples)
        # Neighbours get different sub-networks, so that each part of a batch that is split over devices has them all.
        widths = jax.tree.map(lambda leaf: jnp.tile(leaf, examples).reshape(batch), drawn)
        return self.network(x, widths, deterministic=False)


# Evolutionary search --------------------------------------------------------------------------------------------------

# How often an operator is tried before the space counts as exhausted.
_ATTEMPTS = 1000


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A network that the search has tried.

    Attributes:
      architecture: its widths.
      score: what `score` gave for it; more is better.
      cost: what `cost` gave for it.
    """

    architecture: Architecture
    score: float
    cost: float


def evolutionary_search(
    rng: np.random.Generator,
    space: SearchSpace,
    score: Callable[[Architecture], float],
    cost: Callable[[Architecture], float],
    budget: float,
    *,
    least: float = 0.975,
    initial: int = 500,
    rounds: int = 19,
    parents: int = 75,
    offspring: int = 75,
    mutation_rate: float = 0.3,
) -> tuple[Candidate, ...]:
    """Search for the architecture of the highest score within a budget, by mutation and crossover of the best.

    `initial` random architectures are followed by rounds of `offspring` mutations of the best `parents` and as many
    crossovers of pairs of them. None is scored twice; the defaults score 3350. The score is usually the accuracy of the
    `slice_params` of a trained super-network, the cost `multiply_accumulates(sub_network(model, architecture))`.

    Args:
      rng: random generator.
      space: the search space.
      score: gives an architecture's score; more is better.
      cost: gives its cost, quickly.
      budget: the highest cost.
      least: the lowest cost that is considered, as a part of the budget.
      initial: how many random architectures start it.
      rounds: how many rounds follow.
      parents: how many of the best have offspring, at least 2.
      offspring: how many mutations, and how many crossovers, each round tries.
      mutation_rate: probability that an entry is drawn anew in a mutation.

    Returns:
      All that were tried, the best first; fewer where the space has no more of that cost.

    Raises:
      ValueError: if a number is out of its range, or no architecture is found within the budget.

    Source:
      Liao et al., 2021, as in search_utils/evolver.py of github.com/yilunliao/vit-search.

    Differs:
      A block that comes back draws its widths anew, where the code keeps those it had. Random starts are only ever
      shrunk in heads and hidden features before the features of a stage.
    """
    if not 0 < budget < math.inf or not 0 <= least <= 1 or not 0 < mutation_rate <= 1:
        raise ValueError(
            f"budget={budget} must be positive and finite, least={least} and mutation_rate={mutation_rate} in [0, 1] "
            "and (0, 1]; set them"
        )
    if min(initial, offspring) < 1 or parents < 2 or rounds < 0:
        raise ValueError(
            f"initial={initial} and offspring={offspring} must be positive, parents={parents} at least 2 and "
            f"rounds={rounds} not negative; set them"
        )
    costs: dict[Architecture, float] = {}
    tried: dict[Architecture, Candidate] = {}

    def cost_of(architecture: Architecture) -> float:
        if architecture not in costs:
            costs[architecture] = float(cost(architecture))
        return costs[architecture]

    def unseen(make: Callable[[], Architecture], number: int, taken: Mapping[Architecture, Any]) -> list[Architecture]:
        """Return up to `number` new architectures within the budget; fewer once the attempts at one are used up."""
        made: dict[Architecture, None] = {}
        attempts = 0
        while len(made) < number and attempts < _ATTEMPTS:
            one, attempts = make(), attempts + 1
            if one not in taken and one not in made and least * budget <= cost_of(one) <= budget:
                made[one], attempts = None, 0
        return list(made)

    def random() -> Architecture:
        # Width and depth at random, heads and hidden features as many as the budget allows.
        one = sample_architecture(rng, space)
        full = largest(space)
        one = Architecture(
            one.embed_dim, _where(one.num_heads, full.num_heads), _where(one.num_heads, full.hidden_features)
        )
        while cost_of(one) > budget:
            smaller = _shrink(rng, space, one)
            if smaller is None:
                break
            one = smaller
        return one

    def best() -> list[Candidate]:
        return sorted(tried.values(), key=lambda candidate: candidate.score, reverse=True)

    def evaluate(population: Sequence[Architecture]) -> None:
        for one in population:
            tried[one] = Candidate(one, float(score(one)), cost_of(one))

    evaluate(unseen(random, initial, tried))
    if not tried:
        raise ValueError(
            f"no architecture of the space was found between least={least} of the budget and budget={budget}; the "
            f"largest costs {cost_of(largest(space))}; set budget or least"
        )
    for _ in range(rounds):
        chosen = [candidate.architecture for candidate in best()[:parents]]

        def mutant(chosen: list[Architecture] = chosen) -> Architecture:
            return mutate(rng, space, chosen[int(rng.integers(len(chosen)))], mutation_rate)

        def child(chosen: list[Architecture] = chosen) -> Architecture:
            first, second = rng.choice(len(chosen), size=2, replace=False)
            return crossover(rng, space, chosen[first], chosen[second])

        population = unseen(mutant, offspring, tried)
        if len(chosen) > 1:
            population += unseen(child, offspring, {**tried, **dict.fromkeys(population)})
        evaluate(population)
    return tuple(best())


def mutate(rng: np.random.Generator, space: SearchSpace, architecture: Architecture, rate: float) -> Architecture:
    """Return the architecture with each entry drawn anew, and each removable block flipped, with probability `rate`."""
    embed_dim = tuple(
        _redraw(rng, choices, now, rate) for choices, now in zip(space.embed_dim, architecture.embed_dim, strict=True)
    )
    fixed = len(set(space.keep)) == 1
    heads, hidden = [], []
    for stage, removable in enumerate(space.removable):
        old = architecture.num_heads[stage]
        flipped = [
            (now > 0) != (may and not fixed and rng.random() < rate) for may, now in zip(removable, old, strict=True)
        ]
        kept = _settle(removable, flipped)
        heads.append(_redraw_kept(rng, space.num_heads[stage], kept, old, rate))
        hidden.append(_redraw_kept(rng, space.hidden_features[stage], kept, architecture.hidden_features[stage], rate))
    return Architecture(embed_dim, tuple(heads), tuple(hidden))


def _redraw(rng: np.random.Generator, choices: Sequence[int], now: int, rate: float) -> int:
    return choices[int(rng.integers(len(choices)))] if now == 0 or rng.random() < rate else now


def _redraw_kept(
    rng: np.random.Generator, choices: Sequence[int], kept: Sequence[bool], old: Sequence[int], rate: float
) -> tuple[int, ...]:
    return tuple(_redraw(rng, choices, now, rate) if one else 0 for one, now in zip(kept, old, strict=True))


def crossover(rng: np.random.Generator, space: SearchSpace, first: Architecture, second: Architecture) -> Architecture:
    """Return an architecture with each entry from either of two."""
    embed_dim = tuple(_either(rng, *pair) for pair in zip(first.embed_dim, second.embed_dim, strict=True))
    heads, hidden = [], []
    for stage, removable in enumerate(space.removable):
        pairs = list(zip(first.num_heads[stage], second.num_heads[stage], strict=True))
        widths = zip(first.hidden_features[stage], second.hidden_features[stage], strict=True)
        kept = _settle(removable, [_either(rng, *pair) > 0 for pair in pairs])
        heads.append(tuple(_either_kept(rng, *pair) if one else 0 for one, pair in zip(kept, pairs, strict=True)))
        hidden.append(tuple(_either_kept(rng, *pair) if one else 0 for one, pair in zip(kept, widths, strict=True)))
    return Architecture(embed_dim, tuple(heads), tuple(hidden))


def _either(rng: np.random.Generator, first: int, second: int) -> int:
    return first if rng.random() < 0.5 else second


def _either_kept(rng: np.random.Generator, first: int, second: int) -> int:
    """Return either width of a block; that of the other parent where one lacks the block."""
    return _either(rng, first, second) or first or second


def _where(kept: tuple[tuple[int, ...], ...], full: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Return the widths of `full` for the blocks that `kept` has."""
    return tuple(
        tuple(width if one else 0 for one, width in zip(ones, widths, strict=True))
        for ones, widths in zip(kept, full, strict=True)
    )


def _shrink(rng: np.random.Generator, space: SearchSpace, architecture: Architecture) -> Architecture | None:
    """Return the architecture with one random entry one choice smaller, or `None` if it is the smallest.

    Heads and hidden features go first, then the features of a stage; blocks stay.
    """
    for names in (("num_heads", "hidden_features"), ("embed_dim",)):
        options = [option for name in names for option in _smaller(name, space, architecture)]
        if options:
            name, entries = options[int(rng.integers(len(options)))]
            return dataclasses.replace(architecture, **{name: entries})
    return None


def _smaller(name: str, space: SearchSpace, architecture: Architecture) -> Iterator[tuple[str, Any]]:
    """Yield the field with each of its entries one choice smaller."""
    entries, choices = getattr(architecture, name), getattr(space, name)
    for stage, entry in enumerate(entries):
        widths = entry if isinstance(entry, tuple) else (entry,)
        for index, width in enumerate(widths):
            if width > choices[stage][-1]:
                below = choices[stage][choices[stage].index(width) + 1]
                changed = (*widths[:index], below, *widths[index + 1 :])
                now = changed if isinstance(entry, tuple) else below
                yield name, (*entries[:stage], now, *entries[stage + 1 :])


# The spaces -----------------------------------------------------------------------------------------------------------


def _space(
    width: int, heads: tuple[tuple[int, ...], ...], hidden: tuple[tuple[int, int], ...], *, depth: int
) -> SearchSpace:
    """Return a space of 5/8 to all of `width` times 2^stage features, and half to all of the hidden features."""
    return SearchSpace(
        embed_dim=tuple(
            tuple(width * 2**stage * part // 16 for part in (16, 14, 12, 11, 10)) for stage in range(len(heads))
        ),
        num_heads=heads,
        hidden_features=tuple(tuple(range(most, most // 2 - 1, -step)) for most, step in hidden),
        removable=(tuple(index % 2 == 1 for index in range(depth)),) * len(heads),
    )


# What the published networks were found in, within 1.79 G (tiny), 2.9 G (small) and 4.6 G (medium, in the space of
# small) multiply-accumulates. Every other block may be left out.
SEARCH_SPACES: dict[str, SearchSpace] = {
    "tiny": _space(256, ((6, 5, 4, 3), (12, 10, 8, 6), (12, 10, 8, 6)), ((768, 64), (1536, 128), (3072, 256)), depth=6),
    "small": _space(
        320, ((8, 7, 6, 5), (16, 14, 12, 10), (16, 14, 12, 10)), ((960, 80), (1920, 160), (3840, 320)), depth=7
    ),
}
