"""Fields over the plane for C_n and D_n: their types, steerable filters, and which grids keep turns exact.

A field of type rho, `[*batch, height, width, channels]`, transforms as (g f)(x) = rho(g) f(g^-1 x). Points x are
(row, column) offsets from the middle of the map, as in `jaxlayers.geometry.groups`: x = r (cos phi, sin phi), an angle
turns counterclockwise like `numpy.rot90`, and the flip of D_n, phi -> -phi, mirrors the width.

Constants are NumPy float64 and cached; nothing here has parameters.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core.dtypes import array_namespace, widen
from jaxlayers.geometry.groups import Cyclic, Dihedral, Element

PlanarGroup = Cyclic | Dihedral

PADDINGS = ("SAME", "VALID", "CIRCULAR")

# Representations that permute their coordinates, so that any pointwise function commutes with them.
PERMUTATIONS = ("trivial", "regular")

# A sampled function with less than this part of the energy of its ring, or of its own norm besides earlier functions,
# is nothing but what the grid cannot show.
_FAINT = 0.03


# Representations ------------------------------------------------------------------------------------------------------


def group_size(group: PlanarGroup) -> int:
    """Return the number of elements: n of C_n, 2 n of D_n."""
    return group.order * (2 if isinstance(group, Dihedral) else 1)


def element_index(group: PlanarGroup, g: Element) -> int:
    """Return the place of `g` in the order that regular fields have: `flip * n + steps`."""
    if isinstance(group, Dihedral):
        return int(g.flip) * group.order + int(g.steps) % group.order
    return int(g) % group.order


def irrep_names(group: PlanarGroup) -> tuple[str, ...]:
    """Return the names of all real irreducible representations, `"trivial"` first.

    `"irrep_k"` of C_n turns by k times the angle, k up to n / 2. `"irrep_j_k"` of D_n does so too and, with j = 1,
    changes the sign of its second (or only) coordinate under the flip. They are of dimension 2, but of dimension 1
    for k = 0 and k = n / 2.

    Example:
      >>> irrep_names(Cyclic(4)), irrep_names(Dihedral(2))
      (('trivial', 'irrep_1', 'irrep_2'), ('trivial', 'irrep_1_0', 'irrep_0_1', 'irrep_1_1'))
    """
    n = group.order
    if isinstance(group, Cyclic):
        return ("trivial", *(f"irrep_{k}" for k in range(1, n // 2 + 1)))
    names = ["trivial", "irrep_1_0"]
    for k in range(1, n // 2 + 1):
        names += [f"irrep_0_{k}", f"irrep_1_{k}"] if 2 * k == n else [f"irrep_1_{k}"]
    return tuple(names)


@functools.cache
def representation(group: PlanarGroup, name: str) -> np.ndarray:
    """Return the orthogonal matrices of a representation, `[elements, dimension, dimension]`.

    Args:
      group: `Cyclic(n)` or `Dihedral(n)`.
      name: `"regular"`, which permutes the elements h by rho(g) e_h = e_gh, or one of `irrep_names(group)`.

    Returns:
      float64 matrices in the order of `element_index`.

    Raises:
      ValueError: on an unknown name.
    """
    names = irrep_names(group)
    n, size = group.order, group_size(group)
    flips, steps = np.divmod(np.arange(size), n)
    if name == "regular":
        matrices = np.zeros((size, size, size))
        for g in range(size):
            # h -> g h, see `Dihedral.compose`.
            turned = (steps[g] + (1 - 2 * flips[g]) * steps) % n + n * (flips[g] ^ flips)
            matrices[g, turned, np.arange(size)] = 1.0
        return matrices
    if name not in names:
        raise ValueError(f"representation {name!r} of {group.name} is unknown; use one of {('regular', *names)}")
    if name == "trivial":
        return np.ones((size, 1, 1))
    parts = [int(part) for part in name.split("_")[1:]]
    frequency, signed = parts[-1], len(parts) == 1 or parts[0] == 1
    turns = _turns(group, frequency)
    if frequency == 0 or 2 * frequency == n:
        # For D_n, the rotation matrix is the scalar +-1 here, and the flip's sign is the second coordinate's or none.
        place = 1 if isinstance(group, Dihedral) and signed else 0
        return turns[:, place : place + 1, place : place + 1]
    return turns


def _turns(group: PlanarGroup, frequency: int) -> np.ndarray:
    """Return R(k theta) diag(1, -1 if flipped) for each element, which also is how cos and sin of k phi transform."""
    n = group.order
    flips, steps = np.divmod(np.arange(group_size(group)), n)
    quarters, rest = np.divmod(4 * (frequency * steps % n), n)
    angles = 2 * np.pi * (frequency * steps % n) / n
    # Quarter turns without rounding.
    cosines = np.where(rest == 0, np.array([1.0, 0.0, -1.0, 0.0])[quarters], np.cos(angles))
    sines = np.where(rest == 0, np.array([0.0, 1.0, 0.0, -1.0])[quarters], np.sin(angles))
    signs = 1.0 - 2.0 * flips
    return np.stack([np.stack([cosines, -sines * signs], -1), np.stack([sines, cosines * signs], -1)], -2)


class Run(NamedTuple):
    """Fields of one representation that lie side by side.

    Attributes:
      name: of the representation.
      multiplicity: number of fields.
      dimension: channels of each.
      start: first channel.
    """

    name: str
    multiplicity: int
    dimension: int
    start: int

    @property
    def stop(self) -> int:
        """The channel after the last."""
        return self.start + self.multiplicity * self.dimension


@dataclasses.dataclass(frozen=True)
class FieldType:
    """What the channels of a map mean: a direct sum of trivial, regular and irreducible fields of a planar group.

    Attributes:
      group: `Cyclic(n)` or `Dihedral(n)` of `jaxlayers.geometry.groups`.
      fields: pairs (name of the representation, number of fields), each name once. Channels lie in this order, those
        of one field side by side.

    Example:
      >>> fields = FieldType(Dihedral(4), (("trivial", 3), ("regular", 2), ("irrep_1_1", 1)))
      >>> fields.channels, [run.start for run in fields.runs]
      (21, [0, 3, 19])
      >>> FieldType.regular(Cyclic(8), 4) + FieldType.trivial(Cyclic(8), 1)
      FieldType(group=Cyclic(order=8), fields=(('regular', 4), ('trivial', 1)))
    """

    group: PlanarGroup
    fields: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.group, (Cyclic, Dihedral)):
            raise ValueError(f"group={self.group!r} must be Cyclic(n) or Dihedral(n), which turn the plane; set group")
        names = [name for name, _ in self.fields]
        if not names or len(set(names)) < len(names) or min(count for _, count in self.fields) < 1:
            raise ValueError(
                f"fields={self.fields} must name each representation once, with a positive number of fields; set fields"
            )
        for name in names:
            representation(self.group, name)

    @classmethod
    def trivial(cls, group: PlanarGroup, count: int) -> "FieldType":
        """Return `count` trivial fields: numbers, such as the colours of an image."""
        return cls(group, (("trivial", count),))

    @classmethod
    def regular(cls, group: PlanarGroup, count: int) -> "FieldType":
        """Return `count` regular fields: one channel for each element of the group."""
        return cls(group, (("regular", count),))

    @classmethod
    def irreps(cls, group: PlanarGroup, count: int, *, max_frequency: int | None = None) -> "FieldType":
        """Return `count` fields of each irreducible representation up to a frequency, the trivial one included."""
        names = irrep_names(group)
        if max_frequency is not None:
            names = tuple(name for name in names if name == "trivial" or int(name.split("_")[-1]) <= max_frequency)
        return cls(group, tuple((name, count) for name in names))

    def __add__(self, other: "FieldType") -> "FieldType":
        """Return the direct sum; fields of a representation that both have come after those of the first."""
        if other.group != self.group:
            raise ValueError(f"fields of {self.group.name} and {other.group.name} cannot be added; use one group")
        counts = dict(self.fields)
        for name, count in other.fields:
            counts[name] = counts.get(name, 0) + count
        return FieldType(self.group, tuple(counts.items()))

    @property
    def runs(self) -> tuple[Run, ...]:
        """The fields, one entry for each representation."""
        found, start = [], 0
        for name, count in self.fields:
            found.append(Run(name, count, representation(self.group, name).shape[-1], start))
            start = found[-1].stop
        return tuple(found)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.runs[-1].stop

    @property
    def num_fields(self) -> int:
        """Number of fields."""
        return sum(count for _, count in self.fields)

    @property
    def pointwise(self) -> bool:
        """Whether any function may be applied to each channel: all fields are trivial or regular."""
        return all(name in PERMUTATIONS for name, _ in self.fields)

    def matrix(self, g: Element) -> np.ndarray:
        """Return rho(g), float64 `[channels, channels]`."""
        result = np.zeros((self.channels, self.channels))
        index = element_index(self.group, g)
        for run in self.runs:
            part = slice(run.start, run.stop)
            result[part, part] = np.kron(np.eye(run.multiplicity), representation(self.group, run.name)[index])
        return result

    def act(self, g: Element, x: Any) -> Any:
        """Return the field g x: the map is moved about its middle, and its channels are mixed by rho(g).

        Args:
          g: element of the group.
          x: `[*batch, height, width, channels]`, NumPy or JAX. Quarter turns and flips are exact; other angles
            interpolate, see `jaxlayers.geometry.images.resample_image`.

        Returns:
          The field, of the kind of `x`.

        Raises:
          ValueError: if `x` has other channels.
        """
        if np.ndim(x) < 3 or x.shape[-1] != self.channels:
            raise ValueError(
                f"a map of shape {np.shape(x)} must be [*batch, height, width, {self.channels}] for "
                f"fields={self.fields} of {self.group.name}; set fields"
            )
        wide, dtype = widen(self.group.act(g, x, "image"))
        matrix = self.matrix(g).astype(wide.dtype)
        numpy = array_namespace(wide)
        exact = {"precision": "highest"} if numpy is jnp else {}
        return numpy.einsum("...c,dc->...d", wide, matrix, **exact).astype(dtype)


# Steerable filters ----------------------------------------------------------------------------------------------------


class Harmonics(NamedTuple):
    """Circular harmonics on Gaussian rings, sampled on the taps of a square filter.

    Attributes:
      samples: `[functions, size, size]`.
      turns: `[elements, functions, functions]`, with s_f(h^-1 x) = sum_e turns[h, e, f] s_e(x).
      frequencies: `[functions]`, m of cos(m phi) and sin(m phi).
      rings: `[functions]`, number of the ring of each.
    """

    samples: np.ndarray
    turns: np.ndarray
    frequencies: np.ndarray
    rings: np.ndarray


@functools.cache
def harmonics(
    group: PlanarGroup, kernel_size: int, max_frequency: int | None = None, ring_width: float = 0.6
) -> Harmonics:
    """Return the functions that filters are made of: exp(-(r - R)^2 / 2 w^2) times cos(m phi) and sin(m phi).

    Rings have radii R = (k - 1) / 2, and every whole pixel less down to 0 (or 1 / 2 for even sizes). The outermost is
    narrower by a third, so that little of it is cut off by the square.

    A square grid cannot tell frequency m from m - 4, m - 8, ...: sums over sampled harmonics of m = 4 do not vanish,
    and smooth images would see them as m = 0. Therefore the moments sum_x s(x) r^l cos(l phi) of each function are
    removed for l < m. That commutes with quarter turns and flips, and makes the error at other angles fall with the
    square of the resolution.

    Args:
      group: gives `turns`, and the band limit.
      kernel_size: taps along each axis.
      max_frequency: largest m, at most ceil(pi R) on a ring. `None` takes ceil(pi R) if the group has only quarter
        turns and flips (that is all 3 x 3 filters, and 24 of the 25 dimensions of 5 x 5), and floor(2 R) otherwise.
      ring_width: w, in pixels.

    Returns:
      See `Harmonics`.

    Raises:
      ValueError: if a size does not fit.
    """
    if kernel_size < 1:
        raise ValueError(f"kernel_size={kernel_size} must be positive; set kernel_size")
    if max_frequency is not None and max_frequency < 0:
        raise ValueError(f"max_frequency={max_frequency} must not be negative; set max_frequency, or None")
    if not ring_width > 0:
        raise ValueError(f"ring_width={ring_width} must be positive; set ring_width")
    taps = np.arange(kernel_size) - (kernel_size - 1) / 2
    rows, columns = np.meshgrid(taps, taps, indexing="ij")
    radius, angle = np.hypot(rows, columns), np.arctan2(columns, rows)
    radii = np.arange(kernel_size % 2 == 0, kernel_size, 2)[: (kernel_size + 1) // 2] / 2
    samples, frequencies, rings, kinds = [], [], [], []
    for ring, centre in enumerate(radii):
        width = ring_width * (2 / 3 if ring == len(radii) - 1 and ring > 0 else 1.0)
        profile = np.exp(-0.5 * np.square((radius - centre) / width))
        if max_frequency is not None:
            limit = min(max_frequency, math.ceil(math.pi * centre))
        else:
            limit = math.ceil(math.pi * centre) if 4 % group.order == 0 else math.floor(2 * centre)
        for m in range(limit + 1):
            for kind in range(1 if m == 0 else 2):
                wave = (np.cos, np.sin)[kind](m * angle) * ((radius > 0) | (m == 0))
                samples.append(_remove_moments(profile * wave, profile, radius, angle, m))
                frequencies.append(m)
                rings.append(ring)
                kinds.append(kind)
    turns = np.zeros((group_size(group), len(samples), len(samples)))
    for e, f in np.ndindex(len(samples), len(samples)):
        if (frequencies[e], rings[e]) == (frequencies[f], rings[f]):
            turns[:, e, f] = _turns(group, frequencies[e])[:, kinds[e], kinds[f]]
    return Harmonics(np.stack(samples), turns, np.array(frequencies), np.array(rings))


def _remove_moments(
    samples: np.ndarray, profile: np.ndarray, radius: np.ndarray, angle: np.ndarray, frequency: int
) -> np.ndarray:
    """Take the moments of lower frequencies, which only the grid brings in, out of a sampled harmonic."""
    aliases = [m for m in range(frequency) if (frequency - m) % 4 == 0 or (frequency + m) % 4 == 0]
    waves = [radius**m * wave(m * angle) for m in aliases for wave in ((np.cos, np.sin) if m else (np.cos,))]
    if not waves:
        return samples
    moments = np.stack([wave.ravel() for wave in waves])
    weighted = moments * profile.ravel()
    lower = np.linalg.pinv(weighted @ moments.T, rcond=1e-9, hermitian=True) @ (moments @ samples.ravel())
    return samples - (lower @ weighted).reshape(samples.shape)


class Factors(NamedTuple):
    """How weights become filters: one einsum with constants that are far smaller than the basis itself.

    Attributes:
      subscripts: of weights, constants and result.
      shape: the axes of the weights between those of the fields, `[sources, *shape, targets]`.
      constants: the other operands. The result is `[rows, columns, sources, channels, targets, channels]`.
    """

    subscripts: str
    shape: tuple[int, ...]
    constants: tuple[np.ndarray, ...]


@functools.cache
def filter_factors(
    group: PlanarGroup,
    source: str,
    target: str,
    kernel_size: int,
    max_frequency: int | None = None,
    ring_width: float = 0.6,
) -> Factors:
    """Return how to build all filters K with K(g x) = rho_out(g) K(x) rho_in(g)^-1 between two representations.

    To a regular field any filter k of one output channel gives one: K(x)[h, :] = k(h^-1 x) rho_in(h)^-1. So it does
    from a regular field: K(x)[:, h] = rho_out(h) k(h^-1 x). Between irreducible fields the constraint is solved for
    each frequency by averaging over the group.

    Every element of the basis has the energy that keeps variance: independent weights of variance 1 / (number of
    weights that an output field sums over) take white noise of variance 1 to variance 1.

    Args:
      group: of both.
      source: name of the representation of the input.
      target: name of the representation of the output.
      kernel_size: see `harmonics`.
      max_frequency: see `harmonics`.
      ring_width: see `harmonics`.

    Returns:
      See `Factors`; its shape multiplies to 0 if there is no filter.
    """
    found = harmonics(group, kernel_size, max_frequency, ring_width)
    rho_in, rho_out = representation(group, source), representation(group, target)
    floor = _FAINT * np.array([np.sum(found.samples[found.rings == ring][0] ** 2) for ring in found.rings])
    if "regular" in (source, target):
        turned = np.einsum("hef,eyx->hfyx", found.turns, found.samples)
        energy = np.mean(np.sum(turned**2, axis=(-2, -1)), axis=0)
        kept = np.flatnonzero(energy > floor)
        kept = kept[_independent(found.samples[kept])]
        turns = found.turns[:, :, kept] / np.sqrt(energy[kept])
        if target == "regular":
            # rho(h)^-1 = rho(h)^T
            return Factors("mfin,hef,hji,eyx->yxmjnh", (len(kept), rho_in.shape[-1]), (turns, rho_in, found.samples))
        rho_out = rho_out * math.sqrt(rho_out.shape[-1] / len(rho_out))
        return Factors("mfpn,hef,hop,eyx->yxmhno", (len(kept), rho_out.shape[-1]), (turns, rho_out, found.samples))
    elements = []
    for ring in np.unique(found.rings):
        for m in np.unique(found.frequencies[found.rings == ring]):
            places = np.flatnonzero((found.rings == ring) & (found.frequencies == m))
            for solution in _solve(found.turns[:, places[:, None], places], rho_in, rho_out):
                coefficients = np.zeros((len(found.samples), *solution.shape[1:]))
                coefficients[places] = solution
                energy = np.sum(np.einsum("eio,eyx->yxio", coefficients, found.samples) ** 2)
                if energy > floor[places[0]]:
                    elements.append(coefficients * math.sqrt(rho_out.shape[-1] / energy))
    basis = np.reshape(elements, (-1, len(found.samples), rho_in.shape[-1], rho_out.shape[-1]))
    basis = basis[_independent(np.einsum("beio,eyx->byxio", basis, found.samples))]
    return Factors("mbn,beio,eyx->yxmino", (len(basis),), (basis, found.samples))


def _independent(vectors: np.ndarray) -> list[int]:
    """Return the places of those that are not sums of earlier ones: a coarse grid makes some functions equal."""
    size = math.prod(vectors.shape[1:])
    kept, frame = [], np.zeros((0, size))
    for place, vector in enumerate(vectors.reshape(len(vectors), size)):
        rest = vector - frame.T @ (frame @ vector)
        rest = rest - frame.T @ (frame @ rest)
        if np.linalg.norm(rest) > _FAINT * np.linalg.norm(vector):
            kept.append(place)
            frame = np.concatenate([frame, rest[None] / np.linalg.norm(rest)])
    return kept


def _solve(turns: np.ndarray, rho_in: np.ndarray, rho_out: np.ndarray) -> list[np.ndarray]:
    """Return an orthonormal basis of the coefficients `[functions, in, out]` that the group leaves alone.

    The columns of the projection are orthogonalised in their order, so that the basis does not hang on the linear
    algebra library, as eigenvectors would: weights are stored with respect to it.
    """
    shape = (turns.shape[-1], rho_in.shape[-1], rho_out.shape[-1])
    projection = np.einsum("hef,hij,hop->eiofjp", turns, rho_in, rho_out) / len(turns)
    projection = projection.reshape(math.prod(shape), math.prod(shape))
    found: list[np.ndarray] = []
    for column in projection.T:
        rest = column - sum((vector * (vector @ column) for vector in found), start=np.zeros_like(column))
        if np.linalg.norm(rest) > 1e-6:
            found.append(rest / np.linalg.norm(rest))
    return [vector.reshape(shape) for vector in found]


def expand_filters(
    weights: Float[Array, "sources basis targets"],
    group: PlanarGroup,
    source: str,
    target: str,
    kernel_size: int,
    max_frequency: int | None = None,
    ring_width: float = 0.6,
) -> Float[Array, "size size channels_in channels_out"]:
    """Return the filters between `sources` fields of one representation and `targets` of another.

    Args:
      weights: one number for each pair of fields and element of the basis, see `filter_factors`.
      group: of both.
      source: name of the representation of the input.
      target: name of the representation of the output.
      kernel_size: see `harmonics`.
      max_frequency: see `harmonics`.
      ring_width: see `harmonics`.

    Returns:
      The kernel of a cross-correlation, in the dtype of the weights.
    """
    factors = filter_factors(group, source, target, kernel_size, max_frequency, ring_width)
    constants = [jnp.asarray(constant, weights.dtype) for constant in factors.constants]
    weights = weights.reshape(weights.shape[0], *factors.shape, weights.shape[-1])
    # Rounded constants would be other filters: full precision whatever the default of the platform.
    filters = jnp.einsum(factors.subscripts, weights, *constants, precision=jax.lax.Precision.HIGHEST)
    return filters.reshape(kernel_size, kernel_size, filters.shape[2] * filters.shape[3], -1)


def filter_basis(
    group: PlanarGroup,
    source: str,
    target: str,
    kernel_size: int,
    max_frequency: int | None = None,
    ring_width: float = 0.6,
) -> np.ndarray:
    """Return the basis that `expand_filters` spans, `[basis, size, size, channels_in, channels_out]`, float64.

    Example:
      >>> filter_basis(Cyclic(4), "trivial", "regular", 3).shape  # 9 taps: any 3 x 3 filter, and its four turns
      (9, 3, 3, 1, 4)
    """
    factors = filter_factors(group, source, target, kernel_size, max_frequency, ring_width)
    size = math.prod(factors.shape)
    weights = np.eye(size).reshape(1, *factors.shape, size)
    filters = np.einsum(factors.subscripts, weights, *factors.constants, optimize=True)
    return np.moveaxis(filters[:, :, 0], 3, 0)


# Grids ----------------------------------------------------------------------------------------------------------------


def resolve_padding(length: int, kernel_size: int, stride: int, padding: str | int) -> tuple[int, int, int]:
    """Return the pixels put before and after an axis, and the length of the result.

    Args:
      length: of the axis.
      kernel_size: taps.
      stride: pixels from one output to the next.
      padding: `"SAME"` (ceil(length / stride) outputs; of an odd number of pixels the last one goes after), `"VALID"`
        (none), `"CIRCULAR"` (as SAME, wrapped), or the number of pixels on both sides.

    Raises:
      ValueError: on an unknown padding, numbers that are not positive, or a kernel that does not fit.
    """
    if kernel_size < 1 or stride < 1:
        raise ValueError(f"kernel_size={kernel_size} and stride={stride} must be positive; set them")
    if not (padding in PADDINGS or (isinstance(padding, int) and padding >= 0)):
        raise ValueError(f"padding={padding!r} must be one of {PADDINGS} or a number of pixels; set padding")
    if isinstance(padding, int):
        before = after = padding
    elif padding == "VALID":
        before = after = 0
    else:
        total = max((-(-length // stride) - 1) * stride + kernel_size - length, 0)
        before, after = total // 2, total - total // 2
    result = (length + before + after - kernel_size) // stride + 1
    if length < 1 or result < 1:
        raise ValueError(
            f"a map of length {length} must hold kernel_size={kernel_size} with padding={padding!r}; use larger "
            "images, a smaller kernel_size or padding='SAME'"
        )
    return before, after, result


def matching_kernel(length: int, kernel_size: int, stride: int) -> int:
    """Return `kernel_size`, or one more if that is what keeps the output of an axis symmetric under SAME padding."""
    total = (-(-length // stride) - 1) * stride + kernel_size - length
    return kernel_size if total >= 0 and total % 2 == 0 else max(kernel_size + 1, kernel_size - total)


@dataclasses.dataclass(frozen=True)
class GridReport:
    """Whether a layer's output grid lies symmetrically on its input grid.

    Quarter turns and flips about the middle of the input are about the middle of the output only if the two middles
    coincide. Otherwise the output of the turned image is the turned output of a *displaced* image.

    Attributes:
      layer: what the layer is called.
      size: height and width of the input.
      kernel_size: taps along each axis.
      stride: pixels from one output to the next.
      padding: as given.
      out_size: height and width of the output.
      displacement: by how many input pixels, along each axis, a flip of that axis displaces the image that the output
        sees; 0 where the middles coincide. A half turn displaces along both axes, a quarter turn along one.
    """

    layer: str
    size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: int
    padding: str | int
    out_size: tuple[int, int]
    displacement: tuple[int, int]

    @property
    def exact(self) -> bool:
        """Whether quarter turns and flips are exact."""
        return self.displacement == (0, 0)

    def __str__(self) -> str:
        """Return one line."""
        verdict = (
            "exact for quarter turns and flips"
            if self.exact
            else f"NOT exact: flips and turns see the image displaced by {self.displacement} pixels"
        )
        return (
            f"{self.layer}: {self.size} -> {self.out_size}, kernel {self.kernel_size}, stride {self.stride}, "
            f"padding {self.padding}: {verdict}"
        )


def check_grid(
    size: int | tuple[int, int],
    kernel_size: int | tuple[int, int],
    stride: int = 1,
    padding: str | int = "SAME",
    *,
    layer: str = "layer",
) -> GridReport:
    """Say whether a convolution or pooling keeps quarter turns and flips exact on maps of a size.

    With m outputs, k taps, p pixels before and n pixels, it does if (m - 1) stride + k - 2 p - n is 0 along both axes
    (modulo n for `"CIRCULAR"`). That is: stride 1 with VALID, or with SAME and odd k; stride 2 with SAME if k and n are
    both odd or both even; VALID if the stride divides n - k.

    Args:
      size: n, or height and width.
      kernel_size: k, or that along each axis.
      stride: pixels from one output to the next.
      padding: see `resolve_padding`.
      layer: name for the report.

    Returns:
      The report.

    Raises:
      ValueError: as `resolve_padding`.

    Example:
      >>> [check_grid(size, 3, stride=2).exact for size in (28, 29)]
      [False, True]
      >>> print(check_grid(28, 3, stride=2))
      layer: (28, 28) -> (14, 14), kernel (3, 3), stride 2, padding SAME: NOT exact: flips and turns see the image displaced by (1, 1) pixels
    """  # noqa: E501
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    kernels = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    results, displacements = [], []
    for length, taps in zip(sizes, kernels, strict=True):
        before, _, result = resolve_padding(length, taps, stride, padding)
        offset = (result - 1) * stride + taps - 2 * before - length
        if padding == "CIRCULAR":
            offset = (offset + length // 2) % length - length // 2
        results.append(result)
        displacements.append(offset)
    return GridReport(
        layer,
        (sizes[0], sizes[1]),
        (kernels[0], kernels[1]),
        stride,
        padding,
        (results[0], results[1]),
        (displacements[0], displacements[1]),
    )


def exact_sizes(
    layers: Sequence[tuple[int, int, str | int]], sizes: Sequence[int] = tuple(range(1, 129))
) -> tuple[int, ...]:
    """Return the sizes of square images at which a chain of layers keeps quarter turns and flips exact.

    Args:
      layers: (kernel_size, stride, padding) of each, in order.
      sizes: which to try; those too small for a kernel are left out.

    Returns:
      The sizes.

    Example:
      >>> exact_sizes([(3, 1, "SAME"), (3, 2, "SAME"), (3, 2, "SAME")], range(28, 42))
      (29, 33, 37, 41)
    """
    found = []
    for size in sizes:
        length = size
        try:
            reports = []
            for kernel_size, stride, padding in layers:
                reports.append(check_grid(length, kernel_size, stride, padding))
                length = reports[-1].out_size[0]
        except ValueError:
            continue
        if all(report.exact for report in reports):
            found.append(size)
    return tuple(found)
