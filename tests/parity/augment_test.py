"""Augmentation beside timm and torchvision: the same pixels from the same picture and parameters."""

import random

import jax
import numpy as np
import PIL.Image
import pytest

from train import augment

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def timm_data(torchvision):
    return pytest.importorskip("timm.data")


def picture(height: int = 61, width: int = 80, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(generator.integers(0, 256, (7, 9, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC))
    return np.clip(smooth + generator.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)


REFERENCE = {
    "Posterize": "PosterizeIncreasing", "Solarize": "SolarizeIncreasing", "Color": "ColorIncreasing",
    "Contrast": "ContrastIncreasing", "Brightness": "BrightnessIncreasing", "Sharpness": "SharpnessIncreasing",
    "TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel",
}  # fmt: skip


def test_rand_augment_has_the_operations_of_the_reference(timm_data) -> None:
    from timm.data import auto_augment

    ours = [REFERENCE.get(name, name) for name in augment.RAND_AUGMENT]
    assert ours == auto_augment._RAND_INCREASING_TRANSFORMS
    theirs = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104)})
    recipe = augment.RandAugment()
    assert theirs.num_layers == recipe.layers
    assert {(op.magnitude, op.prob, op.magnitude_std) for op in theirs.ops} == {
        (recipe.magnitude, recipe.probability, recipe.deviation)
    }


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("level", [0.0, 1.7, 5.0, 9.0, 9.63, 10.0])
@pytest.mark.parametrize("name", augment.RAND_AUGMENT)
def test_every_operation_gives_the_pixels_of_the_reference(timm_data, monkeypatch, name, level, interpolation) -> None:
    from timm.data import auto_augment

    reference = REFERENCE.get(name, name)
    if name == "Posterize" and level == 10:
        # Level 10 keeps no bit, which the reference leaves to Pillow, whose newer releases refuse it.
        assert (run(name, level, 1, interpolation) == 0).all()
        return
    fill = (124, 116, 104)
    for sign in (1, -1):
        # The reference negates when its draw is above a half.
        monkeypatch.setattr(auto_augment.random, "random", lambda sign=sign: 0.2 if sign == 1 else 0.9)
        hparams = {"img_mean": fill, "interpolation": getattr(PIL.Image.Resampling, interpolation.upper())}
        operation = auto_augment.AugmentOp(reference, prob=1.0, magnitude=level, hparams=hparams)
        expected = np.asarray(operation(PIL.Image.fromarray(picture())))
        np.testing.assert_array_equal(run(name, level, sign, interpolation), expected)


def run(name: str, level: float, sign: int, interpolation: str) -> np.ndarray:
    changed = augment.RAND_AUGMENT[name](
        PIL.Image.fromarray(picture()),
        level=level,
        sign=sign,
        fill=(124, 116, 104),
        resample=getattr(PIL.Image.Resampling, interpolation.upper()),
    )
    return np.asarray(changed)


@pytest.mark.parametrize("shape", [(61, 80), (80, 61), (300, 256), (256, 256), (375, 500), (200, 801)])
@pytest.mark.parametrize("size", [32, 224])
def test_the_evaluation_transform_is_that_of_the_reference(timm_data, shape, size) -> None:
    source = picture(*shape)
    theirs = timm_data.create_transform(size, is_training=False, interpolation="bicubic", crop_pct=0.875)
    expected = theirs(PIL.Image.fromarray(source)).numpy().transpose(1, 2, 0)
    ours = augment.swin_recipe(size).test({"image": source}, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_resized_crop_is_that_of_the_reference(torchvision, monkeypatch, interpolation) -> None:
    from torchvision.transforms import InterpolationMode, functional

    source = picture(375, 500)
    for box in ((10, 20, 200, 150), (0, 0, 375, 500), (300, 400, 30, 40)):
        monkeypatch.setattr(augment.RandomResizedCrop, "box", lambda self, height, width, generator, box=box: box)
        ours = augment.RandomResizedCrop(224, interpolation=interpolation)
        expected = functional.resized_crop(
            PIL.Image.fromarray(source), *box, (224, 224), InterpolationMode(interpolation)
        )
        found = ours({"image": source}, np.random.default_rng(0))["image"]
        np.testing.assert_array_equal(found, np.asarray(expected))


def test_crops_have_the_distribution_of_the_reference(timm_data) -> None:
    from timm.data.transforms import RandomResizedCropAndInterpolation as Reference

    random.seed(0)
    height, width, count = 375, 500, 4000
    image = PIL.Image.new("RGB", (width, height))
    theirs = np.array([Reference.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    crop = augment.RandomResizedCrop(224)
    ours = np.array([crop.box(height, width, np.random.default_rng(seed)) for seed in range(count)])
    for column in range(4):
        levels = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.quantile(ours[:, column], levels), np.quantile(theirs[:, column], levels), atol=0.035 * width
        )


@pytest.mark.parametrize("share", [-0.5, -0.1, 0.0, 0.03, 0.25, 0.5])
def test_hue_is_turned_as_in_the_reference(torchvision, share) -> None:
    from torchvision.transforms import functional

    image = PIL.Image.fromarray(picture())
    expected = np.asarray(functional.adjust_hue(image, share))
    np.testing.assert_array_equal(np.asarray(augment._turn_hue(image, share)), expected)


def test_erased_rectangles_have_the_distribution_of_the_reference(timm_data) -> None:
    from timm.data.random_erasing import RandomErasing as Reference

    random.seed(0)
    torch.manual_seed(0)
    theirs, ours = [], []
    for seed in range(2000):
        erased = Reference(probability=0.25, mode="pixel", device="cpu")(torch.full((3, 64, 48), 9.0))
        theirs.append(float((erased[0] != 9).float().mean()))
        record = {"image": np.full((64, 48, 3), 9, np.float32)}
        changed = augment.RandomErasing(0.25)(record, np.random.default_rng(seed))["image"]
        ours.append(float((changed[..., 0] != 9).mean()))
    assert abs(np.mean(np.array(theirs) > 0) - np.mean(np.array(ours) > 0)) < 0.04
    theirs, ours = ([value for value in values if value] for values in (theirs, ours))
    levels = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(ours, levels), np.quantile(theirs, levels), atol=0.03)


@pytest.mark.parametrize("cut", [True, False])
def test_mixtures_and_soft_labels_are_those_of_the_reference(timm_data, monkeypatch, cut) -> None:
    """The reference is given the weight and the rectangle that were drawn here."""
    from timm.data import mixup

    generator = np.random.default_rng(0)
    images = generator.normal(size=(6, 20, 24, 3)).astype(np.float32)
    labels = generator.integers(0, 7, 6).astype(np.int32)
    ours = jax.jit(augment.mixup_cutmix(7, 0.8 * (not cut), 1.0 * cut))
    for seed in range(20):
        found = ours({"image": images, "label": labels}, jax.random.key(seed))
        theirs = mixup.Mixup(0.8 * (not cut), 1.0 * cut, num_classes=7, label_smoothing=0.1)
        if cut:
            pasted = (np.asarray(found["image"][0]) != images[0]).any(-1)
            if not pasted.any():
                continue
            rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
            box = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
            monkeypatch.setattr(mixup, "rand_bbox", lambda shape, weight, count=None, box=box: box)
            weight = 0.5
        else:
            partner = images[::-1]
            weight = float(np.median((found["image"] - partner) / (images - partner)))
        monkeypatch.setattr(theirs, "_params_per_batch", lambda weight=weight: (weight, cut))
        x, y = theirs(torch.tensor(images.transpose(0, 3, 1, 2).copy()), torch.tensor(labels))
        np.testing.assert_allclose(found["image"], x.numpy().transpose(0, 2, 3, 1), atol=0 if cut else 1e-5)
        np.testing.assert_allclose(found["label"], y.numpy(), atol=2e-6)


def test_cutmix_rectangles_come_from_the_same_draw_as_the_reference(timm_data, monkeypatch) -> None:
    """Extent and place of the rectangle for a given weight and centre."""
    from timm.data import mixup

    for seed in range(200):
        generator = np.random.default_rng(seed)
        weight, centre = generator.random(), generator.integers(0, [20, 24])
        draws = iter(centre.tolist())
        monkeypatch.setattr(mixup.np.random, "randint", lambda low, high, size=None, draws=draws: next(draws))
        top, bottom, left, right = mixup.rand_bbox((3, 20, 24), weight)
        for length, at, low, high in ((20, centre[0], top, bottom), (24, centre[1], left, right)):
            inside = augment._inside(length, np.floor(length * np.sqrt(1 - weight)), at)
            expected = (np.arange(length) >= low) & (np.arange(length) < high)
            np.testing.assert_array_equal(inside, expected)
