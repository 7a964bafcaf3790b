"""TurboViT: a searched pyramid of attention in mask units with pooled queries, then of attention everywhere."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlayers.core.initializers import truncated_normal, zeros
from jaxlayers.core.labels import no_decay as no_decay
from jaxlayers.core.labels import pyramid_layer_ids
from jaxlayers.core.pyramid import Level
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.drop_path import drop_path_rates
from jaxlayers.ops.patches import split_shape
from jaxlayers.window.hiera import HieraEmbed, HieraStage, layer_norm, max_pool, resize_positions

_PATCH_STRIDE = 4
_Q_STRIDE = 2


class TurboViT(nn.Module):
    """Classify images, or give their feature pyramid, by Hiera's blocks with the widths of every stage set freely.

    Patches of 7 x 7 pixels, 4 apart, are embedded (`HieraEmbed`); each stage is a `HieraStage`, which from the second
    on begins with a block that pools 2 x 2 queries into one and changes the width. Stages with a unit attend within
    it, the others everywhere. The stem may be wider than the first stage, whose first block then narrows it. The last
    map is averaged, normed and mapped to logits.

    Symmetry:
      None exactly: the table of positions is learned. While all stages so far have a unit, a token depends on no token
      outside its own.

    Attributes:
      num_classes: number of logits; 0 leaves the head out, and the output is the normed average.
      image_size: size of the images, an int or (height, width); see `resize` for another.
      stem_features: width of the embedded patches.
      embed_dim: width of each stage.
      depths: number of blocks of each stage.
      num_heads: number of heads of each stage.
      unit_size: side of a mask unit at each stage, in tokens of that stage; `None` attends everywhere. That of a stage
        before a pooling must be even.
      pool: pools queries, and what skips the attention; `max_pool` or `average_pool` of `jaxlayers.window.hiera`.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      drop_path_rate: probability of dropping a residual branch of the last block; grows linearly from 0 at the first.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`: "attention" its
        scores and softmax, "full" (or True) the whole block, "none" (or False) nothing.
      norm: makes a norm, called as `norm(dtype=..., param_dtype=..., name=...)`.
      dtype: compute dtype; `None` infers it from input and parameters. Softmax and norms' statistics are in float32.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, except that of the convolution.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and a rate is not 0.

    Cost:
      As `Hiera`. The variant `turbovit_2427` at 224 x 224: 2.5 G multiply-accumulates, 13.6 M parameters.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.window import TurboViT
      >>> model = TurboViT(10, 64, 12, (8, 16, 24), depths=(1, 1, 2), num_heads=(1, 2, 2), unit_size=(8, 4, None))
      >>> images = jnp.ones((1, 64, 64, 3))
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
      >>> levels = jax.eval_shape(nn.apply(TurboViT.features, model), variables, images)
      >>> logits.shape, [(level.array.shape, level.stride) for level in levels][-1]
      ((1, 10), ((1, 4, 4, 24), (16, 16)))

    Source:
      Wong, Abbasi and Nair, TurboViT: Generating Fast Vision Transformers via Generative Architecture Search,
      arXiv:2308.11421, 2023. Stem and widths of the variant: github.com/icecap360/TurboMedSAM,
      models/TurboViTModel.py.

    Differs:
      The abstract names the design patterns, mask unit attention and Q-pooling, but no number of the architecture that
      the search gave, and none of the paper's code or weights was found. The variant's depths, widths and heads are
      those of a model that later code for medical images calls TurboViT (`GenViT_2427`); whether they are the paper's
      is not known, so the paper's figures are not the variant's. That code pools by the maximum; the average is an
      addition.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, ...] = 224
    stem_features: int = 96
    embed_dim: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (1, 2, 8, 2)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    unit_size: tuple[int | None, ...] = (8, 4, None, None)
    pool: Callable[[Array, tuple[int, ...]], Array] = max_pool
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        by_stage = {field: getattr(self, field) for field in ("embed_dim", "depths", "num_heads", "unit_size")}
        if len({len(entries) for entries in by_stage.values()}) != 1 or not self.depths or min(self.depths) < 1:
            raise ValueError(f"{by_stage} must have one entry a stage, and positive depths; set them")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must not be negative; set num_classes (0 for no head)")
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"image_size={self.image_size} must be an int or (height, width); set image_size")
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        self.patch_embed = HieraEmbed(
            self.stem_features,
            image_size=self.image_size,
            patch_stride=_PATCH_STRIDE,
            bias_init=self.bias_init,
            **dtypes,
        )
        self.stages = [
            HieraStage(
                self.embed_dim[stage],
                num_heads=self.num_heads[stage],
                drop_path_rates=rates[sum(self.depths[:stage]) :][:depth],
                unit_size=self.unit_size[stage],
                # Queries are pooled within the units of the stage before.
                first_unit_size=self.unit_size[max(stage - 1, 0)],
                q_stride=_Q_STRIDE if stage else 1,
                pool=self.pool,
                mlp_ratio=self.mlp_ratio,
                remat=self.remat,
                norm=self.norm,
                **dtypes,
                **init,
            )
            for stage, depth in enumerate(self.depths)
        ]
        self.final_norm = self.norm(**dtypes)
        self.head = nn.Dense(self.num_classes, **dtypes, **init) if self.num_classes else None

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify.

        Args:
          x: images of `image_size`, channels last.
          deterministic: no dropped branches.

        Returns:
          Logits, or with `num_classes=0` the normed average.

        Raises:
          ValueError: if `x` is not of `image_size` or not of floating point, or a field does not fit.
        """
        x = self.final_norm(jnp.mean(self.features(x, deterministic=deterministic)[-1].array, axis=(-3, -2)))
        return x if self.head is None else self.head(x)

    def features(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Level, ...]:
        """Return the map after each stage, finest first, without norms.

        Args:
          x: images of `image_size`, channels last.
          deterministic: no dropped branches.

        Returns:
          One level a stage, of stride `4 * 2**stage`.
        """
        split_shape(x.shape, 2)
        x = self.patch_embed(x)
        levels = []
        for index, stage in enumerate(self.stages):
            x = stage(x, deterministic=deterministic)
            levels.append(Level(x, (_PATCH_STRIDE * _Q_STRIDE**index,) * 2))
        return tuple(levels)


# Parameter trees ------------------------------------------------------------------------------------------------------


def layer_ids(params: Params, model: TurboViT) -> dict[str, Any]:
    """Return a tree of the layer that each parameter belongs to, see `pyramid_layer_ids`."""
    return pyramid_layer_ids(params, model.depths)


def resize(params: Params, from_model: TurboViT, to_model: TurboViT) -> dict[str, Any]:
    """Return the parameters of `from_model` fitted to the image size of `to_model`.

    The table of positions is resampled bicubically with antialiasing; all else stays.

    Args:
      params: parameters of `from_model`.
      from_model: the model that the parameters are of.
      to_model: the model that they are wanted for.

    Returns:
      Parameters of `to_model`.

    Raises:
      ValueError: if the models differ in a field that no resampling bridges.
    """
    for field in ("num_classes", "stem_features", "embed_dim", "depths", "mlp_ratio"):
        old, new = getattr(from_model, field), getattr(to_model, field)
        if old != new:
            raise ValueError(f"{field}={new} must equal the {field}={old} of the parameters; set it alike")
    embed = resize_positions(params["patch_embed"], from_model.image_size, to_model.image_size, _PATCH_STRIDE)
    return {**params, "patch_embed": embed}


VARIANTS: dict[str, dict[str, Any]] = {
    "turbovit_2427": {
        "module": TurboViT,
        "inputs": (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),),
    }
}
