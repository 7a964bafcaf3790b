"""Which of several kernels computes what has more than one: compositions of JAX operations, or Pallas kernels.

The choice is made while a function is traced, by the innermost `use` around it:

    with dispatch.use("table"):
        logits = jax.jit(model.apply)(variables, x)

"jnp", the default, serves everything everywhere. "pallas" takes a Pallas kernel wherever there is one, and refuses what
that does not serve. "table" takes it where a table below says that it is faster on the platform, and "jnp" elsewhere.
Parameters, values and gradients are the same.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp

from jaxlayers.core import axes

_F = TypeVar("_F", bound=Callable[..., Any])

Kernel = Literal["jnp", "pallas"]
"""A composition of JAX operations, or a Pallas kernel."""

Choice = Literal["jnp", "pallas", "table"]

MOST_WINDOWS = 64
"""In a row of a map that `pallas_cut` serves."""
MOST_ROW_BYTES = 2**20
"""Of a row of windows that `pallas_cut` serves."""

MOST_WINDOW_TOKENS = 256
"""Of a window that `pallas_window` serves."""

MOST_RADIAL_OUTPUTS = 24576
"""Of the radial functions of an edge that `pallas_edges` serves: all pairs of channels and paths."""

MOST_WEIGHTS = 2**20
"""Of either projection of a perceptron that `pallas_feed_forward` serves."""
MOST_TOKENS = 1024
"""Of a row of tokens that `pallas_feed_forward` serves, unless they are a multiple of 8."""
MOST_PROJECTION = 2**16
"""Of the weights of a projection that `pallas_project` serves."""
MOST_BLOCK_TOKENS = 64
"""Of a window that `pallas_window_block` serves."""
MOST_BLOCK_FEATURES = 768
"""Of tokens that `pallas_window_block` serves: its weights and their gradients stay in fast memory."""

# Part of the key of JAX's tracing caches: a jitted function is traced again under another value.
_scope = jax.make_user_context(("jnp", ""))


@dataclasses.dataclass(frozen=True)
class Row:
    """When a Pallas kernel for windows is taken.

    Attributes:
      platform: what the program is compiled for.
      tokens: the fewest and the most tokens of a window.
      dim: the fewest and the most features of a head.
      features: the fewest and the most features of a token.
    """

    platform: str
    tokens: tuple[int, int]
    dim: tuple[int, int]
    features: tuple[int, int] = (1, 2**20)

    def fits(self, platform: str, tokens: int, dim: int, features: int = 1) -> bool:
        """Return whether a call is within the row."""
        given = ((self.tokens, tokens), (self.dim, dim), (self.features, features))
        return platform == self.platform and all(low <= value <= high for (low, high), value in given)


# By the TPU compiler's estimates, see docs/decisions/window_kernel.md; on no other platform is there a kernel.
WINDOW_TABLE: tuple[Row, ...] = (Row("tpu", tokens=(49, 144), dim=(32, 32)),)
BLOCK_TABLE: tuple[Row, ...] = (Row("tpu", tokens=(49, 64), dim=(32, 32), features=(96, 512)),)
COSINE_BLOCK_TABLE: tuple[Row, ...] = (Row("tpu", tokens=(49, 64), dim=(32, 32), features=(96, 768)),)


@dataclasses.dataclass(frozen=True)
class EdgeRow:
    """When the Pallas kernel for messages of SE(3)-equivariant edges is taken.

    Attributes:
      platform: what the program is compiled for.
      degree: the least and the greatest highest degree.
      outputs: the fewest and the most outputs of the radial functions of an edge.
    """

    platform: str
    degree: tuple[int, int]
    outputs: tuple[int, int]


# By the TPU compiler's estimates, see docs/decisions/edge_kernel.md; on no other platform is there a kernel.
EDGE_TABLE: tuple[EdgeRow, ...] = (EdgeRow("tpu", degree=(1, 1), outputs=(2400, 2400)),)

# Features of a map whose patches are normed and projected by a convolution, and the fewest patches, see
# docs/decisions/patch_convolution.md.
PATCH_TABLE: tuple[tuple[str, tuple[int, int], int], ...] = (("tpu", (96, 384), 1568),)

# Features of a perceptron whose hidden layer is at most four times as wide, see docs/decisions/feed_forward_kernel.md.
FEED_FORWARD_TABLE: tuple[tuple[str, tuple[int, int]], ...] = (("tpu", (96, 512)),)

# Features of tokens that are projected and normed, before and after, see docs/decisions/patch_convolution.md.
PROJECT_TABLE: tuple[tuple[str, tuple[int, int], tuple[int, int]], ...] = (("tpu", (48, 48), (96, 128)),)


@contextlib.contextmanager
def use(choice: str, *, platform: str = "") -> Iterator[None]:
    """Choose the kernels of what is traced within.

    Args:
      choice: see above.
      platform: what is compiled for, where that is not the default backend, as when a TPU's program is compiled on a
        machine without one.

    Raises:
      ValueError: if there is no such choice.
    """
    if choice not in get_args(Choice):
        raise ValueError(f"kernels={choice!r} must be one of {get_args(Choice)}; set kernels")
    with _scope((choice, platform)):
        yield


def using(fn: _F, choice: str) -> _F:
    """Return `fn` run under `use`, with the platform of the scope around it."""

    @functools.wraps(fn)
    def under(*arguments: Any, **keywords: Any) -> Any:
        with use(choice, platform=_scope.value[1]):
            return fn(*arguments, **keywords)

    return under  # type: ignore[return-value]


def check_kernel(kernel: str) -> str:
    """Return the name of a kernel.

    Raises:
      ValueError: if there is none of that name.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel={kernel!r} must be one of {get_args(Kernel)}; set kernel")
    return kernel


def window_kernel(tokens: int, dim: int, dtype: Any, dropout_rate: float) -> Kernel:
    """Return which kernel computes an attention within windows.

    Args:
      tokens: tokens of a window.
      dim: features of a head.
      dtype: of queries, keys and values.
      dropout_rate: of the weights.

    Raises:
      ValueError: if "pallas" was chosen and its kernel does not serve this.
    """
    choice, platform = _scope.value
    if choice == "jnp":
        return "jnp"
    platform = platform or jax.default_backend()
    dtype = jnp.dtype(dtype)  # a field may have its name
    # Only bfloat16 was weighed.
    fits = dtype == jnp.bfloat16 and any(row.fits(platform, tokens, dim) for row in WINDOW_TABLE)
    return _served(choice, fits, _refusal(tokens, dtype, dropout_rate, platform))


def edge_kernel(outputs: int, degree: int, dtype: Any) -> Kernel:
    """Return which kernel computes messages of SE(3)-equivariant edges.

    Args:
      outputs: outputs of the radial functions of an edge: channels_k features_l (2 min(k, l) + 1) over all pairs of
        degrees (k, l).
      degree: the highest degree.
      dtype: of the messages.

    Raises:
      ValueError: if "pallas" was chosen and its kernel does not serve this.
    """
    choice, platform = _scope.value
    if choice == "jnp":
        return "jnp"
    platform = platform or jax.default_backend()
    dtype = jnp.dtype(dtype)
    refusal = _platform_refusal(platform) or _dtype_refusal(dtype)
    if outputs > MOST_RADIAL_OUTPUTS:
        refusal = refusal or f"radial functions of {outputs} outputs must have at most {MOST_RADIAL_OUTPUTS}"
    # Only float32 was weighed.
    fits = dtype == jnp.float32 and any(
        platform == row.platform
        and row.degree[0] <= degree <= row.degree[1]
        and row.outputs[0] <= outputs <= row.outputs[1]
        for row in EDGE_TABLE
    )
    return _served(choice, fits, refusal)


def block_kernel(
    tokens: int, heads: int, features: int, dtype: Any, dropout_rate: float, *, cosine: bool = False
) -> Kernel:
    """Return which kernel computes an attention within windows together with its projections, and the norm before it.

    "pallas" takes it where it serves and refuses nothing: the rest is left to `window_kernel`.

    Args:
      tokens: tokens of a window.
      heads: number of heads, which the logical rules may not split over devices.
      features: of a token.
      dtype: of queries, keys and values.
      dropout_rate: of the weights.
      cosine: scores are cosines, and a norm is one of the result.
    """
    choice, platform = _scope.value
    platform = platform or jax.default_backend()
    # Heads are whole tiles of eight rows.
    whole = heads > 0 and features % (8 * heads) == 0
    dtype = jnp.dtype(dtype)
    if choice == "jnp" or not whole or tokens > MOST_BLOCK_TOKENS or features > MOST_BLOCK_FEATURES:
        return "jnp"
    if _refusal(tokens, dtype, dropout_rate, platform) or _parts(heads, axes.HEADS) > 1:
        return "jnp"
    # Only bfloat16 was weighed.
    table = COSINE_BLOCK_TABLE if cosine else BLOCK_TABLE
    fits = dtype == jnp.bfloat16 and any(row.fits(platform, tokens, features // heads, features) for row in table)
    return "pallas" if choice == "pallas" or fits else "jnp"


def cut_kernel(size: Sequence[int], window: Sequence[int], features: int, dtype: Any) -> Kernel:
    """Return which kernel cuts a map into windows and joins them.

    It only moves entries, so "pallas" takes it where it serves and refuses nothing; by "table" it is taken on TPU.

    Args:
      size: of the map, multiples of the window.
      window: along each axis.
      features: of the map.
      dtype: of the map.
    """
    choice, platform = _scope.value
    platform = platform or jax.default_backend()
    if choice == "jnp" or platform not in (("cpu", "tpu") if choice == "pallas" else ("tpu",)):
        return "jnp"
    row = window[0] * size[-1] * -(-features // 128) * 128 * jnp.dtype(dtype).itemsize
    serves = len(size) == 2 and dtype in (jnp.float32, jnp.bfloat16)
    return "pallas" if serves and size[1] // window[1] <= MOST_WINDOWS and row <= MOST_ROW_BYTES else "jnp"


def convolves_patches(patches: int, features: int, dtype: Any) -> bool:
    """Return whether patches of a map are projected by a convolution (`ops.patches.project_patches`), normed or not.

    "pallas" takes it in float32 and bfloat16, "table" in bfloat16, which was weighed, on TPU.

    Args:
      patches: of all maps.
      features: of a map.
      dtype: of the maps, and of the product.
    """
    choice, platform = _scope.value
    platform = platform or jax.default_backend()
    dtype = jnp.dtype(dtype)
    if choice == "table":
        return dtype == jnp.bfloat16 and any(
            platform == name and least <= features <= most and patches >= fewest
            for name, (least, most), fewest in PATCH_TABLE
        )
    return choice == "pallas" and not _dtype_refusal(dtype)


def feed_forward_kernel(tokens: int, features: int, hidden: int, dtype: Any) -> Kernel:
    """Return which kernel computes x + MLP(norm(x)).

    "pallas" takes it where it serves and refuses nothing, since what a block consists of may be another thing. Where
    the logical rules split the hidden layer over devices it is "jnp".

    Args:
      tokens: along the last axis of tokens.
      features: of a token.
      hidden: width of the hidden layer.
      dtype: of the tokens, and of all products.
    """
    choice, platform = _scope.value
    platform = platform or jax.default_backend()
    dtype = jnp.dtype(dtype)
    if choice == "jnp" or platform not in ("cpu", "tpu") or dtype not in (jnp.float32, jnp.bfloat16):
        return "jnp"
    if _parts(hidden, axes.HIDDEN) > 1 or features * hidden > MOST_WEIGHTS or (tokens > MOST_TOKENS and tokens % 8):
        return "jnp"
    # Only bfloat16 was weighed.
    fits = dtype == jnp.bfloat16 and any(
        platform == name and least <= features <= most and hidden <= 4 * features
        for name, (least, most) in FEED_FORWARD_TABLE
    )
    return "pallas" if choice == "pallas" or fits else "jnp"


def project_kernel(tokens: int, features: int, out_features: int, dtype: Any) -> Kernel:
    """Return which kernel computes norm(x W + b).

    "pallas" takes it where it serves and refuses nothing.

    Args:
      tokens: along the last axis of tokens.
      features: of a token.
      out_features: of what it is projected to.
      dtype: of the tokens, and of the product.
    """
    choice, platform = _scope.value
    platform = platform or jax.default_backend()
    dtype = jnp.dtype(dtype)
    if choice == "jnp" or _platform_refusal(platform) or _dtype_refusal(dtype):
        return "jnp"
    if tokens % 8 or features * out_features > MOST_PROJECTION:
        return "jnp"
    # Only bfloat16 was weighed.
    fits = dtype == jnp.bfloat16 and any(
        platform == name and least <= features <= most and fewest <= out_features <= greatest
        for name, (least, most), (fewest, greatest) in PROJECT_TABLE
    )
    return "pallas" if choice == "pallas" or fits else "jnp"


def _served(choice: str, fits: bool, refusal: str) -> Kernel:
    """Return the kernel of a call that a table's row fits or not; a refused one that was chosen is an error."""
    if choice == "pallas" and refusal:
        raise ValueError(f"{refusal} with kernels='pallas'; choose 'table' or 'jnp'")
    return "pallas" if not refusal and (fits or choice == "pallas") else "jnp"


def _parts(length: int, name: str) -> int:
    """Return over how many devices the logical rules split an axis of that name."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[each] for each in axes.split((length,), name)[0])


def _refusal(tokens: int, dtype: Any, dropout_rate: float, platform: str) -> str:
    """Return which rule of the kernel for windows a call breaks; empty = none."""
    if found := _platform_refusal(platform):
        return found
    if dropout_rate:
        return f"attention_dropout_rate={dropout_rate} must be 0"
    if tokens > MOST_WINDOW_TOKENS:
        return f"windows of {tokens} tokens must have at most {MOST_WINDOW_TOKENS}"
    return _dtype_refusal(dtype)


def _platform_refusal(platform: str) -> str:
    return "" if platform in ("cpu", "tpu") else f"platform {platform!r} must be TPU (or CPU, interpreted)"


def _dtype_refusal(dtype: Any) -> str:
    return "" if dtype in (jnp.float32, jnp.bfloat16) else f"dtype={dtype} must be float32 or bfloat16"
