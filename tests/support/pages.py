"""What the pages hold: fenced blocks, commands, links, paths."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; `where` is its page and first line."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line that a page shows, and what it shows as its answer.

    `in_sentence` says that it may be no more than the command's name.
    """

    where: str
    words: tuple[str, ...]
    answer: str = ""
    in_sentence: bool = False


def blocks(language: str) -> list[Block]:
    """Return the fenced blocks of a language, over all pages."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 2
                found.append(Block(page, line, language, match[2]))
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """Return what stands between single backticks in the prose of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands() -> list[Command]:
    """Return every command of the `sh` and `console` blocks, and those inside sentences."""
    found = []
    for block in blocks("sh"):
        for number, line in enumerate(block.text.splitlines()):
            if words := shlex.split(line.partition(" > ")[0], comments=True):
                found.append(Command(f"{block.page.name}:{block.line + number}", tuple(words)))
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, answer = part.partition("\n")
            found.append(Command(block.where, tuple(shlex.split(line)), answer))
    for page in PAGES:
        for span in spans(page):
            if span.startswith(("nemotron ", "make ", "python ")):
                words = shlex.split(span.partition(" > ")[0])
                found.append(Command(page.name, tuple(words), in_sentence=True))
    return found
