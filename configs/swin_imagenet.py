r"""Train Swin-T on ImageNet-1k by the published recipe: 300 epochs at 224 x 224.

Command:  python -c "import tensorflow_datasets as t; t.data_source('imagenet2012')"    # once, see below
          HARDWARE=gpu-8 python -m train configs/swin_imagenet.py
          HARDWARE=tpu-v5e-16 python -m train configs/swin_imagenet.py --distributed \
              --set checkpoint_dir=gs://...    # on each host
Expected: the authors publish 81.2 % top-1 of one crop (README of microsoft/Swin-Transformer, 28 M parameters, 4.5 G
          multiply-accumulates). The recipe is theirs number by number; a full run of it was not made with this code.
          `--smoke` shows in a minute on two CPU cores, on simulated pictures, that all parts work together.

`HARDWARE` names an entry of the table below; the batch of 1,024, and with it the recipe, is the same on all of them.
The pictures are read from `IMAGENET`, a folder with `train/<class>/*.JPEG` and `val/<class>/*.JPEG`, if that is set,
else from TensorFlow Datasets' array_record files in `TFDS_DATA_DIR`, which the first command prepares after you have
put the two archives of ILSVRC 2012 into its `downloads/manual`. Data is opened when training begins, so `--print` needs
none.

Of the reference this differs in three things: the warmup starts from a step's share of the peak (4e-8) instead of 1e-6;
a last incomplete batch of an epoch is not dropped but filled from the next (an epoch is still counted as 1,251 steps);
and computing is in bfloat16 instead of float16 with loss scaling.
"""

import dataclasses
import functools
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlayers.window import Swin
from train.augment import swin_recipe
from train.config import Config, MeshShape, Optim
from train.data import Source, arrays, image_folder, tfds
from train.tasks import classification

# Steps are counted as the reference counts them: of 1,281,167 pictures, whole batches of 1,024.
EPOCH = 1251
EPOCHS, WARMUP_EPOCHS = 300, 20
# 5e-4 for each 512 pictures, as its main.py scales it; so 5e-6 at the end is a hundredth.
BATCH, PEAK, LAST = 1024, 1e-3, 0.01


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What changes from one machine to another.

    Attributes:
      mesh: layout of the devices.
      accumulate: pieces of the batch, taken one after the other, so that activations fit.
      workers: processes that decode and augment, on each host.
    """

    mesh: MeshShape
    accumulate: int
    workers: int


HARDWARE = {
    # 128 pictures at a time, as on each of the authors' eight.
    "gpu-1": Hardware(MeshShape(data=1), accumulate=8, workers=12),
    "gpu-8": Hardware(MeshShape(data=8), accumulate=1, workers=64),
    # 28 M parameters fit every chip many times over: plain data parallelism, 64 and 4 pictures a chip. Four hosts ...
    "tpu-v5e-16": Hardware(MeshShape(data=16), accumulate=1, workers=96),
    # ... and 64. Four pictures keep a chip busy only in part; what makes it worth while is a larger model.
    "tpu-v5e-256": Hardware(MeshShape(data=256), accumulate=1, workers=32),
}


def config(smoke: bool = False) -> Config:
    """Return the run; the small one, on simulated pictures, shows in a minute that everything works."""
    size, classes = (32, 8) if smoke else (224, 1000)
    hardware = Hardware(MeshShape(), accumulate=2, workers=0) if smoke else chosen()
    train_transform, test_transform, batch_transform = swin_recipe(size, classes)
    model = Swin(num_classes=classes, drop_path_rate=0.2, dtype=jnp.bfloat16)
    if smoke:
        model = model.clone(embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, patch_size=2)
    return Config(
        title="Swin-T on ImageNet-1k",
        model=model,
        # The mixing has smoothed the labels already.
        task=classification(classes, inputs=("image",), label="label"),
        train_data=simulated(64, classes) if smoke else Pictures("train"),
        test_data=simulated(32, classes) if smoke else Pictures("validation"),
        train_transform=train_transform,
        test_transform=test_transform,
        batch_transform=batch_transform,
        steps=6 if smoke else EPOCHS * EPOCH,
        batch_size=16 if smoke else BATCH,
        accumulate=hardware.accumulate,
        workers=hardware.workers,
        on_corrupt="skip",
        optim=Optim(
            name="adamw",
            learning_rate=PEAK,
            warmup_steps=2 if smoke else WARMUP_EPOCHS * EPOCH,
            final_fraction=LAST,
            weight_decay=0.05,
            clip_norm=5.0,
        ),
        mesh=hardware.mesh,
        log_every=1 if smoke else 50,
        eval_every=3 if smoke else EPOCH,
        keep_every=None if smoke else 50 * EPOCH,
        metric="accuracy",
    )


def chosen() -> Hardware:
    """Return the entry of `HARDWARE` that the environment names."""
    name = os.environ.get("HARDWARE", "gpu-8")
    if name not in HARDWARE:
        raise ValueError(f"HARDWARE={name!r} must be one of {sorted(HARDWARE)}; set the environment variable HARDWARE")
    return HARDWARE[name]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A split of ImageNet-1k, "train" or "validation", that is opened when its length or a record is asked for."""

    split: str

    @functools.cached_property
    def source(self) -> Any:
        """The folder that `IMAGENET` names, or the files of TensorFlow Datasets."""
        folder = os.environ.get("IMAGENET")
        if folder:
            return image_folder(os.path.join(folder, "train" if self.split == "train" else "val"))
        return tfds("imagenet2012", self.split, columns=("image", "label"), prepare=with_int32_label)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.source[index]

    def digest(self) -> str:
        """Return what identifies the content."""
        return self.source.digest()


def with_int32_label(record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the record with its label as the int32 that JAX computes with."""
    return {**record, "label": record["label"].astype(np.int32)}


def simulated(count: int, classes: int) -> Source:
    """Return `count` pictures of noise around a colour that tells the class, as records of raw bytes."""
    rng = np.random.default_rng(count)
    colours, labels = rng.integers(40, 215, size=(classes, 3)), np.arange(count) % classes
    noise = rng.normal(scale=20, size=(count, 40, 48, 3))
    images = np.clip(colours[labels][:, None, None] + noise, 0, 255)
    return arrays(image=images.astype(np.uint8), label=labels.astype(np.int32))
