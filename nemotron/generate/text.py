"""Tokens to text while they arrive: whole characters only, and nothing of a stop string."""

from nemotron.data.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet one."""


class TextStream:
    """The text of one row, piece by piece; the pieces joined are the text of all its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that `token` completes, which is empty inside a character."""
        self._pending.append(token)
        text = self.tokenizer.decode(self._pending, skip_specials=True)
        if text.endswith(REPLACEMENT):
            return ""
        self._pending.clear()
        return text

    def close(self) -> str:
        """Return what is left at the end, bytes of unfinished characters replaced."""
        text = self.tokenizer.decode(self._pending, skip_specials=True)
        self._pending.clear()
        return text


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces.

    What could be the beginning of one is held back until that is decided.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """Return the text that is certain to lie before any stop string."""
        if not self._strings or self.is_found:
            return "" if self.is_found else text
        held = self._held + text
        places = [place for stop in self._strings if (place := held.find(stop)) >= 0]
        if places:
            self.is_found, self._held = True, ""
            return held[: min(places)]
        size = max(self._beginning(held, stop) for stop in self._strings)
        self._held = held[len(held) - size :]
        return held[: len(held) - size]

    def close(self) -> str:
        """Return what was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Return how many characters at the end of `text` begin `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next(n for n in range(longest, -1, -1) if text.endswith(stop[:n]))
