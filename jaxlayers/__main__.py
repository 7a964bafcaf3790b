"""`python -m jaxlayers list [PATTERN] | find WORD | summary MODEL`."""

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import flax.linen as nn
from rich.console import Console

import jaxlayers
from jaxlayers.models import paper_modules


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 if nothing was found, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m jaxlayers", description=jaxlayers.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="names of the model variants")
    command.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, for example 'swin_*'")
    command = commands.add_parser("find", help="layers and models by a word of their name or first line")
    command.add_argument("word")
    command = commands.add_parser("summary", help="modules of a model with shapes, parameters and MACs")
    command.add_argument("model")
    command.add_argument("--depth", type=int, default=2, help="how deep the table goes (default 2)")
    command.add_argument("--batch-size", type=int, default=None)
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=options.command != "summary")

    if options.command == "list":
        names = jaxlayers.list_models(options.pattern)
        for name in names:
            console.print(name, highlight=False)
        return 0 if names else 1
    if options.command == "find":
        hits = [hit for hit in catalogue() if options.word.lower() in " ".join(hit).lower()]
        for path, name, line in hits:
            console.print(f"{path}: {name}: {line}", highlight=False, markup=False)
        return 0 if hits else 1
    try:
        inputs = jaxlayers.abstract_inputs(options.model, batch_size=options.batch_size)
        summary = jaxlayers.summarize(jaxlayers.create_model(options.model), *inputs)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(summary.table(depth=options.depth))
    console.print(f"{summary.parameters:,} parameters, {summary.macs / 1e9:.3f} GMACs", highlight=False)
    return 0


def catalogue() -> Iterator[tuple[str, str, str]]:
    """Yield (file, class, first line of its docstring) of every public module of every paper."""
    root = Path(jaxlayers.__path__[0]).parent
    for module in paper_modules():
        path = Path(str(module.__file__)).relative_to(root).as_posix()
        for name, member in vars(module).items():
            public = inspect.isclass(member) and issubclass(member, nn.Module) and not name.startswith("_")
            if public and member.__module__ == module.__name__:
                yield path, name, (inspect.getdoc(member) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
