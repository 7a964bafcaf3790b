"""Groups as objects that sample an element, compose, invert and act on a named representation.

Elements are pytrees of NumPy arrays (float64 or integer), so the group laws hold to machine precision whatever the
dtype of the data. `Group.act` computes on the host in float64 for NumPy arrays and in jax.numpy, in the dtype of the
data, for JAX arrays (traced or not).

| representation | shape | who acts |
|---|---|---|
| `scalar` | any | nobody |
| `points` | `[*batch, n, d]` | affine groups on the last axis, permutations on axis -2 |
| `vectors` | `[*batch, n, d]` | the same without translations |
| `point`, `vector` | `[*batch, d]` | affine groups on the last axis |
| `matrix` | `[*batch, d, d]` | affine groups of matrix A by `A X A^T` |
| `image` | `[*batch, height, width, channels]` | affine groups of the plane, about the centre of the image |
| `set` | `[*batch, n, features]` | permutations on axis -2 |
| `adjacency` | `[*batch, n, n]` | permutations on both axes |
| `edges` | `[*batch, n, n, features]` | permutations on axes -3 and -2 |
| `weights` | list of `(kernel, bias)` | `Symmetric(n, layer=i)`: hidden units of a perceptron |

A group leaves a representation alone that it has nothing to say about: a rotation does not move an adjacency matrix.
The plane of an image has coordinates (height, width) in pixels from its centre, so a positive angle turns the picture
counterclockwise, like `numpy.rot90`.
"""

# ruff: noqa: D102 (an override has the docstring of `Group`)

import abc
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.core.dtypes import array_namespace, widen
from jaxlayers.geometry.haar import haar_rotation, linear_magnitude, near_orthogonal, random_stretch
from jaxlayers.geometry.images import resample_image

Element = Any

# Name of a representation -> smallest rank of an array in it.
REPRESENTATIONS = {
    "scalar": 0,
    "points": 2,
    "vectors": 2,
    "point": 1,
    "vector": 1,
    "matrix": 2,
    "image": 3,
    "set": 2,
    "adjacency": 2,
    "edges": 3,
    "weights": 0,
}


class Group(abc.ABC):
    """A group that can be sampled and acts on named representations.

    To add a group, implement the abstract methods (and `_act`, which the checks of `act` precede). `compose` and `act`
    obey `act(compose(g, h), x) == act(g, act(h, x))`.
    """

    #: whether the group has elements of determinant -1, which the symmetry assertions then draw as often as the others
    has_improper: ClassVar[bool] = False

    #: the usual symbol, with the names of the group's attributes in braces
    symbol: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """The usual symbol of the group, such as `SO(3)`."""
        return self.symbol.format(**vars(self)) or type(self).__name__

    @abc.abstractmethod
    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        """Draw an element.

        Args:
          rng: source of randomness.
          scale: in (0, 1], shrinks how far from the identity the element may lie. Below 1 only the connected component
            of the identity is drawn (no reflections).

        Returns:
          A pytree of float64 or integer NumPy arrays.

        Raises:
          ValueError: if `scale` is outside (0, 1].
        """

    @abc.abstractmethod
    def identity(self) -> Element:
        """Return the neutral element."""

    @abc.abstractmethod
    def compose(self, g: Element, h: Element) -> Element:
        """Return the element that acts as `h` followed by `g`."""

    @abc.abstractmethod
    def inverse(self, g: Element) -> Element:
        """Return the element that undoes `g`."""

    @abc.abstractmethod
    def magnitude(self, g: Element) -> float:
        """Return the distance of `g` from the identity, in the unit the class names."""

    def is_proper(self, g: Element) -> bool:
        """Return whether `g` keeps the orientation (determinant above zero)."""
        return True

    def describe(self, g: Element) -> str:
        """Return `g` in a short printed form, for messages."""
        return ", ".join(
            np.array2string(np.asarray(leaf), precision=4, suppress_small=True, threshold=32, separator=", ").replace(
                "\n", ""
            )
            for leaf in jax.tree.leaves(g)
        )

    def act(self, g: Element, x: Any, representation: str) -> Any:
        """Apply `g` to `x`.

        Args:
          g: element of this group.
          x: array (or, for `weights`, list of pairs of arrays) of the shape that the representation asks for.
          representation: one of the names in `REPRESENTATIONS`.

        Returns:
          The transformed data, of the dtype of `x` where that is inexact or the action only moves entries, else
          float64 (NumPy) or JAX's default float. NumPy arrays (computed in float64) give NumPy arrays, JAX arrays
          give JAX arrays.

        Raises:
          ValueError: on an unknown representation, or an `x` of a rank or size that does not fit it.
        """
        if representation not in REPRESENTATIONS:
            raise ValueError(f"representation {representation!r} is unknown; use one of {sorted(REPRESENTATIONS)}")
        if representation == "scalar":
            return x
        if representation == "weights":
            return self._act_weights(g, x)
        array = x if isinstance(x, jax.Array) else np.asarray(x)
        rank = REPRESENTATIONS[representation]
        if array.ndim < rank:
            raise ValueError(
                f"representation {representation!r} needs an array of rank {rank} or more; got shape {array.shape}; "
                "add the missing axes or name another representation"
            )
        return self._act(g, array, representation)

    def _act(self, g: Element, x: Any, representation: str) -> Any:
        """Apply `g` to an array whose rank fits; the default is the trivial action."""
        return x

    def _act_weights(self, g: Element, x: Any) -> Any:
        """Apply `g` to the weights of a perceptron; the default is the trivial action."""
        return x


# Affine groups: x -> A x + b


class Motion(NamedTuple):
    """Element of a Euclidean group, x -> matrix x + translation."""

    matrix: np.ndarray
    translation: np.ndarray


class _Affine(Group):
    """Groups whose elements are maps x -> A x + b; subclasses say what A and b are."""

    @property
    def _dimension(self) -> int | None:
        """Size of the space acted on; None for any."""
        return getattr(self, "dimension", None)

    @abc.abstractmethod
    def _parts(self, g: Element, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        """Return A and b of `g` on the space of the given dimension."""

    def is_proper(self, g: Element) -> bool:
        return bool(np.linalg.det(self._parts(g, self._dimension or 1)[0]) > 0)

    def magnitude(self, g: Element) -> float:
        matrix, translation = self._parts(g, self._dimension or 1)
        return math.hypot(linear_magnitude(matrix), float(np.linalg.norm(translation)))

    def _act(self, g: Element, x: Any, representation: str) -> Any:
        if representation == "image":
            return self._act_image(g, x) if self._dimension in (2, None) else x
        if representation not in ("points", "vectors", "point", "vector", "matrix"):
            return x
        dimension = self._dimension or x.shape[-1]
        axes = x.shape[-2:] if representation == "matrix" else x.shape[-1:]
        if any(size != dimension for size in axes):
            raise ValueError(
                f"representation {representation!r} of {self.name} needs trailing size {dimension}; got shape "
                f"{x.shape}; pass data of that dimension or a group of the dimension of the data"
            )
        matrix, translation = self._parts(g, dimension)
        wide, dtype = widen(x)
        if representation == "matrix":
            result = _matmul(np.swapaxes(_matmul(np.swapaxes(wide, -1, -2), matrix), -1, -2), matrix)
        else:
            result = _matmul(wide, matrix)
            if representation in ("points", "point"):
                result = result + translation.astype(result.dtype)
        return result.astype(dtype)

    def _act_image(self, g: Element, x: Any) -> Any:
        return resample_image(x, *self._parts(g, 2))


class _Linear(_Affine):
    """Matrix groups: the element is the matrix."""

    def identity(self) -> Element:
        return np.eye(self._dimension or 1)

    def compose(self, g: Element, h: Element) -> Element:
        return g @ h

    def inverse(self, g: Element) -> Element:
        return np.linalg.inv(g)

    def _parts(self, g: Element, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        return g, np.zeros(dimension)


class _Rigid(_Affine):
    """Euclidean groups: the element is a `Motion`."""

    def identity(self) -> Element:
        dimension = self._dimension or 1
        return Motion(np.eye(dimension), np.zeros(dimension))

    def compose(self, g: Element, h: Element) -> Element:
        return Motion(g.matrix @ h.matrix, g.matrix @ h.translation + g.translation)

    def inverse(self, g: Element) -> Element:
        return Motion(g.matrix.T, -g.matrix.T @ g.translation)

    def _parts(self, g: Element, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        return g


@dataclasses.dataclass(frozen=True)
class Translation(_Affine):
    """Translations T(d) of points, or cyclic shifts of a grid by whole pixels.

    The element is the vector of the translation, its magnitude the length. With `cyclic=True` it is a vector of
    integers that rolls an `image` (`dimension=2`) or the n entries of a `set`, read as a sequence (`dimension=1`), and
    leaves points alone, for which no period is known.

    Attributes:
      dimension: d.
      cyclic: whether to shift grids by whole, wrapped pixels in place of points by real vectors.
      extent: largest component of a drawn translation; None means 1, or 16 for cyclic shifts. For curves against the
        length of the shift set it to at most half the grid, beyond which a shift wraps back towards the identity.

    Example:
      >>> import numpy as np
      >>> group = Translation(2, cyclic=True)
      >>> group.act(np.array([0, 1]), np.arange(3.0).reshape(1, 3, 1), "image").ravel().tolist()
      [2.0, 0.0, 1.0]
    """

    dimension: int
    cyclic: bool = False
    extent: float | None = None

    def __post_init__(self) -> None:
        _check_at_least("dimension", self.dimension, 1)

    @property
    def name(self) -> str:
        return f"Z({self.dimension})" if self.cyclic else f"T({self.dimension})"

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        extent = scale * (self.extent if self.extent is not None else 16.0 if self.cyclic else 1.0)
        if self.cyclic:
            bound = max(1, round(extent))
            return rng.integers(-bound, bound, size=self.dimension, endpoint=True)
        return rng.uniform(-extent, extent, size=self.dimension)

    def identity(self) -> Element:
        return np.zeros(self.dimension, dtype=np.int64 if self.cyclic else np.float64)

    def compose(self, g: Element, h: Element) -> Element:
        return g + h

    def inverse(self, g: Element) -> Element:
        return -g

    def _parts(self, g: Element, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        return np.eye(dimension), g

    def _act(self, g: Element, x: Any, representation: str) -> Any:
        if not self.cyclic:
            return super()._act(g, x, representation)
        axes = {("image", 2): (-3, -2), ("set", 1): (-2,)}.get((representation, self.dimension))
        return x if axes is None else array_namespace(x).roll(x, tuple(int(shift) for shift in g), axis=axes)


@dataclasses.dataclass(frozen=True)
class Rotation(_Linear):
    """Rotations SO(d), drawn from the Haar measure.

    The element is the matrix; its magnitude is the root of the summed squares of its plane angles in radians (for d =
    2, 3 the angle). With `scale < 1` every plane angle of a Haar rotation is multiplied by `scale`.

    Attributes:
      dimension: d, at least 2.

    Example:
      >>> import numpy as np
      >>> group = Rotation(3)
      >>> g = group.sample(np.random.default_rng(0))
      >>> points = np.eye(3)
      >>> bool(np.allclose(group.act(group.inverse(g), group.act(g, points, "points"), "points"), points))
      True
    """

    dimension: int
    symbol: ClassVar[str] = "SO({dimension})"

    def __post_init__(self) -> None:
        _check_at_least("dimension", self.dimension, 2)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        return haar_rotation(rng, self.dimension, scale)


@dataclasses.dataclass(frozen=True)
class Orthogonal(_Linear):
    """Rotations and reflections O(d), drawn from the Haar measure (half of them improper).

    The element is the matrix; magnitude as for `Rotation`, with pi / sqrt(2) for a reflection. With `scale < 1` only
    rotations are drawn, since no reflection is near the identity.

    Attributes:
      dimension: d.
    """

    dimension: int
    has_improper: ClassVar[bool] = True
    symbol: ClassVar[str] = "O({dimension})"

    def __post_init__(self) -> None:
        _check_at_least("dimension", self.dimension, 1)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        return near_orthogonal(rng, self.dimension, scale)


@dataclasses.dataclass(frozen=True)
class SpecialEuclidean(_Rigid):
    """Rotations and translations SE(d).

    The element is a `Motion`; its magnitude is the root of the squared angle (radians) plus the squared length.

    Attributes:
      dimension: d, at least 2.
      extent: largest component of a drawn translation (in pixels where it acts on an image).
    """

    dimension: int
    extent: float = 1.0
    symbol: ClassVar[str] = "SE({dimension})"

    def __post_init__(self) -> None:
        _check_at_least("dimension", self.dimension, 2)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        translation = rng.uniform(-1.0, 1.0, size=self.dimension) * self.extent * scale
        return Motion(haar_rotation(rng, self.dimension, scale), translation)


@dataclasses.dataclass(frozen=True)
class Euclidean(_Rigid):
    """Rotations, reflections and translations E(d).

    The element is a `Motion`; magnitude as for `SpecialEuclidean`. With `scale < 1` no reflections are drawn.

    Attributes:
      dimension: d.
      extent: largest component of a drawn translation (in pixels where it acts on an image).
    """

    dimension: int
    extent: float = 1.0
    has_improper: ClassVar[bool] = True
    symbol: ClassVar[str] = "E({dimension})"

    def __post_init__(self) -> None:
        _check_at_least("dimension", self.dimension, 1)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        translation = rng.uniform(-1.0, 1.0, size=self.dimension) * self.extent * scale
        return Motion(near_orthogonal(rng, self.dimension, scale), translation)


@dataclasses.dataclass(frozen=True)
class Scale(_Affine):
    """Uniform scalings of any space: x -> s x with s > 0.

    The element is s as an array without axes, its magnitude |log s|. A `matrix` scales by s^2. An `image` is enlarged
    about its centre by interpolation.

    Attributes:
      maximum: s is drawn log-uniformly from [1 / maximum, maximum].
    """

    maximum: float = 2.0
    symbol: ClassVar[str] = "R+"

    def __post_init__(self) -> None:
        if self.maximum <= 1.0:
            raise ValueError(f"maximum={self.maximum} must be above 1; set the largest factor to draw")

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        return np.asarray(np.exp(rng.uniform(-1.0, 1.0) * scale * math.log(self.maximum)))

    def identity(self) -> Element:
        return np.asarray(1.0)

    def compose(self, g: Element, h: Element) -> Element:
        return np.asarray(g * h)

    def inverse(self, g: Element) -> Element:
        return np.asarray(1.0 / g)

    def _parts(self, g: Element, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        return g * np.eye(dimension), np.zeros(dimension)


@dataclasses.dataclass(frozen=True)
class GeneralLinear(_Linear):
    """Invertible matrices GL(n), of either sign of the determinant.

    An element is drawn as Q P with Q Haar in O(n) and P symmetric with log-uniform eigenvalues, so it is never badly
    conditioned. Its magnitude is the root of the squared magnitude of Q plus |log P|^2. With `scale < 1` the
    determinant is positive.

    Attributes:
      dimension: n.
      maximum: the eigenvalues of P lie in [1 / maximum, maximum].
    """

    dimension: int
    maximum: float = 2.0
    has_improper: ClassVar[bool] = True
    symbol: ClassVar[str] = "GL({dimension})"

    def __post_init__(self) -> None:
        _check_at_least("dimension", self.dimension, 1)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        logarithms = rng.uniform(-1.0, 1.0, size=self.dimension) * math.log(self.maximum) * scale
        return near_orthogonal(rng, self.dimension, scale) @ random_stretch(rng, logarithms)


@dataclasses.dataclass(frozen=True)
class SpecialLinear(_Linear):
    """Matrices of determinant one, SL(n).

    Drawn as for `GeneralLinear`, with Q a rotation and P of determinant one; the same magnitude.

    Attributes:
      dimension: n, at least 2.
      maximum: the eigenvalues of P are drawn from [1 / maximum, maximum] before their product is set to one.
    """

    dimension: int
    maximum: float = 2.0
    symbol: ClassVar[str] = "SL({dimension})"

    def __post_init__(self) -> None:
        _check_at_least("dimension", self.dimension, 2)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        logarithms = rng.uniform(-1.0, 1.0, size=self.dimension) * math.log(self.maximum) * scale
        return haar_rotation(rng, self.dimension, scale) @ random_stretch(rng, logarithms - logarithms.mean())


# Finite groups of the plane


class Turn(NamedTuple):
    """Element of a dihedral group: mirror the width axis if `flip`, then turn by `steps` / order of a full turn."""

    steps: np.ndarray
    flip: np.ndarray


class _Polygon(_Affine):
    """Symmetries of the regular polygon with `order` corners, from an integer element."""

    order: int

    @property
    def _dimension(self) -> int | None:
        return 2

    @abc.abstractmethod
    def _turn(self, g: Element) -> tuple[int, bool]:
        """Return steps and flip of `g`."""

    def _parts(self, g: Element, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        steps, flip = self._turn(g)
        quarters, rest = divmod(4 * steps, self.order)
        if rest == 0:  # sines and cosines without rounding
            cosine, sine = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[quarters % 4]
        else:
            angle = 2.0 * math.pi * steps / self.order
            cosine, sine = math.cos(angle), math.sin(angle)
        mirror = -1.0 if flip else 1.0
        return np.array([[cosine, -sine * mirror], [sine, cosine * mirror]]), np.zeros(2)

    def _act_image(self, g: Element, x: Any) -> Any:
        if 4 % self.order and x.shape[-3] != x.shape[-2]:
            raise ValueError(
                f"{self.name} acts on square images only; got shape {x.shape}; crop or pad to a square, or use a group "
                "of quarter turns"
            )
        steps, flip = self._turn(g)
        quarters, rest = divmod(4 * steps, self.order)
        if rest:
            return resample_image(x, *self._parts(g, 2))
        numpy = array_namespace(x)
        return numpy.rot90(numpy.flip(x, axis=-2) if flip else x, quarters % 4, axes=(-3, -2))


@dataclasses.dataclass(frozen=True)
class Cyclic(_Polygon):
    """Rotations C_n of the plane by multiples of 2 pi / n.

    The element is the number of steps as an integer array without axes, its magnitude the angle in radians. Quarter
    turns of images are exact to the bit, at odd and even sizes; they exchange height and width. Other angles
    interpolate.

    Attributes:
      order: n, at least 2.

    Example:
      >>> import numpy as np
      >>> image = np.arange(4.0).reshape(2, 2, 1)
      >>> Cyclic(4).act(np.asarray(1), image, "image")[..., 0].tolist()
      [[1.0, 3.0], [0.0, 2.0]]
    """

    order: int
    symbol: ClassVar[str] = "C{order}"

    def __post_init__(self) -> None:
        _check_at_least("order", self.order, 2)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        return np.asarray(_steps(rng, self.order, scale))

    def identity(self) -> Element:
        return np.asarray(0)

    def compose(self, g: Element, h: Element) -> Element:
        return np.asarray((g + h) % self.order)

    def inverse(self, g: Element) -> Element:
        return np.asarray(-g % self.order)

    def _turn(self, g: Element) -> tuple[int, bool]:
        return int(g) % self.order, False


@dataclasses.dataclass(frozen=True)
class Dihedral(_Polygon):
    """Rotations and reflections D_n of the regular polygon with n corners (2 n elements).

    The element is a `Turn`; its magnitude is the angle in radians, pi / sqrt(2) for a reflection. Images as for
    `Cyclic`. With `scale < 1` no reflections are drawn, unless there is nothing else (n = 1).

    Attributes:
      order: n.
    """

    order: int
    has_improper: ClassVar[bool] = True
    symbol: ClassVar[str] = "D{order}"

    def __post_init__(self) -> None:
        _check_at_least("order", self.order, 1)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        steps = _steps(rng, self.order, scale)
        flip = rng.integers(2) if scale == 1.0 or self.order == 1 else 0
        return Turn(np.asarray(steps), np.asarray(flip))

    def identity(self) -> Element:
        return Turn(np.asarray(0), np.asarray(0))

    def compose(self, g: Element, h: Element) -> Element:
        steps = (g.steps + (1 - 2 * g.flip) * h.steps) % self.order
        return Turn(np.asarray(steps), np.asarray(g.flip ^ h.flip))

    def inverse(self, g: Element) -> Element:
        return Turn(np.asarray((2 * g.flip - 1) * g.steps % self.order), g.flip)

    def _turn(self, g: Element) -> tuple[int, bool]:
        return int(g.steps) % self.order, bool(g.flip)


# Permutations and products


@dataclasses.dataclass(frozen=True)
class Symmetric(Group):
    """Permutations S_n of the entries of a set, the nodes of a graph or the units of a hidden layer.

    The element is an integer array p: entry i moves to place p[i]. Its magnitude is the fraction of entries that move.
    It permutes axis -2 of `points`, `vectors` and `set`, and both node axes of `adjacency` and `edges`. With `layer` it
    acts on `weights` instead: it permutes the outputs of the pair (kernel `[in, out]`, bias `[out]`) of that number
    together with the inputs of the next pair, which leaves the function of the perceptron unchanged. For several
    hidden layers at once use `Product(Symmetric(8, layer=0), Symmetric(4, layer=1))`.

    Attributes:
      size: n, at least 2.
      layer: index of the pair in `weights` whose outputs are permuted (not the last); None permutes sets and graphs.

    Example:
      >>> import numpy as np
      >>> Symmetric(3).act(np.array([1, 2, 0]), np.array([[10], [20], [30]]), "set").ravel().tolist()
      [30, 10, 20]
    """

    size: int
    layer: int | None = None
    symbol: ClassVar[str] = "S{size}"

    def __post_init__(self) -> None:
        _check_at_least("size", self.size, 2)
        if self.layer is not None:
            _check_at_least("layer", self.layer, 0)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        _check_scale(scale)
        moved = rng.choice(self.size, size=max(2, round(scale * self.size)), replace=False)
        permutation = np.arange(self.size)
        permutation[moved] = rng.permutation(moved)
        return permutation

    def identity(self) -> Element:
        return np.arange(self.size)

    def compose(self, g: Element, h: Element) -> Element:
        return g[h]

    def inverse(self, g: Element) -> Element:
        return np.argsort(g)

    def magnitude(self, g: Element) -> float:
        return float(np.mean(g != np.arange(self.size)))

    def _act(self, g: Element, x: Any, representation: str) -> Any:
        if self.layer is not None:
            return x
        axes = {"points": (-2,), "vectors": (-2,), "set": (-2,), "adjacency": (-2, -1), "edges": (-3, -2)}
        for axis in axes.get(representation, ()):
            if x.shape[axis] != self.size:
                raise ValueError(
                    f"representation {representation!r} of {self.name} needs size {self.size} at axis {axis}; got "
                    f"shape {x.shape}; use Symmetric({x.shape[axis]}) or change the data"
                )
            x = array_namespace(x).take(x, np.argsort(g), axis=axis)
        return x

    def _act_weights(self, g: Element, x: Any) -> Any:
        if self.layer is None:
            return x
        leaves, structure = jax.tree.flatten(x)
        pairs = len(leaves) // 2
        if not isinstance(x, (list, tuple)) or len(leaves) != 2 * len(x):
            raise ValueError(
                f"representation 'weights' needs a list of (kernel, bias) pairs; got {structure}; collect the layers "
                "in order, with a zero bias where there is none"
            )
        if self.layer > pairs - 2:
            raise ValueError(
                f"layer={self.layer} must be a hidden layer, at most {pairs - 2} for {pairs} pairs (the outputs of the "
                "last one may not be permuted); set layer"
            )
        first = 2 * self.layer  # kernel and bias of the layer, then the kernel that reads it
        for index, axis in ((first, -1), (first + 1, -1), (first + 2, -2)):
            leaf = leaves[index] if isinstance(leaves[index], jax.Array) else np.asarray(leaves[index])
            if leaf.ndim < -axis or leaf.shape[axis] != self.size:
                raise ValueError(
                    f"representation 'weights' of {self.name} at layer={self.layer} needs size {self.size} at axis "
                    f"{axis} of pair {index // 2}; got shape {leaf.shape}; set size or layer"
                )
            leaves[index] = array_namespace(leaf).take(leaf, np.argsort(g), axis=axis)
        return jax.tree.unflatten(structure, leaves)


@dataclasses.dataclass(frozen=True, init=False)
class Product(Group):
    """Direct product of groups, each factor acting in turn (the last one first).

    The element is the tuple of the factors' elements; the magnitude is the root of the summed squares. It is a group
    action only on representations where the factors commute, as permutations of points and rotations do. Rotations and
    translations of points do not: use `SpecialEuclidean`.

    Attributes:
      factors: the groups.

    Example:
      >>> Product(Symmetric(5), Rotation(3)).name
      'S5 x SO(3)'
    """

    factors: tuple[Group, ...]

    def __init__(self, *factors: Group) -> None:
        if not factors:
            raise ValueError("a product of 0 groups has no elements; pass at least one group")
        object.__setattr__(self, "factors", factors)

    @property
    def name(self) -> str:
        return " x ".join(factor.name for factor in self.factors)

    @property
    def has_improper(self) -> bool:  # type: ignore[override]
        return any(factor.has_improper for factor in self.factors)

    def sample(self, rng: np.random.Generator, *, scale: float = 1.0) -> Element:
        return tuple(factor.sample(rng, scale=scale) for factor in self.factors)

    def identity(self) -> Element:
        return tuple(factor.identity() for factor in self.factors)

    def compose(self, g: Element, h: Element) -> Element:
        return tuple(factor.compose(a, b) for factor, a, b in zip(self.factors, g, h, strict=True))

    def inverse(self, g: Element) -> Element:
        return tuple(factor.inverse(a) for factor, a in zip(self.factors, g, strict=True))

    def magnitude(self, g: Element) -> float:
        return math.hypot(*(factor.magnitude(a) for factor, a in zip(self.factors, g, strict=True)))

    def is_proper(self, g: Element) -> bool:
        """Return whether an even number of the factors' elements is improper."""
        return sum(not factor.is_proper(a) for factor, a in zip(self.factors, g, strict=True)) % 2 == 0

    def describe(self, g: Element) -> str:
        return "; ".join(f"{factor.name}: {factor.describe(a)}" for factor, a in zip(self.factors, g, strict=True))

    def act(self, g: Element, x: Any, representation: str) -> Any:
        for factor, a in reversed(list(zip(self.factors, g, strict=True))):
            x = factor.act(a, x, representation)
        return x


# Sampling and arithmetic


def _steps(rng: np.random.Generator, order: int, scale: float) -> int:
    """Draw a number of steps in [0, order), at most a `scale` of half a turn away from zero (and at least one step)."""
    _check_scale(scale)
    if scale == 1.0:
        return int(rng.integers(order))
    bound = max(1, int(scale * order / 2))
    return int(rng.integers(-bound, bound, endpoint=True)) % order


def _matmul(x: Any, matrix: np.ndarray) -> Any:
    """Apply `matrix` to the vectors on the last axis of `x`, in the dtype of `x`."""
    transposed = matrix.T.astype(x.dtype)
    if isinstance(x, jax.Array):
        return jnp.matmul(x, transposed, precision=jax.lax.Precision.HIGHEST)
    return x @ transposed


def _check_at_least(field: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{field}={value} must be at least {minimum}; set {field}")


def _check_scale(scale: float) -> None:
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale={scale} must lie in (0, 1]; set scale, 1.0 for the whole group")
