"""Write the catalogue table of the README from the first lines of the docstrings: `python -m tools.catalogue`."""

import sys
from pathlib import Path

import jaxlayers
from jaxlayers.__main__ import catalogue
from jaxlayers.models import paper_modules

START = "<!-- catalogue: written by `make catalogue` -->"
END = "<!-- end of catalogue -->"


def table() -> str:
    """Return the catalogue as a Markdown table."""
    rows = [f"| [`{name}`]({path}) | {line} |" for path, name, line in catalogue()]
    variants = [
        f"- `{module.__name__.removeprefix('jaxlayers.')}`: " + ", ".join(f"`{name}`" for name in module.VARIANTS)
        for module in paper_modules()
        if getattr(module, "VARIANTS", None)
    ]
    lines = [
        "| layer | what it does |",
        "| --- | --- |",
        *rows,
        "",
        "Named variants for `create_model`:",
        "",
        *variants,
    ]
    return "\n".join(lines)


def rendered(readme: Path) -> str:
    """Return the README's text with a fresh table.

    Raises:
      ValueError: if the markers are not there.
    """
    text = readme.read_text()
    if START not in text or END not in text:
        raise ValueError(f"{readme.name} must hold the markers {START} and {END}; put them where the table goes")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


def current(readme: Path) -> bool:
    """Say whether the README's table is the one that the docstrings give."""
    return readme.read_text() == rendered(readme)


if __name__ == "__main__":
    path = Path(jaxlayers.__path__[0]).parent / "README.md"
    path.write_text(rendered(path))
    sys.exit(0)
