import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxlayers import summarize


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="dense")(x)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.remat(Inner)(name="saved")(x)
        body = nn.scan(
            lambda block, x, _: (block(x), None), length=3, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        x, _ = body(Inner(name="scanned"), x, None)
        return nn.Conv(6, (3,), feature_group_count=1, padding="VALID", name="conv")(x)


@pytest.fixture
def rows():
    summary = summarize(Outer(), jax.ShapeDtypeStruct((2, 7, 5), jnp.float32))
    return {"/".join(row.path): row for row in summary.rows}


def test_products_count_under_their_module_through_remat_and_scan(rows):
    assert rows["saved/dense"].macs == 2 * 7 * 5 * 5
    assert rows["scanned/dense"].macs == 3 * 2 * 7 * 5 * 5
    assert rows["conv"].macs == 2 * 5 * 6 * (3 * 5)
    assert rows[""].macs == 4 * 2 * 7 * 5 * 5 + 2 * 5 * 6 * 15


def test_parameters_count_from_the_leaves_up(rows):
    assert rows["saved"].parameters == 30
    assert rows["scanned"].parameters == 90
    assert rows[""].parameters == 30 + 90 + 3 * 5 * 6 + 6


def test_grouped_convolutions_and_conditionals():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3,), feature_group_count=4, padding="SAME")(x)
            return jax.lax.cond(x.sum() > 0, lambda x: x @ jnp.ones((4, 4)), lambda x: x, x)

    summary = summarize(Grouped(), jax.ShapeDtypeStruct((1, 8, 4), jnp.float32))
    assert summary.macs == 8 * 4 * 3 + 8 * 4 * 4


def test_a_product_in_another_method_counts_under_its_module():
    class Methods(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        def embed(self, x):
            return self.dense(x)

        def __call__(self, x):
            return self.embed(x)

    summary = summarize(Methods(), jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert {row.path: row.macs for row in summary.rows}[("dense",)] == 24
