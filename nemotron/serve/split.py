"""An answer in the chat format, taken apart while it arrives: reasoning, content and calls."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron.data.chat.calls import CALL, Call, read_calls
from nemotron.data.chat.check import Message
from nemotron.data.tokenizer import Tokenizer

THINK, END = "<think>", "</think>"
MARKS = (THINK, END, CALL, "</tool_call>")


def marks_of(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the marks that are special tokens: an engine's text leaves them out."""
    alone = {mark: tokenizer.encode(mark, specials=True) for mark in MARKS}
    return {
        ids[0]: mark
        for mark, ids in alone.items()
        if len(ids) == 1 and not tokenizer.decode(ids, skip_specials=True)
    }


@dataclass(frozen=True)
class Delta:
    """What is new of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()


class Splitter:
    """Takes one answer apart; what could be the beginning of a mark is held back.

    The line breaks between reasoning, tag and content belong to the format, not to the texts. What
    follows the first call is held back until the end, where it becomes calls, or content if it is
    none.
    """

    def __init__(self, tools: Sequence[Message], *, thinks: bool, only_one: bool = False) -> None:
        self.is_reasoning = thinks
        self._tools, self._only_one = tools, only_one
        self._held = ""
        self._has_content = False

    def push(self, text: str) -> Delta:
        """Take more text."""
        self._held += text
        reasoning = ""
        if self.is_reasoning:
            before, closed, after = self._held.partition(END)
            if not closed:
                return Delta(self._take(END))
            self.is_reasoning, self._held = False, after
            reasoning = before.rstrip("\n")
        return Delta(reasoning, self._content())

    def close(self) -> Delta:
        """Return what was held back, once no more text comes."""
        held, self._held = self._held, ""
        if self.is_reasoning:
            return Delta(held.rstrip("\n"))
        content, calls = read_calls(held, self._tools) if self._tools else (held, [])
        if not self._has_content:
            content = content.lstrip()
        return Delta("", content, tuple(calls[:1] if self._only_one else calls))

    def _content(self) -> str:
        """Return the content that cannot be the beginning of a call."""
        if not self._has_content:
            self._held = self._held.lstrip()
        text = self._take(CALL) if self._tools else self._take("")
        self._has_content = self._has_content or bool(text)
        return text

    def _take(self, mark: str) -> str:
        """Take what is held but for what `mark`, with line breaks before it, may begin with."""
        stop = self._held.find(mark) if mark and mark in self._held else len(self._held)
        if mark and stop == len(self._held):
            longest = min(len(self._held), len(mark) - 1)
            part = next(n for n in range(longest, -1, -1) if self._held.endswith(mark[:n]))
            stop -= part
        if mark:
            stop = len(self._held[:stop].rstrip())
        taken, self._held = self._held[:stop], self._held[stop:]
        return taken
