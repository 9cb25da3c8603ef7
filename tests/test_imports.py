"""What importing the package loads, in processes of their own, and what it offers."""

import ast
import pkgutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import siss_diffusers
from siss_diffusers import evaluation
from tests.helpers.imports import loaded_by


INIT = Path(siss_diffusers.__file__)
LAZY = (siss_diffusers, evaluation)  # packages whose names are imported when they are first used


def test_the_package_loads_no_library():
    assert loaded_by("import siss_diffusers; siss_diffusers.__version__; dir(siss_diffusers)") == set()


def test_what_every_program_starts_with_loads_no_library():
    assert loaded_by("from siss_diffusers import errors, parsing, process, quiet") == set()


def test_the_parts_of_a_loop_load_torch_and_no_library_above_it():
    whole = {"unlearn", "Outcome"}  # the loop itself needs all of them
    parts = ", ".join(name for name in siss_diffusers.__all__ if name not in whole)
    assert loaded_by(f"from siss_diffusers import {parts}") - {"numpy", "tqdm"} == {"torch"}


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_every_public_name_is_where_it_is_said_to_be(package):
    for name in package.__all__:
        assert getattr(package, name) is not None and name in dir(package)
    assert not hasattr(package, "no_such_name")


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_type_checkers_see_the_same_names(package):
    imports = {
        (alias.asname, node.module)
        for block in ast.parse(Path(package.__file__).read_text()).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        for alias in node.names
    }
    assert imports == set(package._LOCATIONS.items())


def test_the_package_is_typed():
    assert INIT.with_name("py.typed").exists()


def test_no_public_name_is_that_of_a_module():
    """Importing the module `siss_diffusers.x` makes it the attribute x of the package."""
    modules = {module.name for module in pkgutil.iter_modules([str(INIT.parent)])}
    assert modules.isdisjoint(siss_diffusers.__all__)
    assert all(find_spec(module) is not None for module in siss_diffusers._LOCATIONS.values())
