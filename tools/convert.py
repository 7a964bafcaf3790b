"""Convert checkpoints: `python -m tools.convert list | inspect FILE | run SOURCE OUT [--model NAME] [--to FORMAT]`.

`run` takes the weights of a reference (safetensors, PyTorch, `.npz`, msgpack, one file or an indexed folder) or a
folder that this command or `tools.export` wrote, and writes

    folder     safetensors with config and card, which `load_pretrained` and `start_from` read (the default)
    reference  one safetensors file with the names and layout of a reference, bit for bit those that were read
    orbax      an Orbax checkpoint of the variables
    msgpack    what `flax.serialization.from_bytes` reads
    stablehlo  the model as a program for any batch size, with its weights beside it
    onnx       the model with its weights for ONNX Runtime and others, for any batch size (`jaxlayers[onnx]`)

Exit codes: 0 done, 1 refused (the message says what is wrong and what to do), 2 a wrong argument, 3 not verified.
"""

import argparse
import ast
import collections
import contextlib
import ctypes
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

import jaxlayers
from jaxlayers import pretrained
from jaxlayers.files import Tensors, open_tensors
from tools import convert_verify, convert_write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parser().parse_args(arguments)
    _return_memory_at_once()
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False)
    try:
        return {"list": _list, "inspect": _inspect, "run": _run}[options.command](options, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _return_memory_at_once() -> None:
    """Let the allocator give back every array of more than a megabyte when it goes; it would keep up to 32 of them."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="models and the references whose weights they read and write")
    command.add_argument("pattern", nargs="?", default="", help="a part of a module's or reference's name")
    command = commands.add_parser("inspect", help="what a file holds, and which model it looks like")
    command.add_argument("source", type=Path)
    command.add_argument("--depth", type=int, default=3, help="how many parts of the names the tree shows")
    command.add_argument("--json", action="store_true", help="every tensor, as JSON")
    command.add_argument("--placeholders", action="store_true", help="show a file that names more than tensors")
    command = commands.add_parser("run", help="convert")
    command.add_argument("source", type=Path, help="file or folder")
    command.add_argument("out", type=Path, help="file or folder, which must not exist yet")
    command.add_argument("--model", help="a named model (default: config.json of the folder, or the one that fits)")
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the model")
    command.add_argument(
        "--was", action="append", default=[], metavar="FIELD=VALUE", help="a field as the checkpoint has it, to resize"
    )
    command.add_argument("--channels", type=int, help="channels of the input (default: the model's)")
    command.add_argument("--image-size", type=int, help="side of the input, for stablehlo, onnx and --verify")
    command.add_argument("--dialect", help="the reference (default: told by the names; with --to reference, whose)")
    command.add_argument("--like", type=Path, help="a file of the reference, whose layout is written")
    command.add_argument("--to", choices=sorted(convert_write.WRITERS), default="folder")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="of the weights")
    command.add_argument("--allow", action="append", default=[], metavar="REGEX", help="may be missing or in excess")
    command.add_argument("--shard-size", type=int, default=5 << 30, help="bytes of a file at most")
    command.add_argument("--dry-run", action="store_true", help="account for every tensor and write nothing")
    command.add_argument("--verify", action="store_true", help="compare with the reference's own code, if installed")
    command.add_argument("--report", type=Path, help="a file for what became of every tensor, as JSON")
    command.add_argument(
        "--reference", help="for --verify: timm:NAME, torchvision:NAME, transformers:CLASS or monai:CLASS"
    )
    command.add_argument(
        "--placeholders", action="store_true", help="read past what is no tensor, without importing it"
    )
    return parser


def _list(options: argparse.Namespace, console: Console) -> int:
    table = Table("model", "reference", "files come from", "back", box=None)
    named = collections.Counter(pretrained.class_of(name) for name in jaxlayers.list_models())
    shown = 0
    for dialect in pretrained.list_dialects():
        word = options.pattern.lower()
        if word not in dialect.module.__name__.lower() and word not in dialect.name.lower():
            continue
        back = f"no: {dialect.one_way}" if dialect.one_way else "yes" if dialect.layout else "with --like"
        count = named[dialect.module]
        table.add_row(f"{dialect.module.__name__} ({count} named)", dialect.name, dialect.origin, back)
        shown += 1
    console.print(table if shown else f"nothing is called {options.pattern!r}")
    return 0 if shown else 1


def _inspect(options: argparse.Namespace, console: Console) -> int:
    tensors = pretrained.open_checkpoint(options.source, placeholders=options.placeholders)
    if options.json:
        rows = {name: {"shape": one.shape, "dtype": str(one.dtype)} for name, one in tensors.stored.items()}
        print(json.dumps({"kind": tensors.kind, "metadata": tensors.metadata, "tensors": rows}, indent=1))
        return 0
    console.print(f"{tensors.kind}: {len(tensors)} tensors, {tensors.nbytes:,} bytes")
    dtypes = collections.Counter(str(one.dtype) for one in tensors.stored.values())
    console.print(", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common()))
    groups: dict[str, list[str]] = {}
    for name in tensors:
        parts = name.split(".")
        groups.setdefault(".".join(parts[: options.depth]), []).append(name)
    for group, names in groups.items():
        first = tensors.stored[names[0]]
        one = f"{first.dtype}{list(first.shape)}"
        size = sum(tensors.stored[name].nbytes for name in names)
        console.print(f"  {group}  {one if names == [group] else f'{len(names)} tensors, {size:,} bytes'}")
    if tensors.metadata.get("format") == "jax":
        console.print("written by this library")
        return 0
    found = pretrained.guess(tensors)
    for name, dialect in found:
        console.print(f"looks like {name}, as {dialect.name} has it ({dialect.origin})")
    if not found:
        looks = sorted({f"{one.module.__name__}/{one.name}" for one in pretrained.recognise(tensors)})
        console.print(f"names like those of {', '.join(looks)}; of no named size" if looks else "of no known model")
    return 0


def _run(options: argparse.Namespace, console: Console) -> int:
    convert_write.check_free(options.out)
    if options.to == "reference" and options.out.suffix != ".safetensors":
        raise ValueError(f"{options.out} must end in .safetensors, which is what is written; name it so")
    tensors = pretrained.open_checkpoint(options.source, placeholders=options.placeholders)
    config = _config(options.source)
    name, fields = _chosen(options, tensors, config)
    model, source = _models(name, fields, options)
    inputs = _channelled(pretrained.default_inputs(model), options.channels)
    own = tensors.metadata.get("format") == "jax"
    found = pretrained.convert_tensors(
        tensors,
        model,
        dialect=None if own else options.dialect,
        # Our own files say their channels themselves.
        inputs=None if own and options.channels is None else inputs,
        source=source,
        allow=options.allow,
        dtype=options.dtype,
    )
    console.print(f"{options.source} as {name}")
    console.print(found.report.summary())
    _check_values(found.variables)
    result = None
    if options.verify and not own:
        result = convert_verify.verify(model, found, tensors, options.reference, inputs, config, options.image_size)
        console.print(result.text)
    if options.report is not None:
        about = {**dataclasses.asdict(found.report), "kind": tensors.kind, "errors": result.errors if result else {}}
        options.report.write_text(json.dumps(about, indent=1) + "\n")
    if result is not None and not result.passed:
        return 3
    if options.dry_run:
        return 0
    job = convert_write.Job(
        out=options.out,
        model=model,
        name=name,
        fields=fields,
        found=found,
        inputs=inputs,
        dialect=options.dialect or config.get("source", {}).get("dialect", "") or found.dialect.name,
        layout=_layout(options, config, found),
        shard_size=options.shard_size,
        origin=str(options.source.name),
        image_size=options.image_size,
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(found.variables))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(str(options.out), total=size)
        convert_write.WRITERS[options.to](job, lambda count: bar.advance(task, count))
    console.print(f"{options.out}: {size:,} bytes of weights")
    return 0


def _config(source: Path) -> dict[str, Any]:
    path = (source if source.is_dir() else source.parent) / "config.json"
    if not path.is_file() or path.stat().st_size > 16 << 20:
        return {}
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _chosen(options: argparse.Namespace, tensors: Tensors, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of the model and the fields that differ from it."""
    fields: dict[str, Any] = {}
    if options.model:
        name = options.model
    elif config.get("library_name") == "jaxlayers" and config.get("variant"):
        name, fields = config["variant"], _literals(config.get("fields", {}))
    elif config.get("model_type"):
        name, fields = pretrained.from_huggingface(config)
    else:
        found = sorted({name for name, _ in pretrained.guess(tensors)})
        if len(found) != 1:
            likely = f"; it may be any of {found}" if found else ""
            raise ValueError(f"{options.source} does not say which model it is for{likely}; pass --model")
        (name,) = found
    return name, {**fields, **_fields("--set", options.set)}


def _models(name: str, fields: dict[str, Any], options: argparse.Namespace) -> tuple[nn.Module, nn.Module | None]:
    model = jaxlayers.create_model(name, **fields)
    was = _fields("--was", options.was)
    return model, jaxlayers.create_model(name, **{**fields, **was}) if was else None


def _fields(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        try:
            found[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            if not equals or not value.replace("_", "").isalnum():
                raise ValueError(f"{option} {pair!r} must be FIELD=VALUE, a Python literal; quote texts") from error
            found[field] = value
    return found


def _literals(fields: dict[str, str]) -> dict[str, Any]:
    """Return fields as `config.json` has them: the texts of Python literals."""
    return {field: ast.literal_eval(value) for field, value in fields.items()}


def _channelled(inputs: Sequence[Any] | None, channels: int | None) -> Sequence[Any] | None:
    if channels is None or inputs is None:
        return inputs
    first, *rest = inputs
    return (jax.ShapeDtypeStruct((*first.shape[:-1], channels), first.dtype), *rest)


def _layout(options: argparse.Namespace, config: dict[str, Any], found: pretrained.Pretrained) -> Any:
    """Return the layout of a file of the reference: that given, that of the folder's origin, or that just read."""
    if options.like is not None:
        like = open_tensors(options.like)
        return pretrained.layout_in(like, found, options.dialect)
    stored = config.get("source", {}).get("layout")
    same = options.dialect in (None, config.get("source", {}).get("dialect"))
    if stored and same:
        return {name: tuple(shape) for name, shape in stored.items()}
    return found.layout or None


def _check_values(variables: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if np.issubdtype(leaf.dtype, np.floating) and not bool(np.isfinite(np.asarray(leaf)).all()):
            raise ValueError(f"{jax.tree_util.keystr(path)} must be finite; the checkpoint is damaged or diverged")


if __name__ == "__main__":
    sys.exit(main())
