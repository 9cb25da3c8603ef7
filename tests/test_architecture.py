"""The rules of the house: sizes of files and functions, and which room may import which."""

import ast
from pathlib import Path

import pytest

import siss_diffusers


PACKAGE = Path(siss_diffusers.__file__).parent
SCRIPTS = sorted(PACKAGE.parent.glob("train_siss_*.py"))
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *SCRIPTS]
MAX_FILE, MAX_FUNCTION = 320, 60
ONE_ALGORITHM = {"bits_per_dimension"}

# From the ground up: a room imports its own floor and those below it, never one above.
FLOORS = (
    ("errors", "parsing", "quiet", "process"),
    ("noising", "weights", "combine", "draws", "similarity", "embedding_search"),
    ("methods", "calibration"),
    ("gradients", "settings", "storage"),
    ("flags", "families", "distributed"),
    ("data",),
    ("metrics",),
    ("hub", "report"),
    ("curation", "auditing", "evaluation", "fusing", "exporting"),
    ("training",),
    ("outcome", "unlearning", "api"),
    ("assets",),
    ("commands",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MATHEMATICS = (
    "noising",
    "weights",
    "combine",
    "draws",
    "similarity",
    "embedding_search",
    "methods",
    "calibration",
    "gradients",
)
HEAVY = {"diffusers", "transformers", "accelerate", "datasets", "peft"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports when it runs, in functions too; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "siss_diffusers":
            modules |= {f"siss_diffusers.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def rooms_imported(path: Path) -> set[str]:
    names = {module.split(".")[1] for module in imports_of(path) if module.startswith("siss_diffusers.")}
    return names & FLOOR_OF.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in ONE_ALGORITHM:
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, node.name


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms == FLOOR_OF.keys()


@pytest.mark.parametrize("room", FLOOR_OF)
def test_nothing_imports_upwards(room):
    paths = [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]
    for path in paths:
        above = {other for other in rooms_imported(path) if FLOOR_OF[other] > FLOOR_OF[room]}
        assert not above, f"{path.name} imports {above} from above"


@pytest.mark.parametrize("room", MATHEMATICS)
def test_the_mathematics_imports_no_library_of_models(room):
    for path in [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]:
        assert not HEAVY & {module.split(".")[0] for module in imports_of(path)}
        assert not {"data", "training"} & rooms_imported(path)


def test_parsed_arguments_stay_in_the_commands():
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) not in ("commands", "parsing", "flags", "assets"):
            assert "Namespace" not in path.read_text(), path


def test_attributes_are_not_guessed():
    """A class says what it needs; `hasattr` and `getattr` with a default ask objects of our own nowhere."""
    for path in [
        path for path in PACKAGE.rglob("*.py") if room_of(path) in ("methods", "data", "training", "unlearning")
    ]:
        assert "hasattr(" not in path.read_text(), path


def test_columns_are_read_in_one_place():
    """Of a data set that `select` or `shuffle` made, `rows.data` is the table below it, with other rows."""
    readers = [path.name for path in PACKAGE.rglob("*.py") if ".data.column(" in path.read_text()]
    assert readers == ["cells.py"]
