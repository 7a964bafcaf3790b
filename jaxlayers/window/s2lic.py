"""S2LIC: pictures into few bits and back, by SwinV2 blocks about a latent map that an entropy model codes.

The model counts the bits that a picture costs; `Codec` turns it into bytes that another process reads back. No
checkpoint of the authors' is public and the public code lacks its own layers, so there are no names to read one by.
"""

import dataclasses
import functools
import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlayers.core import axes, remat
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import zeros
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.nn.drop_path import drop_path_rates
from jaxlayers.ops.patches import crop, from_patches
from jaxlayers.ops.range_coder import CodingTables, Decoder, Encoder, coding_tables
from jaxlayers.window.s2lic_entropy import (
    ACGCEntropyModel,
    FactorizedPrior,
    checkerboard,
    gaussian_tables,
    round_through,
    scale_index,
    uniform_kernel,
)
from jaxlayers.window.swin import layer_norm
from jaxlayers.window.swin_v2 import SwinV2Block

# How much smaller than the latent map that of the hyperprior is.
_HYPER_STRIDE = 4


class Compressed(NamedTuple):
    """What `S2LIC` returns.

    Attributes:
      picture: the pictures as they come back, `[*batch, height, width, channels]`.
      bits: what each picture costs, `[*batch]`.
    """

    picture: Array
    bits: Array


class S2LIC(nn.Module):
    """Compress pictures: an analysis to a latent map, its bits by an entropy model, and the synthesis from it.

    y = g_a(x), z = h_a(y), y' and the bits of y from `ACGCEntropyModel`(y, h_s(round z)), the bits of z from
    `FactorizedPrior`, x' = g_s(y'). g_a adds a dense block of convolutions to the picture, and has for each stage a
    convolution of stride 2 and a residual group x + blocks(x) of `SwinV2Block`s, of which every second has its windows
    shifted by half; a last convolution of stride 2 makes y. g_s is its mirror image.

    Symmetry:
      None exactly: strides, windows and padding are tied to the grid.

    Attributes:
      channels: of the pictures.
      features: width N of the stages and of the hyperprior.
      latent_features: width M of the latent map.
      num_slices: slices of the latent map, see `ACGCEntropyModel`.
      depths: number of blocks of each stage, finest first. The latent map has stride `2 ** (stages + 1)`.
      num_heads: number of heads of each stage.
      window_size: side of the windows.
      mlp_ratio: width of the MLPs' hidden layers, in multiples of the features.
      enhance_features: width of the dense blocks on the picture; 0 leaves them out.
      head_dim: width of the heads of the entropy model; must divide a slice.
      reference_stride: see `GlobalInterContext`.
      anchor_context: see `ACGCEntropyModel`.
      drop_path_rate: probability of dropping a residual branch of the last block of the analysis (of the first of the
        synthesis); grows linearly from 0 at the finest stage.
      remat: what the backward pass computes anew in each block, a name of `core.remat.POLICIES`.
      norm: makes a norm of the blocks, called as `norm(dtype=..., param_dtype=..., name=..., scale_init=...)`.
      dtype: compute dtype of the transforms; `None` infers it from input and parameters. The entropy model is in
        float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG streams `noise` and, if the drop rate is not 0, `dropout`, when `deterministic=False`.

    Cost:
      Linear in the number of pixels, but for the global attention of the entropy model, on 1 / 256 of them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.window.s2lic import S2LIC
      >>> model = S2LIC(features=8, latent_features=8, num_slices=2, depths=(1,), num_heads=(2,), head_dim=4)
      >>> out = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 30, 40, 3)))[0]
      >>> out.picture.shape, out.bits.shape
      ((2, 30, 40, 3), (2,))

    Source:
      Wang et al., S2LIC: Learned Image Compression with the SwinV2 Block, Adaptive Channel-wise and Global-inter
      Attention Context, arXiv 2403.14471, abstract and figures; github.com/wyq2021/S2LIC (fcae7fb), which fixes widths,
      depths, heads, strides and the order of decoding; dense blocks: Xie et al., Enhanced Invertible Encoding for
      Learned Image Compression, ACM MM 2021, github.com/xyq7/InvCompress; hyperprior: github.com/JiangWeibeta/MLIC.

    Differs:
      As `ACGCEntropyModel` and `FactorizedPrior`. Pixels are centred at 0. Pictures of any size, continued by their
      border to multiples of the hyperprior's stride, where the public code takes multiples only. Blocks and groups as
      `SwinV2Block` has them, since the public code's own are not public.
    """

    channels: int = 3
    features: int = 192
    latent_features: int = 320
    num_slices: int = 10
    depths: tuple[int, ...] = (1, 2, 3)
    num_heads: tuple[int, ...] = (4, 8, 16)
    window_size: int = 8
    mlp_ratio: float = 4.0
    enhance_features: int = 64
    head_dim: int = 32
    reference_stride: int = 2
    anchor_context: bool = True
    drop_path_rate: float = 0.1
    remat: str | bool = False
    norm: Callable[..., Any] = layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = uniform_kernel
    bias_init: Initializer = zeros()

    @property
    def stride(self) -> int:
        """The stride of the latent map."""
        return 2 ** (len(self.depths) + 1)

    def setup(self) -> None:
        """Make the parts."""
        if len(self.depths) != len(self.num_heads) or not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths={self.depths} and num_heads={self.num_heads} must have one positive entry a stage; set both"
            )
        if min(self.channels, self.features, self.latent_features) < 1 or self.enhance_features < 0:
            raise ValueError(
                f"channels={self.channels}, features={self.features}, latent_features={self.latent_features} must be "
                f"positive and enhance_features={self.enhance_features} not negative; set them"
            )
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init: dict[str, Any] = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        common = {**dtypes, **init}
        rates = drop_path_rates(self.drop_path_rate, sum(self.depths))
        groups = []
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            block = functools.partial(
                SwinV2Block,
                heads,
                mlp_ratio=self.mlp_ratio,
                window_size=self.window_size,
                norm=functools.partial(self.norm, scale_init=zeros()),
                **common,
            )
            first = sum(self.depths[:stage])
            groups.append(
                functools.partial(_Group, block, rates[first : first + depth], self.window_size // 2, self.remat)
            )
        down = functools.partial(nn.Conv, strides=2, padding="SAME", **common)
        up = functools.partial(nn.ConvTranspose, kernel_size=(3, 3), strides=(2, 2), padding="SAME", **common)
        stages = range(len(self.depths))
        self.down = [
            *(down(self.features, (3, 3) if stage else (5, 5)) for stage in stages),
            down(self.latent_features, (3, 3)),
        ]
        self.down_group = [group() for group in groups]
        self.up_group = [group() for group in reversed(groups)]
        self.up = [
            *(up(self.features) for _ in stages),
            nn.Conv(4 * self.channels, (3, 3), padding="SAME", **common),
        ]
        if self.enhance_features:
            self.enhance = _Enhance(self.enhance_features, common)
            self.restore = _Enhance(self.enhance_features, common)
        m, n = self.latent_features, self.features
        # As the entropy model: what the decoder repeats stays in float32.
        self.hyper_analysis = _Resample((n, n, n, n, n), (1, 1, -2, 1, -2), init | {"param_dtype": self.param_dtype})
        self.hyper_synthesis = _Resample(
            (m, m, 3 * m // 2, 3 * m // 2, 2 * m), (1, 2, 1, 2, 1), init | {"param_dtype": self.param_dtype}
        )
        self.prior = FactorizedPrior(param_dtype=self.param_dtype)
        self.entropy_model = ACGCEntropyModel(
            m,
            num_slices=self.num_slices,
            head_dim=self.head_dim,
            reference_stride=self.reference_stride,
            anchor_context=self.anchor_context,
            param_dtype=self.param_dtype,
            **init,
        )

    def __call__(self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True) -> Compressed:
        """Compress pictures and bring them back, and count the bits.

        Args:
          x: pictures with values from 0 to 1, channels last, of any size.
          deterministic: count the bits of what is coded; else, for training, of the latent map with uniform noise.

        Returns:
          The pictures that come back, not clipped to [0, 1], and the bits of each. The gradient goes through rounding
          as if it were not there.

        Raises:
          ValueError: if `x` has fewer than three axes, no pixels, is not of floating point, or a field does not fit.
        """
        y, z = self.analyse(x, deterministic=deterministic)
        z_hat = round_through(z)
        noisy = z if deterministic else z + jax.random.uniform(self.make_rng("noise"), z.shape, z.dtype, -0.5, 0.5)
        bits = self.prior(z_hat if deterministic else noisy)
        decoded, latent_bits = self.entropy_model(y, self.tell(z_hat), deterministic=deterministic)
        picture = self.synthesise(decoded, x.shape[-3:-1], deterministic=deterministic)
        total = jnp.sum(bits, axis=(-3, -2, -1)) + jnp.sum(latent_bits, axis=(-3, -2, -1))
        return Compressed(picture.astype(compute_dtype(x, dtype=self.dtype)), total)

    def analyse(
        self, x: Float[Array, "*batch height width channels"], *, deterministic: bool = True
    ) -> tuple[Float[Array, "*batch rows columns latent"], Float[Array, "*batch fewer less hyper"]]:
        """Return the latent map and that of the hyperprior, neither rounded, in float32 or better.

        Args:
          x: pictures as `__call__` takes them.
          deterministic: no dropped branches.
        """
        if x.ndim < 3 or x.shape[-1] != self.channels or 0 in x.shape[-3:-1]:
            raise ValueError(
                f"input must be [*batch, height, width, {self.channels}] with pixels; got {x.shape}, set channels"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"input of dtype {x.dtype} must be of floating point; divide it by 255")
        multiple = self.stride * _HYPER_STRIDE
        missing = [(0, -length % multiple) for length in x.shape[-3:-1]]
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), *missing, (0, 0)], mode="edge") - 0.5
        x = self.enhance(x) if self.enhance_features else x
        for down, group in zip(self.down, self.down_group, strict=False):
            x = group(axes.constrain_map(down(x)), deterministic=deterministic)
        y = self.down[-1](x)
        y = y.astype(at_least_float32(y.dtype))
        return y, self.hyper_analysis(y)

    def tell(self, z: Float[Array, "*batch fewer less hyper"]) -> Float[Array, "*batch rows columns doubled"]:
        """Return what the rounded hyperprior tells the entropy model."""
        return self.hyper_synthesis(z)

    def synthesise(
        self, y: Float[Array, "*batch rows columns latent"], size: Sequence[int], *, deterministic: bool = True
    ) -> Float[Array, "*batch height width channels"]:
        """Return pictures of that (height, width) from what was decoded."""
        x = y if self.dtype is None else y.astype(self.dtype)
        for up, group in zip(self.up, self.up_group, strict=False):
            x = group(axes.constrain_map(up(x)), deterministic=deterministic)
        x = from_patches(self.up[-1](x), (2, 2))
        x = (self.restore(x) if self.enhance_features else x) + 0.5
        return crop(x, size)

    def accept_and_ask(
        self,
        hyper: Float[Array, "*batch rows columns doubled"],
        decoded: Float[Array, "*batch rows columns latent"],
        values: Float[Array, "*batch rows columns slice"],
        step: int,
    ) -> tuple[Float[Array, "*batch rows columns latent"], Any, Any]:
        """Return what is decoded after the step before, and means and table indexes of a step.

        Args:
          hyper: what `tell` returned.
          decoded: what this method returned last; zeros at the first step.
          values: means plus whole numbers of the step before; anything at the first.
          step: see `ACGCEntropyModel.channels`; one more than the last ends it, without means and indexes.
        """
        if step:
            decoded = self.entropy_model.refine(hyper, decoded, values, step - 1)
        if step == 2 * self.num_slices:
            return decoded, None, None
        means, scales = self.entropy_model.parameters(hyper, decoded, step)
        return decoded, means, scale_index(scales)

    def prior_bits(self, z: Float[Array, "*batch hyper"]) -> Float[Array, "*batch hyper"]:
        """Return the bits of numbers of the hyperprior."""
        return self.prior(z)


class _Group(nn.Module):
    """x + blocks(x), with every second block's windows shifted.

    Attributes:
      block: makes a block.
      rates: drop-path rate of each block.
      shift: of the shifted windows.
      remat: what of each block is recomputed in the backward pass.
    """

    block: Callable[..., nn.Module]
    rates: tuple[float, ...]
    shift: int
    remat: str | bool

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        def call(block: nn.Module, x: Array) -> Array:
            return block(x, deterministic=deterministic)

        y = x
        for index, rate in enumerate(self.rates):
            block = self.block(shift_size=self.shift * (index % 2), drop_path_rate=rate, name=f"blocks_{index}")
            y = remat.remat_block(call, self.remat)(block, y)
        return x + y


class _DenseBlock(nn.Module):
    """Five 3 x 3 convolutions, each of all that came before it, with leaky ReLUs between them.

    Attributes:
      growth: width of the first four.
      features: width of the last.
      common: dtypes and initialisers.
    """

    growth: int
    features: int
    common: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index in range(5):
            width = self.features if index == 4 else self.growth
            y = nn.Conv(width, (3, 3), padding="SAME", name=f"convolution{index + 1}", **dict(self.common))(x)
            x = y if index == 4 else jnp.concatenate([x, nn.leaky_relu(y, 0.2)], axis=-1)
        return x


class _Enhance(nn.Module):
    """x + f(x) / 5, f a dense block, three convolutions and a dense block back to the channels of x.

    Attributes:
      features: width in between.
      common: dtypes and initialisers.
    """

    features: int
    common: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        growth = max(1, self.features // 2)
        y = _DenseBlock(growth, self.features, self.common, name="widen")(x)
        for index, kernel in enumerate((1, 3, 1)):
            y = nn.Conv(
                self.features, (kernel, kernel), padding="SAME", name=f"convolution{index + 1}", **dict(self.common)
            )(y)
        return x + 0.2 * _DenseBlock(growth, x.shape[-1], self.common, name="narrow")(y)


class _Resample(nn.Module):
    """3 x 3 convolutions with a GELU between each two.

    Attributes:
      widths: of the outputs.
      factors: of each: 1, -2 for a stride of 2, 2 for twice the size by a convolution to four times the width.
      common: dtypes and initialisers.
    """

    widths: tuple[int, ...]
    factors: tuple[int, ...]
    common: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index, (width, factor) in enumerate(zip(self.widths, self.factors, strict=True)):
            x = nn.gelu(x, approximate=False) if index else x
            x = nn.Conv(
                4 * width if factor == 2 else width,
                (3, 3),
                strides=max(1, -factor),
                padding="SAME",
                name=f"convolution{index + 1}",
                **dict(self.common),
            )(x)
            # Without being told, XLA's partitioner adds parts of these convolutions twice on some meshes.
            x = axes.constrain_map(x)
            x = axes.constrain_map(from_patches(x, (2, 2))) if factor == 2 else x
        return x


# Files ---------------------------------------------------------------------------------------------------------------

MAGIC = b"S2LC"
_VERSION = 1
# Magic, version, height, width, digest of the model, checksum of the symbols; then one of all these and the payload.
_HEADER = struct.Struct("<4sBHH8sI")
_CHECKSUM = struct.Struct("<I")


class Codec:
    """Pictures into bytes and back, by a model with its parameters.

    Coder and decoder call the same compiled functions, one for each step of the entropy model, on the same shapes, so
    that both compute the same means and scales to the last bit. On other hardware or another release of the compiler
    they may not: then the checksum of the symbols says so.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jaxlayers.window.s2lic import S2LIC, Codec
      >>> model = S2LIC(features=4, latent_features=4, num_slices=1, depths=(1,), num_heads=(1,), head_dim=4)
      >>> codec = Codec(model, model.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))["params"])
      >>> codec.decode(codec.encode(np.zeros((10, 20, 3), np.uint8))).shape
      (10, 20, 3)
    """

    def __init__(self, model: S2LIC, params: Params) -> None:
        """Make the tables of the hyperprior, and name the model by a digest.

        Args:
          model: the module, unbound; computed in float32 where its `dtype` is None.
          params: its parameters.
        """
        self.model, self._variables = model, {"params": params}
        self._gaussian = gaussian_tables()
        self._prior = _prior_tables(model, self._variables)
        digest = hashlib.sha256()
        for field in dataclasses.fields(model):
            value = getattr(model, field.name)
            if field.init and field.name not in ("parent", "name", "remat") and not callable(value):
                digest.update(f"{field.name}={value};".encode())
        flat = flax.traverse_util.flatten_dict(jax.device_get(dict(params)), sep="/")
        for path in sorted(flat):
            leaf = np.ascontiguousarray(flat[path])
            digest.update(f"{path} {leaf.dtype} {leaf.shape};".encode() + leaf.tobytes())
        for tables in (self._gaussian, self._prior):
            digest.update(tables.cumulative.tobytes() + tables.begins.tobytes() + tables.lowest.tobytes())
        self.digest = digest.digest()[:8]
        self.parameters = sum(leaf.size for leaf in flat.values())
        self._analyse = jax.jit(functools.partial(model.apply, method="analyse"))
        self._tell = jax.jit(functools.partial(model.apply, method="tell"))
        self._step = jax.jit(functools.partial(model.apply, method="accept_and_ask"), static_argnames="step")
        self._synthesise = jax.jit(functools.partial(model.apply, method="synthesise"), static_argnames="size")

    def encode(self, picture: np.ndarray) -> bytes:
        """Return the bytes of a picture.

        Args:
          picture: `[height, width, channels]`, uint8, each side up to 65535.

        Raises:
          ValueError: if it is no such picture, or the model gives no finite numbers for it.
        """
        picture = np.asarray(picture)
        if picture.ndim != 3 or picture.shape[-1] != self.model.channels or picture.dtype != np.uint8:
            raise ValueError(
                f"picture {picture.dtype}{list(picture.shape)} must be uint8 [height, width, {self.model.channels}]; "
                "convert it"
            )
        height, width = picture.shape[:2]
        if not (0 < height < 1 << 16 and 0 < width < 1 << 16):
            raise ValueError(f"picture of {height} x {width} must have sides from 1 to 65535; cut it")
        y, z = self._analyse(self._variables, jnp.asarray(picture, jnp.float32)[None] / 255)
        if not (np.all(np.isfinite(y)) and np.all(np.isfinite(z))):
            raise ValueError("the model must give finite numbers for the picture; take other parameters")
        encoder, checksum, latent = Encoder(), 0, np.asarray(y)

        def push(symbols: np.ndarray, tables: CodingTables, indexes: np.ndarray) -> np.ndarray:
            nonlocal checksum
            encoder.push(symbols, tables, indexes)
            checksum = _continued(checksum, symbols)
            return symbols

        def code(channels: slice, places: np.ndarray, means: np.ndarray, indexes: np.ndarray) -> np.ndarray:
            return push(_whole(latent[..., channels][places] - means), self._gaussian, indexes)

        whole = _whole(np.asarray(z))
        self._run(push(whole, self._prior, _feature_index(whole.shape)), latent.shape, code)
        head = _HEADER.pack(MAGIC, _VERSION, height, width, self.digest, checksum)
        payload = encoder.finish()
        return head + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(head))) + payload

    def decode(self, data: bytes, *, max_pixels: int = 1 << 26) -> np.ndarray:
        """Return the picture of bytes that `encode` made.

        Args:
          data: the bytes.
          max_pixels: largest picture that is decoded.

        Returns:
          `[height, width, channels]`, uint8.

        Raises:
          ValueError: if they are no such bytes, damaged, of another model, or of too large a picture; or if this
            machine computes other numbers than the one that encoded them.
        """
        first = _HEADER.size + _CHECKSUM.size
        if len(data) < first or data[: len(MAGIC)] != MAGIC:
            raise ValueError(f"data of {len(data)} bytes must start as a file of S2LIC does; pass what `encode` made")
        _, version, height, width, digest, checksum = _HEADER.unpack_from(data)
        payload = data[first:]
        if zlib.crc32(payload, zlib.crc32(data[: _HEADER.size])) != _CHECKSUM.unpack_from(data, _HEADER.size)[0]:
            raise ValueError("the checksum must be that of the data: they are damaged or cut off; copy the file anew")
        if version != _VERSION:
            raise ValueError(f"version {version} must be {_VERSION}; decode with the release that encoded")
        if digest != self.digest:
            raise ValueError(
                f"the data were encoded by model {digest.hex()}, not by {self.digest.hex()}; pass its parameters"
            )
        if not 0 < height * width <= max_pixels:
            raise ValueError(f"picture of {height} x {width} must have 1 to {max_pixels} pixels; set max_pixels")
        decoder, found = Decoder(payload), 0

        def pop(tables: CodingTables, indexes: np.ndarray) -> np.ndarray:
            nonlocal found
            symbols = decoder.pop(tables, indexes)
            found = _continued(found, symbols)
            return symbols

        def code(channels: slice, places: np.ndarray, means: np.ndarray, indexes: np.ndarray) -> np.ndarray:
            return pop(self._gaussian, indexes)

        multiple = self.model.stride * _HYPER_STRIDE
        rows, columns = (-(-length // multiple) for length in (height, width))
        whole = pop(self._prior, _feature_index((1, rows, columns, self.model.features)))
        shape = (1, rows * _HYPER_STRIDE, columns * _HYPER_STRIDE, self.model.latent_features)
        decoded = self._run(whole, shape, code)
        decoder.finish()
        if found != checksum:
            raise ValueError("this machine must compute what the encoding one did, and did not; decode on such a one")
        picture = self._synthesise(self._variables, decoded, size=(height, width))[0]
        return np.asarray(jnp.round(jnp.clip(picture, 0, 1) * 255)).astype(np.uint8)

    def _run(self, hyper_symbols: np.ndarray, shape: tuple[int, ...], code: Callable[..., np.ndarray]) -> jax.Array:
        """Return the latent map, asking `code` for the symbols of each step's channels and places."""
        hyper = self._tell(self._variables, jnp.asarray(hyper_symbols, jnp.float32))
        decoded = jnp.zeros(shape, jnp.float32)
        steps, slices = 2 * self.model.num_slices, self.model.latent_features // self.model.num_slices
        values = np.zeros((*shape[:-1], slices), np.float32)
        for step in range(steps + 1):
            decoded, *asked = self._step(self._variables, hyper, decoded, jnp.asarray(values), step=step)
            if step < steps:
                places = checkerboard(shape[1:3])[None] == (step % 2 == 0)
                means, indexes = (np.asarray(one)[places] for one in asked)
                if not np.all(np.isfinite(means)):
                    raise ValueError("the model must give finite numbers for the picture; take other parameters")
                channels = slice(step // 2 * slices, (step // 2 + 1) * slices)
                values = np.zeros_like(values)
                values[places] = means + code(channels, places, means, indexes)
        return decoded


def _whole(x: np.ndarray) -> np.ndarray:
    return np.rint(x).astype(np.int64)


def _feature_index(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[-1]), shape)


def _continued(checksum: int, symbols: np.ndarray) -> int:
    return zlib.crc32(symbols.astype("<i8").tobytes(), checksum)


def _prior_tables(model: S2LIC, variables: Params, reach: int = 512) -> CodingTables:
    """Return a table for each feature of the hyperprior, over the whole numbers that are not too unlikely."""
    numbers = jnp.broadcast_to(jnp.arange(-reach, reach + 1.0)[:, None], (2 * reach + 1, model.features))
    bits = jax.jit(functools.partial(model.apply, method="prior_bits"))(variables, numbers)
    probabilities, lowest = [], []
    for mass in np.exp2(-np.asarray(bits, np.float64)).T:
        likely = np.flatnonzero(mass > 1e-5)
        if not len(likely):
            likely = np.array([reach])
        one = np.maximum(mass[likely[0] : likely[-1] + 1], 0)
        # Interval by interval in float32: the sum may be more than 1 by rounding.
        probabilities.append(one / max(1.0, one.sum()))
        lowest.append(int(likely[0]) - reach)
    return coding_tables(probabilities, lowest)


VARIANTS: dict[str, dict[str, Any]] = {
    # The sizes of the public code.
    "s2lic": {"module": S2LIC, "inputs": (jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32),)}
}
