import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlayers.ops import depthwise
from jaxlayers.ops.depthwise import as_general_conv, depthwise_conv


def plain(x, kernel, stride=1, padding="SAME"):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        feature_group_count=x.shape[-1],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def gradients(conv):
    return jax.jit(jax.grad(lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel))), (0, 1)))


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 3)])
def test_it_equals_a_loop_over_pixels(rng, size):
    x, kernel = draw(rng, 2, 6, 9, 3), draw(rng, *size, 1, 3)
    padded = np.pad(x, ((0, 0), (size[0] // 2,) * 2, (size[1] // 2,) * 2, (0, 0)))
    expected = np.zeros_like(x)
    for i, j in np.ndindex(6, 9):
        expected[:, i, j] = np.sum(padded[:, i : i + size[0], j : j + size[1]] * kernel[:, :, 0], axis=(1, 2))
    np.testing.assert_allclose(depthwise_conv(jnp.asarray(x), jnp.asarray(kernel)), expected, atol=1e-5)
    np.testing.assert_allclose(depthwise_conv(jnp.asarray(x[0]), jnp.asarray(kernel)), expected[0], atol=1e-5)


def test_derivatives_of_both_modes_equal_those_of_the_plain_convolution(rng):
    x, kernel = draw(rng, 2, 6, 5, 4), draw(rng, 3, 5, 1, 4)
    for found, expected in zip(gradients(depthwise_conv)(x, kernel), gradients(plain)(x, kernel), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    tangents = (draw(rng, *x.shape), draw(rng, *kernel.shape))
    found, expected = (
        jax.jvp(conv, (jnp.asarray(x), jnp.asarray(kernel)), tangents)[1] for conv in (depthwise_conv, plain)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Per-example gradients and second derivatives go through as well.
    each = jax.vmap(jax.grad(lambda kernel, x: jnp.sum(jnp.sin(depthwise_conv(x, kernel)))), (None, 0))(kernel, x)
    np.testing.assert_allclose(jnp.sum(each, axis=0), gradients(plain)(x, kernel)[1], atol=1e-5)

    def curvature(conv):
        slope = jax.grad(lambda kernel: jnp.sum(jnp.sin(conv(jnp.asarray(x), kernel))))
        return jax.jvp(slope, (jnp.asarray(kernel),), (tangents[1],))[1]

    np.testing.assert_allclose(curvature(depthwise_conv), curvature(plain), atol=1e-4)


def test_gradient_over_many_pixels_survives_bfloat16(rng):
    # 65,536 products of one sign: a sum kept in bfloat16 would stop growing at 256 of them.
    x, kernel = np.abs(draw(rng, 16, 64, 64, 2)), draw(rng, 3, 3, 1, 2)

    def gradient(dtype):
        step = jax.grad(lambda kernel, x: jnp.sum(depthwise_conv(x, kernel).astype(jnp.float32)))
        return jax.jit(step)(jnp.asarray(kernel, dtype), jnp.asarray(x, dtype))

    found = gradient(jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), gradient(jnp.float32), rtol=1e-2)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("height", [7, 8, 9])
def test_strides_without_padding_equal_the_plain_convolution_with_its_derivatives(rng, stride, height):
    x, kernel = draw(rng, 2, height, 6, 4), draw(rng, 2 if height == 8 else 3, 5, 1, 4)
    ours = functools.partial(depthwise_conv, stride=stride, padding="VALID")
    theirs = functools.partial(plain, stride=stride, padding="VALID")
    np.testing.assert_allclose(ours(jnp.asarray(x), jnp.asarray(kernel)), theirs(x, kernel), atol=1e-5)
    for found, expected in zip(gradients(ours)(x, kernel), gradients(theirs)(x, kernel), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("size", "steps"), [((3, 5), (1, "SAME")), ((3, 5), (1, "VALID")), ((2, 3), (2, "VALID"))])
def test_forms_for_a_processor_equal_those_for_accelerators(rng, size, steps):
    stride, padding = steps
    x, kernel = jnp.asarray(draw(rng, 2, 8, 9, 4)), jnp.asarray(draw(rng, *size, 1, 4))
    expected = depthwise._convolve(x, kernel, *steps)
    for form in (depthwise._gather, depthwise._scatter):
        np.testing.assert_allclose(form(x, kernel, *steps), expected, atol=1e-5)
    out = jnp.asarray(draw(rng, *expected.shape))
    (by_x,) = jax.linear_transpose(lambda x: depthwise._convolve(x, kernel, *steps), x)(out)
    for form in (depthwise._gather, depthwise._scatter):
        (found,) = jax.linear_transpose(lambda x, form=form: form(x, kernel, *steps), x)(out)
        np.testing.assert_allclose(found, by_x, atol=1e-5)
    (by_kernel,) = jax.vjp(lambda kernel: depthwise._convolve(x, kernel, *steps), kernel)[1](out)
    for linear in (depthwise._by_kernel_in_turn, depthwise._by_kernel_at_once):
        form = functools.partial(linear, x, stride=stride, padding=padding)
        np.testing.assert_allclose(form(kernel), expected, atol=1e-5)
        np.testing.assert_allclose(jax.vjp(form, kernel)[1](out)[0], by_kernel, atol=1e-4)


def test_kernels_of_more_numbers_than_are_worth_a_sum_are_convolved(rng):
    x, kernel = draw(rng, 1, 14, 14, 2), draw(rng, 13, 13, 1, 2)
    assert kernel.shape[0] * kernel.shape[1] > depthwise.MOST_SHIFTS
    np.testing.assert_allclose(depthwise_conv(jnp.asarray(x), jnp.asarray(kernel)), plain(x, kernel), atol=1e-4)
    for found, expected in zip(gradients(depthwise_conv)(x, kernel), gradients(plain)(x, kernel), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_backward_pass_keeps_the_map_and_no_copies_of_it(rng):
    x, kernel = jnp.asarray(draw(rng, 2, 16, 16, 4)), jnp.asarray(draw(rng, 7, 7, 1, 4))
    _, pull = jax.vjp(depthwise_conv, x, kernel)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) <= 1.1 * (x.nbytes + kernel.nbytes)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("steps", [{}, {"stride": 2, "padding": "VALID"}], ids=["same", "strided"])
def test_gradient_is_right_on_a_mesh_with_axes_that_do_not_split_the_batch(rng, shape, steps):
    x, kernel = draw(rng, 8, 5, 4, 6), draw(rng, 3, 3, 1, 6)
    expected = gradients(functools.partial(plain, **steps))(x, kernel)
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    placed = jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(kernel, NamedSharding(mesh, P()))
    for found, one in zip(gradients(functools.partial(depthwise_conv, **steps))(*placed), expected, strict=True):
        np.testing.assert_allclose(found, one, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 1, 6), (3, 3, 1, 5), (3, 3, 6, 1), (3, 3, 6)])
def test_kernels_without_a_middle_or_of_other_features_are_refused(untyped, shape):
    with pytest.raises(ValueError, match=r"must be \[odd, odd, 1, 6\]; set its sizes"):
        depthwise_conv(jnp.ones((1, 5, 5, 6)), jnp.ones(shape))


@pytest.mark.parametrize("steps", [{}, {"strides": 2, "padding": "VALID"}], ids=["same", "strided"])
def test_it_stands_in_for_the_convolution_of_flax(rng, steps):
    x = jnp.asarray(draw(rng, 2, 3, 6, 5, 4))
    fields = {"features": 4, "kernel_size": (3, 5), "feature_group_count": 4, **steps}
    ours = nn.Conv(**fields, conv_general_dilated=as_general_conv)
    found, variables = ours.init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(found, nn.Conv(**fields).apply(variables, x), atol=1e-5)
    assert "custom_jvp" in str(jax.make_jaxpr(ours.apply)(variables, x))


@pytest.mark.parametrize("change", [{"strides": (1, 2)}, {"kernel_dilation": 2}, {"feature_group_count": 2}])
def test_other_convolutions_of_flax_are_refused(untyped, change):
    fields = {"features": 4, "kernel_size": (3, 3), "feature_group_count": 4, **change}
    with pytest.raises(ValueError, match="must be alike, 1, 4 and None; use the plain convolution"):
        nn.Conv(**fields, conv_general_dilated=as_general_conv).init(jax.random.key(0), jnp.ones((1, 5, 5, 4)))


@pytest.mark.parametrize("steps", [{"stride": 2}, {"padding": "CIRCULAR"}, {"stride": 0, "padding": "VALID"}])
def test_stride_and_padding_that_do_not_go_together_are_refused(steps):
    with pytest.raises(ValueError, match="must be 1 and 'SAME', or any and 'VALID'"):
        depthwise_conv(jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 1, 4)), **steps)
