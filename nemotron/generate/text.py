"""Tokens to text while they arrive: a character is shown only when all its bytes are there."""

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
