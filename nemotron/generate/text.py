"""Tokens to text while they arrive: a character is shown only when all its bytes are there."""

from collections.abc import Sequence

from nemotron.data.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet one."""


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
        if text:  # a special token is no text, so it cannot be the one that new ones follow
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
