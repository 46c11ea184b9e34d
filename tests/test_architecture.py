"""The house: folders on floors, each of which imports from the floors below only; sizes of files and functions."""

import ast
from pathlib import Path

import pytest

import nac_gpu as nac

ROOT = Path(__file__).parent.parent
#: A folder or module of the library, by its floor, and what it may import besides itself. `kernels` is where it is
#: installed; what has no floor here has no place in the house.
FLOORS: tuple[dict[str, str], ...] = (
    {"kernels": "", "moved": ""},
    {"clustering": "kernels", "network": ""},
    {"distributed": "network", "tracing": "network"},
    {"calibration": "kernels clustering network distributed tracing"},
    {"merging": "clustering network distributed tracing calibration"},
    {"planning": "network distributed tracing calibration merging"},
    {"files": "network tracing merging planning.plans planning.alike"},
    {"assembly": "clustering network distributed tracing calibration merging planning files"},
    {
        "compression": "assembly clustering network distributed tracing calibration merging planning files",
        "experts": "clustering network tracing calibration merging planning files",
        "training": "network files",
        "reporting": "clustering network tracing calibration planning files",
        "testing": "network tracing merging planning",
    },
    {
        "": "moved assembly clustering network tracing calibration planning files compression experts training "
        "reporting testing",
    },
    {"cli": "network files merging"},
)
MODULES = sorted((ROOT / "nac_gpu").rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "kernels").glob("*.py")), *sorted((ROOT / "experiments").rglob("*.py"))]
#: Entry points whose parameters are what users set.
ENTRIES = {"plan", "compress", "finetune"}


def named(path: Path) -> str:
    """The name of a module within the package; nothing for the package itself."""
    parts = path.relative_to(ROOT / "nac_gpu").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {named(path) for path in MODULES}


def imported(path: Path, *, at_once: bool = False) -> set[str]:
    """The modules of the package that a module imports: wherever in its code, or only as it is imported itself."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "nac_gpu":
            inside = node.module.partition(".")[2]
            for alias in node.names:
                full = f"{inside}.{alias.name}".strip(".")
                found.add(full if full in NAMES or full == "kernels" else inside)
        elif isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.partition(".")[0] == "nac_gpu"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: named(path) or "nac_gpu")
def test_a_module_imports_from_lower_floors_only(path: Path) -> None:
    name = named(path)
    room = name.partition(".")[0]
    allowed = next((floor[room] for floor in FLOORS if room in floor), None)
    assert allowed is not None, f"{room} has no floor: add it to FLOORS, and to docs/design.md"
    for other in imported(path):
        inside = other.partition(".")[0] == room and room
        # The command line is built of public names, and of what it shares with the library.
        public = room == "cli" and other == ""
        may = any(other == room_ or other.startswith(f"{room_}.") for room_ in allowed.split())
        assert inside or public or may, f"nac_gpu.{name} imports nac_gpu.{other}, which is not below it"


def test_every_floor_is_below_the_next() -> None:
    for number, floor in enumerate(FLOORS):
        below = {room for lower in FLOORS[:number] for room in lower}
        for room, allowed in floor.items():
            assert {other.partition(".")[0] for other in allowed.split()} <= below, room


def floors_of(name: str, graph: dict[str, set[str]], above: tuple[str, ...] = ()) -> int:
    """On which floor a module stands, if every import is a stair."""
    assert name not in above, f"a circle: {' -> '.join((*above, name))}"
    return 1 + max((floors_of(other, graph, (*above, name)) for other in graph[name]), default=0)


def test_imports_make_no_circle_and_few_stairs() -> None:
    graph = {named(path): imported(path, at_once=True) & NAMES - {named(path)} for path in MODULES}
    assert max(floors_of(name, graph) for name in graph if not name.startswith("cli")) <= 10


def test_few_modules_stand_outside_of_rooms() -> None:
    assert len(list((ROOT / "nac_gpu").glob("*.py"))) <= 6


def test_no_module_has_the_name_of_a_public_function() -> None:
    functions = {name for name in nac.__all__ if callable(getattr(nac, name))}
    assert not {name.rpartition(".")[2] for name in NAMES} & functions


def test_no_name_of_a_module_is_found_twice() -> None:
    """Experiments, tests and what supports them are imported by their bare names."""
    folders = (ROOT / "experiments", *(folder for folder in (ROOT / "tests").rglob("*") if folder.is_dir()))
    names = [path.stem for folder in folders for path in folder.glob("*.py") if path.stem[:2] != "__"]
    assert sorted(set(names)) == sorted(names)


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def is_kernel(node: ast.FunctionDef) -> bool:
    """A kernel, or a function that kernels call: its arguments are registers."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).with_suffix("").as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in functions(path):
        if node.name in ENTRIES or is_kernel(node):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(own) <= 8, f"{node.name} has {len(own)} parameters"
        lines = (node.end_lineno or 0) - node.lineno + 1
        assert lines <= 60, f"{node.name} has {lines} lines"
