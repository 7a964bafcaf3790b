"""SwinFace: one Swin for many tasks, each of which weighs the channels of all stages for itself."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlayers.core import dialects, reference
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, truncated_normal, zeros
from jaxlayers.core.safe import safe_normalize
from jaxlayers.core.types import Dtype, Initializer
from jaxlayers.ops.patches import pad_to_multiple, to_blocks
from jaxlayers.window import swin
from jaxlayers.window.swin import Swin

# Names of a subnet's outputs, and how many numbers each has.
Group = tuple[tuple[str, int], ...]

# The 42 analyses of the published model: their attributes are those of CelebA, grouped by what they look at.
FACE_GROUPS: tuple[Group, ...] = (
    (("gender", 2),),
    (("age", 1), ("young", 2)),
    (("expression", 7), ("smiling", 2)),
    tuple((name, 2) for name in ("attractive", "blurry", "chubby", "heavy_makeup", "oval_face", "pale_skin")),
    (
        *((name, 2) for name in ("bald", "bangs", "black_hair", "blond_hair", "brown_hair", "gray_hair")),
        *((name, 2) for name in ("receding_hairline", "straight_hair", "wavy_hair", "wearing_hat")),
    ),
    tuple((name, 2) for name in ("arched_eyebrows", "bags_under_eyes", "bushy_eyebrows", "eyeglasses", "narrow_eyes")),
    (("big_nose", 2), ("pointy_nose", 2)),
    tuple((name, 2) for name in ("high_cheekbones", "rosy_cheeks", "wearing_earrings", "sideburns")),
    (
        *((name, 2) for name in ("five_o_clock_shadow", "big_lips", "mouth_slightly_open", "mustache")),
        *((name, 2) for name in ("wearing_lipstick", "no_beard")),
    ),
    (("double_chin", 2), ("goatee", 2)),
    (("wearing_necklace", 2), ("wearing_necktie", 2)),
)


# Losses ---------------------------------------------------------------------------------------------------------------


def cosface_logits(
    cosines: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], *, margin: float = 0.4, scale: float = 64.0
) -> Float[Array, "*batch classes"]:
    """Return the logits of the large-margin cosine loss, scale (cos - margin [class is the label]).

    Their cross entropy is the loss; without labels, as for a prediction, take `scale * cosines`.

    Args:
      cosines: similarity to each class, in [-1, 1], as `CosineClassifier` gives it.
      labels: integer class of each example; of one that is no class, such as -1, no cosine is lowered.
      margin: by how much the label's cosine must lead, in [0, 2).
      scale: inverse temperature.

    Returns:
      Logits, in float32 or better.

    Raises:
      ValueError: on a margin or scale out of range.
    """
    if not 0 <= margin < 2 or scale <= 0:
        raise ValueError(f"margin={margin} must lie in [0, 2) and scale={scale} be positive; set them")
    cosines = cosines.astype(at_least_float32(cosines.dtype))
    return scale * (cosines - margin * jax.nn.one_hot(labels, cosines.shape[-1], dtype=cosines.dtype))


def robust_square_loss(
    prediction: Float[Array, "*batch"],
    target: Float[Array, "*batch"],
    *,
    progress: float | Float[Array, ""],
    sigma: float = 3.0,
) -> Float[Array, "*batch"]:
    """Return (1 - p) d^2 / 2 + p (1 - exp(-d^2 / (2 sigma^2))), from squares to what bounds the cost of outliers.

    Args:
      prediction: for example an age.
      target: what it should be.
      progress: p, the share of the training that is done, in [0, 1].
      sigma: deviation from which on an error counts little, in the target's units.

    Raises:
      ValueError: if sigma is not positive.
    """
    if sigma <= 0:
        raise ValueError(f"sigma={sigma} must be positive; set sigma")
    square = jnp.square(prediction - target)
    return (1 - progress) / 2 * square + progress * -jnp.expm1(-square / (2 * sigma**2))


# Layers ---------------------------------------------------------------------------------------------------------------


class CosineClassifier(nn.Module):
    """Compare an embedding with a learned direction for each class.

    cos_c = <x, w_c> / (|x| |w_c|); a zero embedding has the cosine 0 with every class.

    Symmetry:
      Scaling the embedding by a positive number changes nothing.

    Attributes:
      num_classes: number of directions w_c.
      dtype: dtype of the cosines; `None` infers it from input and parameters. They are computed in float32 or better.
      param_dtype: dtype of the directions.
      kernel_init: initialiser of the directions, of which the length does not matter.

    Source:
      Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018; see `cosface_logits`.

    Differs:
      None.
    """

    num_classes: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch classes"]:
        """Return the cosines.

        Args:
          x: embeddings.

        Returns:
          Cosines in [-1, 1].

        Raises:
          ValueError: if there is no class.
        """
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1; set num_classes")
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.num_classes), self.param_dtype)
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        wide = at_least_float32(dtype)
        directions = safe_normalize(kernel.astype(wide), axis=0)
        return (safe_normalize(x.astype(wide)) @ directions).astype(dtype)


class ChannelGate(nn.Module):
    """Scale each channel of a map by a gate in (0, 1) that depends on the means and maxima of all channels.

    y = sigmoid(MLP(mean x) + MLP(max x)) x, with one MLP for both.

    Symmetry:
      Permuting the pixels permutes the output alike.

    Attributes:
      reduction: by how much the MLP's hidden layer is narrower than the map has channels.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The gates are sown as `intermediates/gates`.

    Source:
      Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, equation 2; as in github.com/lxq1000/SwinFace.

    Differs:
      The hidden layer has at least one feature.
    """

    reduction: int = 16
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch height width channels"]:
        """Gate the channels.

        Args:
          x: a map, channels last.

        Returns:
          The map with its channels scaled.

        Raises:
          ValueError: if the reduction is not positive.
        """
        if self.reduction < 1:
            raise ValueError(f"reduction={self.reduction} must be at least 1; set reduction")
        channels = x.shape[-1]
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        down = nn.Dense(max(1, channels // self.reduction), name="down", **options)
        up = nn.Dense(channels, name="up", **options)
        pooled = (jnp.mean(x, axis=(-3, -2)), jnp.max(x, axis=(-3, -2)))
        gates = nn.sigmoid(sum(up(nn.relu(down(y))) for y in pooled))
        self.sow("intermediates", "gates", gates)
        return x * gates[..., None, None, :]


class MultiLevelChannelAttention(nn.Module):
    """Describe a picture by the maps of several stages, with the channels weighed that a task needs (MLCA).

    Each level has a convolution of its own, the results stand side by side, `ChannelGate` weighs their channels, and
    what is left after ReLU is maximised over the pixels and normed.

    Symmetry:
      Reordering the levels, with their parameters, reorders the gates and the output alike.

    Attributes:
      features: F, length of the description; each level has a share of it as it has of all channels.
      kernel_size: side of the convolutions' kernels.
      reduction: see `ChannelGate`.
      epsilon: added to the variances in the norm.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the convolutions.

    Collections:
      `batch_stats` with the running mean and var (decay 0.9), which `deterministic=False` updates; the gates are sown
      as `intermediates/gate/gates`.

    Source:
      Qin et al., SwinFace: A Multi-task Transformer for Face Recognition, Expression Recognition, Age Estimation and
      Attribute Estimation, IEEE TCSVT 2023; github.com/lxq1000/SwinFace (read: its code).

    Differs:
      The levels' shares of the features follow their channels for any number of levels; the code writes out those of
      its one model, which are the same. The running var averages the biased variance, as Flax does.
    """

    features: int = 512
    kernel_size: int = 3
    reduction: int = 16
    epsilon: float = 2e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self, levels: Sequence[Float[Array, "*batch height width _"]], *, deterministic: bool = True
    ) -> Float[Array, "*batch features"]:
        """Describe a picture.

        Args:
          levels: maps of one size.
          deterministic: norm by the running statistics, not by those of the batch.

        Returns:
          The description.

        Raises:
          ValueError: if there is no level, their sizes differ, or there are fewer features than levels.
        """
        if not levels or len({level.shape[:-1] for level in levels}) > 1:
            raise ValueError(
                f"the levels' shapes {[level.shape for level in levels]} must differ in their channels alone, and at "
                "least one must be given; pool them to one size"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shares = _shares(self.features, [level.shape[-1] for level in levels])
        convolved = [
            nn.Conv(
                share,
                (self.kernel_size,) * 2,
                use_bias=False,
                kernel_init=self.kernel_init,
                name=f"levels_{i}",
                **dtypes,
            )(level)
            for i, (share, level) in enumerate(zip(shares, levels, strict=True))
        ]
        x = ChannelGate(self.reduction, name="gate", **dtypes)(jnp.concatenate(convolved, axis=-1))
        x = jnp.max(nn.relu(x), axis=(-3, -2))
        return nn.BatchNorm(
            use_running_average=deterministic, momentum=0.9, epsilon=self.epsilon, name="norm", **dtypes
        )(x)


class SwinFace(nn.Module):
    """Answer groups of questions about a picture, and embed it, from one Swin.

    The maps after each merging and the last stage's are averaged to the size of the last; each group of outputs has a
    `MultiLevelChannelAttention` over them, two hidden layers, and a linear head an output. The embedding, for
    recognition, is made of the last map's mean by two linear layers without biases, each with a batch norm.

    Symmetry:
      None exactly, as Swin.

    Attributes:
      backbone: the shared Swin, with `num_classes=0`.
      groups: for each subnet its outputs, as pairs of a name and a number of features.
      features: width of the descriptions and of the subnets' hidden layers.
      embedding_features: length of the embedding; 0 = none.
      dropout_rate: dropout after the subnets' hidden layers, in [0, 1).
      reduction: see `ChannelGate`.
      dtype: compute dtype of what follows the backbone; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters of what follows the backbone.
      kernel_init: initialiser of the linear layers.
      bias_init: initialiser of the biases.

    Collections:
      `batch_stats`; the RNG stream `dropout` when `deterministic=False`; sown gates, see `ChannelGate`.

    Cost:
      The published model, at 112 x 112: 6.09 G multiply-accumulates, 67,415,538 parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window import Swin, SwinFace
      >>> backbone = Swin(num_classes=0, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
      >>> model = SwinFace(backbone, groups=((("age", 1), ("young", 2)), (("smiling", 2),)), features=32)
      >>> outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
      >>> {name: output.shape for name, output in outputs.items()}
      {'age': (1, 1), 'embedding': (1, 512), 'smiling': (1, 2), 'young': (1, 2)}

    Source:
      As `MultiLevelChannelAttention`.

    Differs:
      Any groups and any number of stages, for pictures of any size: where a map is no multiple of the last one, cells
      at the border average what there is. Convolutions start with variance 1 / fan-in. The backbone's own head, which
      nothing reads, is left out.
    """

    backbone: Swin
    groups: tuple[Group, ...]
    features: int = 512
    embedding_features: int = 512
    dropout_rate: float = 0.5
    reduction: int = 16
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = truncated_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts."""
        names = [name for group in self.groups for name, _ in group]
        if not all(self.groups) or len({*names, "embedding"}) <= len(names):
            raise ValueError(
                f"groups={self.groups} must have an output each, with different names, none of them 'embedding'; set "
                "groups"
            )
        if not names and not self.embedding_features:
            raise ValueError(
                f"groups={self.groups} or embedding_features={self.embedding_features} must give an output; set one"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, **dtypes}
        biased: dict[str, Any] = {"bias_init": self.bias_init, **init}
        self.attentions = [
            MultiLevelChannelAttention(self.features, reduction=self.reduction, **dtypes) for _ in self.groups
        ]
        self.firsts = [nn.Dense(self.features, **biased) for _ in self.groups]
        self.seconds = [nn.Dense(self.features, **biased) for _ in self.groups]
        self.heads = [nn.Dense(features, **biased) for group in self.groups for _, features in group]
        self.dropout = nn.Dropout(self.dropout_rate)
        if self.embedding_features:
            last = self.backbone.embed_dim * 2 ** (len(self.backbone.depths) - 1)
            self.final_norm = swin.layer_norm(**dtypes)
            self.embed1, self.embed2 = (
                nn.Dense(width, use_bias=False, **init) for width in (last, self.embedding_features)
            )
            self.embed_norm1, self.embed_norm2 = (nn.BatchNorm(momentum=0.9, epsilon=2e-5, **dtypes) for _ in range(2))

    def __call__(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> dict[str, Float[Array, "*batch _"]]:
        """Answer and embed.

        Args:
          x: images of any size, channels last, scaled as the weights want them.
          deterministic: no dropout, no dropped branches; norm by the running statistics.

        Returns:
          The outputs by their names, and `embedding`.

        Raises:
          ValueError: if names are not unique, nothing is asked for, or `x` is no image.
        """
        before, after = self.backbone.stage_maps(x, deterministic=deterministic)
        last = after[-1]
        levels = [
            _average(level.array, tuple(a // b for a, b in zip(last.stride, level.stride, strict=True)))
            for level in (*before[1:], last)
        ]
        outputs = {}
        heads = iter(self.heads)
        for index, group in enumerate(self.groups):
            y = self.attentions[index](levels, deterministic=deterministic)
            for layer in (self.firsts[index], self.seconds[index]):
                y = self.dropout(nn.relu(layer(y)), deterministic=deterministic)
            outputs.update({name: next(heads)(y) for name, _ in group})
        if self.embedding_features:
            y = jnp.mean(self.final_norm(last.array), axis=(-3, -2))
            for layer, norm in ((self.embed1, self.embed_norm1), (self.embed2, self.embed_norm2)):
                y = norm(layer(y), use_running_average=deterministic)
            outputs["embedding"] = y
        return outputs


def _average(x: Array, block: tuple[int, ...]) -> Array:
    """Average a map over blocks of pixels; those at its end average what is left."""
    if block == (1, 1):
        return x

    def total(y: Array) -> Array:
        return jnp.sum(to_blocks(pad_to_multiple(y, block), block), axis=(-3, -2))

    return total(x) / total(jnp.ones((*x.shape[-3:-1], 1), x.dtype))


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Split a number in proportion to weights: round down, then give one each to those that lost most."""
    shares = [total * weight // sum(weights) for weight in weights]
    lost = [total * weight % sum(weights) for weight in weights]
    for index in sorted(range(len(weights)), key=lambda i: -lost[i])[: total - sum(shares)]:
        shares[index] += 1
    if min(shares) < 1:
        raise ValueError(f"features={total} must give each of the {len(weights)} levels one at least; set features")
    return shares


# Reference checkpoints ------------------------------------------------------------------------------------------------


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {ours: theirs, f"{ours}/mean": f"{theirs}.running_mean", f"{ours}/var": f"{theirs}.running_var"}


# See `jaxlayers.core.reference`.
REFERENCE_NAMES: Mapping[str, str] = {
    **{
        f"backbone/{ours}": f"backbone.{theirs}"
        for ours, theirs in swin.REFERENCE_NAMES["official"].items()
        if ours not in ("head", "final_norm")
    },
    **{
        f"backbone/stages/blocks/attention/{part}": f"backbone.layers.{{stage}}.blocks.{{block}}.attn.{part}"
        for part in ("query", "key", "value")
    },
    "final_norm": "backbone.norm",
    "embed1": "backbone.feature.0",
    **_norm("embed_norm1", "backbone.feature.1"),
    "embed2": "backbone.feature.2",
    **_norm("embed_norm2", "backbone.feature.3"),
    "attentions/levels": "fam.nets.{attention}.conv.convs.{level}",
    "attentions/gate/down": "fam.nets.{attention}.channel_attention.mlp.1",
    "attentions/gate/up": "fam.nets.{attention}.channel_attention.mlp.3",
    **_norm("attentions/norm", "fam.nets.{attention}.norm"),
    "firsts": "tss.nets.{first}.feature.0",
    "seconds": "tss.nets.{second}.feature.3",
    "heads": "om.output_fcs.{head}",
}
_IGNORED = ("relative_position_index", "attn_mask", "backbone.head.weight", "backbone.head.bias")


def from_reference(tensors: Mapping[str, Any], model: SwinFace) -> dict[str, Any]:
    """Return variables of `model` from the tensors of a checkpoint of github.com/lxq1000/SwinFace.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      model: the model they are for.

    Returns:
      The collections `params` and `batch_stats`, as JAX arrays in the dtype of the tensors.

    Raises:
      ValueError: if names or shapes of the tensors are not those of the model.
    """
    wanted = dialects.shapes_of(model, reference_inputs(model))
    return reference.read_variables(reference.split_fused(tensors), wanted, REFERENCE_NAMES, ignored=_IGNORED)


def reference_inputs(model: SwinFace) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of the least size, which show the shapes of a model's parameters."""
    return swin.reference_inputs(model.backbone)


# The parts of the model, each in a state dict of its own in the published file.
_APART = re.compile(r"^state_dict_(?=(?:backbone|fam|tss|om)\.)")


def _from_parts(tensors: Mapping[str, Any], model: SwinFace) -> dict[str, Any]:
    return from_reference({_APART.sub("", name): tensors[name] for name in tensors}, model)


def _their_patches(model: SwinFace, ours: tuple[int, ...]) -> tuple[int, ...]:
    return dialects.patches()(model.backbone, ours)


def _dialect(name: str, origin: str, read: Callable[..., Any], before: str) -> dialects.Dialect:
    return dialects.Dialect(
        name=name,
        origin=origin,
        module=SwinFace,
        read=dialects.from_variables(read),
        marks=tuple(
            rf"^{before}{part}\." for part in (r"backbone\.layers", r"fam\.nets", r"tss\.nets", r"om\.output_fcs")
        ),
        ignored={
            **swin.COMPUTED,
            **dialects.COUNTED,
            rf"^{before}backbone\.head\.": "a classifier of the backbone that is not called",
            r"^state_dict_softmax_fc\.": "the identities' classifier, which only training uses",
            r"^state_(optimizer|lr_scheduler)\.|^(epoch|global_step|local_step)$": "the state of a training",
        },
        layout=dialects.table_layout(
            REFERENCE_NAMES,
            shapes={"patch_embed/projection/kernel": _their_patches},
            fused=dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn.qkv"),
            rename=lambda found: before + found,
        ),
    )


DIALECTS = (
    _dialect("official", "files of github.com/lxq1000/SwinFace", _from_parts, "state_dict_"),
    _dialect("official_module", "state dict of the whole model of github.com/lxq1000/SwinFace", from_reference, ""),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "swinface": {
        "module": SwinFace,
        "inputs": (jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32),),
        "backbone": Swin(num_classes=0, patch_size=2, drop_path_rate=0.1),
        "groups": FACE_GROUPS,
    }
}
