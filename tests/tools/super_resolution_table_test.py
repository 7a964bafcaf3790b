import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import drct_super_resolution as task
from jaxlayers.ops.image_quality import psnr
from tools import super_resolution_table as table
from train.photographs import photograph


def test_page_has_every_method_and_a_picture(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Result:
        state: object

    def train(config, workdir, **keywords):
        """Untrained: kernels of zero add nothing to the bicubic picture."""
        shapes = jax.eval_shape(config.model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]

        @dataclasses.dataclass
        class State:
            params: object = dataclasses.field(
                default_factory=lambda: jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
            )

        return Result(State())

    monkeypatch.setattr(table.loop, "train", train)
    found = table.main(
        ["--scales", "2", "--networks", "DRCT", "--side", "64", "--runs", str(tmp_path), "--docs", str(tmp_path)]
    )
    page = (tmp_path / "super_resolution.md").read_text()
    assert found in page
    assert (tmp_path / "images" / "super_resolution.png").stat().st_size < 300_000
    rows = [line.split(" | ") for line in found.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == ["nearest", "bicubic", "DRCT"]
    # A network that finds nothing leaves the bicubic picture.
    assert rows[2][2:] == rows[1][2:]
    assert float(rows[1][5].split(" / ")[0]) > float(rows[0][5].split(" / ")[0]) + 1
    assert "- DRCT, x2: 0.000, 0.000, 0.000" in page
    assert "- DRCT, x2: +0.00 dB and +0.0000 on luma" in page
    assert "    python -m tools.super_resolution_table --scales 2 --networks DRCT\n" in page
    assert "Plain groups" not in page


@pytest.mark.parametrize("scale", [2, 4])
def test_low_resolution_is_that_of_the_middle(scale):
    low, high = table.middles(scale, 64)
    assert low.shape == (3, 64 // scale, 64 // scale, 3)
    found = task.enlarged(jnp.asarray(low), scale)
    aligned = psnr(found, jnp.asarray(high))
    # Negative control: a pixel aside they fit worse.
    assert np.all(aligned > psnr(jnp.roll(found, 1, axis=2), jnp.asarray(high)))
    np.testing.assert_array_equal(low * 255, np.round(low * 255))


def test_crops_for_training_are_pieces_of_the_whole_at_both_resolutions():
    scale, side = 2, 2 * (task.CROP + 2 * task.MARGIN)
    image = photograph("chelsea")[:, :450].astype(np.float32) / 255
    whole = task.reduced(image, scale)
    record = {"image": image[100 : 100 + side, 60 : 60 + side]}
    found = task.shrunk(record, np.random.default_rng(0), scale=scale, turn=False)
    first = (50 + task.MARGIN, 30 + task.MARGIN)
    np.testing.assert_array_equal(found["low"], whole[first[0] : first[0] + task.CROP, first[1] : first[1] + task.CROP])
    turned = [task.shrunk(record, np.random.default_rng(seed), scale=scale, turn=True) for seed in range(60)]
    assert len({one["low"].tobytes() for one in turned}) == 8
    for one in turned:
        again = task.reduced(one["high"], scale)
        np.testing.assert_array_equal(again[4:-4, 4:-4], one["low"][4:-4, 4:-4])


def test_shrinking_equals_matlabs_inside():
    """MATLAB's imresize of an impulse: its kernel, widened by the factor, at pixel centres."""
    image = np.zeros((32, 32, 1), np.float32)
    image[16, 15] = 1
    found = task.reduced(image, 2)[..., 0]

    # Keys' kernel (a = -0.5) at a quarter, three quarters, ... divided by the factor.
    def keys(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    rows = [keys((16 - (2 * i + 0.5)) / 2) / 2 for i in range(16)]
    columns = [keys((15 - (2 * i + 0.5)) / 2) / 2 for i in range(16)]
    expected = np.round(np.clip(np.outer(rows, columns), 0, 1) * 255) / 255
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.max() > 0.1


@pytest.mark.parametrize("dense", [True, False])
def test_an_untrained_network_enlarges_bicubically(dense):
    low = jnp.asarray(np.random.RandomState(0).rand(1, 8, 8, 3), jnp.float32)
    model = task.network(2, dense=dense)
    found, variables = jax.jit(model.init_with_output)(jax.random.key(0), low)
    np.testing.assert_allclose(found, task.enlarged(low, 2), atol=1e-6)
    # Negative control: any other last convolution shows that the network sees the picture.
    params = variables["params"]["network"]
    last = {**params["last"], "kernel": jnp.ones_like(params["last"]["kernel"])}
    other = jax.jit(model.apply)({"params": {"network": {**params, "last": last}}}, low)
    assert float(jnp.std(other - found)) > 1e-3
