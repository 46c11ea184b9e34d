"""What the README and the pages say is run: Python and commands, and what they print."""

import contextlib
import doctest
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import tyro

import nac_gpu as nac

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?: {4}|\$ )python (experiments/(\w+)\.py[^#\n]*)", re.MULTILINE)


def agrees(expected: str, found: str) -> bool:
    """`...` stands for what depends on the machine."""
    return doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def run_console(text: str, folder: Path) -> None:
    """Lines that begin with `$` are commands, what follows is what they print."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command, expected in zip(parts[::2], parts[1::2], strict=True):
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_experiments_are_understood(page: Path) -> None:
    """They need data and hours, so only their options are read."""
    for line, name in COMMAND.findall(page.read_text(encoding="utf-8")):
        options = importlib.import_module(name).Options
        assert tyro.cli(options, args=shlex.split(line)[1:]) is not None


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_module_is_in_the_design_section() -> None:
    design = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Design")[2]
    for path in (ROOT / "nac_gpu").rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.stem}\b", design), f"{path.name} is not in the README's design section"


def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdoc", "nac_gpu", "-d", "google", "-o", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "nac_gpu.html").read_text(encoding="utf-8")
    assert [name for name in nac.__all__ if f'id="{name}"' not in reference] == []
