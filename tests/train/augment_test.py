"""Every augmentation does what it says, no more, and the same for the same generator or key."""

import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from train import augment, data
from train.sources import describe

SIZE = 32


def image(height: int = SIZE, width: int = SIZE, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours and some noise: neither flat nor saturated."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(5 * x + 3 * y + c) * np.cos(4 * y - c) for c in range(channels)], axis=-1)
    return np.clip(128 + 90 * waves + generator.normal(0, 9, waves.shape), 1, 254).astype(np.uint8)


def applied(transform, picture: np.ndarray, seed: int = 0) -> np.ndarray:
    record = {"image": picture, "label": np.int32(3)}
    result = transform(record, np.random.default_rng(seed))
    assert result["label"] is record["label"]
    assert record["image"] is picture
    return result["image"]


RECORD_TRANSFORMS = (
    augment.RandomResizedCrop(24),
    augment.Resize(20),
    augment.CenterCrop(20),
    augment.HorizontalFlip(),
    augment.RandAugment(),
    augment.ColorJitter(hue=0.1),
    augment.Normalize(),
    augment.Compose((augment.Normalize(), augment.RandomErasing(0.9))),
    augment.swin_recipe(16).train,
    augment.swin_recipe(16).test,
    augment.random_affine(),
)


@pytest.mark.parametrize("transform", RECORD_TRANSFORMS, ids=lambda t: type(t).__name__)
def test_transforms_depend_on_the_generator_alone_and_pickle(transform) -> None:
    picture = image(40, 50)
    untouched = picture.copy()
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform
    for seed in range(5):
        np.testing.assert_array_equal(applied(copy, picture, seed), applied(transform, picture, seed))
    np.testing.assert_array_equal(picture, untouched)
    other = dataclasses.replace(transform, key="else") if hasattr(transform, "key") else augment.Compose(())
    assert describe(other) != describe(transform)
    assert " at 0x" not in describe(transform)


# ---------------------------------------------------------------------------------------------------- crops and flips


def test_random_resized_crops_have_the_published_areas_and_ratios() -> None:
    crop = augment.RandomResizedCrop(224)
    boxes = np.array([crop.box(1000, 1000, np.random.default_rng(seed)) for seed in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 1000).all()
    assert (left + width <= 1000).all()
    area, ratio = height * width / 1e6, np.log(width / height)
    assert 0.079 < area.min() < 0.09
    assert area.max() > 0.97
    assert -math.log(4 / 3) - 0.01 < ratio.min() < -0.27
    assert 0.27 < ratio.max() < math.log(4 / 3) + 0.01
    # Uniform where every ratio fits into the square, that is up to 3/4 of the area.
    small = area[area < 0.75]
    quarters = np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(np.quantile(small, quarters), 0.08 + 0.67 * quarters, atol=0.02)
    np.testing.assert_allclose(np.quantile(ratio[area < 0.75], [0.25, 0.75]), [-0.144, 0.144], atol=0.015)
    # Everywhere: the place is uniform in what is left.
    free = 1000 - height > 100
    assert abs((top / (1000 - height).clip(1))[free].mean() - 0.5) < 0.02


def test_random_resized_crop_resizes_its_part_and_falls_back_to_the_middle() -> None:
    picture = image(40, 60)
    whole = augment.RandomResizedCrop(20, scale=(1.0, 1.0), ratio=(1.5, 1.5))
    assert whole.box(40, 60, np.random.default_rng(0)) == (0, 0, 40, 60)
    np.testing.assert_array_equal(
        applied(augment.RandomResizedCrop(40, (1.0, 1.0), (1.0, 1.0)), image(40, 40)), image(40, 40)
    )
    # Nothing fits: the ratio of the whole image is out of range, so the middle in the nearest ratio is taken.
    assert augment.RandomResizedCrop(20, (1.0, 1.0), (0.9, 1.1)).box(40, 100, np.random.default_rng(0)) == (
        0,
        28,
        40,
        44,
    )
    assert augment.RandomResizedCrop(20, (1.0, 1.0), (0.5, 2.0)).box(100, 40, np.random.default_rng(0)) == (
        10,
        0,
        80,
        40,
    )
    results = [applied(augment.RandomResizedCrop(20), picture, seed) for seed in range(20)]
    assert {result.shape for result in results} == {(20, 20, 3)}
    assert len(np.unique(np.stack(results).reshape(20, -1), axis=0)) == 20
    assert applied(augment.RandomResizedCrop(20), image(channels=1)).shape == (20, 20, 1)


def test_resize_and_center_crop_keep_proportions_and_the_middle() -> None:
    assert applied(augment.Resize(20), image(40, 61)).shape == (20, 30, 3)
    assert applied(augment.Resize(20), image(61, 40)).shape == (30, 20, 3)
    same = image(20, 31)
    assert applied(augment.Resize(20), same) is same
    picture = image(11, 20)
    np.testing.assert_array_equal(applied(augment.CenterCrop(5), picture), picture[3:8, 8:13])  # 7.5 to the even 8
    padded = applied(augment.CenterCrop(14), picture)
    np.testing.assert_array_equal(padded[1:12], picture[:, 3:17])
    assert (padded[[0, 12, 13]] == 0).all()


def test_flips_are_as_frequent_as_asked() -> None:
    picture = image()
    for probability in (0.0, 0.3, 1.0):
        flip = augment.HorizontalFlip(probability)
        flipped = [(applied(flip, picture, seed) == picture[:, ::-1]).all() for seed in range(600)]
        kept = [(applied(flip, picture, seed) == picture).all() for seed in range(600)]
        assert (np.array(flipped) != np.array(kept)).all()
        assert abs(np.mean(flipped) - probability) <= (0.06 if probability == 0.3 else 0)


def test_normalize_gives_imagenet_statistics() -> None:
    picture = image()
    expected = (picture / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    result = applied(augment.Normalize(), picture)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(applied(augment.Normalize((0.5,), (0.25,), scale=1), np.ones((2, 2, 1))), 2)


# ------------------------------------------------------------------------------------------------------------ colour


LEVELS = ("Rotate", "SolarizeAdd", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
LEVELS += ("ShearX", "ShearY", "TranslateX", "TranslateY")
WITHOUT_LEVEL = ("AutoContrast", "Equalize", "Invert")


@pytest.mark.parametrize("name", augment.RAND_AUGMENT)
def test_rand_augment_operations_grow_with_the_magnitude(name: str) -> None:
    picture = image(48, 48)

    def change(magnitude: float, seed: int = 1) -> float:
        one = augment.RandAugment(magnitude, layers=1, probability=1.0, deviation=0.0, operations=(name,))
        return float(np.abs(applied(one, picture, seed).astype(float) - picture).mean())

    if name in LEVELS:
        assert change(0) == 0
        assert change(9) > change(3) > 0
    elif name in WITHOUT_LEVEL:
        assert change(0) == change(9) > 0
    else:
        assert name == "Posterize"
        assert 0 < change(0) < change(5) < change(10)
        black = augment.RandAugment(10, layers=1, probability=1.0, deviation=0.0, operations=(name,))
        assert (applied(black, picture) == 0).all()
    grey = image(24, 24, 1)
    assert applied(augment.RandAugment(probability=1.0, operations=(name,)), grey).shape == grey.shape


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_rand_augment_moves_either_way_and_fills_with_the_mean_colour(name: str) -> None:
    picture = np.full((40, 40, 3), 255, np.uint8)
    one = augment.RandAugment(9, layers=1, probability=1.0, deviation=0.0, operations=(name,))
    results = {applied(one, picture, seed).tobytes() for seed in range(12)}
    assert len(results) == 2
    pixels = np.frombuffer(results.pop(), np.uint8).reshape(-1, 3)
    assert {tuple(pixel) for pixel in pixels.tolist()} >= {(255, 255, 255), (124, 116, 104)}


def test_rand_augment_draws_operations_levels_and_omissions_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float, int]] = []
    for name in augment.RAND_AUGMENT:
        monkeypatch.setitem(
            augment.RAND_AUGMENT,  # type: ignore[arg-type]
            name,
            lambda picture, level, sign, fill, resample, name=name: (calls.append((name, level, sign)), picture)[1],
        )
    count = 3000
    for seed in range(count):
        applied(augment.RandAugment(), np.zeros((2, 2, 3), np.uint8), seed)
    names, levels, signs = (np.array(column) for column in zip(*calls, strict=True))
    assert abs(len(calls) / count - 1.0) < 0.05  # two layers, half of them left out
    share = np.array([(names == name).mean() for name in augment.RAND_AUGMENT])
    assert len(share) == 15
    np.testing.assert_allclose(share, 1 / 15, atol=0.02)
    assert levels.max() == 10
    assert abs(np.median(levels) - 9) < 0.03
    np.testing.assert_allclose(np.quantile(levels, [0.16, 0.84]), [8.5, 9.5], atol=0.06)
    assert abs(signs.mean()) < 0.06
    calls.clear()
    applied(augment.RandAugment(probability=0.0), np.zeros((2, 2, 3), np.uint8))
    assert not calls


def test_color_jitter_changes_what_it_is_told_to() -> None:
    picture = image()
    assert (applied(augment.ColorJitter(0, 0, 0, 0), picture) == picture).all()
    results = [applied(augment.ColorJitter(0.4, 0, 0), picture, seed).astype(float) for seed in range(100)]
    factors = np.array([result[picture < 150].sum() / picture[picture < 150].sum() for result in results])
    assert 0.55 < factors.min() < 0.65
    assert 1.35 < factors.max() < 1.45
    contrast = (
        np.array([applied(augment.ColorJitter(0, 0.3, 0), picture, seed).std() for seed in range(60)]) / picture.std()
    )
    assert 0.68 < contrast.min() < 0.8
    assert 1.15 < contrast.max() < 1.32
    grey = np.repeat(image(channels=1), 3, axis=-1)
    assert np.abs(applied(augment.ColorJitter(0, 0, 0.9), grey).astype(int) - grey).max() <= 1
    turned = applied(augment.ColorJitter(0, 0, 0, hue=0.5), picture, 3)
    assert np.abs(turned.astype(int) - picture).mean() > 5
    assert np.abs(turned.max(-1).astype(int) - picture.max(-1)).max() <= 3  # the value of HSV stays


# ----------------------------------------------------------------------------------------------------------- erasing


def test_erased_rectangles_have_the_published_areas_ratios_and_frequency() -> None:
    picture = np.full((100, 100, 3), 50.0, np.float32)
    areas, ratios, erased = [], [], 0
    for seed in range(1500):
        result = applied(augment.RandomErasing(0.25), picture, seed)
        gone = (result != 50).any(-1)
        if not gone.any():
            assert result is picture
            continue
        erased += 1
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        box = gone[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()  # one full rectangle, and nothing outside of it
        areas.append(box.size / 1e4)
        ratios.append(box.shape[0] / box.shape[1])
        noise = result[gone]
        if box.size > 2000:
            assert abs(noise.mean()) < 0.1
            assert abs(noise.std() - 1) < 0.1
    assert abs(erased / 1500 - 0.25) < 0.04
    assert 0.018 < min(areas) < 0.03
    assert 0.31 < max(areas) <= 0.345
    assert 0.28 < min(ratios) < 0.36
    assert 2.8 < max(ratios) < 3.6


def test_erasing_fills_in_noise_one_colour_or_nothing() -> None:
    picture = np.full((50, 50, 3), 9.0, np.float32)
    distinct = {}
    for mode in ("pixel", "colour", "zero"):
        result = applied(augment.RandomErasing(1.0, mode=mode), picture, 4)
        gone = (result != 9).any(-1)
        distinct[mode] = len(np.unique(result[gone], axis=0)) / gone.sum()
    assert distinct["pixel"] == 1
    assert 0 < distinct["colour"] == distinct["zero"] < 0.02
    assert (applied(augment.RandomErasing(1.0, mode="zero"), picture, 4) == 0).any()
    assert applied(augment.RandomErasing(0.0), picture) is picture
    never = augment.RandomErasing(1.0, area=(1.0, 1.0), ratio=(1.0, 1.0))
    assert applied(never, picture) is picture  # it would be the whole image


# -------------------------------------------------------------------------------------------------- mixup and cutmix


def batch(count: int = 8, size: int = 16) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "image": generator.normal(size=(count, size, size + 4, 3)).astype(np.float32),
        "label": generator.integers(5, size=count).astype(np.int32),
        "name": np.arange(count),
    }


def hard(labels: np.ndarray) -> np.ndarray:
    return np.eye(5)[labels]


def test_mixup_is_the_published_equation() -> None:
    before = batch()
    mix = augment.mixup_cutmix(5, mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.0)
    weights = []
    mix = jax.jit(mix)
    for seed in range(40):
        after = mix(before, jax.random.key(seed))
        np.testing.assert_array_equal(after["name"], before["name"])
        x, partner = before["image"], before["image"][::-1]
        weight = float(np.median((after["image"] - partner) / (x - partner)))
        assert 0 <= weight <= 1
        np.testing.assert_allclose(after["image"], weight * x + (1 - weight) * partner, atol=2e-5)
        y = hard(before["label"])
        np.testing.assert_allclose(after["label"], weight * y + (1 - weight) * y[::-1], atol=2e-5)
        weights.append(weight)
    # Beta(0.8, 0.8): symmetric, and wider than the uniform distribution.
    assert abs(np.mean(weights) - 0.5) < 0.15
    assert np.std(weights) > 0.25


def test_cutmix_pastes_one_rectangle_and_weighs_labels_by_its_area_exactly() -> None:
    before = batch()
    mix = augment.mixup_cutmix(5, mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.0)
    areas = []
    mix = jax.jit(mix)
    for seed in range(60):
        after = mix(before, jax.random.key(seed))
        own = np.asarray(after["image"]) == before["image"]
        pasted = ~own.all(-1)
        np.testing.assert_array_equal(after["image"][pasted], before["image"][::-1][pasted])  # bit by bit
        first = pasted[0]
        assert (pasted == first).all()
        area = first.mean()
        if first.any():
            rows, columns = np.flatnonzero(first.any(1)), np.flatnonzero(first.any(0))
            assert first[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        y = hard(before["label"])
        np.testing.assert_allclose(after["label"], (1 - area) * y + area * y[::-1], atol=1e-7)
        areas.append(area)
    assert min(areas) < 0.1
    assert max(areas) > 0.5
    assert len(set(areas)) > 30


def test_cutmix_rectangles_follow_the_reference_distribution() -> None:
    """The mean of the area over many keys, beside the same draw in NumPy."""
    generator = np.random.default_rng(0)
    side = np.sqrt(1 - generator.beta(1, 1, 20000))
    expected = 1.0
    for length in (16, 20):
        extent, centre = (length * side).astype(int), generator.integers(0, length, 20000)
        low, high = np.clip(centre - extent // 2, 0, length), np.clip(centre + (extent + 1) // 2, 0, length)
        expected = expected * (high - low) / length
    mix = augment.mixup_cutmix(2, mixup_alpha=0.0, label_smoothing=0.0)
    one = {"image": jnp.zeros((2, 16, 20, 1)), "label": jnp.array([0, 1])}
    found = jax.jit(jax.vmap(lambda key: mix(one, key)["label"][0, 1]))(jax.random.split(jax.random.key(0), 4000))
    assert abs(float(found.mean()) - expected.mean()) < 0.012
    quarters = [0.25, 0.5, 0.75]
    np.testing.assert_allclose(np.quantile(found, quarters), np.quantile(expected, quarters), atol=0.02)


def test_labels_are_smoothed_and_sum_to_one() -> None:
    before = batch()
    mix = augment.mixup_cutmix(5, probability=0.0, label_smoothing=0.1)
    after = jax.jit(mix)(before, jax.random.key(0))
    np.testing.assert_array_equal(after["image"], before["image"])
    np.testing.assert_allclose(after["label"], 0.9 * hard(before["label"]) + 0.02, atol=1e-6)
    mixed = jax.jit(augment.mixup_cutmix(5))(before, jax.random.key(1))["label"]
    assert mixed.shape == (8, 5)
    assert mixed.dtype == jnp.float32
    np.testing.assert_allclose(mixed.sum(-1), 1, atol=1e-6)
    dense = {**before, "label": hard(before["label"]).astype(np.float32)}
    soft = jax.jit(augment.mixup_cutmix(5))(dense, jax.random.key(1))
    np.testing.assert_allclose(soft["label"], mixed, atol=1e-6)


def test_mixing_switches_and_rests_as_often_as_asked() -> None:
    one = {"image": jnp.arange(2.0 * 8 * 8).reshape(2, 8, 8, 1), "label": jnp.array([0, 1])}
    mix = augment.mixup_cutmix(2, probability=0.8, switch_probability=0.25, label_smoothing=0.0)

    def kind(key):
        weight = mix(one, key)["label"][0, 1]
        pixel = mix(one, key)["image"][0] - one["image"][0]
        return weight, (jnp.abs(pixel) > 1e-4).mean()

    weight, changed = map(np.asarray, jax.jit(jax.vmap(kind))(jax.random.split(jax.random.key(2), 2000)))
    rested, cut = weight == 0, (changed > 0) & (changed < 1)
    assert 0.19 < rested.mean() < 0.26  # 0.2, and the cuts that miss
    assert abs(cut.mean() - 0.8 * 0.25) < 0.04
    assert abs((changed == 1).mean() - 0.8 * 0.75) < 0.04


@pytest.mark.parametrize("axes", [("data",), ("data", "tensor")])
def test_mixing_does_not_depend_on_how_the_batch_is_sharded(axes: tuple[str, ...]) -> None:
    before = {name: batch()[name] for name in ("image", "label")}
    mix = jax.jit(augment.mixup_cutmix(5))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    sharded = jax.device_put(before, NamedSharding(mesh, PartitionSpec(axes)))
    for seed in range(4):
        expected, found = mix(before, jax.random.key(seed)), mix(sharded, jax.random.key(seed))
        assert found["image"].sharding.spec[0] == (axes if len(axes) > 1 else axes[0])
        # The draws are the same; a program compiled for another sharding may round another way.
        np.testing.assert_allclose(found["image"], expected["image"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["label"], expected["label"], rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------- recipe and errors


def test_the_swin_recipe_is_the_published_one() -> None:
    recipe = augment.swin_recipe(224, 1000)
    crop, flip, rand, normalize, erase = recipe.train.transforms
    assert (crop.size, crop.scale, crop.ratio, crop.interpolation) == (224, (0.08, 1.0), (0.75, 4 / 3), "bicubic")
    assert flip.probability == 0.5
    assert (rand.magnitude, rand.deviation, rand.layers, rand.probability) == (9, 0.5, 2, 0.5)
    assert (erase.probability, erase.mode) == (0.25, "pixel")
    assert recipe.test.transforms == (augment.Resize(256), augment.CenterCrop(224), normalize)
    assert augment.swin_recipe(384).test.transforms[0] == augment.Resize(438)
    mix = recipe.batch
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.probability, mix.switch_probability) == (0.8, 1.0, 1.0, 0.5)
    assert (mix.label_smoothing, mix.num_classes) == (0.1, 1000)


def test_the_recipe_trains_from_an_image_folder(tmp_path) -> None:
    import PIL.Image

    for number in range(6):
        folder = tmp_path / f"class_{number % 2}"
        folder.mkdir(exist_ok=True)
        PIL.Image.fromarray(image(40 + number, 70 - 3 * number, seed=number)).save(folder / f"{number}.jpg")
    source, recipe = data.image_folder(tmp_path), augment.swin_recipe(16, num_classes=2)
    options = {"batch_size": 4, "seed": 0, "transform": recipe.train}
    straight, workers = data.batches(source, **options), data.batches(source, workers=2, **options)
    for _ in range(4):
        one, other = next(straight), next(workers)
        np.testing.assert_array_equal(one["image"], other["image"])
        assert one["image"].shape == (4, 16, 16, 3)
        assert one["image"].dtype == np.float32
    straight.close()
    workers.close()
    mixed = jax.jit(recipe.batch)(one, jax.random.key(0))
    assert mixed["label"].shape == (4, 2)
    assert bool(jnp.isfinite(mixed["image"]).all())
    tested = list(data.evaluation_batches(source, batch_size=4, transform=recipe.test))
    assert [len(each["image"]) for each in tested] == [4, 4]


def test_wrong_arguments_are_refused() -> None:
    record, generator = {"image": np.zeros((8, 8, 3), np.float32)}, np.random.default_rng(0)
    for make, message in (
        (lambda: augment.RandomResizedCrop(0), "size=0 must be at least 1"),
        (lambda: augment.RandomResizedCrop(8, scale=(0.5, 0.2)), "scale=.* must be an increasing pair"),
        (lambda: augment.RandomResizedCrop(8, ratio=(0, 1)), "ratio=.* must be an increasing pair"),
        (lambda: augment.Resize(8, "cubic"), "interpolation='cubic' must be nearest"),
        (lambda: augment.CenterCrop(-1), "size=-1"),
        (lambda: augment.HorizontalFlip(1.5), "probability=1.5 must lie in"),
        (lambda: augment.Normalize(std=(0.0,)), "must be positive"),
        (lambda: augment.Normalize((0.5, 0.5))(record, generator), "must have 1 or 3 entries"),
        (lambda: augment.ColorJitter(hue=0.6), "hue=0.6"),
        (lambda: augment.RandAugment(magnitude=11), "magnitude=11 must lie in"),
        (lambda: augment.RandAugment(operations=("Blur",)), r"drop \['Blur'\]"),
        (lambda: augment.RandAugment()(record, generator), "RandAugment takes uint8 images .* got float32"),
        (lambda: augment.RandomErasing(area=(0.5, 1.5)), "area=.* must be an increasing pair"),
        (lambda: augment.RandomErasing(mode="noise"), "mode='noise' must be"),
        (lambda: augment.RandomErasing()({"image": image()}, generator), "takes normalised images, got uint8"),
        (lambda: augment.mixup_cutmix(5, mixup_alpha=0, cutmix_alpha=0), "mixup_alpha=0 and cutmix_alpha=0"),
        (lambda: augment.mixup_cutmix(0), "num_classes=0"),
        (lambda: augment.mixup_cutmix(5, probability=-1), "probability=-1"),
        (
            lambda: augment.mixup_cutmix(5)({"image": np.zeros((2, 4)), "label": np.zeros(2)}, None),
            "must be float .batch",
        ),
        (lambda: augment.swin_recipe(crop_fraction=0), "crop_fraction=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ------------------------------------------------------------------------------------------------------- small motions


def moved(image: np.ndarray, **motion: float) -> np.ndarray:
    return augment._warp(image, **{"angle": 0.0, "scale": 1.0, "down": 0.0, "right": 0.0, **motion})


def test_warp_agrees_with_whole_pixel_shifts_and_quarter_turns() -> None:
    image = np.random.default_rng(0).random((6, 9, 2)).astype(np.float32)
    np.testing.assert_array_equal(moved(image), image)
    down = np.zeros_like(image)
    down[2:, :-1] = image[:-2, 1:]
    np.testing.assert_allclose(moved(image, down=2, right=-1), down, atol=1e-6)
    assert (moved(image, down=50, right=-50) == 0).all()
    square = image[:, :6]
    # Rows run down: a turn from x to y is clockwise on the screen.
    np.testing.assert_allclose(moved(square, angle=np.pi / 2), np.rot90(square, -1), atol=1e-5)
    np.testing.assert_allclose(moved(square, angle=np.pi), square[::-1, ::-1], atol=1e-5)


def test_warp_is_the_bilinear_interpolation_of_scipy() -> None:
    from scipy.ndimage import affine_transform

    image = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    for angle, scale, down, right in [(0.3, 1.0, 0, 0), (-0.2, 1.3, 0.4, -1.7), (1.0, 0.7, 2.2, 0.6)]:
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
        centre = np.full(2, 3.5)
        offset = centre - matrix @ (centre + np.array([down, right]))
        expected = affine_transform(image, matrix, offset, order=1, mode="grid-constant")
        ours = moved(image[..., None], angle=angle, scale=scale, down=down, right=right)[..., 0]
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_random_affine_stays_within_its_bounds_and_leaves_the_rest_alone() -> None:
    image = np.zeros((15, 15, 1), np.float32)
    image[6:9, 6:9] = 1
    record = {"image": image, "label": np.int32(3)}
    y, x = np.mgrid[:15, :15] - 7.0
    shifts, masses, results = [], [], []
    for seed in range(200):
        result = augment.random_affine(2.0, 30.0, 0.2)(record, np.random.default_rng(seed))
        assert result["label"] is record["label"]
        assert result["image"].dtype == np.float32
        assert result["image"].min() >= 0
        assert result["image"].max() <= 1 + 1e-6
        mass = result["image"][..., 0].sum()
        shifts.append([(result["image"][..., 0] * axis).sum() / mass for axis in (y, x)])
        masses.append(mass / 9)
        results.append(result["image"])
    assert np.abs(shifts).max() <= 2.15
    assert np.abs(shifts).max(axis=0).min() > 1.7
    assert 0.6 < min(masses) < 0.75
    assert 1.3 < max(masses) < 1.6
    assert len(np.unique(np.stack(results).reshape(200, -1), axis=0)) == 200
    again = augment.random_affine(2.0, 30.0, 0.2)(record, np.random.default_rng(7))
    np.testing.assert_array_equal(again["image"], results[7])
    still = augment.random_affine(0, 0, 0)(record, np.random.default_rng(0))
    np.testing.assert_allclose(still["image"], image, atol=1e-6)
    assert (record["image"][6:9, 6:9] == 1).all()
    assert record["image"].sum() == 9


def test_wrong_bounds_are_refused() -> None:
    for bounds, message in (((-1, 0, 0), "max_shift=-1"), ((0, float("nan"), 0), "max_degrees=nan")):
        with pytest.raises(ValueError, match=f"{message} must be a finite number of at least 0"):
            augment.random_affine(*bounds)
