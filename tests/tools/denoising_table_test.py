import numpy as np
import pytest
from PIL import Image

from configs import maxim_denoising as task
from tools import denoising_table
from train.photographs import PHOTOGRAPHS

SIDE = 40


@pytest.fixture
def pictures(monkeypatch):
    """Smooth pictures, one of them grey, in place of the photographs."""

    def photograph(name):
        index = PHOTOGRAPHS["test"].index(name)
        waves = np.sin(np.arange(SIDE) / (4 + index))
        grey = 128 + 60 * waves[:, None] * waves[None]
        tint = (1.0, 1.0, 1.0) if name == "camera" else (1.0, 0.8, 0.6)
        return np.rint(grey[..., None] * tint).astype(np.uint8)

    monkeypatch.setattr(denoising_table, "photograph", photograph)
    monkeypatch.setattr(denoising_table, "SHOWN", ("chelsea", 25, (4, 6), 16))


def test_noise_is_fixed_has_its_strength_and_is_grey_on_a_grey_picture(pictures):
    for name in PHOTOGRAPHS["test"]:
        clean, noisy = denoising_table.given(name, 25)
        np.testing.assert_array_equal(noisy, denoising_table.given(name, 25)[1])
        noise = noisy - clean
        assert noise.std() == pytest.approx(25 / 255, rel=0.1)
        assert np.any(denoising_table.given(name, 50)[1] - clean != 2 * noise)
        assert bool(np.all(np.ptp(noise, axis=-1) < 1e-6)) == (name == "camera")


def test_table_ranks_denoisers_and_the_figure_shows_them(pictures, tmp_path, capsys):
    # Stands for the network, which would have to be trained.
    denoisers = {**denoising_table.CLASSICAL, "MAXIM": lambda image, strength: np.full_like(image, 0.5)}
    found = denoising_table.measure(denoisers, PHOTOGRAPHS["test"], (15, 25))
    for name in PHOTOGRAPHS["test"]:
        noisy, means = found["noisy"][name, 25], found["non-local means"][name, 25]
        assert noisy[0] == pytest.approx(20 * np.log10(255 / 25), abs=0.5)
        assert means[0] > noisy[0] + 3
        assert means[1] > noisy[1]
        assert found["MAXIM"][name, 25][0] < noisy[0]
    table = denoising_table.markdown(found, (15, 25))
    assert table.splitlines()[0] == "| method | noise 15 / 255 | noise 25 / 255 |"
    assert "Each picture at 25 / 255:" in table
    assert table.count("| non-local means | ") == 2
    assert "total variation: " in capsys.readouterr().err
    denoising_table.draw(denoisers, tmp_path / "images" / "denoising.png")
    with Image.open(tmp_path / "images" / "denoising.png") as figure:
        assert figure.size == (64, 16)


def test_networks_restore_pictures_of_any_size_without_being_told_the_noise():
    for name, (_, make) in denoising_table.MODELS.items():
        model = make()
        image = np.random.RandomState(0).rand(20, 26, 3).astype(np.float32)
        variables = model.init(task.jax.random.key(0), task.jnp.asarray(image[None]))
        denoise = denoising_table.as_denoiser(model, variables)
        assert denoise(image, 0.1).shape == image.shape, name
