"""Deep adaptive graph networks: transform first, propagate far without parameters, weigh the hops for each node."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes, dialects
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, Params
from jaxlayers.ops.segments import clean_graph, propagate, symmetric_weights

# Names of the reference's modules.
NAMES = {"up": "lin1", "down": "lin2", "gate": "prop.proj"}


class DAGNN(nn.Module):
    """Classify nodes by a perceptron whose outputs are averaged over 0 to depth hops, gated for each node.

    Z = MLP(X), H_l = A_hat^l Z for l = 0 ... depth, out_i = sum_l sigmoid(s . H_l,i + b) H_l,i, with X
    `[nodes, features]`, Z and H `[nodes, classes]`, A_hat = D^-1/2 (A + I) D^-1/2, an MLP of one hidden layer, and a
    trained vector s `[classes]` and number b. More hops have no more parameters.

    Symmetry:
      Permutations of the nodes, with the ends of the edges renumbered: exactly equivariant. The order of the edges:
      exactly invariant.

    Attributes:
      num_classes: numbers for each node; positive.
      features: width of the hidden layer of the perceptron; positive.
      depth: the farthest hop, 0 or more; 0 is a perceptron and its gate.
      activation_fn: the nonlinearity of the perceptron.
      dropout_rate: dropout before both layers of the perceptron, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters. Degrees and sums are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels and of s.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0. The gates `[*batch, nodes, depth + 1]`
      are sown as `gates` in `intermediates`.

    Cost:
      (features + classes) x hidden multiply-accumulates a node once, classes an edge and hop. The hops are a scan, so
      the compiled program does not grow with depth.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.graph import DAGNN
      >>> senders, receivers = jnp.array([[0, 1], [1, 2]])
      >>> model = DAGNN(num_classes=5, features=8, depth=20)
      >>> model.init_with_output(jax.random.key(0), jnp.ones((3, 2)), senders, receivers)[0].shape
      (3, 5)

    Source:
      Liu, Gao, Ji, Towards Deeper Graph Neural Networks, KDD 2020, equations 8 to 10. Reference code divelab/DeeperGNN
      at ad7fba8, `DeeperGNN/dagnn.py`.

    Differs:
      The bias b of the gate is the code's; the paper has none. Logits, not their softmax. The weight of a loop among
      the edges is 1, as if it were unweighted.
    """

    num_classes: int
    features: int = 64
    depth: int = 10
    activation_fn: ActivationFn = nn.relu
    dropout_rate: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        nodes: Float[Array, "*batch nodes features"],
        senders: Int[Array, "*batch edges"],
        receivers: Int[Array, "*batch edges"],
        *,
        mask: Bool[Array, "*batch nodes"] | None = None,
        edge_mask: Bool[Array, "*batch edges"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch nodes classes"]:
        """Classify the nodes.

        Args:
          nodes: features X.
          senders: node that each edge leaves.
          receivers: node that each edge enters.
          mask: True = a real node.
          edge_mask: True = a real edge.
          deterministic: no dropout.

        Returns:
          Logits; zero where padded.

        Raises:
          ValueError: on shapes that do not fit, ids that are no nodes, or fields out of range.
        """
        if self.num_classes < 1 or self.features < 1 or self.depth < 0:
            raise ValueError(
                f"num_classes={self.num_classes} and features={self.features} must be positive and depth={self.depth} "
                "not negative; set them"
            )
        nodes, edge_mask = clean_graph(nodes, senders, receivers, mask=mask, edge_mask=edge_mask)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        dropout = nn.Dropout(self.dropout_rate)
        x = nn.Dense(self.features, name="up", **common)(dropout(nodes, deterministic=deterministic))
        x = dropout(self.activation_fn(x), deterministic=deterministic)
        x = nn.Dense(self.num_classes, name="down", **common)(x)
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        x = axes.constrain_last(x, axes.BATCH, axes.NODES, None)
        weights = symmetric_weights(senders, receivers, nodes.shape[-2], mask=edge_mask)

        def hop(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = axes.constrain_last(propagate(x, senders, receivers, *weights), axes.BATCH, axes.NODES, None)
            return x, x

        _, farther = jax.lax.scan(hop, x, None, length=self.depth)
        hops = jnp.moveaxis(jnp.concatenate([x[None], farther]), 0, -2)
        gates = nn.sigmoid(nn.Dense(1, name="gate", **common)(hops))
        self.sow("intermediates", "gates", gates[..., 0])
        x = axes.constrain_last(jnp.sum(gates * hops, axis=-2), axes.BATCH, axes.NODES, None)
        return x if mask is None else jnp.where(mask[..., None], x, 0)


def from_reference(tensors: Mapping[str, Any]) -> Params:
    """Return the parameters of a `DAGNN` from those of the reference's `Net`.

    Args:
      tensors: arrays by the reference's names, such as `lin1.weight`.

    Returns:
      Parameters; their shapes say `features` and `num_classes`.

    Raises:
      ValueError: if names are missing or unknown.
    """
    known = {f"{theirs}.{leaf}" for theirs in NAMES.values() for leaf in ("weight", "bias")}
    if set(tensors) != known:
        raise ValueError(
            f"tensors must be those of the reference: missing {sorted(known - set(tensors))}, unknown "
            f"{sorted(set(tensors) - known)}; pass its state dict"
        )
    return {
        ours: {
            "kernel": jnp.asarray(np.asarray(tensors[f"{theirs}.weight"]).T),
            "bias": jnp.asarray(np.asarray(tensors[f"{theirs}.bias"])),
        }
        for ours, theirs in NAMES.items()
    }


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/divelab/DeeperGNN, DeeperGNN/dagnn.py",
        module=DAGNN,
        read=lambda tensors, model, inputs: {"params": from_reference(tensors)},
        marks=(r"^lin1\.weight$", r"^prop\.proj\.weight$"),
        layout=dialects.table_layout(NAMES),
    ),
)
