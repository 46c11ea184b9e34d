"""What the README and the pages say is run: Python and commands, and what they print."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from pages import FENCE, MAP, PAGES, ROOT, agrees, consoles
from test_architecture import FLOORS


def run_console(text: str, folder: Path) -> None:
    """Run the commands of a block, and compare what they print."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command, expected in consoles(text):
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert agrees(expected, done.stdout), f"{command} prints\n{done.stdout}\nnot\n{expected}"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_say_what_happens(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for kind, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, str(page), "exec", dont_inherit=True), names)
            printed = out.getvalue()
        elif kind == "text":
            assert agrees(text, printed), f"{page.name}: prints\n{printed}\nnot\n{text}"
        else:
            assert kind == "console", f"{page.name}: nothing runs what is fenced as {kind}"
            run_console(text, tmp_path)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def mapped(text: str) -> set[str]:
    """The modules of the map of the code, as paths in nac_gpu/. Folders end in a slash, what is indented is in them."""
    found, folders = set(), [(0, "")]
    for line in text.splitlines():
        indent, name = re.match(r"([ \d]+)(\S+)", line).group(1, 2)  # floors stand before the folders
        while len(indent) <= folders[-1][0]:
            folders.pop()
        path = folders[-1][1] + name
        if name.endswith("/"):
            folders.append((len(indent), path))
        else:
            found.add(path.removesuffix(".py"))
    return found


def test_the_map_has_every_module_in_its_folder() -> None:
    (text,) = MAP.findall((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    modules = {str(path.relative_to(ROOT / "nac_gpu").with_suffix("")) for path in (ROOT / "nac_gpu").rglob("*.py")}
    modules |= {f"kernels/{path.stem}" for path in (ROOT / "kernels").glob("*.py")}
    assert mapped(text) == {module for module in modules if not module.endswith("/__init__")}


def test_the_map_has_the_floors_that_imports_are_held_to() -> None:
    (text,) = MAP.findall((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    drawn = {(int(floor), name) for floor, name in re.findall(r"^ +(\d+) (\w+)", text, re.MULTILINE)}
    held = {(number, room or "__init__") for number, floor in enumerate(FLOORS, 1) for room in floor}
    assert drawn == held


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_pre_commit_runs_what_make_lint_runs() -> None:
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert hooks == [line.strip() for line in recipe.group(1).replace("$(BIN)", ".venv/bin").splitlines()]
