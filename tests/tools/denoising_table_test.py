import functools

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
    ahead = denoising_table.lead(found, (15, 25)).splitlines()
    assert [line.split(":")[0] for line in ahead] == ["- total variation", "- non-local means"]
    mean = np.mean([found["MAXIM"][n, 25][0] - found["non-local means"][n, 25][0] for n in PHOTOGRAPHS["test"]])
    assert f"{mean:+.2f} dB and " in ahead[1].split(", ")[1]
    denoising_table.draw(denoisers, tmp_path / "images" / "denoising.png")
    with Image.open(tmp_path / "images" / "denoising.png") as figure:
        assert figure.size == (64, 16)


def test_networks_restore_pictures_of_any_size_without_being_told_the_noise():
    for name, (_, make) in denoising_table.MODELS.items():
        model = make()
        image = np.random.RandomState(0).rand(20, 26, 3).astype(np.float32)
        variables = task.jax.jit(model.init)(task.jax.random.key(0), image[None])
        denoise = denoising_table.as_denoiser(model, variables)
        assert denoise(image, 0.1).shape == image.shape, name


@pytest.mark.parametrize("size", [(48, 48), (48, 100), (71, 53), (20, 26)])
def test_tiles_cover_a_picture_and_show_a_network_nothing_larger(size):
    image = np.random.RandomState(0).rand(*size, 3).astype(np.float32)
    seen = []

    def shifted(tiles):
        seen.append(tiles.shape)
        return tiles + 1

    np.testing.assert_allclose(denoising_table.in_tiles(shifted, image), image + 1, rtol=1e-5)
    assert {shape[1:] for shape in seen} == {(min(task.SIZE, *size),) * 2 + (3,)}
    # Negative control: what differs between tiles fades from one to the next.
    ramps = denoising_table.in_tiles(lambda tiles: 0 * tiles + np.arange(len(tiles))[:, None, None, None], image)
    assert np.ptp(ramps) > 0 or size[0] == size[1]
    assert np.abs(np.diff(ramps[0, :, 0])).max(initial=0) < 0.5


def test_untrained_networks_give_back_what_they_are_given():
    image = np.random.RandomState(0).rand(1, 16, 16, 3).astype(np.float32)
    for _, make in denoising_table.MODELS.values():
        model = make()
        given = task.jax.jit(functools.partial(model.init_with_output, method="restore"))(
            task.jax.random.key(0), image
        )[0]
        np.testing.assert_array_equal(given, image)


def test_training_varies_size_place_and_colours_and_keeps_grey_grey():
    side = task.SIZE
    waves = np.sin(np.arange(2 * side) / 3)
    grey = np.repeat((0.5 + 0.2 * waves[:, None] * waves[None])[..., None], 3, axis=-1).astype(np.float32)
    colour = (grey * np.float32([1.0, 0.7, 0.4])).astype(np.float32)
    found = [task.varied(colour, np.random.default_rng(seed)) for seed in range(30)]
    assert {one.shape for one in found} == {(side, side, 3)}
    assert len({one.tobytes() for one in found}) == 30
    assert all(one.min() >= 0 and one.max() <= 1 for one in found)
    assert len({tuple(np.argsort(one.std(axis=(0, 1)))) for one in found}) == 6
    for seed in range(10):
        record = task.degraded({"image": grey}, np.random.default_rng(seed), strength=None)
        assert np.all(np.ptp(record["noisy"], axis=-1) < 1e-6)
        record = task.degraded({"image": colour}, np.random.default_rng(seed), strength=None)
        assert np.all(np.ptp(record["noisy"], axis=-1).max() > 0.01)


def test_an_error_counts_in_multiples_of_the_noise():
    loss = task.restoration().loss
    clean = np.full((2, 16, 16, 3), 0.5, np.float32)
    noise = np.random.RandomState(0).standard_normal(clean.shape).astype(np.float32)
    strength = np.float32([0.05, 0.2])[:, None, None, None]
    batch = task.jax.tree.map(task.jnp.asarray, {"image": clean, "noisy": clean + strength * noise})
    weak, strong = loss(lambda noisy: ((noisy,),), batch, None)[0]
    assert 1 < strong / weak < 1.5
    # Negative control: the errors themselves are four times as large.
    bare = task.restoration_loss(((batch["noisy"],),), batch["image"])
    assert bare[1] / bare[0] > 3.5
