"""SimMIM: pretraining a window transformer by letting it predict the pixels of hidden patches."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlayers.core import dialects
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.types import Dtype, Initializer, PRNGKey
from jaxlayers.ops.patches import crop, from_patches
from jaxlayers.window import swin, swin_v2
from jaxlayers.window.swin import Swin
from jaxlayers.window.swin_v2 import SwinV2


class SimMIM(nn.Module):
    """Reconstruct the pixels of an image of which some patches are hidden.

    out = shuffle(norm(encoder(hide(embed(x)))) W + b). `hide` puts one learned token in the place of each hidden
    patch's embedding; the encoder's last map, of stride (s, s), is normed and mapped by W `[C, s s channels]` to the
    pixels under each of its entries, which `shuffle` lays out as an image. There is no other decoder. The loss is
    `masked_l1`, over hidden pixels only.

    Symmetry:
      None. The output is exactly independent of the pixels under hidden patches.

    Attributes:
      encoder: the backbone, with `num_classes=0`. Its parameters lie under `encoder/`, as a classifier names them.
      dtype: compute dtype of the decoder; `None` infers it from input and parameters. The encoder has its own.
      param_dtype: dtype of the decoder's parameters and of the token.
      kernel_init: initialiser of W; the token starts as a truncated normal of 0.02.
      bias_init: initialiser of b.

    Collections:
      Those of the encoder.

    Cost:
      That of the encoder, and C s s channels multiply-accumulates an entry of the last map. Swin-B at 192 x 192 with
      window 6: 11.4 G, of which 0.1 G are the decoder's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import SimMIM, Swin
      >>> model = SimMIM(Swin(num_classes=0, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4))
      >>> image, masked = jnp.ones((1, 32, 48, 3)), jnp.zeros((1, 8, 12), bool)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), image, masked)[0].shape
      (1, 32, 48, 3)

    Source:
      Xie et al., SimMIM: a Simple Framework for Masked Image Modeling, CVPR 2022, section 3 and appendix A;
      github.com/microsoft/Swin-Transformer, models/simmim.py.

    Differs:
      Any image size: what the last map has in excess is cropped. A pixel's channels lie next to one another in the
      columns of W (`from_reference` reorders them). The targets are pixels as given; the local normalisation of targets
      that the reference has for Swin V2 is left out.
    """

    encoder: Swin | SwinV2
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        masked: Bool[Array, "*batch rows columns"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*batch height width channels"]:
        """Reconstruct.

        Args:
          x: images, channels last, scaled as they are to be predicted.
          masked: true where a patch of the encoder is hidden, `ceil(size / patch_size)` along each axis, as
            `random_mask` makes it; `None` hides nothing.
          deterministic: no dropout, no dropped branches.

        Returns:
          Images like `x`.

        Raises:
          ValueError: if the encoder has a head, or `masked` is not a boolean for each patch.
        """
        if self.encoder.num_classes:
            raise ValueError(f"encoder.num_classes={self.encoder.num_classes} must be 0; set the encoder's num_classes")
        token = self.param("mask_token", truncated_normal(), (self.encoder.embed_dim,), self.param_dtype)

        def hide(tokens: Array) -> Array:
            if masked is None:
                return tokens
            if masked.dtype != bool or masked.shape != tokens.shape[:-1]:
                raise ValueError(
                    f"masked must be a boolean for each patch, of shape {tokens.shape[:-1]}; it is {masked.dtype} of "
                    f"shape {masked.shape}; make it with random_mask and the encoder's patch_size"
                )
            return jnp.where(masked[..., None], token.astype(tokens.dtype), tokens)

        last = self.encoder.features(x, replace_tokens=hide, deterministic=deterministic)[-1]
        pixels = nn.Dense(
            math.prod(last.stride) * x.shape[-1],
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="decoder",
        )(self.encoder.final_norm(last.array))
        return crop(from_patches(pixels, last.stride), x.shape[-3:-1])


def random_mask(
    rng: PRNGKey,
    batch: Sequence[int],
    size: tuple[int, int],
    *,
    patch_size: int = 4,
    mask_patch_size: int = 32,
    mask_ratio: float = 0.6,
) -> Bool[Array, "*batch rows columns"]:
    """Return masks that hide `ceil(mask_ratio units)` randomly chosen units of `mask_patch_size` pixels squared.

    Args:
      rng: the key.
      batch: leading axes; every entry gets a mask of its own.
      size: height and width of the images in pixels.
      patch_size: pixels of the encoder's patches along each axis.
      mask_patch_size: pixels of a unit along each axis.
      mask_ratio: share of the units that is hidden, in (0, 1].

    Returns:
      A boolean for each patch, true where it is hidden: `[*batch, height / patch_size, width / patch_size]`.

    Raises:
      ValueError: if a unit does not hold whole patches or the image whole units, or the ratio is outside (0, 1].

    Example:
      >>> import jax
      >>> from jaxlayers.window.simmim import random_mask
      >>> mask = random_mask(jax.random.key(0), (2,), (192, 192))
      >>> mask.shape, mask.sum(axis=(1, 2)).tolist()  # ceil(0.6 x 36) = 22 units of 64 patches
      ((2, 48, 48), [1408, 1408])
    """
    if mask_patch_size < 1 or patch_size < 1 or mask_patch_size % patch_size:
        raise ValueError(
            f"mask_patch_size={mask_patch_size} must be a multiple of patch_size={patch_size}; set mask_patch_size"
        )
    if any(length % mask_patch_size or not length for length in size):
        raise ValueError(
            f"size={tuple(size)} must be multiples of mask_patch_size={mask_patch_size}; crop the images, or set "
            "mask_patch_size"
        )
    if not 0 < mask_ratio <= 1:
        raise ValueError(f"mask_ratio={mask_ratio} must lie in (0, 1]; set mask_ratio")
    rows, columns = (length // mask_patch_size for length in size)
    # Rounded first: 0.28 of 25 units are 7.000000000000001 in binary, and still not eight.
    hidden = math.ceil(round(mask_ratio * rows * columns, 6))
    order = jnp.argsort(jax.random.uniform(rng, (*batch, rows * columns)), axis=-1)
    mask = (jnp.argsort(order, axis=-1) < hidden).reshape(*batch, rows, columns)
    scale = mask_patch_size // patch_size
    return jnp.repeat(jnp.repeat(mask, scale, axis=-2), scale, axis=-1)


def masked_l1(
    x: Float[Array, "*batch height width channels"],
    reconstruction: Float[Array, "*batch height width channels"],
    masked: Bool[Array, "*batch rows columns"],
    *,
    patch_size: int | tuple[int, ...] = 4,
) -> Float[Array, "*batch"]:
    """Return the mean absolute error over the hidden pixels of each image, in float32 or better; 0 if none is hidden.

    The reference divides the sum over a batch by its number of hidden pixels; with equally many in each image, as
    `random_mask` hides, that is the mean of these.

    Args:
      x: the images.
      reconstruction: what the model made of them.
      masked: the masks it was given.
      patch_size: pixels of a patch along each axis.

    Returns:
      One number an image.

    Raises:
      ValueError: if mask and patch do not cover the image.
    """
    patch, size = _pair(patch_size), x.shape[-3:-1]
    if masked.shape[-2:] != tuple(-(-length // step) for length, step in zip(size, patch, strict=True)):
        raise ValueError(f"masked of shape {masked.shape} must have a patch_size={patch} for each of {size}; set them")
    hidden = jnp.repeat(jnp.repeat(masked, patch[0], axis=-2), patch[1], axis=-1)[..., : size[0], : size[1], None]
    wide = at_least_float32(jnp.result_type(x, reconstruction))
    # Chosen rather than multiplied: what is visible must not count, even if it is not a number.
    error = jnp.where(hidden, jnp.abs(reconstruction.astype(wide) - x.astype(wide)), 0)
    count = jnp.sum(hidden, axis=(-3, -2, -1)) * x.shape[-1]
    return jnp.sum(error, axis=(-3, -2, -1)) / jnp.maximum(count, 1)


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


# Reference checkpoints ------------------------------------------------------------------------------------------------

# For each source, where the encoder's tensors are, as its own `from_reference` wants them, and the token.
_REFERENCE = {"official": ("encoder.", "encoder.mask_token"), "huggingface": ("", "{encoder}.embeddings.mask_token")}
_REFERENCE["huggingface_5"] = _REFERENCE["huggingface"]


def from_reference(tensors: Mapping[str, Any], model: SimMIM, *, source: str) -> dict[str, Any]:
    """Return parameters of `model` from the tensors of a reference checkpoint.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for, whose encoder has `scan=False`.
      source: "official", "huggingface" (the names in files) or, for Swin, "huggingface_5" (those of transformers 5 in
        memory).

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    if source not in _REFERENCE:
        raise ValueError(f"source={source!r} must be one of {sorted(_REFERENCE)}; pass one of them")
    prefix, token = _REFERENCE[source]
    token = token.format(encoder="swinv2" if isinstance(model.encoder, SwinV2) else "swin")
    own = (token, "decoder.0.weight", "decoder.0.bias")
    missing = [name for name in own if name not in tensors]
    if missing:
        raise ValueError(f"a SimMIM checkpoint of source={source!r} must hold {missing}; pass the source it comes from")
    encoder = {name.removeprefix(prefix): tensors[name] for name in tensors if name not in own}
    weight, bias = (np.asarray(tensors[name]) for name in own[1:])
    factor = 2 ** (len(model.encoder.depths) - 1)
    stride = tuple(length * factor for length in _pair(model.encoder.patch_size))
    # Theirs is [channels x rows x columns, C, 1, 1], ours [C, rows x columns x channels].
    if weight.shape[0] % math.prod(stride):
        raise ValueError(f"decoder.0.weight of shape {weight.shape} must have pixels of {stride}; set the encoder")
    weight, bias = (np.moveaxis(x.reshape(-1, math.prod(stride), *x.shape[1:]), 0, 1) for x in (weight, bias))
    weight = weight.reshape(-1, weight.shape[2])
    return {
        "encoder": _read_encoder(encoder, model.encoder, source),
        "mask_token": jnp.asarray(np.asarray(tensors[token]).reshape(-1)),
        "decoder": {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias.reshape(-1))},
    }


def _read_encoder(tensors: Mapping[str, Any], encoder: Swin | SwinV2, source: str) -> dict[str, Any]:
    if isinstance(encoder, SwinV2):
        return swin_v2.from_reference(tensors, encoder, source=source)
    return swin.from_reference(tensors, encoder, source=source)


def reference_inputs(model: SimMIM) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of the least size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, *_pair(model.encoder.patch_size), 3), jnp.float32),)


def _layout(source: str) -> Callable[[SimMIM, Mapping[str, Any]], dialects.Layout]:
    """Return the function of a source that tells its layout: that of the encoder, with token and decoder."""

    def layout(model: SimMIM, variables: Mapping[str, Any]) -> dialects.Layout:
        is_v2 = isinstance(model.encoder, SwinV2)
        known = {one.name: one for one in (swin_v2 if is_v2 else swin).DIALECTS}
        if source not in known:
            raise ValueError(f"source={source!r} must be one of {sorted(known)} for this encoder; pass one of them")
        params = variables["params"]
        encoder = dialects.layout_of(known[source], model.encoder, {"params": params["encoder"]})
        prefix, token = _REFERENCE[source]
        features, pixels = params["decoder"]["kernel"].shape
        return {
            **{f"{prefix}{name}": shape for name, shape in encoder.items()},
            token.format(encoder="swinv2" if is_v2 else "swin"): (1, 1, *params["mask_token"].shape),
            "decoder.0.weight": (pixels, features, 1, 1),
            "decoder.0.bias": (pixels,),
        }

    return layout


# Where such files come from, and marks beside the decoder.
_MARKS = {
    "official": ("github.com/microsoft/SimMIM", (r"^encoder\.mask_token$",)),
    "huggingface": (
        "files of Hugging Face transformers",
        (r"^swin(v2)?\.embeddings\.mask_token$", r"attention\.self\.query\."),
    ),
    "huggingface_5": ("transformers from 5 on, in memory", (r"^swin\.embeddings\.mask_token$", r"attention\.q_proj\.")),
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=SimMIM,
        read=dialects.from_params(from_reference, source=name),
        marks=(r"^decoder\.0\.weight$", *marks),
        ignored=swin.COMPUTED,
        layout=_layout(name),
    )
    for name, (origin, marks) in _MARKS.items()
)

VARIANTS: dict[str, dict[str, Any]] = {
    "simmim_swin_base": {
        "module": SimMIM,
        "inputs": (jax.ShapeDtypeStruct((1, 192, 192, 3), jnp.float32), jax.ShapeDtypeStruct((1, 48, 48), jnp.bool_)),
        "encoder": Swin(
            num_classes=0,
            embed_dim=128,
            depths=(2, 2, 18, 2),
            num_heads=(4, 8, 16, 32),
            window_size=6,
            drop_path_rate=0.0,
        ),
    }
}
