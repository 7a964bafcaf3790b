"""Scattering: deep feature extractors of fixed filters that do not expand distances, and classifiers on them.

Longer than most files: the general network of Wiatowski and Bölcskei, the filter banks that it takes, and the Morlet
scattering of Mallat that is used in practice belong together.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory

# Filter banks, in NumPy and float64 ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class FilterBank:
    """Filters on a periodic grid, by their frequency responses (discrete Fourier transforms).

    Attributes:
      band: `[filters, *size]`, real or complex: the g_lambda.
      low_pass: `[*size]`: the output-generating atom chi.
    """

    band: np.ndarray
    low_pass: np.ndarray

    def littlewood_paley(self, *, real: bool = False) -> np.ndarray:
        """Return |chi(w)|^2 + sum |g_lambda(w)|^2 at every frequency.

        Args:
          real: the signals are real, so that w and -w count by their mean.
        """
        total = np.abs(self.low_pass) ** 2 + np.sum(np.abs(self.band) ** 2, axis=0)
        if real:
            total = (total + np.roll(np.flip(total), 1, axis=tuple(range(total.ndim)))) / 2
        return total

    def bounds(self, *, real: bool = False) -> tuple[float, float]:
        """Return the frame bounds A and B: A |f|^2 <= |f * chi|^2 + sum |f * g_lambda|^2 <= B |f|^2, both attained."""
        total = self.littlewood_paley(real=real)
        return float(total.min()), float(total.max())

    def scaled(self, factor: float) -> "FilterBank":
        """Return the bank with every filter multiplied by a number."""
        return FilterBank(self.band * factor, self.low_pass * factor)


BankFactory = Callable[[tuple[int, ...]], FilterBank]


def morlet_bank(size: tuple[int, ...], *, scales: int = 2, orientations: int = 8) -> FilterBank:
    """Return dyadic Morlet wavelets, in one or two dimensions, and a Gaussian low-pass.

    psi_{j,theta}(u) = 2^{-dj} psi(2^{-j} R_theta^{-1} u), psi(u) = c g_s(u) (exp(i xi u_1) - beta), with a Gaussian g
    of deviation s = 0.8, frequency xi = 3 pi / 4 and beta such that the mean vanishes. In two dimensions the envelope
    is stretched along the crests of the wave by `orientations` / 4, and the angles divide pi. Only one of w and -w is
    covered: the bank is a frame for real signals.

    Args:
      size: of the grid, one or two axes.
      scales: J; the low-pass has deviation 0.8 x 2^{J-1}.
      orientations: number of angles; ignored in one dimension.

    Returns:
      The bank; band filters in the order of scales, then angles.

    Raises:
      ValueError: on a grid of more than two axes, or a number below one.
    """
    _check_grid(size)
    if min(scales, orientations) < 1:
        raise ValueError(f"scales={scales} and orientations={orientations} must be at least 1; set them")
    flat = len(size) == 2
    angles = [(max(orientations // 2 - 1, 0) - k) * np.pi / orientations for k in range(orientations)]
    slant = 4 / orientations if flat else 1.0
    band = [
        _morlet(size, 0.8 * 2**j, 0.75 * np.pi / 2**j, angle, slant)
        for j in range(scales)
        for angle in (angles if flat else [0.0])
    ]
    return FilterBank(np.stack(band), np.real(np.fft.fftn(_wave(size, 0.8 * 2 ** (scales - 1), 0.0, 0.0, 1.0))))


def _morlet(size: tuple[int, ...], deviation: float, frequency: float, angle: float, slant: float) -> np.ndarray:
    wave = np.fft.fftn(_wave(size, deviation, frequency, angle, slant))
    envelope = np.fft.fftn(_wave(size, deviation, 0.0, angle, slant))
    # Both are even in space up to conjugation, so that their transforms are real.
    return np.real(wave - wave.flat[0] / envelope.flat[0] * envelope)


def _wave(size: tuple[int, ...], deviation: float, frequency: float, angle: float, slant: float) -> np.ndarray:
    """Return a plane wave under a Gaussian of unit mean, summed over five periods of the grid."""
    periods = 5
    grids = np.meshgrid(*(np.arange(n * periods) - periods // 2 * n for n in size), indexing="ij")
    along = grids[0] * math.cos(angle) + (grids[1] * math.sin(angle) if len(size) == 2 else 0)
    across = grids[1] * math.cos(angle) - grids[0] * math.sin(angle) if len(size) == 2 else 0.0 * along
    value = np.exp(-(along**2 + (slant * across) ** 2) / (2 * deviation**2) + 1j * frequency * along)
    value = value * slant / (math.sqrt(2 * np.pi) * deviation) ** len(size)
    folded = value.reshape([part for n in size for part in (periods, n)])
    return folded.sum(axis=tuple(range(0, 2 * len(size), 2)))


def gabor_bank(size: tuple[int, ...], *, channels: int = 4) -> FilterBank:
    """Return a Weyl-Heisenberg bank: one Gaussian window, shifted to `channels` frequencies along every axis.

    g_k(w) = g(w - 2 pi k / channels) with k in {0, ..., channels - 1}^d; k = 0 is the low-pass. The window has half its
    height half-way to the neighbours, and the whole plane of frequencies is covered: a frame for complex signals too.

    Args:
      size: of the grid, one or two axes.
      channels: frequencies along every axis, at least 2.

    Returns:
      The bank, of channels^d - 1 band filters.

    Raises:
      ValueError: on a grid of more than two axes, or fewer than two channels.
    """
    _check_grid(size)
    if channels < 2:
        raise ValueError(f"channels={channels} must be at least 2; set channels")

    def window(n: int, k: int) -> np.ndarray:
        distance = (np.arange(n) / n - k / channels + 0.5) % 1 - 0.5
        return np.exp2(-((2 * channels * distance) ** 2))

    filters = [[window(n, k) for k in range(channels)] for n in size]
    if len(size) == 1:
        every = np.stack(filters[0])
    else:
        every = np.stack([a[:, None] * b[None, :] for a in filters[0] for b in filters[1]])
    return FilterBank(every[1:], every[0])


def spatial_bank(size: tuple[int, ...], *, filters: np.ndarray, low_pass: np.ndarray) -> FilterBank:
    """Return a bank of filters given in space, such as learned ones: zero-padded, with their middle at the origin.

    Args:
      size: of the grid.
      filters: `[filters, *support]`, real or complex.
      low_pass: `[*support]`.

    Returns:
      The bank.

    Raises:
      ValueError: if a support does not fit the grid.
    """
    _check_grid(size)

    def response(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        if x.ndim != len(size) or any(part > whole for part, whole in zip(x.shape, size, strict=True)):
            raise ValueError(f"a filter of support {x.shape} must fit a grid of size {size}; pass smaller filters")
        padded = np.pad(x, [(0, whole - part) for part, whole in zip(x.shape, size, strict=True)])
        return np.fft.fftn(np.roll(padded, [-((part - 1) // 2) for part in x.shape], axis=tuple(range(x.ndim))))

    return FilterBank(np.stack([response(x) for x in filters]), response(low_pass))


def tight_bank(size: tuple[int, ...], *, bank: BankFactory = gabor_bank, real: bool = False) -> FilterBank:
    """Return the bank divided at every frequency by the root of its Littlewood-Paley sum: a frame with A = B = 1.

    Args:
      size: of the grid.
      bank: makes the bank.
      real: A = B = 1 for real signals only, for banks such as Morlet's.

    Returns:
      The canonical tight frame of the bank.

    Raises:
      ValueError: if the bank is no frame: some frequency passes no filter.
    """
    made = bank(size)
    total = made.littlewood_paley(real=real)
    if total.min() < 1e-12 * total.max():
        raise ValueError(
            f"the bank must be a frame, but its Littlewood-Paley sum falls to {total.min():.1e} on a grid of size "
            f"{size}; add filters, or set real=True for analytic ones"
        )
    root = np.sqrt(total)
    return FilterBank(made.band / root, made.low_pass / root)


def delta_bank(size: tuple[int, ...]) -> FilterBank:
    """Return a bank without band filters whose low-pass hands everything on: as the last one, it keeps all energy."""
    return FilterBank(np.zeros((0, *size)), np.ones(size))


def _check_grid(size: Sequence[int]) -> None:
    if len(size) not in (1, 2) or min(size) < 1:
        raise ValueError(f"a grid of size {tuple(size)} must have one or two axes, not empty; reshape the signal")


# The general network -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Nonlinearity:
    """A pointwise nonlinearity that maps zero to zero.

    Attributes:
      function: of a real or complex array.
      lipschitz: L: |function(a) - function(b)| <= L |a - b|.
      real: whether its values are real whatever the input.
    """

    function: Callable[[jax.Array], jax.Array]
    lipschitz: float
    real: bool = False


def modulus(x: jax.Array) -> jax.Array:
    """Return |x|, with gradient zero where x is zero; NaN stays NaN."""
    squared = jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else x**2
    vanishes = squared == 0
    return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, squared)))


def _componentwise(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    def apply(x: jax.Array) -> jax.Array:
        return jax.lax.complex(function(jnp.real(x)), function(jnp.imag(x))) if jnp.iscomplexobj(x) else function(x)

    return apply


NONLINEARITIES: dict[str, Nonlinearity] = {
    "modulus": Nonlinearity(modulus, 1.0, real=True),
    "relu": Nonlinearity(_componentwise(jax.nn.relu), 1.0),
    "tanh": Nonlinearity(_componentwise(jnp.tanh), 1.0),
    "logistic": Nonlinearity(_componentwise(lambda x: jax.nn.sigmoid(x) - 0.5), 0.25),
}

POOLINGS = ("subsample", "average", "max")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One layer of a deep scattering network.

    Attributes:
      bank: makes the frame for a grid: its band filters lead on, its low-pass gives the output of what comes in.
      nonlinearity: a name of `NONLINEARITIES` (on real and imaginary part, except the modulus) or a `Nonlinearity`.
      pooling: `"subsample"`, `"average"` or `"max"` (of the modulus), over blocks of `factor` pixels in each direction.
      factor: S, which must divide the grid; 1 pools nothing.
    """

    bank: BankFactory = gabor_bank
    nonlinearity: str | Nonlinearity = "modulus"
    pooling: str = "subsample"
    factor: int = 1

    def rule(self) -> Nonlinearity:
        """Return the nonlinearity."""
        if isinstance(self.nonlinearity, Nonlinearity):
            return self.nonlinearity
        if self.nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity={self.nonlinearity!r} is unknown; use one of {sorted(NONLINEARITIES)}")
        return NONLINEARITIES[self.nonlinearity]

    def pooling_lipschitz(self, rank: int) -> float:
        """Return R, the Lipschitz constant of the pooling in the sum of squares."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is unknown; use one of {POOLINGS}")
        return self.factor ** (-rank / 2) if self.pooling == "average" else 1.0


@dataclasses.dataclass(frozen=True)
class Admissibility:
    """What a stage does to distances at most.

    Attributes:
      lower: frame bound A.
      upper: frame bound B.
      lipschitz: L of the nonlinearity.
      pooling: R of the pooling.
    """

    lower: float
    upper: float
    lipschitz: float
    pooling: float

    @property
    def constant(self) -> float:
        """max{B, B R^2 L^2}: the network does not expand distances if it is at most 1 in every stage."""
        return max(self.upper, self.upper * self.pooling**2 * self.lipschitz**2)


def admissibility(size: tuple[int, ...], stages: Sequence[Stage]) -> tuple[Admissibility, ...]:
    """Return the constants of every stage for real signals on a grid.

    Example:
      >>> import functools
      >>> found = admissibility((16,), (Stage(functools.partial(tight_bank, bank=gabor_bank)),))
      >>> round(found[0].constant, 6)
      1.0
    """
    return tuple(found for found, _ in _prepare(size, stages))


def _prepare(size: tuple[int, ...], stages: Sequence[Stage]) -> list[tuple[Admissibility, FilterBank]]:
    """Return the constants and the bank of every stage, each on the grid that reaches it."""
    prepared, real = [], True
    for index, stage in enumerate(stages):
        if stage.factor < 1 or any(n % stage.factor for n in size):
            raise ValueError(
                f"factor={stage.factor} of stage {index} must divide its grid {size}; set factor or pad the signal"
            )
        bank, rule = stage.bank(size), stage.rule()
        lower, upper = bank.bounds(real=real)
        prepared.append((Admissibility(lower, upper, rule.lipschitz, stage.pooling_lipschitz(len(size))), bank))
        real = rule.real or stage.pooling == "max" or (real and np.isrealobj(bank.band) and _symmetric(bank.band))
        size = tuple(n // stage.factor for n in size)
    return prepared


def _symmetric(band: np.ndarray) -> bool:
    """Return whether real responses are even, so that the filters are real in space."""
    grid = tuple(range(1, band.ndim))
    return bool(np.allclose(band, np.roll(np.flip(band, grid), 1, grid), atol=1e-12))


def scatter(
    signal: Float[Array, "*batch channels length"] | Float[Array, "*batch channels height width"],
    stages: Sequence[Stage],
    *,
    rank: int = 2,
    last: BankFactory | None = None,
    condition: str = "normalize",
) -> tuple[Array, ...]:
    """Return the features Phi^0, ..., Phi^N of a signal on a periodic grid.

    U_0 = f; U_n = {P_n(rho_n(u * g_lambda))} over all paths u of U_{n-1} and all band filters g_lambda of stage n;
    Phi^n = {u * chi_{n+1}} over u in U_n, with chi_{n+1} the low-pass of stage n + 1.

    Args:
      signal: real, channels before the grid.
      stages: N of them.
      rank: axes of the grid, 1 or 2.
      last: makes the low-pass of the last features; `None` takes that of the last stage.
      condition: `"normalize"`: divide each bank by the root of its constant max{B, B R^2 L^2} where that is over 1;
        `"check"`: refuse such stages; `"ignore"`: take them.

    Returns:
      N + 1 arrays `[*batch, channels, paths, *grid]`, real or complex, in float32 or better.

    Raises:
      ValueError: on a factor that does not divide its grid, an unknown name, or an inadmissible stage to be checked.
    """
    if condition not in ("normalize", "check", "ignore"):
        raise ValueError(f"condition={condition!r} is unknown; use 'normalize', 'check' or 'ignore'")
    if not stages:
        raise ValueError(f"stages={tuple(stages)!r} must not be empty; pass at least one Stage")
    if signal.ndim < rank + 1:
        raise ValueError(f"a signal of shape {signal.shape} must have channels and {rank} axes of space; add axes")
    dtype = at_least_float32(compute_dtype(signal))
    # The last low-pass is that of one more stage, whose band leads nowhere.
    made = [*stages, Stage(last or stages[-1].bank, "modulus")]
    grid = tuple(signal.shape[signal.ndim - rank :])
    spaces = tuple(range(-rank, 0))
    paths = signal.astype(dtype)[(..., None, *(slice(None),) * rank)]
    features = []
    for index, (stage, (found, bank)) in enumerate(zip(made, _prepare(grid, made), strict=True)):
        constant = found.upper if index == len(stages) else found.constant
        if index == len(stages) and not bank.band.size:
            constant = float(np.max(np.abs(bank.low_pass)) ** 2)
        if condition == "check" and constant > 1 + 1e-6:
            raise ValueError(
                f"stage {index} must satisfy max(B, B R^2 L^2) <= 1, but its constant is {constant:.4g} "
                f"(B={found.upper:.4g}, R={found.pooling:.4g}, L={found.lipschitz:.4g}); set condition='normalize' or "
                "scale its bank"
            )
        if constant > 1 and condition == "normalize":
            bank = bank.scaled(constant**-0.5)
        spectrum = jnp.fft.fftn(paths, axes=spaces)
        features.append(_inverse(spectrum * _constant(bank.low_pass, dtype), bank.low_pass, paths, rank))
        if index == len(stages):
            break
        every = spectrum[(..., None, *(slice(None),) * rank)] * _constant(bank.band, dtype)
        every = _inverse(every, bank.band, paths, rank)
        every = every.reshape(*every.shape[: -rank - 2], -1, *every.shape[-rank:])
        paths = _pool(stage.rule().function(every), stage, rank)
    return tuple(features)


def _constant(response: np.ndarray, dtype: Dtype) -> jax.Array:
    if np.iscomplexobj(response):
        return jnp.asarray(response, jnp.promote_types(dtype, jnp.complex64))
    return jnp.asarray(response, dtype)


def _inverse(spectrum: jax.Array, response: np.ndarray, before: jax.Array, rank: int) -> jax.Array:
    """Return the inverse transform; real where a real signal met filters that are real in space."""
    found = jnp.fft.ifftn(spectrum, axes=tuple(range(-rank, 0)))
    grid = tuple(range(response.ndim - rank, response.ndim))
    mirrored = np.roll(np.flip(response, grid), 1, grid)
    hermitian = np.allclose(
        response, np.conj(mirrored), atol=1e-12 * max(1.0, float(np.max(np.abs(response), initial=0)))
    )
    return jnp.real(found) if hermitian and not jnp.iscomplexobj(before) else found


def _pool(x: jax.Array, stage: Stage, rank: int) -> jax.Array:
    s = stage.factor
    if stage.pooling == "subsample":
        return x[(..., *(slice(None, None, s),) * rank)]
    lead, grid = x.shape[: x.ndim - rank], x.shape[x.ndim - rank :]
    blocks = x.reshape(*lead, *(part for n in grid for part in (n // s, s)))
    inner = tuple(range(x.ndim - rank + 1, x.ndim + rank, 2))
    return jnp.mean(blocks, axis=inner) if stage.pooling == "average" else jnp.max(modulus(blocks), axis=inner)


class DeepScattering(nn.Module):
    """Extract features by fixed filters, nonlinearities and pooling, layer over layer, without expanding distances.

    U_0 = f; U_n = {P_n(rho_n(u * g_lambda)) : u in U_{n-1}, lambda}; out_n = {u * chi_{n+1} : u in U_n}, n = 0 ... N,
    with circular convolutions, the frame {chi_n} and {g_lambda} of stage n, a pointwise nonlinearity rho_n of Lipschitz
    constant L_n and a pooling P_n by the factor S_n of Lipschitz constant R_n. Where max{B_n, B_n R_n^2 L_n^2} <= 1 for
    the upper frame bounds B_n, which `condition="normalize"` sees to, |out(f) - out(h)| <= |f - h| in the root of the
    sum of all squares. No parameters.

    Symmetry:
      Cyclic shifts by whole pixels: exact if no stage subsamples; else shifts by multiples of S_1 ... S_N, which move
      out_n by the shift over S_1 ... S_n. In return features matter the less to shifts the deeper they lie: of 256
      samples of noise, shifted by 8, the features of depths 1, 2 and 3 changed by 0.28, 0.15 and 0.07 of their norm,
      with tight Gabor frames of 8 channels, modulus and S = 2, and by 0.54 at every depth with S = 1.

    Attributes:
      stages: `Stage` for each of the N layers.
      last: makes the bank whose low-pass gives the deepest features; `None` takes that of the last stage,
        `delta_bank` keeps everything.
      rank: axes of the grid: 1 for `[*batch, length, channels]`, 2 for images.
      condition: `"normalize"`, `"check"` or `"ignore"`, see `scatter`.
      dtype: dtype of the output; `None` keeps that of the input. Convolutions are in float32 or better.

    Cost:
      Fourier transforms of all paths; the number of paths is the product of those of filters of all stages.

    Example:
      >>> import functools, jax.numpy as jnp
      >>> from jaxlayers.equivariant.scattering import DeepScattering, Stage, gabor_bank
      >>> layer = DeepScattering((Stage(gabor_bank, "relu", "max", 2),) * 2, rank=1)
      >>> [x.shape for x in layer.apply({}, jnp.ones((5, 32, 1)))]
      [(5, 32, 1), (5, 16, 3), (5, 8, 9)]

    Source:
      Wiatowski and Bölcskei, A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction, IEEE
      Transactions on Information Theory 2018, definitions 1 to 4 and theorems 1 and 2; on grids Wiatowski, Tschannen,
      Stanić, Grohs and Bölcskei, Discrete Deep Feature Extraction, ICML 2016.

    Differs:
      Discrete and periodic signals, and poolings without the factor S^(d/2), as in the ICML paper. Of ReLU and tanh on
      complex signals L is 1, and of the logistic function 1/4: the papers' 2 and 1 are bounds, these are attained.
      Frame bounds are those for real signals where signals are real. Where features are complex, their real and
      imaginary parts are concatenated.
    """

    stages: Sequence[Stage] = (Stage(),)
    last: BankFactory | None = None
    rank: int = 2
    condition: str = "normalize"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, inputs: Float[Array, "*dims channels"]) -> tuple[Float[Array, "..."], ...]:
        """Compute the features of every depth.

        Args:
          inputs: real, `[*batch, length, channels]` or `[*batch, height, width, channels]`, read as periodic. Zeros
            give zeros, with zero gradient; one NaN makes all features of its channel NaN.

        Returns:
          N + 1 maps `[*batch, *grid, channels x paths]`, those of depth n on a grid smaller by S_1 ... S_n.

        Raises:
          ValueError: see `scatter`; or if `rank` is not 1 or 2.
        """
        if self.rank not in (1, 2):
            raise ValueError(f"rank={self.rank} must be 1 or 2; set rank")
        if inputs.ndim < self.rank + 1:
            raise ValueError(
                f"inputs of shape {inputs.shape} must be [*batch, {'length' if self.rank == 1 else 'height, width'}, "
                "channels]; add axes or set rank"
            )
        dtype = compute_dtype(inputs, dtype=self.dtype)
        found = scatter(
            jnp.moveaxis(inputs, -1, -1 - self.rank),
            self.stages,
            rank=self.rank,
            last=self.last,
            condition=self.condition,
        )
        return tuple(self._map(x, dtype) for x in found)

    def _map(self, x: jax.Array, dtype: Dtype) -> jax.Array:
        """Bring `[*batch, channels, paths, *grid]` to channels last."""
        if jnp.iscomplexobj(x):
            x = jnp.concatenate([jnp.real(x), jnp.imag(x)], axis=-1 - self.rank)
        x = x.reshape(*x.shape[: -2 - self.rank], -1, *x.shape[x.ndim - self.rank :])
        return axes.constrain_map(jnp.moveaxis(x, -1 - self.rank, -1).astype(dtype), self.rank)


# Morlet scattering ---------------------------------------------------------------------------------------------------


def morlet_scattering(
    image: Float[Array, "*batch height width channels"],
    *,
    scales: int = 2,
    orientations: int = 8,
    order: int = 2,
    padding: str = "wrap",
    normalize: bool = False,
    bank: BankFactory | None = None,
) -> Float[Array, "*batch rows columns channels paths"]:
    """Return the windowed scattering coefficients of Mallat, up to the second order.

    S_0 = f * phi_J; S_1 = |f * psi_{j,a}| * phi_J; S_2 = ||f * psi_{j,a}| * psi_{k,b}| * phi_J for k > j only, where
    the energy is; each kept at every 2^J-th pixel, and inner ones at every 2^j-th.

    Args:
      image: real.
      scales: J.
      orientations: L.
      order: 0, 1 or 2.
      padding: `"wrap"`, for which 2^J must divide height and width, or `"reflect"`.
      normalize: divide the filters by the root of their upper frame bound, if that is over 1.
      bank: makes J x L band filters of real response for a grid, in the order of `morlet_bank`, the default.

    Returns:
      The coefficients; 1 + J L + L^2 J (J - 1) / 2 paths, ordered by (j, a), then (k, b), as other codes have them.

    Raises:
      ValueError: on sizes that do not fit, or an unknown name or order.
    """
    if image.ndim < 3:
        raise ValueError(f"an image of shape {image.shape} must be [*batch, height, width, channels]; add axes")
    if order not in (0, 1, 2) or min(scales, orientations) < 1:
        raise ValueError(
            f"order={order} must be 0, 1 or 2, and scales={scales} and orientations={orientations} at least 1; set them"
        )
    stride = 2**scales
    dtype = at_least_float32(compute_dtype(image))
    x = jnp.moveaxis(image, -1, -3).astype(dtype)
    x = _padded(x, stride, padding)
    grid = tuple(x.shape[-2:])
    made = bank(grid) if bank else morlet_bank(grid, scales=scales, orientations=orientations)
    if made.band.shape != (scales * orientations, *grid) or np.iscomplexobj(made.band):
        raise ValueError(
            f"the bank must have {scales} x {orientations} band filters with real responses on {grid}; got "
            f"{made.band.dtype} {made.band.shape}; set scales and orientations to fit it"
        )
    if normalize:
        made = made.scaled(max(1.0, made.bounds(real=True)[1]) ** -0.5)
    band = made.band.reshape(scales, orientations, *grid)

    def transform(x: jax.Array) -> jax.Array:
        return jnp.fft.fft2(x)

    def averaged(spectrum: jax.Array, level: int) -> jax.Array:
        low = spectrum * jnp.asarray(_at_level(made.low_pass, level), dtype)
        return jnp.real(jnp.fft.ifft2(_subsampled(low, 2 ** (scales - level))))

    def wavelet(spectrum: jax.Array, j: int, level: int) -> jax.Array:
        """Return |u * psi_{j,a}| for all a, as an axis before the grid, at every 2^j-th pixel."""
        high = spectrum[..., None, :, :] * jnp.asarray(_at_level(band[j], level), dtype)
        return modulus(jnp.fft.ifft2(_subsampled(high, 2 ** (j - level))))

    spectrum = transform(x)
    zeroth = averaged(spectrum, 0)[..., None, :, :]
    first, second = [], []
    for j in range(scales if order else 0):
        inner = transform(wavelet(spectrum, j, 0))
        first.append(averaged(inner, j))
        deeper = [averaged(transform(wavelet(inner, k, j)), k) for k in range(j + 1, scales if order == 2 else 0)]
        if deeper:
            paths = jnp.concatenate(deeper, axis=-3)
            second.append(paths.reshape(*paths.shape[:-4], -1, *paths.shape[-2:]))
    out = jnp.concatenate([zeroth, *first, *second], axis=-3)
    if padding == "reflect":
        out = out[..., 1:-1, 1:-1]
    return jnp.moveaxis(out, (-4, -3), (-2, -1)).astype(compute_dtype(image))


def _padded(x: jax.Array, stride: int, padding: str) -> jax.Array:
    height, width = x.shape[-2:]
    if padding == "wrap":
        if min(height, width) < 1 or height % stride or width % stride:
            raise ValueError(
                f"an image of {height} x {width} pixels must be a multiple of 2^scales={stride} to wrap around; pad "
                "it, or set scales or padding='reflect'"
            )
        return x
    if padding != "reflect":
        raise ValueError(f"padding={padding!r} is unknown; use 'wrap' or 'reflect'")
    # At least one coefficient on each side is made of the border alone; it is dropped.
    extra = [((size + stride) // stride + 1) * stride - size for size in (height, width)]
    if any((more + 1) // 2 >= size for more, size in zip(extra, (height, width), strict=True)):
        raise ValueError(
            f"an image of {height} x {width} pixels is too small to reflect for 2^scales={stride}; set scales"
        )
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(more // 2, (more + 1) // 2) for more in extra], mode="reflect")


def _at_level(response: np.ndarray, level: int) -> np.ndarray:
    """Return the low frequencies of a response: what is left of the filter on a grid that is 2^level times coarser."""
    for axis in (-2, -1):
        kept = response.shape[axis] // 2**level
        index = np.r_[: (kept + 1) // 2, response.shape[axis] - kept // 2 : response.shape[axis]]
        response = np.take(response, index, axis=axis)
    return response


def _subsampled(spectrum: jax.Array, factor: int) -> jax.Array:
    """Return the spectrum of a signal kept at every `factor`-th pixel: the mean of the frequencies that fold."""
    *lead, height, width = spectrum.shape
    folded = spectrum.reshape(*lead, factor, height // factor, factor, width // factor)
    return jnp.mean(folded, axis=(-4, -2))


class MorletScattering(nn.Module):
    """Describe image patches by the moduli of wavelet coefficients of wavelet coefficients: Mallat's scattering.

    S_0 = f * phi_J, S_1 = |f * psi_{j,a}| * phi_J, S_2 = ||f * psi_{j,a}| * psi_{k,b}| * phi_J for k > j, at every
    2^J-th pixel, with Morlet wavelets psi of scales 2^j and L angles, and a Gaussian phi_J. No parameters.

    Symmetry:
      With `padding="wrap"`, cyclic shifts by multiples of 2^J: exact, they move the output by the shift over 2^J.
      Smaller shifts change it little, since phi_J has smoothed it: of 32 x 32 pixels of noise, shifted by one,
      S_1 and S_2 changed by 0.21, 0.09, 0.04 and 0.01 of their norm for J = 1, 2, 3 and 4.
      Where it breaks: with `padding="reflect"`, at the border.

    Attributes:
      scales: J; the output has 2^J times fewer pixels in each direction.
      orientations: L.
      order: 0, 1 or 2.
      padding: `"wrap"`, for which 2^J must divide height and width, or `"reflect"`.
      normalize: divide the filters so that distances are not expanded; without it, they are those of other codes,
        whose upper frame bound is 1.011 for J = 3, L = 8 and 32 x 32 pixels.
      dtype: dtype of the output; `None` keeps that of the input. Convolutions are in float32 or better.

    Cost:
      1 + J L + L^2 J (J - 1) / 2 maps for each channel, by Fourier transforms.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import MorletScattering
      >>> image = jax.random.normal(jax.random.key(0), (1, 16, 16, 1))
      >>> layer = MorletScattering(scales=2, orientations=4)
      >>> out, moved = layer.apply({}, image), layer.apply({}, jnp.roll(image, 4, axis=1))
      >>> out.shape, bool(jnp.allclose(jnp.roll(out, 1, axis=1), moved, atol=1e-5))
      ((1, 4, 4, 25), True)

    Source:
      Mallat, Group Invariant Scattering, 2012; Bruna and Mallat, Invariant Scattering Convolution Networks, IEEE TPAMI
      2013, whose filters these are; compared with kymatio 0.3.0.

    Differs:
      Periodic images by default; `normalize` is an addition.
    """

    scales: int = 2
    orientations: int = 8
    order: int = 2
    padding: str = "wrap"
    normalize: bool = False
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns features"]:
        """Compute the coefficients.

        Args:
          inputs: real images. A constant gives itself in S_0 and zeros else, with zero gradient through the moduli; one
            NaN makes all coefficients of its channel NaN.

        Returns:
          A map of channels x paths features.

        Raises:
          ValueError: see `morlet_scattering`.
        """
        out = morlet_scattering(
            inputs,
            scales=self.scales,
            orientations=self.orientations,
            order=self.order,
            padding=self.padding,
            normalize=self.normalize,
        )
        out = out.reshape(*out.shape[:-2], -1).astype(compute_dtype(inputs, dtype=self.dtype))
        return axes.constrain_map(out)


class ScatteringNet(nn.Module):
    """Classify signals by a dense head on scattering features.

    logits = W_head act(W_i ... norm(pool(features(x)))): everything before the head is fixed, so few labels do.

    Symmetry:
      With `pooling="mean"`, invariant to the cyclic shifts that the features are equivariant to, exactly: all of them
      for a `DeepScattering` without pooling, multiples of 2^J for a `MorletScattering`. With `"flatten"`, none.

    Attributes:
      features: module from inputs to a map, or to maps of several depths.
      num_classes: number of logits; 0 gives the features before the head.
      pooling: `"mean"` over the grid, or `"flatten"`, which keeps where things are.
      rank: axes of the grid of the maps.
      hidden_features: widths of the dense layers between; may be empty.
      activation_fn: the nonlinearity after each of them.
      norm: makes the normalisation of the features, or `None` for none.
      dropout_rate: dropout before the head, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      That of the features, and a dense layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import MorletScattering, ScatteringNet
      >>> model = ScatteringNet(MorletScattering(scales=2), num_classes=10)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 16, 16, 1)))[0].shape
      (2, 10)

    Source:
      Bruna and Mallat, Invariant Scattering Convolution Networks, IEEE TPAMI 2013, section 5; Wiatowski et al., ICML
      2016, section 6.

    Differs:
      A linear head trained with the rest of the library in place of a support vector machine; layer normalisation.
    """

    features: nn.Module = MorletScattering()
    num_classes: int = 10
    pooling: str = "mean"
    rank: int = 2
    hidden_features: Sequence[int] = ()
    activation_fn: ActivationFn = nn.relu
    norm: ModuleFactory | None = nn.LayerNorm
    dropout_rate: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*dims channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch outputs"]:
        """Classify signals.

        Args:
          inputs: what the features take.
          deterministic: no dropout.

        Returns:
          Logits, or features if `num_classes` is 0.

        Raises:
          ValueError: on an unknown pooling, a negative width, or inputs that do not fit the features.
        """
        if self.pooling not in ("mean", "flatten"):
            raise ValueError(f"pooling={self.pooling!r} is unknown; use 'mean' or 'flatten'")
        if self.num_classes < 0 or min(self.hidden_features, default=1) < 1:
            raise ValueError(
                f"num_classes={self.num_classes} must not be negative and hidden_features="
                f"{tuple(self.hidden_features)} must be positive; set them"
            )
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, bias_init=self.bias_init, **common)
        space = tuple(range(-1 - self.rank, -1))

        def pooled(x: jax.Array) -> jax.Array:
            return jnp.mean(x, axis=space) if self.pooling == "mean" else x.reshape(*x.shape[: space[0]], -1)

        x = jnp.concatenate([pooled(x) for x in jax.tree.leaves(self.features(inputs))], axis=-1)
        if self.norm is not None:
            x = self.norm(name="features_norm", **common)(x)
        for index, width in enumerate(self.hidden_features):
            x = self.activation_fn(dense(width, name=f"hidden_{index}")(x))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = dense(self.num_classes, name="head")(x) if self.num_classes else x
        return axes.constrain_last(x, axes.BATCH, axes.FEATURES)


def morlet_net(
    num_classes: int = 10,
    scales: int = 2,
    orientations: int = 8,
    order: int = 2,
    pooling: str = "flatten",
    padding: str = "wrap",
    dtype: Dtype | None = None,
) -> ScatteringNet:
    """Return a linear classifier on Morlet scattering.

    Args:
      num_classes: number of logits.
      scales: J.
      orientations: L.
      order: of the scattering.
      pooling: see `ScatteringNet`.
      padding: see `MorletScattering`.
      dtype: compute dtype of the head.

    Returns:
      An unbound module.
    """
    features = MorletScattering(scales, orientations, order, padding)
    return ScatteringNet(features, num_classes, pooling, dtype=dtype)


VARIANTS: dict[str, dict[str, Any]] = {
    "scattering_net_28": {
        "module": morlet_net,
        "inputs": (jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32),),
        "scales": 2,
    },
    "scattering_net_32": {
        "module": morlet_net,
        "inputs": (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),),
        "scales": 3,
    },
}
