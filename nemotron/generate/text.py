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

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
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
            self.tokenizer.decode(self._ids[self._context : stop], skip_specials=True)
            for stop in (self._shown, len(self._ids))
        )
        return whole[len(known) :]


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
