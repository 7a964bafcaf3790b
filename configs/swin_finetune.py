"""Fine-tune a pretrained backbone on 50 labelled digits: weights from another run, a fresh head, layer-wise decay.

Command:  python -m train configs/simmim_digits.py     # once: leaves the encoder, which saw no label
          python -m train configs/swin_finetune.py
Expected: test accuracy 0.866 (from scratch 0.773, logistic regression 0.781, support vector machine 0.791, nearest
          neighbour 0.795 on the same 50 labels); a minute and a half of processor time on two CPU cores for both.

Five labels of each class are kept of the 1,198 training images; the test is on all 599 held-out ones. The rival is the
same network from scratch, in the same run and with the same settings. Where the weights come from is
`--set start_from.path=...`: a run, one of its checkpoints, or a `.safetensors` file, also one converted from PyTorch by
`jaxlayers.window.swin.from_reference`. SimMIM keeps its encoder under `encoder/`, which the rename takes off; its token
and decoder find no place in a classifier and are skipped. The log names what was loaded, skipped and left fresh.
"""

from collections.abc import Mapping

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from jaxlayers.window import Swin, swin
from train.config import Config, Optim, StartFrom
from train.data import Source, arrays, digits, random_affine
from train.tasks import classification

LABELS_PER_CLASS = 5


def config(smoke: bool = False) -> Config:
    """Return the run; the small one starts from scratch and shows in a minute that everything else works."""
    # As in simmim_digits, but for head and drop path.
    model = Swin(
        num_classes=10,
        patch_size=2,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(4, 8),
        window_size=4,
        drop_path_rate=0.05,
        kernel_init=nn.initializers.xavier_uniform(),
    )
    return Config(
        title="Fine-tuning on 50 labels",
        model=model,
        task=classification(10, inputs=("image",), label="label", label_smoothing=0.1),
        train_data=labelled(),
        test_data=digits("test"),
        train_transform=random_affine(max_shift=0.7, max_degrees=8.0, max_scale=0.07),
        steps=20 if smoke else 600,
        batch_size=32,
        eval_batch_size=200,
        optim=Optim(
            learning_rate=2e-3,
            warmup_steps=5 if smoke else 60,
            weight_decay=0.05,
            layer_ids=depths(model).__getitem__,
            layer_decay=0.8,
        ),
        start_from=None
        if smoke
        else StartFrom(
            "runs/simmim_digits",
            rename=((r"^encoder/", ""),),
            exclude=(r"^head/",),
            require=(r"^patch_embed/", r"^stages_", r"^final_norm/"),
        ),
        log_every=10,
        eval_every=10 if smoke else 100,
        metric="accuracy",
        labels=tuple("0123456789"),
        baselines=baselines,
        rivals={"from scratch": model},
    )


def depths(model: Swin) -> Mapping[str, int]:
    """Return the layer of each parameter by its path, the patch embedding first."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return flax.traverse_util.flatten_dict(swin.layer_ids(params, model), sep="/")


def labelled() -> Source:
    """Return the first few training images of each class."""
    source = digits("train")
    records = [source[index] for index in range(len(source))]
    labels = np.stack([record["label"] for record in records])
    chosen = np.concatenate([np.flatnonzero(labels == label)[:LABELS_PER_CLASS] for label in range(10)])
    return arrays(image=np.stack([records[index]["image"] for index in chosen]), label=labels[chosen])


def baselines() -> Mapping[str, float]:
    """Return the test accuracy of scikit-learn's classifiers on the same labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    def columns(source: Source) -> tuple[np.ndarray, np.ndarray]:
        records = [source[index] for index in range(len(source))]
        return np.stack([one["image"].ravel() for one in records]), np.stack([one["label"] for one in records])

    train, test = columns(labelled()), columns(digits("test"))
    models = {
        "logistic regression": LogisticRegression(max_iter=2000),
        "support vector machine": SVC(gamma="scale"),
        "nearest neighbour": KNeighborsClassifier(1),
    }
    return {f"{name} accuracy": float(model.fit(*train).score(*test)) for name, model in models.items()}
