"""Tokens to text while they arrive: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from nemotron.data.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not a character, or not yet one."""


class TextStream:
    """The text that follows a prompt, piece by piece; joined, it is the text of all new tokens.

    Tokens are decoded together with those shown before them: alone, many tokenizers take the space
    in front of a word for the beginning of a text, and drop it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_specials: bool = True
    ) -> None:
        self.tokenizer, self._skip_specials = tokenizer, skip_specials
        self._ids = list(prompt)
        self._context = 0
        """Where the tokens begin that are decoded together with new ones."""
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Return the text that `token` completes, which is empty inside a character."""
        self._ids.append(token)
        text = self._new()
        if text.endswith(REPLACEMENT):
            return ""
        if text:  # a special token is not text, so it cannot be the one that new ones follow
            self._context = self._shown
        self._shown = len(self._ids)
        return text

    def close(self) -> str:
        """Return what is left at the end, bytes of unfinished characters replaced."""
        text = self._new()
        self._shown = len(self._ids)
        return text

    def _new(self) -> str:
        known, whole = (
            self.tokenizer.decode(
                self._ids[self._context : stop], skip_specials=self._skip_specials
            )
            for stop in (self._shown, len(self._ids))
        )
        return whole[len(known) :]


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces: the one that ends first.

    What could be the beginning of one is held back until that is decided. With `included`, the
    string that is found belongs to the text.
    """

    def __init__(self, strings: tuple[str, ...], *, included: bool = False) -> None:
        self._strings, self._included = strings, included
        self._held = ""
        self._passed = 0
        """Characters of what is held in which no stop string may end."""
        self.found: str | None = None
        """The string that was found."""

    def push(self, text: str) -> str:
        """Return the text that is certain to lie before any stop string, and one that is included.

        Of strings that end at the same place, the longest counts.
        """
        if not self._strings or self.found is not None:
            return "" if self.found is not None else text
        held = self._held + text
        ends = []
        for stop in self._strings:
            begin = held.find(stop, max(0, self._passed - len(stop) + 1))
            if begin >= 0:
                ends.append((begin + len(stop), begin))
        if ends:
            end, begin = min(ends)
            self.found, self._held = held[begin:end], ""
            return held[: end if self._included else begin]
        return self._hold(held)

    def pass_over(self, text: str) -> str:
        """Take text in which no stop string may end; return what is certain not to begin one."""
        taken = self._hold(self._held + text)
        self._passed = len(self._held)
        return taken

    def close(self) -> str:
        """Return what was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _hold(self, text: str) -> str:
        """Keep what a stop string may begin with; return what is before it."""
        size = max((self._beginning(text, stop) for stop in self._strings), default=0)
        self._held = text[len(text) - size :]
        self._passed = max(0, self._passed - (len(text) - size))
        return text[: len(text) - size]

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Return how many characters at the end of `text` begin `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next(n for n in range(longest, -1, -1) if text.endswith(stop[:n]))
