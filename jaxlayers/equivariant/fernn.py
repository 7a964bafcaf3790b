"""Flow-equivariant recurrence: hidden states that move along with every velocity, for sequences of moving pictures."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes
from jaxlayers.core.dtypes import compute_dtype
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer

Velocity = tuple[int, int]
Velocities = Sequence[Velocity]

POOLINGS = ("max", "mean", "sum", "none")


# Velocities and flows ------------------------------------------------------------------------------------------------


def velocity_grid(radius: int) -> tuple[Velocity, ...]:
    """Return all velocities (rows, columns) of up to `radius` pixels a step in each direction, sorted.

    Example:
      >>> velocity_grid(1)[:4]
      ((-1, -1), (-1, 0), (-1, 1), (0, -1))
    """
    if radius < 0:
        raise ValueError(f"radius={radius} must not be negative; set radius")
    steps = range(-radius, radius + 1)
    return tuple((row, column) for row in steps for column in steps)


def cyclic_velocities(rows: int, columns: int) -> tuple[Velocity, ...]:
    """Return the group of all velocities on a periodic grid of that size; 1 leaves an axis at rest.

    Example:
      >>> cyclic_velocities(1, 3)
      ((0, 0), (0, 1), (0, 2))
    """
    if min(rows, columns) < 1:
        raise ValueError(f"rows={rows} and columns={columns} must be at least 1; set them")
    return tuple((row, column) for row in range(rows) for column in range(columns))


def flow(
    sequence: Float[Array, "*batch time height width channels"], velocity: Velocity, *, start: int = 0
) -> Float[Array, "*batch time height width channels"]:
    """Return the sequence with frame t moved by (start + t) x velocity pixels, cyclically: psi(v) x.

    Example:
      >>> import jax.numpy as jnp
      >>> frames = jnp.array([1.0, 0.0, 0.0]).reshape(1, 3, 1) * jnp.ones((3, 1, 1, 1))
      >>> flow(frames, (0, 1))[..., 0, :, 0].tolist()
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    steps = start + np.arange(sequence.shape[-4])
    return _rolled(sequence, [(int(t * velocity[0]), int(t * velocity[1])) for t in steps])


def flow_hidden(
    hidden: Float[Array, "*batch time velocities height width features"], velocities: Velocities, velocity: Velocity
) -> tuple[Float[Array, "*batch time velocities height width features"], Bool[Array, " velocities"]]:
    """Return what hidden states become when their input flows: h_t(v - v0, psi_t(v0)^{-1} g).

    Args:
      hidden: of a network over all time.
      velocities: V.
      velocity: v0.

    Returns:
      The moved states, and for which v the velocity v - v0 is in V, modulo the grid; the other states are zeros.
    """
    grid = hidden.shape[-3:-1]
    index, known = _places(velocities, [(-velocity[0], -velocity[1])], grid)
    taken = jnp.where(known[:, 0, None, None, None], hidden[..., index[:, 0], :, :, :], 0)
    frames = [
        jnp.roll(taken[..., t, :, :, :, :], (t * velocity[0], t * velocity[1]), axis=(-3, -2))
        for t in range(taken.shape[-5])
    ]
    return jnp.stack(frames, axis=-5), jnp.asarray(known[:, 0])


def _rolled(x: jax.Array, shifts: Velocities) -> jax.Array:
    """Return `[*batch, n, height, width, features]` with entry i rolled by shift i."""
    moved = [jnp.roll(x[..., i, :, :, :], shift, axis=(-3, -2)) for i, shift in enumerate(shifts)]
    return jnp.stack(moved, axis=-4)


def _places(velocities: Velocities, differences: Velocities, grid: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of v + d for each v and d, `[velocities, differences]`, and whether it is there."""
    # A roll by the size of the grid is none.
    wrapped = [(row % grid[0], column % grid[1]) for row, column in velocities]
    if len(set(wrapped)) < len(wrapped):
        raise ValueError(
            f"velocities={tuple(velocities)} must differ on a grid of {grid[0]} x {grid[1]} pixels, which they wrap "
            "around; leave out the doubles"
        )
    where = {velocity: index for index, velocity in enumerate(wrapped)}
    places = [
        [where.get(((v[0] + d[0]) % grid[0], (v[1] + d[1]) % grid[1]), -1) for d in differences] for v in velocities
    ]
    index = np.array(places).reshape(len(velocities), len(differences))
    return np.maximum(index, 0), index >= 0


# Cells ---------------------------------------------------------------------------------------------------------------


def _check_sizes(features: int, *kernel_sizes: Sequence[int]) -> None:
    if features < 1 or any(len(size) != 2 or min(size) < 1 for size in kernel_sizes):
        raise ValueError(
            f"features={features} and the kernel sizes {[tuple(size) for size in kernel_sizes]} must be positive, two "
            "for each kernel; set them"
        )


def _check_frame(inputs: jax.Array, hidden_shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if inputs.ndim < 3 or hidden_shape != expected:
        raise ValueError(
            f"inputs of shape {inputs.shape} and a hidden state of shape {hidden_shape} must be [*batch, height, "
            f"width, channels] and {list(expected)}; use initial_state"
        )


class FlowEquivariantCell(nn.Module):
    """Update a hidden state that holds one map for each velocity, each of which moves by its own velocity.

    h_{t+1}(v, g) = act(psi_1(v) [W * h_t](v, g) + [U * x_t](g)), with v in V, pixels g, psi_1(v) the roll by v pixels,
    circular convolutions, [W * h](v) = sum_d W_d * h(v + d) over `differences` d, and the input the same for all v.

    Symmetry:
      Over time, flows v0 of the input: h[psi(v0) x]_t(v, g) = h[x]_t(v - v0, psi_t(v0)^{-1} g), exactly, for all v
      with v - v0 in V, if the initial state is zero; see `FlowEquivariantRNN`.
      Where it breaks: with other `differences` than (0, 0), also at those v from which a sum leaves V. Never for a V
      that is a group on the grid, as `cyclic_velocities` of its size.

    Attributes:
      features: width of the hidden maps.
      velocities: V, pairs of whole pixels a step (rows, columns).
      differences: pairs d by which the recurrence mixes velocities; (0, 0) alone keeps each to itself.
      kernel_size: of W, on each map.
      input_kernel_size: of U.
      activation_fn: the nonlinearity.
      use_bias: whether U has a bias.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the bias.

    Cost:
      That of a plain cell times the number of velocities.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.fernn import FlowEquivariantCell, velocity_grid
      >>> cell = FlowEquivariantCell(4, velocity_grid(1))
      >>> frame = jnp.ones((2, 8, 8, 1))
      >>> cell.init_with_output(jax.random.key(0), cell.initial_state(frame), frame)[0].shape
      (2, 9, 8, 8, 4)

    Source:
      Keller, Flow Equivariant Recurrent Neural Networks, NeurIPS 2025, arXiv:2507.14793, section 4; reference code
      akandykeller/FERNN, commit 7def7bc, `FERNN_Cell`.

    Differs:
      Channels last; velocities are (rows, columns). The code keeps velocities apart; `differences` make the recurrence
      a convolution over V as well. Only translation flows.
    """

    features: int
    velocities: Velocities = ((0, 0),)
    differences: Velocities = ((0, 0),)
    kernel_size: Sequence[int] = (3, 3)
    input_kernel_size: Sequence[int] = (3, 3)
    activation_fn: ActivationFn = nn.relu
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    def initial_state(self, frame: Float[Array, "*batch height width channels"]) -> Array:
        """Return zeros `[*batch, velocities, height, width, features]`."""
        *batch, height, width, _ = frame.shape
        shape = (*batch, len(self.velocities), height, width, self.features)
        return jnp.zeros(shape, compute_dtype(frame, dtype=self.dtype))

    def advance(self, hidden: Float[Array, "*batch velocities height width features"]) -> Array:
        """Return each map moved on by one step of its velocity, without new input."""
        return _rolled(hidden, self.velocities)

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "*batch velocities height width features"],
        inputs: Float[Array, "*batch height width channels"],
    ) -> Float[Array, "*batch velocities height width features"]:
        """Take one step.

        Args:
          hidden: the state, see `initial_state`.
          inputs: one frame. NaN spreads to all later states.

        Returns:
          The next state.

        Raises:
          ValueError: if shapes do not fit, a size is not positive, or velocities coincide on the grid.
        """
        _check_sizes(self.features, self.kernel_size, self.input_kernel_size)
        if not self.velocities or not self.differences:
            raise ValueError("velocities and differences must not be empty; set them, at least to ((0, 0),)")
        expected = (*inputs.shape[:-3], len(self.velocities), *inputs.shape[-3:-1], self.features)
        _check_frame(inputs, hidden.shape, expected)
        conv = _convolution(self)
        lifted = conv(self.input_kernel_size, self.use_bias, name="input")(inputs)
        index, known = _places(self.velocities, self.differences, inputs.shape[-3:-1])
        if len(self.differences) > 1 or not np.array_equal(index[:, 0], np.arange(len(self.velocities))):
            reached = hidden[..., index, :, :, :]
            reached = jnp.where(known[..., None, None, None], reached, 0)
            reached = jnp.moveaxis(reached, -4, -2)
            hidden = reached.reshape(*reached.shape[:-2], -1)
        mixed = conv(self.kernel_size, False, name="recurrent")(hidden)
        return self.activation_fn(_rolled(mixed, self.velocities) + lifted[..., None, :, :, :])


class ConvCell(nn.Module):
    """Update a hidden map by convolutions of it and of the input: the cell of a plain convolutional RNN.

    h_{t+1} = act(W * h_t + U * x_t), with circular convolutions.

    Symmetry:
      Static cyclic shifts of all frames: exact. Not to flows: it is the control of `FlowEquivariantCell`, and equals
      the one with V = {0}.

    Attributes:
      features: width of the hidden map.
      kernel_size: of W.
      input_kernel_size: of U.
      activation_fn: the nonlinearity.
      use_bias: whether U has a bias.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the bias.

    Cost:
      Two convolutions a step.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.fernn import ConvCell
      >>> cell, frame = ConvCell(4), jnp.ones((2, 8, 8, 1))
      >>> cell.init_with_output(jax.random.key(0), cell.initial_state(frame), frame)[0].shape
      (2, 8, 8, 4)

    Source:
      The G-RNN of Keller, Flow Equivariant Recurrent Neural Networks, NeurIPS 2025, arXiv:2507.14793.

    Differs:
      Channels last.
    """

    features: int
    kernel_size: Sequence[int] = (3, 3)
    input_kernel_size: Sequence[int] = (3, 3)
    activation_fn: ActivationFn = nn.relu
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    def initial_state(self, frame: Float[Array, "*batch height width channels"]) -> Array:
        """Return zeros `[*batch, height, width, features]`."""
        return jnp.zeros((*frame.shape[:-1], self.features), compute_dtype(frame, dtype=self.dtype))

    def advance(self, hidden: Float[Array, "*batch height width features"]) -> Array:
        """Return the map as it is: it knows no velocity."""
        return hidden

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "*batch height width features"],
        inputs: Float[Array, "*batch height width channels"],
    ) -> Float[Array, "*batch height width features"]:
        """Take one step.

        Args:
          hidden: the state, see `initial_state`.
          inputs: one frame.

        Returns:
          The next state.

        Raises:
          ValueError: if shapes do not fit or a size is not positive.
        """
        _check_sizes(self.features, self.kernel_size, self.input_kernel_size)
        _check_frame(inputs, hidden.shape, (*inputs.shape[:-1], self.features))
        conv = _convolution(self)
        recurrent = conv(self.kernel_size, False, name="recurrent")(hidden)
        return self.activation_fn(recurrent + conv(self.input_kernel_size, self.use_bias, name="input")(inputs))


def _convolution(cell: FlowEquivariantCell | ConvCell) -> Callable[..., nn.Conv]:
    def make(kernel_size: Sequence[int], use_bias: bool, *, name: str) -> nn.Conv:
        return nn.Conv(
            cell.features,
            tuple(kernel_size),
            padding="CIRCULAR",
            use_bias=use_bias,
            dtype=cell.dtype,
            param_dtype=cell.param_dtype,
            kernel_init=cell.kernel_init,
            bias_init=cell.bias_init,
            name=name,
        )

    return make


# Networks ------------------------------------------------------------------------------------------------------------


def _pooled(cell: nn.Module, hidden: jax.Array, pooling: str) -> jax.Array:
    """Pool over velocities, where the cell has any."""
    if pooling not in POOLINGS:
        raise ValueError(f"velocity_pooling={pooling!r} is unknown; use one of {POOLINGS}")
    if pooling == "none" or not hasattr(cell, "velocities"):
        return hidden
    pools: dict[str, Callable[..., jax.Array]] = {"max": jnp.max, "mean": jnp.mean, "sum": jnp.sum}
    return pools[pooling](hidden, axis=-4)


def _frames(inputs: jax.Array) -> jax.Array:
    """Return the frames with time first."""
    if inputs.ndim < 4 or not inputs.shape[-4]:
        raise ValueError(
            f"a sequence of shape {inputs.shape} must be [*batch, time, height, width, channels] with at least one "
            "frame; add axes"
        )
    return jnp.moveaxis(inputs, -4, 0)


def _scanned(step: Callable[..., Any], length: int | None = None) -> Callable[..., Any]:
    return nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, length=length)


class FlowEquivariantRNN(nn.Module):
    """Run a cell over a sequence of frames, and pool its maps over the velocities.

    h_0 = 0, h_{t+1} = cell(h_t, x_t), y_t = pool_v h_{t+1}(v).

    Symmetry:
      With a `FlowEquivariantCell`, flows of the input by v0 pixels a step: if V is closed under v - v0 on the periodic
      grid, y_t moves by t v0 pixels, exactly. If V is a truncated set, the hidden states obey
      h[psi(v0) x]_t(v, g) = h[x]_t(v - v0, psi_t(v0)^{-1} g) where v - v0 is in V, and y_t up to what the velocities
      at the border of V contribute. Static cyclic shifts always. With a `ConvCell`, static shifts only.

    Attributes:
      cell: `FlowEquivariantCell` or `ConvCell`.
      velocity_pooling: `"max"`, `"mean"`, `"sum"`, or `"none"`, which keeps the axis of velocities before the grid.

    Cost:
      Linear in time; the states of all steps are kept for the gradient.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import FlowEquivariantCell, FlowEquivariantRNN
      >>> model = FlowEquivariantRNN(FlowEquivariantCell(4, velocities=((0, -1), (0, 0), (0, 1))))
      >>> model.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8, 8, 1)))[0].shape
      (2, 5, 8, 8, 4)

    Source:
      Keller, Flow Equivariant Recurrent Neural Networks, NeurIPS 2025, arXiv:2507.14793, section 4; reference code
      akandykeller/FERNN, commit 7def7bc.

    Differs:
      One layer of recurrence; stack by feeding the maps on.
    """

    cell: nn.Module
    velocity_pooling: str = "max"

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch time height width channels"]
    ) -> (
        Float[Array, "*batch time height width features"] | Float[Array, "*batch time velocities height width features"]
    ):
        """Run over all frames.

        Args:
          inputs: frames on a periodic grid.

        Returns:
          Maps for each frame.

        Raises:
          ValueError: if the inputs are no sequence, or a name is unknown.
        """
        frames = _frames(inputs)

        def step(model: Any, hidden: jax.Array, frame: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = model.cell(hidden, frame)
            return hidden, _pooled(model.cell, hidden, model.velocity_pooling)

        start = _carry(self.cell, frames)
        _, out = _scanned(step)(self, start, frames)
        lead = inputs.ndim - 4
        return axes.constrain(jnp.moveaxis(out, 0, lead), *_names(lead, out.ndim))


def _names(lead: int, ndim: int) -> tuple[str | None, ...]:
    """Name the first axis of the batch."""
    return ((axes.BATCH,) if lead else (None,)) + (None,) * (ndim - 1)


def _carry(cell: Any, frames: jax.Array) -> jax.Array:
    start = cell.initial_state(frames[0])
    # The state of a cell whose parameters are wider than the frames is as wide as they.
    if cell.dtype is None:
        start = start.astype(jnp.promote_types(start.dtype, cell.param_dtype))
    return start


class FlowForecaster(nn.Module):
    """Predict the frames that follow a sequence, one from the other.

    After the given frames, T of them: y_{T+k} = decoder(pool_v psi_1(v) h(v)), h <- cell(h, y_{T+k}) for k = 0, 1, ...:
    every map moves on by its velocity before it is read, so that what it predicts is where the next frame will be.

    Symmetry:
      With a `FlowEquivariantCell` of velocities closed under v - v0 on the periodic grid, and a decoder that is
      equivariant to cyclic shifts: if the input flows with v0, so do the predictions, y_{T+k} moves by (T + k) v0,
      exactly. Static cyclic shifts always. With `repeat_last=True`, as in the reference code, flows are broken: the
      recurrence then pairs every frame with the state of one step later.

    Attributes:
      cell: `FlowEquivariantCell` or `ConvCell`.
      decoder: module from maps to frames, such as `nn.Conv` with circular padding.
      horizon: number of frames to predict.
      velocity_pooling: `"max"`, `"mean"` or `"sum"`.
      repeat_last: feed the last frame twice and read states after a step, as the reference code does.
      stop_gradient: hand no gradient through the frames that are fed back, as the reference code does.

    Cost:
      T + horizon steps of the cell.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import FlowEquivariantCell, FlowForecaster
      >>> decoder = nn.Conv(1, (3, 3), padding="CIRCULAR")
      >>> model = FlowForecaster(FlowEquivariantCell(4, ((0, 0), (0, 1))), decoder, horizon=3)
      >>> model.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8, 8, 1)))[0].shape
      (2, 3, 8, 8, 1)

    Source:
      Keller, Flow Equivariant Recurrent Neural Networks, NeurIPS 2025, arXiv:2507.14793, section 5; reference code
      akandykeller/FERNN, commit 7def7bc, `Seq2SeqFERNN`.

    Differs:
      States are moved on before they are read, in place of feeding the last frame twice, which breaks flow
      equivariance from the first predicted frame on; `repeat_last=True` gives the reference's order. No teacher
      forcing.
    """

    cell: nn.Module
    decoder: nn.Module
    horizon: int = 10
    velocity_pooling: str = "max"
    repeat_last: bool = False
    stop_gradient: bool = True

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch time height width channels"]
    ) -> Float[Array, "*batch horizon height width channels"]:
        """Predict.

        Args:
          inputs: frames on a periodic grid.

        Returns:
          The next `horizon` frames.

        Raises:
          ValueError: if the inputs are no sequence, the horizon is not positive, or a name is unknown.
        """
        if self.horizon < 1 or self.velocity_pooling == "none":
            raise ValueError(
                f"horizon={self.horizon} must be at least 1 and velocity_pooling={self.velocity_pooling!r} must pool; "
                "set them"
            )
        frames = _frames(inputs)

        def encode(model: Any, hidden: jax.Array, frame: jax.Array) -> tuple[jax.Array, None]:
            return model.cell(hidden, frame), None

        def read(model: Any, hidden: jax.Array, dtype: Dtype) -> tuple[jax.Array, jax.Array]:
            frame = model.decoder(_pooled(model.cell, hidden, model.velocity_pooling))
            return frame, (jax.lax.stop_gradient(frame) if model.stop_gradient else frame).astype(dtype)

        def predict(model: Any, carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[Any, ...], jax.Array]:
            hidden, frame = carry
            if model.repeat_last:
                hidden = model.cell(hidden, frame)
                frame, fed = read(model, hidden, frame.dtype)
            else:
                frame, fed = read(model, model.cell.advance(hidden), frame.dtype)
                hidden = model.cell(hidden, fed)
            return (hidden, fed), frame

        hidden, _ = _scanned(encode)(self, _carry(self.cell, frames), frames)
        last = frames[-1].astype(hidden.dtype)
        _, out = _scanned(predict, self.horizon)(self, (hidden, last), None)
        lead = inputs.ndim - 4
        return axes.constrain(jnp.moveaxis(out, 0, lead), *_names(lead, out.ndim))


class FlowClassifier(nn.Module):
    """Classify sequences by the last maps of a recurrent network, averaged over the grid.

    logits = W mean_g y_T(g), with y_T `[*batch, height, width, features]` the pooled maps after the last frame.

    Symmetry:
      Invariant to static cyclic shifts and, with a `FlowEquivariantCell` whose velocities are closed under v - v0 on
      the periodic grid, to flows of the input by v0: exact.

    Attributes:
      rnn: `FlowEquivariantRNN` that pools over velocities, or another module from sequences to sequences of maps.
      num_classes: number of logits; 0 gives the features before the head.
      spatial_pooling: `"mean"` or `"max"` over the grid.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the head's kernel.
      bias_init: initialiser of the head's bias.

    Cost:
      That of the network.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import FlowClassifier, FlowEquivariantCell, FlowEquivariantRNN
      >>> model = FlowClassifier(FlowEquivariantRNN(FlowEquivariantCell(4, ((0, 0), (0, 1)))), num_classes=6)
      >>> model.init_with_output(jax.random.key(0), jnp.ones((2, 5, 8, 8, 1)))[0].shape
      (2, 6)

    Source:
      Keller, Flow Equivariant Recurrent Neural Networks, NeurIPS 2025, arXiv:2507.14793, section 5; reference code
      akandykeller/FERNN, commit 7def7bc, `FERNN_Classifier`.

    Differs:
      One linear head on the last maps; the reference has convolutions and batch normalisation before it.
    """

    rnn: nn.Module
    num_classes: int = 10
    spatial_pooling: str = "mean"
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch time height width channels"]) -> Float[Array, "*batch outputs"]:
        """Classify sequences.

        Args:
          inputs: frames on a periodic grid.

        Returns:
          Logits, or features if `num_classes` is 0.

        Raises:
          ValueError: if the inputs are no sequence, the network keeps its velocities, or a name is unknown.
        """
        if self.spatial_pooling not in ("mean", "max") or self.num_classes < 0:
            raise ValueError(
                f"spatial_pooling={self.spatial_pooling!r} must be 'mean' or 'max' and num_classes={self.num_classes} "
                "not negative; set them"
            )
        maps = self.rnn(inputs)
        if maps.ndim != inputs.ndim:
            raise ValueError(
                f"the network returned shape {maps.shape} for a sequence of shape {inputs.shape}, but must pool over "
                "velocities; set its velocity_pooling to 'max' or 'mean'"
            )
        pool = jnp.mean if self.spatial_pooling == "mean" else jnp.max
        x = pool(maps[..., -1, :, :, :], axis=(-3, -2))
        if self.num_classes:
            x = nn.Dense(
                self.num_classes,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name="head",
            )(x)
        return axes.constrain_last(x, axes.BATCH, axes.FEATURES)


def fernn(
    radius: int = 2, features: int = 128, channels: int = 1, horizon: int = 10, dtype: Dtype | None = None
) -> FlowForecaster:
    """Return a forecaster of moving pictures with all velocities of up to `radius` pixels; 0 is a plain network.

    Args:
      radius: largest speed along an axis.
      features: width of the hidden maps.
      channels: of the frames.
      horizon: number of frames to predict.
      dtype: compute dtype.

    Returns:
      An unbound module; its decoder has two circular convolutions.
    """
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding="CIRCULAR", use_bias=False, dtype=dtype)
    cell = FlowEquivariantCell(features, velocity_grid(radius), dtype=dtype)
    decoder = nn.Sequential([conv(features), nn.relu, conv(channels)])
    return FlowForecaster(cell, decoder, horizon)


VARIANTS: dict[str, dict[str, Any]] = {
    name: {
        "module": fernn,
        "inputs": (jax.ShapeDtypeStruct((1, 10, 28, 28, 1), jnp.float32),),
        "radius": radius,
    }
    for name, radius in (("fernn_v0", 0), ("fernn_v1", 1), ("fernn_v2", 2))
}
