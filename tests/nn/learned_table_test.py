import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxlayers.nn.learned_table import learned_table
from jaxlayers.window import TNT, Swin


class Placed(nn.Module):
    length: int

    @nn.compact
    def __call__(self, x):
        shape = (self.length, x.shape[-1])
        return x + learned_table(self, "table", nn.initializers.ones, shape, x.dtype, size=f"length={self.length}")


def test_it_is_the_modules_parameter():
    x = jnp.zeros((3, 2))
    variables = Placed(3).init(jax.random.key(0), x)
    assert variables["params"]["table"].shape == (3, 2)
    assert Placed(3).apply(variables, x).tolist() == [[1.0, 1.0]] * 3


def test_one_made_for_another_size_is_refused_with_what_fits_it():
    variables = Placed(3).init(jax.random.key(0), jnp.zeros((3, 2)))
    message = (
        r"length=4 wants table of shape \(4, 2\), but the parameters have \(3, 2\); fit them by the model's resize"
    )
    with pytest.raises(ValueError, match=message):
        Placed(4).apply(variables, jnp.zeros((4, 2)))


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (Swin, {"window_size": 5}, r"window_size=\(5, 5\) wants relative_position_bias_table of shape \(81, 1\), but"),
        (TNT, {"image_size": 48}, r"image_size=48 wants position_embedding of shape \(10, 384\), but .* \(5, 384\)"),
    ],
    ids=["window", "image"],
)
def test_parameters_of_another_window_or_image_are_refused_by_models(model, change, message):
    fields = {Swin: {"depths": (1,), "num_heads": (1,), "window_size": 4}, TNT: {"depth": 1, "image_size": 32}}[model]
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model(**fields).init, jax.random.key(0), image)
    other = model(**{**fields, **change})
    size = change.get("image_size", 32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(other.apply, variables, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def test_another_width_is_not_called_a_matter_of_size():
    variables = Placed(3).init(jax.random.key(0), jnp.zeros((3, 2)))
    with pytest.raises(flax.errors.ScopeParamShapeError, match="table"):
        Placed(3).apply(variables, jnp.zeros((3, 4)))
