"""The rules of the house that a machine can see: floors, docstrings, names, completeness."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import flax.linen as nn
import pytest

import jaxlayers
from jaxlayers.models import families, paper_modules
from tests.conformance_test import CASES
from tools import catalogue

ROOT = Path(__file__).parent.parent
LIBRARY = sorted(
    info.name for info in pkgutil.walk_packages(jaxlayers.__path__, "jaxlayers.") if not info.name.endswith("__main__")
)


def public_modules():
    """Return every public Linen module of the families and of jaxlayers.nn."""
    rooms = [f"jaxlayers.{family}" for family in families()]
    files = [*paper_modules(), *(importlib.import_module(name) for name in LIBRARY if name.startswith("jaxlayers.nn."))]
    found = []
    for module in files:
        for name, member in vars(module).items():
            local = inspect.isclass(member) and member.__module__ == module.__name__
            if local and issubclass(member, nn.Module) and not name.startswith("_"):
                found.append(member)
    assert rooms
    return found


every_module = pytest.mark.parametrize("cls", public_modules(), ids=lambda cls: cls.__name__)


def own_fields(cls):
    return [field.name for field in dataclasses.fields(cls) if field.name not in ("parent", "name")]


def test_floors_import_only_from_below():
    result = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_import_contract_sees_a_breach(tmp_path):
    # Negative control: the same contract, over a copy in which a lower floor imports a family.
    for line in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "pyproject.toml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines():  # fmt: skip
        if line.startswith(("jaxlayers/", "train/", "configs/", "tools/", "pyproject")) and (ROOT / line).exists():
            target = tmp_path / line
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text((ROOT / line).read_text())
    breach = tmp_path / "jaxlayers" / "core" / "safe.py"
    breach.write_text(breach.read_text() + "\nimport jaxlayers.window.swin\n")
    result = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode != 0
    assert "jaxlayers.core.safe -> jaxlayers.window.swin" in result.stdout


def test_file_names_are_unique():
    names = [
        path.name for path in (ROOT / "jaxlayers").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_importing_the_library_loads_no_heavy_package():
    heavy = "tensorflow torch optax orbax grain matplotlib sklearn tensorflow_datasets safetensors"
    code = f"import jaxlayers, sys; print([name for name in {heavy.split()!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Flax itself imports optax and orbax.
    assert set(ast.literal_eval(printed)) <= {"optax", "orbax"}


@pytest.mark.parametrize("name", LIBRARY)
def test_doctests_pass(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", LIBRARY)
def test_public_functions_and_classes_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for member_name, member in vars(module).items():
        documented = inspect.isclass(member) or inspect.isfunction(member)
        if documented and member.__module__ == name and not member_name.startswith("_"):
            assert inspect.getdoc(member), f"{name}.{member_name}"


@every_module
def test_docstring_documents_exactly_the_fields(cls):
    fields = own_fields(cls)
    assert documented_fields(inspect.getdoc(cls)) == fields


def documented_fields(docstring):
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if section is None:
        return []
    indent = re.match(r"[ ]+", section.group(1)).group()  # deeper lines go on with the entry above
    return re.findall(rf"^{indent}(\w+):", section.group(1), re.MULTILINE)


def test_field_parser_sees_a_missing_field():
    assert documented_fields("Do.\n\nAttributes:\n  one: first,\n    continued: no.\n  two: second.\n") == [
        "one",
        "two",
    ]


@every_module
def test_docstring_has_its_sections(cls):
    docstring = inspect.getdoc(cls)
    first = docstring.partition("\n")[0]
    assert first.endswith("."), first
    assert len(first) <= 120
    assert re.search(r"^Source:", docstring, re.MULTILINE), f"{cls.__name__} must say where it comes from"
    assert re.search(r"^Differs:", docstring, re.MULTILINE), f"{cls.__name__} must say what differs"
    call = inspect.getdoc(cls.__call__)
    assert "Args:" in call
    assert "Returns:" in call


@every_module
def test_house_rules_of_a_module(cls):
    assert cls.__mro__[1] is nn.Module, "nothing subclasses a concrete layer"
    parameters = inspect.signature(cls.__call__).parameters
    assert not [name for name, one in parameters.items() if one.kind is one.VAR_KEYWORD]
    if "deterministic" in parameters:
        assert parameters["deterministic"].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters["deterministic"].default is True


@every_module
def test_every_public_module_has_a_case(cls):
    # A module counts as shown when it is a case of its own.
    assert cls in {type(case.module) for case in CASES}


def test_every_public_module_is_exported_by_its_family():
    for module in paper_modules():
        package = importlib.import_module(module.__name__.rpartition(".")[0])
        for name, member in vars(module).items():
            if inspect.isclass(member) and issubclass(member, nn.Module) and member.__module__ == module.__name__:
                assert name.startswith("_") or getattr(package, name, None) is member, name


def test_every_paper_has_a_test_file_of_its_name():
    for module in paper_modules():
        _, family, name = module.__name__.split(".")
        assert (ROOT / "tests" / family / f"{name}_test.py").exists()


def test_catalogue_in_the_readme_is_current():
    assert catalogue.current(ROOT / "README.md"), "run `make catalogue`"
