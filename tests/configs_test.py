"""Every config loads in both forms, says what to expect, and makes a plan; none needs anything but its own data."""

import ast
import dataclasses
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from train import config as configs
from train import loop, optim

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("[!_]*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def devices(mesh):
    """Return as many devices as a mesh is written for; one for each axis that takes the rest."""
    return jax.devices()[: math.prod(abs(size) for size in (mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor))]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder laid out like ImageNet, with two pictures."""
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            noise = np.random.default_rng(0).integers(256, size=(60, 80, 3)).astype(np.uint8)
            Image.fromarray(noise).save(folder / "one.JPEG")
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    return tmp_path


@every_file
def test_docstring_gives_the_command_and_the_expected_result(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    first, command, expected = re.match(r"(.+?)\n\nCommand:(.+?)\nExpected:(.+?)(?:\n\n|$)", docstring, re.S).groups()
    assert first.endswith(".")
    assert f"configs/{path.name}" in command
    assert re.search(r"\d", expected)


@every_file
def test_config_makes_a_plan(path, pictures):
    config = configs.load(path)
    assert config.title
    assert " at 0x" not in configs.describe(config)
    # The first batch is made for the plan; of ImageNet 1,024 pictures would be augmented.
    config = dataclasses.replace(config, batch_size=8, eval_batch_size=8, accumulate=1, workers=0)
    assert loop.prepare(config, devices(config.mesh)).parameters > 0


@every_file
def test_smoke_form_is_short_and_fits_its_devices(path):
    config = configs.load(path, smoke=True)
    assert config.steps <= 100
    rows = config.mesh.data * config.mesh.fsdp
    for size in (config.batch_size // config.accumulate, config.eval_batch_size or config.batch_size):
        assert size % abs(rows) == 0


# ImageNet --------------------------------------------------------------------------------------------------------


def imagenet(monkeypatch, hardware, smoke=False):
    monkeypatch.setenv("HARDWARE", hardware)
    return configs.load(ROOT / "configs" / "swin_imagenet.py", smoke=smoke)


@pytest.mark.parametrize(("hardware", "count"), [("gpu-1", 1), ("gpu-8", 8), ("tpu-v5e-16", 16), ("tpu-v5e-256", 256)])
def test_imagenet_recipe_is_the_published_one_on_every_machine(monkeypatch, hardware, count):
    monkeypatch.delenv("IMAGENET", raising=False)
    config = imagenet(monkeypatch, hardware)
    assert math.prod((config.mesh.data, config.mesh.fsdp, config.mesh.sequence, config.mesh.tensor)) == count
    assert config.batch_size == 1024
    assert config.batch_size % (config.mesh.data * config.mesh.fsdp * config.accumulate) == 0
    # Epochs of 1,281,167 // 1,024 steps.
    assert config.steps == 300 * 1251 == 300 * (1_281_167 // 1024)
    rate = optim.schedule(config.optim, config.steps)
    assert rate(20 * 1251) == pytest.approx(1e-3)
    assert rate(config.steps) == pytest.approx(1e-5, rel=1e-3)
    assert rate(10 * 1251) == pytest.approx(0.5e-3, rel=1e-3)
    assert (config.optim.weight_decay, config.optim.clip_norm) == (0.05, 5.0)
    assert (config.model.drop_path_rate, config.model.num_classes) == (0.2, 1000)
    assert config.batch_transform is not None


def test_imagenet_can_be_listed_without_its_data_and_then_says_how_to_get_it(monkeypatch, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = imagenet(monkeypatch, "gpu-8")
    assert "optim.clip_norm = 5.0" in configs.describe(config)
    with pytest.raises(FileNotFoundError, match="prepare it with: python -c"):
        len(config.train_data)
    with pytest.raises(ValueError, match=r"HARDWARE='abacus' must be one of \['gpu-1', 'gpu-8', 'tpu-v5e-16'"):
        imagenet(monkeypatch, "abacus")


def test_imagenet_folder_is_read_where_one_is_named(monkeypatch, pictures):
    config = imagenet(monkeypatch, "gpu-1")
    assert len(config.train_data) == len(config.test_data) == 2
    record = config.test_transform(config.test_data[1], np.random.default_rng(0))
    assert record["image"].shape == (224, 224, 3)
    assert record["label"] == 1


# What the other configs are made of ------------------------------------------------------------------------------


def module(name):
    configs.load(ROOT / "configs" / f"{name}.py", smoke=True)
    return sys.modules[f"config_{name}"]


def test_simulated_shapes_have_the_area_and_the_form_they_claim():
    shapes = module("segmentation_shapes")
    grid = np.stack(np.meshgrid(*[np.linspace(-2, 2, 400)] * 2, indexing="ij"), axis=-1)
    outlines = [shapes.outline(kind, grid, 1.0, 0.3) for kind in (1, 2, 3)]
    for inside in outlines:
        assert inside.mean() * 16 == pytest.approx(np.pi, rel=0.01)
    reach = [np.linalg.norm(grid[inside], axis=-1).max() for inside in outlines]
    # Corners: the radius, half of the diagonal of a square, two thirds of the height of a triangle of that area.
    wanted = [1, np.sqrt(np.pi / 2), np.sqrt(np.pi / np.tan(np.pi / 3) / 3) * 2]
    assert reach == pytest.approx(wanted, rel=0.02)
    source = shapes.shapes(20, seed=0)
    labels = np.stack([source[index]["label"] for index in range(20)])
    assert set(np.unique(labels)) == {0, 1, 2, 3}


def test_turned_pictures_keep_their_labels():
    shapes = module("segmentation_shapes")
    record = shapes.shapes(1, seed=3)[0]
    rng = np.random.default_rng(0)
    found = {shapes.turned(record, rng)["label"].tobytes() for _ in range(60)}
    assert len(found) == 8
    marked = {"image": record["label"][..., None].astype(np.float32), "label": record["label"]}
    turned = shapes.turned(marked, rng)
    np.testing.assert_array_equal(turned["image"][..., 0], turned["label"])


def test_fine_tuning_slows_early_layers_and_starts_its_head_anew():
    config = configs.load(ROOT / "configs" / "swin_finetune.py")
    ids = config.optim.layer_ids
    assert ids("patch_embed/projection/kernel") == 0 < ids("stages_0/blocks_0/norm1/scale") < ids("head/kernel")
    assert config.start_from.exclude == (r"^head/",)
    records = [config.train_data[index] for index in range(len(config.train_data))]
    assert np.bincount([record["label"] for record in records]).tolist() == [5] * 10
    pretrained = configs.load(ROOT / "configs" / "simmim_digits.py")
    kept = ("patch_size", "embed_dim", "depths", "num_heads", "window_size")
    for name in kept:  # the two files must agree, since neither imports the other
        assert getattr(config.model, name) == getattr(pretrained.model.encoder, name)
