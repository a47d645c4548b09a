"""The documents are true in what a program can check: links, the map of the code, dates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src") / "mlx_lm_server"
NAMES = ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", "LOG.md")
DOCUMENTS = sorted([*(ROOT / name for name in NAMES), *(ROOT / "docs").rglob("*.md")])

CODE_BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# `scheduler.py`, `server/`, `openai/routes.py`: whole words that end like a file or a folder.
FILE_OR_FOLDER = re.compile(r"(?<![\w./-])[\w][\w./-]*?(?:\.py|/)(?![\w./])")
DAY = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")


def prose(text: str) -> str:
    """Returns the text without its blocks of code, where brackets make no links."""
    return CODE_BLOCK.sub("", text)


def anchors(text: str) -> set[str]:
    """Returns what links call the headings of a text."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path) -> list[str]:
    """Returns the relative links of a document that lead nowhere."""
    dead = []
    for link in LINK.findall(prose(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            dead.append(link)
    return dead


def trees(text: str) -> list[str]:
    """Returns the blocks of code that are maps of folders: they begin with one."""
    return [block for block in CODE_BLOCK.findall(text) if re.match(r"\S+/(\s|$)", block)]


def named_in(tree: str) -> Iterator[tuple[str, list[Path]]]:
    """Yields each file and folder that a tree names, and the folders in which it may be.

    That is the folder whose line stands above with a smaller indentation, and the one that the line
    itself begins with, since lines name several and say words about them. A folder in such words
    may also be written from the package on.
    """
    above: list[tuple[int, Path]] = []
    for line in tree.splitlines():
        if (begin := re.search(r"\w", line)) is None:
            continue
        while above and above[-1][0] >= begin.start():
            above.pop()
        folder = above[-1][1] if above else Path()
        places = [folder]
        for found in FILE_OR_FOLDER.finditer(line):
            name = found.group()
            yield name, [*places, PACKAGE]
            if name.endswith("/") and found.start() == begin.start():
                above.append((begin.start(), folder / name))
                places.append(folder / name)


def missing_from(root: Path, tree: str) -> list[str]:
    """Returns what a tree names and nobody finds below `root`."""
    return [
        name
        for name, places in named_in(tree)
        if not any((root / place / name).exists() for place in places)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_relative_link_leads_somewhere(document: Path) -> None:
    assert dead_links(document) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "# A title\n[a](#a-title) [b](#b) [c](page.md) [d](gone.md) [e](http://x/y)\n"
    )
    assert dead_links(document) == ["#b", "gone.md"]


def test_each_file_of_the_architecture_s_tree_exists() -> None:
    found = trees((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert sum(len(list(named_in(tree))) for tree in found) > 50
    assert [name for tree in found for name in missing_from(ROOT, tree)] == []


def test_a_file_that_moved_is_missed_in_the_tree(tmp_path: Path) -> None:
    for name in ("src/core/plan.py", "src/core/more/step.py", "src/cli.py", "src/c/x/a.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tree = (
        "src/\n"
        "  cli.py  gone.py     commands and/or words; core/plan.py\n"
        "  core/               decisions\n"
        "    plan.py           what is decided   cli.py  is not here\n"
        "    more/             a folder of steps:\n"
        "                      step.py, plan.py\n"
        "  c/                  code: x/ (a.c), y/\n"
    )
    assert missing_from(tmp_path, tree) == ["gone.py", "cli.py", "plan.py", "y/"]


def test_each_section_of_the_log_has_a_day() -> None:
    titles = re.findall(r"^## (.*)$", prose((ROOT / "LOG.md").read_text("utf-8")), re.MULTILINE)
    assert titles
    assert [title for title in titles if not DAY.search(title)] == []


def test_each_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "adr"
    linked = set(LINK.findall((folder / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in folder.glob("[0-9]*.md")} <= linked
