"""The pages, and the commands that they show."""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAP = re.compile(r"^ {4}nac_gpu/\n((?: {4}.*\n)+)", re.MULTILINE)
SCRIPT = re.compile(r"(experiments|docs)/\w+\.(py|sh)")
PROGRAMS = ("bash", "git", "make", "nac", "pip", "pytest", "python", "python3", "torchrun")


def agrees(expected: str, found: str) -> bool:
    """`...` stands for what depends on the machine."""
    return doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def consoles(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, lines that begin with `$`, and what each prints."""
    before, *parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    assert not before, f"nothing runs {before}"
    yield from zip(parts[::2], parts[1::2], strict=True)


def commands(page: Path) -> list[str]:
    """What a page tells people to run, outside its fenced blocks: indented lines, and commands within sentences.

    The map of the code on the page of the design is indented, too, and is no command.
    """
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert "```" not in text, f"{page.name}: a fenced block that names no language is not run"
    text = MAP.sub("", text)
    indented = [line.partition("  #")[0].strip() for line in re.findall(r"^(?: {4}|\t)(.*\S.*)$", text, re.MULTILINE)]
    text = re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)
    assert text.count("`") % 2 == 0, f"{page.name}: a backtick is missing"
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return indented + [span for span in spans if _is_command(span)]


def _is_command(span: str) -> bool:
    first, _, rest = span.partition(" ")
    return bool(SCRIPT.fullmatch(first) or (first in PROGRAMS and rest))
