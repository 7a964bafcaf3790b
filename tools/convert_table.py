"""Draw the table of dialects: `python -m tools.convert_table [--out docs/conversion.md] [--only WORD]`.

Each reference that a package has is made there with random weights, saved as that package saves it, taken through the
whole command of `tools.convert` and back, and run beside ours on random input.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlayers
from jaxlayers import pretrained
from jaxlayers.files import open_tensors
from tools import convert, convert_write

# Measured by `python -m tools.bench_convert` (Python 3.11, JAX 0.10.2, two cores).
MEMORY = (
    "reading 994 MB of Swin weights\n  into a folder held 1.17 times that at most, writing the reference's layout "
    "about four times."
)
LAYOUTS = Path(__file__).parents[1] / "tests" / "golden" / "layouts"

# References whose own code was run once: repository and commit of the arrays below tests/golden.
STORED = {
    "AttSwinUNet": "NITR098/AttSwinUNet 4b14f37",
    "AxialResNet": "csrhddlam/axial-deeplab 79088ed",
    "DAGNN": "divelab/DeeperGNN ad7fba8",
    "DRCT": "ming053l/DRCT c0a8b51",
    "DeepRC": "ml-jku/DeepRC 108d08d",
    "EGNN": "vgsatorras/egnn e9ca6c0",
    "EnergyTransformerBlock": "bhoov/energy-transformer-jax f01e90c",
    "FrameGNN": "omri1348/Frame-Averaging 9de18e1",
    "GTA": "autonomousvision/gta 1dcbd37",
    "Hopfield": "ml-jku/hopfield-layers f56f929",
    "HopfieldLayer": "ml-jku/hopfield-layers f56f929",
    "Hopular": "ml-jku/hopular 3e0c39f",
    "LieResNet": "mfinzi/LieConv 93affb1",
    "Maxim": "google-research/maxim 3c82651",
    "PPGN": "omri1348/Equivariant-Polynomaials 8262feb",
    "PaRotClassifier": "dingxin-zhang/PaRot c0b5905",
    "PaRotSegmenter": "dingxin-zhang/PaRot c0b5905",
    "RISurConvClassifier": "cszyzhang/RISurConv 27c48dd",
    "RISurConvSegmenter": "cszyzhang/RISurConv 27c48dd",
    "RMT": "qhfan/RMT 32ea214",
    "RePAST": "autonomousvision/gta 1dcbd37",
    "SE3Assembly": "crtie/Leveraging-SE-3-Equivariance-for-Learning-3D-Geometric-Shape-Assembly 7061d09",
    "SE3Transformer": "FabianFuchsML/se3-transformer-public a9010df",
    "SetTransformer": "juho-lee/set_transformer 73432c6",
    "SheafDiffusion": "twitter-research/neural-sheaf-diffusion 11e21b5",
    "ShiftViT": "microsoft/SPACH dcede1e",
    "Swin3D": "microsoft/Swin3D 4184679",
    "SwinFace": "lxq1000/SwinFace 2770479",
    "VNDGCNN": "FlyingGiraffe/vnn f3197e2",
    "VNDGCNNSegmentation": "FlyingGiraffe/vnn f3197e2",
    "VNPointNet": "FlyingGiraffe/vnn f3197e2",
    "VNPointNetSegmentation": "FlyingGiraffe/vnn f3197e2",
    "VNSmall": "arnab39/equiadapt 657ee6f",
    "ViTResNAS": "yilunliao/vit-search 303e7c3",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A reference that is run beside ours.

    Attributes:
      model: our named model.
      reference: `package:NAME` as `--reference` takes it.
      settings: of the reference's config, where it is made from one.
      options: of the command, besides.
    """

    model: str
    reference: str
    settings: tuple[tuple[str, Any], ...] = ()
    options: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        """The package that has the reference."""
        return self.reference.partition(":")[0]


ROWS = (
    Row("swin_tiny", "timm:swin_tiny_patch4_window7_224"),
    Row("swin_tiny", "torchvision:swin_t"),
    Row("swin_tiny", "transformers:SwinForImageClassification", (("num_labels", 10),)),
    Row("swin_v2_tiny_window8_256", "timm:swinv2_tiny_window8_256"),
    Row("swin_v2_tiny_window8_256", "torchvision:swin_v2_t", options=("--image-size", "256")),
    Row(
        "swin_v2_tiny_window8_256",
        "transformers:Swinv2ForImageClassification",
        (("num_labels", 10), ("image_size", 256), ("window_size", 8)),
    ),
    Row("convnext_atto", "timm:convnext_atto"),
    Row("convnextv2_atto", "timm:convnextv2_atto"),
    Row("convnext_tiny", "torchvision:convnext_tiny"),
    Row(
        "convnext_tiny",
        "transformers:ConvNextForImageClassification",
        (("num_labels", 10), ("hidden_sizes", (32, 64, 96, 128)), ("layer_norm_eps", 1e-6)),
    ),
    Row(
        "convnextv2_tiny",
        "transformers:ConvNextV2ForImageClassification",
        (("num_labels", 10), ("hidden_sizes", (32, 64, 96, 128)), ("layer_norm_eps", 1e-6)),
    ),
    Row("crossvit_9_240", "timm:crossvit_9_240"),
    Row("tnt_small_legacy", "timm:tnt_s_legacy_patch16_224"),
    Row("hiera_tiny", "timm:hiera_tiny_224"),
    Row(
        "hiera_base",
        "transformers:HieraForImageClassification",
        (("num_labels", 10), ("embed_dim", 32), ("depths", (1, 2, 3, 1))),
    ),
    Row("maxvit_tiny", "timm:maxvit_tiny_tf_224"),
    Row(
        "swin_unetr_small",
        "monai:SwinUNETR",
        (("in_channels", 1), ("out_channels", 14), ("feature_size", 24)),
        # The weights do not say which version of MONAI merged them.
        ("--set", "merging=complete"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one row gave.

    Attributes:
      dialect: that the command told.
      kind: of the file.
      tensors: how many were converted.
      absolute: largest difference of the output.
      relative: largest difference of a stage or the output, relative to its largest value.
      back: whether the reference's file came back bit for bit.
    """

    dialect: str
    kind: str
    tensors: int
    absolute: float
    relative: float
    back: bool


def run(row: Row, folder: Path) -> Outcome:
    """Make a reference with random weights, convert it there and back, and run both.

    Args:
      row: which.
      folder: an empty one to work in.

    Raises:
      ValueError: if the command does not end well; with what it said.
    """
    theirs = _made(row)
    if row.package == "transformers":
        theirs.save_pretrained(folder / "theirs")
        source = folder / "theirs"
    else:
        source = folder / "theirs.pth"
        importlib.import_module("torch").save(theirs.state_dict(), source)
    named = () if row.package == "transformers" else ("--model", row.model)
    report, ours, back = folder / "report.json", folder / "ours", folder / "back.safetensors"
    _command("run", source, ours, *named, *row.options, "--verify", "--reference", row.reference, "--report", report)
    _command("run", ours, back, "--to", "reference")
    found = json.loads(report.read_text())
    before, after = open_tensors(source), open_tensors(back)
    prefix = found["prefix"]
    same = {name.removeprefix(prefix) for name in found["converted"]} == set(after) and all(
        np.array_equal(before[prefix + name], after[name]) for name in after
    )
    worst = found["errors"]
    return Outcome(
        found["dialect"],
        found["kind"],
        len(found["converted"]),
        worst["output"][0],
        max(share for _, share in worst.values()),
        same,
    )


def _command(*arguments: Any) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = convert.main([str(argument) for argument in arguments])
    if code:
        raise ValueError(f"tools.convert {' '.join(map(str, arguments))} ended with {code}: {said.getvalue()}")


def _made(row: Row) -> Any:
    """Return the reference, its weights drawn at a scale at which each shows in the output."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    package, _, name = row.reference.partition(":")
    if package == "timm":
        model = importlib.import_module("timm").create_model(name, pretrained=False)
    elif package == "torchvision":
        model = importlib.import_module("torchvision.models").get_model(name, weights=None)
    elif package == "monai":
        model = importlib.import_module("monai.networks.nets").SwinUNETR(**dict(row.settings))
    else:
        made = getattr(importlib.import_module("transformers"), name)
        model = made(made.config_class(**dict(row.settings)))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim == 1 or "table" in path or "scale" in path:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            if row.reference == "torchvision:swin_v2_t" and path.endswith("attn.qkv.bias"):
                # The part of the keys is zeroed where it is used, and comes back as zero.
                parameter[parameter.numel() // 3 : 2 * parameter.numel() // 3] = 0
    return model.eval()


def document(rows: Sequence[tuple[Row, Outcome]]) -> str:
    """Return the page."""
    ran: dict[tuple[str, str], list[tuple[Row, Outcome]]] = {}
    for row, outcome in rows:
        module = pretrained.class_of(row.model).__name__
        ran.setdefault((module, outcome.dialect), []).append((row, outcome))
    lines = []
    for dialect in pretrained.list_dialects():
        module = dialect.module.__name__
        back = "no: " + dialect.one_way if dialect.one_way else "yes" if dialect.layout else "with `--like`"
        cells = [module, dialect.name, dialect.origin]
        for row, outcome in ran.get((module, dialect.name), ()):
            name = f"{row.package} {importlib.metadata.version(row.package)}, `{row.reference.partition(':')[2]}`"
            found = [
                f"{name}, {outcome.tensors} tensors, {outcome.kind}",
                f"{outcome.absolute:.1e} ({outcome.relative:.1e})",
                "bit for bit" if outcome.back else "differs",
            ]
            lines.append("| " + " | ".join([*cells, *found]) + " |")
        if (module, dialect.name) in ran:
            continue
        cells += [_layout_source(module, dialect.name), "", back]
        lines.append("| " + " | ".join(cells) + " |")
    programs = "\n".join(f"| {name} | {size} | {program(name, size)} |" for name, size in PROGRAMS.items())
    return TEMPLATE.format(memory=MEMORY, table="\n".join(lines), programs=programs)


def _layout_source(module: str, dialect: str) -> str:
    """Return what the stored list of names and shapes of a reference says of its origin."""
    word = re.sub(r"[^a-z0-9]", "", module.lower())
    for path in sorted(LAYOUTS.glob("*.txt")):
        stem = path.stem.split(f"_{dialect}")[0]
        if f"_{dialect}" in path.stem and re.sub(r"[^a-z0-9]", "", stem) == word:
            origin = path.read_text().splitlines()[0].lstrip("# ").split()
            return f"names and shapes of {origin[0]} {origin[1][:7]}"
    return f"stored arrays of {STORED[module]}" if module in STORED else ""


TEMPLATE = """# Conversion of checkpoints

Weights of references go into our models and back by `python -m tools.convert`, or in code:

```python
import jaxlayers

model = jaxlayers.create_model("swin_tiny")
variables = jaxlayers.load_pretrained(model, "swin_tiny_patch4_window7_224.pth")
```

```
python -m tools.convert list swin                    # which references are known
python -m tools.convert inspect weights.pth          # what is in a file, and which model it looks like
python -m tools.convert run weights.pth swin/ --verify --reference timm:swin_tiny_patch4_window7_224
python -m tools.convert run weights.pth swin10/ --model swin_tiny \\
    --set num_classes=10 --set window_size=8 --was window_size=7
python -m tools.convert run swin/ back.safetensors --to reference        # bit for bit what was read
python -m tools.convert run swin/ timm.safetensors --to reference --dialect timm
python -m tools.convert run swin/ program/ --to stablehlo                # also orbax, msgpack, onnx
```

- **Formats read**: safetensors, PyTorch (`.pth`, `.pt`, `.bin`, zip or older) without PyTorch and without running what
  a file holds, `.npz`, Flax msgpack, indexes of several files, folders of Hugging Face (`config.json` picks the model)
  and our own, Orbax checkpoints of variables. HDF5 is not read: no reference of these models has only that.
- **Accounting**: every tensor is converted, ignored by a rule that states its reason, or stops the conversion unless
  `--allow` names it. `--report` writes all of it as JSON. A classifier of another size begins anew, a first kernel for
  other channels is fitted, windows and images are resized from what `--was` says; each is reported.
- **What a file lacks**: weights of the reference of `SE3Transformer` are relative to a basis whose signs are in no
  state dict; `jaxlayers.equivariant.tensor_field.basis_factors` has the lines that save it with them.
- **Writing**: an output is there whole or not at all, what is written is read back and compared with its SHA-256, and
  a run that was broken off is taken up where it stopped. Nothing outside the output is touched.
- **Verification**: `--verify` runs the reference's own code beside ours when its package is installed; otherwise it
  looks at shapes, counts and values, and says so.
- **Memory**: `python -m tools.bench_convert` measures it on a synthetic checkpoint; {memory}

## Dialects

One line for each model and reference. Where a package has the reference, it was made there with random weights, saved
as the package saves it, and taken there and back by the command: the error is the largest difference of the output,
and in brackets the largest of any stage relative to its largest value. For the others the parity of outputs is in the
tests of the model, and names, shapes and the way back were compared with what the named code, run once, had left.
`python -m tools.convert_table --out docs/conversion.md` draws this page.

| model | reference | files come from | run or compared with | error | back |
| --- | --- | --- | --- | --- | --- |
{table}

## ONNX

`--to onnx` writes one file for any batch size by jax2onnx (`pip install jaxlayers[onnx]`), and only if ONNX Runtime
then gives the model's outputs on random input. With random weights, by the same command as the table above:

| model | side of the image | largest difference, relative to the largest output |
| --- | --- | --- |
{programs}
"""

PROGRAMS = {
    "swin_tiny": 224,
    "swin_v2_tiny_window8_256": 256,
    "convnext_tiny": 224,
    "hiera_tiny": 224,
    "maxvit_tiny": 224,
    "cvt_13": 224,
    "crossvit_tiny_240": 240,
    "tnt_small": 224,
    "shiftvit_tiny": 224,
    "rmt_tiny": 224,
}
"""Models that are written as ONNX -> side of their image."""


def program(name: str, size: int) -> str:
    """Return how far the ONNX program of a model with random weights is from it, or why there is none."""
    model = jaxlayers.create_model(name)
    image = np.zeros((1, size, size, 3), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    with tempfile.TemporaryDirectory() as folder:
        try:
            error = convert_write.save_onnx(
                Path(folder) / "model.onnx", name, functools.partial(model.apply, variables), [image.shape[1:]]
            )
        except ValueError as refusal:
            return f"not taken: `{refusal.__cause__!r}`"
    return f"{error:.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all rows and write the page; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert_table", description=__doc__)
    parser.add_argument("--out", type=Path, help="the page (default: printed)")
    parser.add_argument("--only", default="", help="rows whose model or reference holds this word")
    options = parser.parse_args(arguments)
    done = []
    for row in ROWS:
        if options.only in row.model or options.only in row.reference:
            with tempfile.TemporaryDirectory() as folder:
                outcome = run(row, Path(folder))
            print(row.reference, dataclasses.asdict(outcome), file=sys.stderr)
            done.append((row, outcome))
    text = document(done)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
