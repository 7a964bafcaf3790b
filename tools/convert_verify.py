"""Verification of a conversion: our model beside the reference's own code, with the same weights, on the same input."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers import pretrained
from jaxlayers.files import Tensors
from tools import convert_write

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value of a stage, that passes."""

# Where a dialect's files come from a package that can make the model from a name.
_PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "huggingface": "transformers",
    "huggingface_v2": "transformers",
    "huggingface_5": "transformers",
    "monai": "monai",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a verification found.

    Attributes:
      passed: whether all stages agree, or there was nothing to compare with and the values look sound.
      text: to be shown.
      errors: for each stage the largest absolute difference and that relative to the largest value.
    """

    passed: bool
    text: str
    errors: Mapping[str, tuple[float, float]]


def verify(
    model: nn.Module,
    found: pretrained.Pretrained,
    tensors: Tensors,
    reference: str | None,
    inputs: Sequence[Any] | None,
    config: Mapping[str, Any],
    image_size: int | None = None,
) -> Result:
    """Compare outputs of every stage, where the reference's package is installed; else look at the values.

    Args:
      model: ours.
      found: its variables.
      tensors: the checkpoint.
      reference: `timm:NAME`, `torchvision:NAME`, `transformers:CLASS` or `monai:CLASS`; `None` takes what the config
        names.
      inputs: shapes of the inputs.
      config: what `config.json` beside the checkpoint holds.
      image_size: side of the image; `None` takes the reference's.

    Raises:
      ValueError: if the reference is named but not installed, or does not take the weights.
    """
    if found.report.fresh or found.report.changed:
        return _values(found, "parts were fitted or begun anew, so that the reference cannot agree")
    if reference is None and config.get("architectures"):
        reference = f"transformers:{config['architectures'][0]}"
    if reference is None:
        package = _PACKAGES.get(found.dialect.name)
        hint = f"; pass --reference {package}:NAME to run it" if package else ", whose code is in no package"
        return _values(found, f"the reference is {found.dialect.origin}{hint}")
    package, _, name = reference.partition(":")
    if package not in _PACKAGES.values() or not name:
        raise ValueError(
            f"--reference {reference!r} must be one of {sorted({*_PACKAGES.values()})}, a colon and a name"
        )
    try:
        torch = importlib.import_module("torch")
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"--verify needs {package} and PyTorch ({error}); install them, or leave it out") from error
    theirs = _made(package, name, model, found, config, inputs)
    state = {name.removeprefix(found.report.prefix): tensors[name] for name in found.report.converted}
    weights = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}
    if package == "transformers":
        # Names in its files are not always those in memory.
        theirs, notes = type(theirs).from_pretrained(
            None, config=theirs.config, state_dict=weights, output_loading_info=True
        )
        missing, unexpected = sorted(notes["missing_keys"]), sorted(notes["unexpected_keys"])
    else:
        missing, unexpected = theirs.load_state_dict(weights, strict=False)
    computed = found.dialect.reasons(missing, model)
    missing = [name for name in missing if name not in computed]
    if missing or unexpected:
        raise ValueError(f"{reference} must take the weights; missing {missing[:5]}, unexpected {list(unexpected)[:5]}")
    size = _size(theirs, package, config, inputs)
    if image_size is not None:
        size = (size[0], *(image_size,) * (len(size) - 2), size[-1])
    image = np.random.default_rng(0).normal(size=size).astype(np.float32)
    stages = _stages_of_theirs(torch, theirs.eval(), package, image)
    ours = _stages_of_ours(model, found.variables, image)
    errors: dict[str, tuple[float, float]] = {}
    for stage in stages:
        if stage in ours:
            a, b = _alike(np.asarray(ours[stage], np.float32), stages[stage])
            worst = float(np.abs(a - b).max())
            errors[stage] = worst, worst / max(float(np.abs(b).max()), 1e-30)
    lines = [f"beside {reference}, on random values of {list(size)}:"]
    lines += [
        f"  {stage}: largest difference {worst:.2e}, relative {share:.2e}" for stage, (worst, share) in errors.items()
    ]
    passed = "output" in errors and all(share <= TOLERANCE for _, share in errors.values())
    lines.append("verified" if passed else f"NOT VERIFIED: a relative difference must be at most {TOLERANCE}")
    return Result(passed, "\n".join(lines), errors)


def _values(found: pretrained.Pretrained, why: str) -> Result:
    """Look at the values alone: finite, and no tensor constant that has no reason to be."""
    leaves = jax.tree.leaves(found.variables)
    finite = all(
        bool(np.isfinite(np.asarray(leaf)).all()) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)
    )
    text = (
        f"not run beside the reference: {why}\n"
        f"{len(leaves)} arrays, {sum(leaf.size for leaf in leaves):,} values, all finite: {finite}\n"
        f"{convert_write.statistics(found.variables)}"
    )
    return Result(finite, text, {})


def _made(
    package: str,
    name: str,
    model: Any,
    found: pretrained.Pretrained,
    config: Mapping[str, Any],
    inputs: Sequence[Any] | None,
) -> Any:
    heads = [head for head in found.dialect.heads if head in found.layout]
    classes = {"num_classes": found.layout[heads[0]][0]} if heads else {}
    if package == "timm":
        return importlib.import_module("timm").create_model(name, pretrained=False, **classes)
    if package == "torchvision":
        models = importlib.import_module("torchvision.models")
        return models.get_model(name, weights=None, **classes)
    if package == "monai":
        nets = importlib.import_module("monai.networks.nets")
        if name != "SwinUNETR" or not inputs:
            raise ValueError(f"--reference monai:{name} must be monai:SwinUNETR")
        return nets.SwinUNETR(
            in_channels=inputs[0].shape[-1],
            out_channels=model.num_classes,
            feature_size=model.embed_dim,
            depths=model.depths,
            num_heads=model.num_heads,
            window_size=model.window_size,
            spatial_dims=len(model.window_size),
            use_v2=model.stage_convolutions,
        )
    transformers = importlib.import_module("transformers")
    made = getattr(transformers, name, None)
    if made is None:
        raise ValueError(f"--reference transformers:{name} must name a class of transformers")
    kept = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    if classes and "id2label" not in kept:
        kept["num_labels"] = classes["num_classes"]
    return made(made.config_class.from_dict(kept))


def _size(theirs: Any, package: str, config: Mapping[str, Any], inputs: Sequence[Any] | None) -> tuple[int, ...]:
    if package == "monai" and inputs:
        return tuple(inputs[0].shape)
    if package == "timm":
        channels, height, width = theirs.default_cfg["input_size"]
        return (1, height, width, channels)
    side = config.get("image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    channels = inputs[0].shape[-1] if inputs else 3
    return (1, height, width, channels)


def _stages_of_theirs(torch: Any, theirs: Any, package: str, image: np.ndarray) -> dict[str, np.ndarray]:
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 1)))
    found: dict[str, Any] = {}
    with torch.no_grad():
        if package == "timm" and hasattr(theirs, "forward_intermediates"):
            maps = theirs.forward_intermediates(x, intermediates_only=True)
            # Counted from the last: some count their stem as the first stage. A single map is no pyramid.
            found |= {f"stage {index - len(maps)}": one for index, one in enumerate(maps)}
            found["output"] = theirs(x)
        elif package == "transformers":
            out = theirs(x, output_hidden_states=True)
            found["output"] = out.logits
        else:
            found["output"] = theirs(x)
    return {name: one.detach().numpy() for name, one in found.items()}


def _stages_of_ours(model: nn.Module, variables: Mapping[str, Any], image: np.ndarray) -> dict[str, Any]:
    x = jnp.asarray(image)
    found: dict[str, Any] = {}
    features = getattr(type(model), "features", None)
    if features is not None:
        levels = jax.jit(nn.apply(features, model))(variables, x)
        if len(levels) > 1:
            found |= {f"stage {index - len(levels)}": level.array for index, level in enumerate(levels)}
    found["output"] = jax.jit(model.apply)(variables, x)
    return found


def _alike(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both channels last."""
    if ours.shape != theirs.shape and theirs.ndim == ours.ndim > 2:
        theirs = np.moveaxis(theirs, 1, -1)
    if ours.shape != theirs.shape and ours.size == theirs.size:
        theirs = theirs.reshape(ours.shape)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"outputs must have one shape to be compared, not {ours.shape} and {theirs.shape}; set the fields"
        )
    return ours, theirs
