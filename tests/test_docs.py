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
from pages import FENCE, PAGES, ROOT, agrees, consoles


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


def test_every_module_is_in_the_design_section() -> None:
    design = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Design")[2]
    for path in (ROOT / "nac_gpu").rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.stem}\b", design), f"{path.name} is not in the README's design section"
