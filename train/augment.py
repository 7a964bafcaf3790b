"""Augmentation: of records, by NumPy and Pillow with a generator of their own, and of batches, by JAX on the device.

A record transform is a frozen dataclass `(record, generator) -> record`: it pickles, and its fields are part of the
data's fingerprint. It changes one entry, `key`, and leaves the others alone. Images are uint8 `[height, width, 1 or 3]`
until `Normalize` makes them float32. A batch transform is `(batch, key) -> batch` with a JAX key.

Longer than most files: one small class an operation, which share their helpers for pixels, and two dozen of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from train.records import Record

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "RAND_AUGMENT",
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "HorizontalFlip",
    "MixupCutmix",
    "Normalize",
    "RandAugment",
    "RandomAffine",
    "RandomErasing",
    "RandomResizedCrop",
    "Recipe",
    "Resize",
    "mixup_cutmix",
    "random_affine",
    "swin_recipe",
]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
RecordTransform = Callable[[Record, np.random.Generator], Record]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------- Pillow and checks


def _picture(image: Any, what: str) -> Any:
    """Returns a Pillow image of a uint8 array."""
    import PIL.Image

    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(
            f"{what} takes uint8 images [height, width, 1 or 3], got {array.dtype} {array.shape}; "
            "put it before Normalize"
        )
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _pixels(picture: Any) -> np.ndarray:
    """Returns a Pillow image as an array with a channel axis."""
    array = np.array(picture)
    return array[..., None] if array.ndim == 2 else array


def _filter(name: str) -> Any:
    import PIL.Image

    return PIL.Image.Resampling[name.upper()]


def _check_interpolation(name: str) -> None:
    if name not in ("nearest", "bilinear", "bicubic", "lanczos"):
        raise ValueError(f"interpolation={name!r} must be nearest, bilinear, bicubic or lanczos; set interpolation")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1]; set {name}")


def _check_range(name: str, value: tuple[float, float], least: float, most: float = math.inf) -> None:
    if len(value) != 2 or not least < value[0] <= value[1] <= most:
        raise ValueError(f"{name}={value} must be an increasing pair in ({least}, {most}]; set {name}")


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size={size} must be at least 1; set size")


# ------------------------------------------------------------------------------------------------------- composition


@dataclasses.dataclass(frozen=True)
class Compose:
    """Applies transforms one after the other.

    Attributes:
        transforms: the transforms; each draws from the same generator after the one before.
    """

    transforms: tuple[RecordTransform, ...]

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the transformed record."""
        for transform in self.transforms:
            record = transform(record, generator)
        return record


# ---------------------------------------------------------------------------------------------------- crops and flips


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts a random part out of an image and brings it to `size x size`.

    The part's area is uniform in `scale` times that of the image, the logarithm of its aspect ratio (width to height)
    uniform in that of `ratio`, its place uniform. After ten parts that do not fit, the middle of the image is taken,
    cut no further than `ratio` wants.

    Attributes:
        size: height and width of the result.
        scale: smallest and largest share of the area.
        ratio: smallest and largest aspect ratio.
        interpolation: Pillow's filter, which averages when it shrinks.
        key: the image's entry of the record.

    Source:
        C. Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6 (8 % to 100 % of the area, ratio 3/4
        to 4/3).
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    key: str = "image"

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_range("scale", self.scale, 0, 1)
        _check_range("ratio", self.ratio, 0)
        _check_interpolation(self.interpolation)

    def box(self, height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Returns top, left, height and width of a random part of an image."""
        for _ in range(10):
            area = height * width * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record with a part of its image."""
        image = record[self.key]
        top, left, height, width = self.box(image.shape[0], image.shape[1], generator)
        part = _picture(image[top : top + height, left : left + width], "RandomResizedCrop")
        resized = part.resize((self.size, self.size), _filter(self.interpolation))
        return {**record, self.key: _pixels(resized)}


@dataclasses.dataclass(frozen=True)
class Resize:
    """Brings the shorter side of an image to `size`, the other in proportion.

    Attributes:
        size: the shorter side of the result.
        interpolation: Pillow's filter.
        key: the image's entry of the record.
    """

    size: int
    interpolation: Interpolation = "bicubic"
    key: str = "image"

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_interpolation(self.interpolation)

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record with its image resized."""
        picture = _picture(record[self.key], "Resize")
        width, height = picture.size
        if min(width, height) == self.size:
            return record
        longer = int(self.size * max(width, height) / min(width, height))
        target = (self.size, longer) if width <= height else (longer, self.size)
        return {**record, self.key: _pixels(picture.resize(target, _filter(self.interpolation)))}


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Cuts `size x size` out of the middle of an image; an image that is smaller is surrounded with zeros.

    Attributes:
        size: height and width of the result.
        key: the image's entry of the record.
    """

    size: int
    key: str = "image"

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record with the middle of its image."""
        image = np.asarray(record[self.key])
        for axis in (0, 1):
            lacking = self.size - image.shape[axis]
            if lacking > 0:
                margin = [(0, 0)] * image.ndim
                margin[axis] = (lacking // 2, (lacking + 1) // 2)
                image = np.pad(image, margin)
            first = round((image.shape[axis] - self.size) / 2)  # half to even, as the reference's crop
            image = image[first : first + self.size] if axis == 0 else image[:, first : first + self.size]
        return {**record, self.key: image}


@dataclasses.dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors an image left to right.

    Attributes:
        probability: how often.
        key: the image's entry of the record.
    """

    probability: float = 0.5
    key: str = "image"

    def __post_init__(self) -> None:
        _check_probability("probability", self.probability)

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record, its image mirrored or not."""
        if generator.random() >= self.probability:
            return record
        return {**record, self.key: record[self.key][:, ::-1]}


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Makes an image float32: `(image / scale - mean) / std`, channel by channel.

    Attributes:
        mean: of each channel, or one for all.
        std: of each channel, or one for all.
        scale: what stands for 1; 255 for uint8 images.
        key: the entry of the record; any array with channels last.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    scale: float = 255.0
    key: str = "image"

    def __post_init__(self) -> None:
        if not all(value > 0 for value in (*self.std, self.scale)):
            raise ValueError(f"std={self.std} and scale={self.scale} must be positive; set both")

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record with its image normalised."""
        image = np.ascontiguousarray(record[self.key]).astype(np.float32)
        if len(self.mean) not in (1, image.shape[-1]) or len(self.std) not in (1, image.shape[-1]):
            raise ValueError(f"mean={self.mean} and std={self.std} must have 1 or {image.shape[-1]} entries; set both")
        image /= np.float32(self.scale)
        image -= np.asarray(self.mean, np.float32)
        image /= np.asarray(self.std, np.float32)
        return {**record, self.key: image}


# ------------------------------------------------------------------------------------------------------------ colour


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue at random, in random order.

    The factors of the first three are uniform in `[max(0, 1 - x), 1 + x]`; the hue is turned by a share of the circle
    uniform in `[-hue, hue]`.

    Attributes:
        brightness: the largest change of the factor that multiplies the pixels.
        contrast: the largest change of the distance from the mean grey.
        saturation: the largest change of the distance from grey.
        hue: the largest turn, at most 0.5.
        key: the image's entry of the record.

    Source:
        A. G. Howard, "Some improvements on deep convolutional neural network based image classification", 2013; order
        and ranges as in torchvision.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0
    key: str = "image"

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            value = getattr(self, name)
            if not 0 <= value <= (0.5 if name == "hue" else math.inf):
                raise ValueError(f"{name}={value} must not be negative, and hue at most 0.5; set {name}")

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record with the colours of its image changed."""
        import PIL.ImageEnhance

        picture = _picture(record[self.key], "ColorJitter")
        enhancers = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}
        for name in generator.permutation(["brightness", "contrast", "saturation", "hue"]).tolist():
            bound = getattr(self, name)
            draw = generator.uniform(-bound, bound)
            if not bound:
                continue
            if name == "hue":
                picture = _turn_hue(picture, draw)
            else:
                low = max(0.0, 1 - bound)
                factor = low + (1 + bound - low) * (draw + bound) / (2 * bound)
                picture = getattr(PIL.ImageEnhance, enhancers[name])(picture).enhance(factor)
        return {**record, self.key: _pixels(picture)}


def _turn_hue(picture: Any, share: float) -> Any:
    """Turns the hue of a picture by a share of the circle; grey ones stay."""
    import PIL.Image

    if picture.mode != "RGB":
        return picture
    hue, saturation, value = picture.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int32) + int(share * 255)).astype(np.uint8)  # modulo 256
    return PIL.Image.merge("HSV", (PIL.Image.fromarray(turned), saturation, value)).convert("RGB")


def _enhance(name: str, picture: Any, level: float, sign: int, fill: Any, resample: Any) -> Any:
    import PIL.ImageEnhance

    return getattr(PIL.ImageEnhance, name)(picture).enhance(max(0.1, 1 + sign * 0.09 * level))


def _affine(
    matrix: Callable[[float, tuple[int, int]], tuple[float, ...]],
    largest: float,
    picture: Any,
    level: float,
    sign: int,
    fill: Any,
    resample: Any,
) -> Any:
    import PIL.Image

    coefficients = matrix(sign * (level / 10 * largest), picture.size)
    return picture.transform(picture.size, PIL.Image.Transform.AFFINE, coefficients, resample=resample, fillcolor=fill)


def _rotate(picture: Any, level: float, sign: int, fill: Any, resample: Any) -> Any:
    return picture.rotate(sign * (level / 10 * 30), resample=resample, fillcolor=fill)


def _whole(name: str, picture: Any, level: float, sign: int, fill: Any, resample: Any) -> Any:
    import PIL.ImageOps

    return getattr(PIL.ImageOps, name)(picture)


def _posterize(picture: Any, level: float, sign: int, fill: Any, resample: Any) -> Any:
    bits = 4 - int(level / 10 * 4)
    mask = 256 - (1 << (8 - bits))  # no bits at level 10: black, which newer releases of Pillow refuse
    return picture.point([value & mask for value in range(256)] * len(picture.getbands()))


def _solarize(picture: Any, level: float, sign: int, fill: Any, resample: Any) -> Any:
    import PIL.ImageOps

    return PIL.ImageOps.solarize(picture, 256 - min(256, int(level / 10 * 256)))


def _solarize_add(picture: Any, level: float, sign: int, fill: Any, resample: Any) -> Any:
    more = min(128, int(level / 10 * 110))
    table = [min(255, value + more) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


# Each takes a picture, the level (0 to 10), the sign of those that have two directions, the colour that comes in from
# outside, and the filter. The severity of all increases with the level.
RAND_AUGMENT: Mapping[str, Callable[..., Any]] = {
    "AutoContrast": functools.partial(_whole, "autocontrast"),
    "Equalize": functools.partial(_whole, "equalize"),
    "Invert": functools.partial(_whole, "invert"),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": functools.partial(_enhance, "Color"),
    "Contrast": functools.partial(_enhance, "Contrast"),
    "Brightness": functools.partial(_enhance, "Brightness"),
    "Sharpness": functools.partial(_enhance, "Sharpness"),
    "ShearX": functools.partial(_affine, lambda v, size: (1, v, 0, 0, 1, 0), 0.3),
    "ShearY": functools.partial(_affine, lambda v, size: (1, 0, 0, v, 1, 0), 0.3),
    "TranslateX": functools.partial(_affine, lambda v, size: (1, 0, v * size[0], 0, 1, 0), 0.45),
    "TranslateY": functools.partial(_affine, lambda v, size: (1, 0, 0, 0, 1, v * size[1]), 0.45),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies `layers` operations, each drawn from `operations` (with repetition) and left out now and then.

    The level of an operation is drawn from a normal distribution with mean `magnitude` and deviation `deviation`, and
    brought into 0..10. At level `m`: rotation by `3 m` degrees, shear by `0.03 m`, translation by `0.045 m` of the
    side, colour, contrast, brightness and sharpness by the factor `1 +- 0.09 m`, posterising to `4 - int(0.4 m)` bits,
    solarising above `256 - int(25.6 m)`, adding `int(11 m)` to the pixels below 128; either sign where there are two.
    The defaults are those of the published Swin and DeiT recipes, `rand-m9-mstd0.5-inc1` in timm's language.

    Attributes:
        magnitude: mean level, 0 to 10.
        layers: how many operations.
        probability: how often a drawn operation is applied.
        deviation: of the level.
        fill: the colour of what comes in from outside, red, green, blue; one number for grey images.
        interpolation: Pillow's filter of the geometric operations.
        operations: names from `RAND_AUGMENT`.
        key: the image's entry of the record.

    Source:
        E. D. Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", NeurIPS
        2020; operations, levels and the 0.5 of leaving one out as in timm's `auto_augment`.

    Differs:
        The random numbers are another stream than timm's; each operation at a given level gives the same pixels.
    """

    magnitude: float = 9.0
    layers: int = 2
    probability: float = 0.5
    deviation: float = 0.5
    fill: tuple[int, ...] = (124, 116, 104)
    interpolation: Interpolation = "bicubic"
    operations: tuple[str, ...] = tuple(RAND_AUGMENT)
    key: str = "image"

    def __post_init__(self) -> None:
        _check_probability("probability", self.probability)
        _check_interpolation(self.interpolation)
        if not 0 <= self.magnitude <= 10 or self.deviation < 0 or self.layers < 0:
            raise ValueError(
                f"magnitude={self.magnitude} must lie in [0, 10], deviation={self.deviation} and layers={self.layers} "
                "must not be negative; set them"
            )
        unknown = sorted(set(self.operations) - set(RAND_AUGMENT))
        if unknown or not self.operations:
            raise ValueError(f"operations={self.operations} must be among {list(RAND_AUGMENT)}; drop {unknown}")

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record with its image changed."""
        picture = before = _picture(record[self.key], "RandAugment")
        fill = self.fill[0] if picture.mode == "L" else (self.fill * 3)[:3]
        for name in generator.choice(self.operations, self.layers).tolist():
            # Every number is drawn whether it is needed or not: one operation does not move the numbers of the next.
            applied, sign = generator.random() < self.probability, 1 if generator.random() < 0.5 else -1
            level = min(10.0, max(0.0, generator.normal(self.magnitude, self.deviation)))
            if applied:
                picture = RAND_AUGMENT[name](
                    picture, level=level, sign=sign, fill=fill, resample=_filter(self.interpolation)
                )
        return record if picture is before else {**record, self.key: _pixels(picture)}


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Overwrites a random rectangle of a normalised image.

    The rectangle's area is uniform in `area` times that of the image, the logarithm of its aspect ratio (height to
    width) uniform in that of `ratio`; one that does not fit is drawn again, up to ten times.

    Attributes:
        probability: how often.
        area: smallest and largest share of the image.
        ratio: smallest and largest aspect ratio.
        mode: "pixel" fills in normal noise, "colour" one normal colour, "zero" zeros (the mean after `Normalize`).
        key: the image's entry of the record, float.

    Source:
        Z. Zhong et al., "Random erasing data augmentation", AAAI 2020; the ranges, and noise after normalisation, as in
        timm's `RandomErasing`.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    mode: Literal["pixel", "colour", "zero"] = "pixel"
    key: str = "image"

    def __post_init__(self) -> None:
        _check_probability("probability", self.probability)
        _check_range("area", self.area, 0, 1)
        _check_range("ratio", self.ratio, 0)
        if self.mode not in ("pixel", "colour", "zero"):
            raise ValueError(f"mode={self.mode!r} must be pixel, colour or zero; set mode")

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record, a part of its image overwritten or not."""
        image = record[self.key]
        if image.dtype.kind != "f":
            raise ValueError(f"RandomErasing takes normalised images, got {image.dtype}; put it after Normalize")
        if generator.random() >= self.probability:
            return record
        height, width, channels = image.shape
        for _ in range(10):
            area = height * width * generator.uniform(*self.area)
            ratio = math.exp(generator.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (0 < h < height and 0 < w < width):
                continue
            top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
            shape = {"pixel": (h, w, channels), "colour": (channels,), "zero": (0,)}[self.mode]
            noise = generator.standard_normal(shape, np.float32)
            image = image.copy()
            image[top : top + h, left : left + w] = 0 if self.mode == "zero" else noise
            return {**record, self.key: image}
        return record


# ------------------------------------------------------------------------------------------------------- small motions


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Shifts, turns and scales the record's "image" at random about its centre.

    Pixels are interpolated bilinearly, in float32 whatever the image's dtype; what comes from outside the image is 0.

    Attributes:
        max_shift: the largest shift along each axis, in pixels.
        max_degrees: the largest turn either way, in degrees.
        max_scale: the largest relative change of size; 0.1 means factors from 1/1.1 to 1.1.
        key: the name of the image in the record, `[height, width, channels]`.
    """

    max_shift: float
    max_degrees: float
    max_scale: float
    key: str = "image"

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        """Returns the record with its image moved."""
        down, right, turn, size = (2 * generator.random(4) - 1).tolist()
        image = _warp(
            record[self.key],
            math.radians(self.max_degrees * turn),
            (1 + self.max_scale) ** size,
            self.max_shift * down,
            self.max_shift * right,
        )
        return {**record, self.key: image}


def random_affine(max_shift: float = 1.0, max_degrees: float = 10.0, max_scale: float = 0.1) -> RandomAffine:
    """Makes an augmentation by small random shifts, turns and changes of size.

    Args:
        max_shift: the largest shift along each axis, in pixels.
        max_degrees: the largest turn either way, in degrees.
        max_scale: the largest relative change of size.

    Returns:
        A transform for `batches`; its parameters are part of the fingerprint.

    Raises:
        ValueError: if a bound is negative or not finite.
    """
    for name, value in (("max_shift", max_shift), ("max_degrees", max_degrees), ("max_scale", max_scale)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number of at least 0; set {name}")
    return RandomAffine(float(max_shift), float(max_degrees), float(max_scale))


@functools.lru_cache(maxsize=64)
def _grid(height: int, width: int) -> np.ndarray:
    """Returns the homogeneous centred pixel coordinates, rows y, x, 1."""
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    grid = np.stack([y - (height - 1) / 2, x - (width - 1) / 2, np.ones_like(y)])
    grid.setflags(write=False)
    return grid


def _warp(image: np.ndarray, angle: float, scale: float, down: float, right: float) -> np.ndarray:
    """Turns by `angle` (radians, from x to y), scales, then shifts an image `[height, width, channels]`.

    Works backwards: the output pixel at `p` reads the input at `R(-angle) (p - shift) / scale`.
    """
    height, width, channels = image.shape
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    # One row and column of zeros before the image and two after it; reading beyond is clipped into them.
    padded = np.zeros((height + 3, width + 3, channels), np.float32)
    padded[1:-2, 1:-2] = image
    centre_y, centre_x = (height + 1) / 2, (width + 1) / 2
    matrix = np.array(
        [
            [cosine, -sine, centre_y - cosine * down + sine * right],
            [sine, cosine, centre_x - sine * down - cosine * right],
        ]
    )
    places = matrix @ _grid(height, width)
    np.maximum(places, 0, out=places)
    np.minimum(places, [[height + 1], [width + 1]], out=places)
    corners = places.astype(np.intp)
    rest = (places - corners).astype(np.float32)[..., None]
    first = corners[0] * (width + 3) + corners[1]
    flat = padded.reshape(-1, channels)
    top, left = flat[first], flat[first + (width + 3)]
    top = top + (flat[first + 1] - top) * rest[1]
    left = left + (flat[first + (width + 4)] - left) * rest[1]
    result = top + (left - top) * rest[0]
    return result.reshape(image.shape)


# ----------------------------------------------------------------------------------------------------------- batches


@dataclasses.dataclass(frozen=True)
class MixupCutmix:
    """Mixes every image of a batch with its partner, and their labels; made by `mixup_cutmix`."""

    num_classes: int
    mixup_alpha: float
    cutmix_alpha: float
    probability: float
    switch_probability: float
    label_smoothing: float
    image: str
    label: str

    def __call__(self, batch: Mapping[str, Any], key: Any) -> dict[str, Any]:
        """Returns the batch with mixed images and soft labels `[batch, num_classes]`."""
        import jax
        import jax.numpy as jnp

        images, labels = jnp.asarray(batch[self.image]), jnp.asarray(batch[self.label])
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"{self.image!r} must be float [batch, height, width, channels], got {images.dtype} {images.shape}; "
                "normalise it in the record transform"
            )
        height, width = images.shape[1:3]
        # Only scalars are drawn, so no sharding of the batch can change what is drawn.
        keys = jax.random.split(key, 5)
        applied = jax.random.uniform(keys[0]) < self.probability
        share = 1.0 if not self.mixup_alpha else self.switch_probability if self.cutmix_alpha else 0.0
        cut = jax.random.uniform(keys[1]) < share
        alpha = jnp.where(cut, self.cutmix_alpha or 1.0, self.mixup_alpha or 1.0)
        weight = jax.random.beta(keys[2], alpha, alpha)  # the image's own
        side = jnp.sqrt(1 - weight)
        rows = _inside(height, jnp.floor(height * side), jax.random.randint(keys[3], (), 0, height))
        columns = _inside(width, jnp.floor(width * side), jax.random.randint(keys[4], (), 0, width))
        pasted = rows[:, None] & columns[None, :]
        # The weight of the partner at each pixel: 0 or 1 in cutmix, so that pixels are copied as they are.
        partner = jnp.where(applied, jnp.where(cut, pasted.astype(jnp.float32), 1 - weight), 0.0)
        share_of_partner = jnp.where(applied, jnp.where(cut, jnp.sum(pasted) / (height * width), 1 - weight), 0.0)
        partner = jnp.broadcast_to(partner, (height, width))[..., None].astype(images.dtype)
        mixed = images * (1 - partner) + images[::-1] * partner
        soft = labels if labels.ndim == 2 else jax.nn.one_hot(labels, self.num_classes)
        soft = soft * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        soft = soft * (1 - share_of_partner) + soft[::-1] * share_of_partner
        return {**batch, self.image: mixed, self.label: soft}


def _inside(length: int, extent: Any, centre: Any) -> Any:
    """Returns which places of an axis lie in a window of an extent around a centre, cut off at the ends."""
    import jax.numpy as jnp

    extent = extent.astype(jnp.int32)
    places = jnp.arange(length)
    return (places >= centre - extent // 2) & (places < centre + (extent + 1) // 2)


def mixup_cutmix(
    num_classes: int,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
    label_smoothing: float = 0.1,
    image: str = "image",
    label: str = "label",
) -> MixupCutmix:
    """Makes a batch transform that mixes image `i` of `n` with its partner `j = n - 1 - i`, and their labels.

    One draw decides for the whole batch between the two:

    - mixup: `x = l x_i + (1 - l) x_j`, `y = l y_i + (1 - l) y_j`, `l ~ Beta(mixup_alpha, mixup_alpha)`;
    - cutmix: a rectangle of `x_j` is pasted into `x_i`, its sides `sqrt(1 - l)` of the image's and its centre uniform,
      `l ~ Beta(cutmix_alpha, cutmix_alpha)`; cut off at the border it covers the share `a` of the image, and
      `y = (1 - a) y_i + a y_j`.

    The labels are smoothed first: `y_i = (1 - s) onehot(label_i) + s / num_classes`. It draws scalars only: the same
    key and batch give the same result on every mesh. Apply it under `jax.jit` to the global batch.

    Args:
        num_classes: length of the soft labels.
        mixup_alpha: 0 = no mixup.
        cutmix_alpha: 0 = no cutmix.
        probability: how often a batch is mixed.
        switch_probability: how often it is cutmix, where both are on.
        label_smoothing: `s`.
        image: the entry of the images, float `[batch, height, width, channels]`.
        label: the entry of the labels, whole numbers `[batch]` or soft `[batch, num_classes]`; the result is float32.

    Returns:
        The transform `(batch, key) -> batch`.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        H. Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018, equation 1; S. Yun et al., "CutMix:
        Regularization strategy to train strong classifiers with localizable features", ICCV 2019, equations 1 and 2;
        the reversed batch as partner and the corrected area as in timm's `Mixup`.
    """
    for name, value in (
        ("probability", probability),
        ("switch_probability", switch_probability),
        ("label_smoothing", label_smoothing),
    ):
        _check_probability(name, value)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1; set num_classes")
    if mixup_alpha < 0 or cutmix_alpha < 0 or not mixup_alpha + cutmix_alpha:
        raise ValueError(
            f"mixup_alpha={mixup_alpha} and cutmix_alpha={cutmix_alpha} must not be negative, and one positive; "
            "set them"
        )
    return MixupCutmix(
        num_classes, mixup_alpha, cutmix_alpha, probability, switch_probability, label_smoothing, image, label
    )


class Recipe(NamedTuple):
    """The three transforms of a recipe.

    Attributes:
        train: of training records.
        test: of test records.
        batch: of training batches.
    """

    train: Compose
    test: Compose
    batch: MixupCutmix


def swin_recipe(
    size: int = 224,
    num_classes: int = 1000,
    *,
    crop_fraction: float = 224 / 256,
    magnitude: float = 9.0,
    erasing: float = 0.25,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    label_smoothing: float = 0.1,
    image: str = "image",
    label: str = "label",
) -> Recipe:
    """Makes the augmentation that Swin (and DeiT) were trained with on ImageNet-1k.

    Training: random resized crop (8 % to 100 % of the area, ratio 3/4 to 4/3, bicubic), flip, RandAugment `m9`,
    `mstd0.5` with two operations, ImageNet's mean and deviation, random erasing with noise in a quarter of the images;
    then mixup (0.8) or cutmix (1.0) of the batch, label smoothing 0.1. Test: the shorter side to
    `size / crop_fraction` (bicubic), the middle `size x size`, normalised. Colour jitter is off where RandAugment is
    on, in the recipe too.

    Args:
        size: height and width of the images.
        num_classes: length of the soft labels.
        crop_fraction: what the crop keeps of the shorter side in the test.
        magnitude: of RandAugment.
        erasing: probability of random erasing.
        mixup_alpha: as for `mixup_cutmix`.
        cutmix_alpha: as for `mixup_cutmix`.
        label_smoothing: as for `mixup_cutmix`.
        image: the entry of the image.
        label: the entry of the label.

    Returns:
        The transforms, for `train_transform`, `test_transform` and `batch_transform` of a `Config`.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Z. Liu et al., "Swin Transformer: Hierarchical vision transformer using shifted windows", ICCV 2021, section
        A2.1; H. Touvron et al., "Training data-efficient image transformers", ICML 2021, table 9.
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction={crop_fraction} must lie in (0, 1]; set crop_fraction")
    normalize = Normalize(key=image)
    train = (
        RandomResizedCrop(size, key=image),
        HorizontalFlip(key=image),
        RandAugment(magnitude=magnitude, key=image),
        normalize,
        RandomErasing(erasing, key=image),
    )
    test = (Resize(math.floor(size / crop_fraction), key=image), CenterCrop(size, key=image), normalize)
    mix = mixup_cutmix(
        num_classes, mixup_alpha, cutmix_alpha, label_smoothing=label_smoothing, image=image, label=label
    )
    return Recipe(Compose(train), Compose(test), mix)
