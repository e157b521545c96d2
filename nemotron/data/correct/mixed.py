"""Tokens of text that mixes scripts: each Chinese or Japanese character, each other word."""

import re
from collections.abc import Sequence

CHARACTER = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003347f"
"""Ranges of characters that are written without spaces, with their punctuation."""
PIECE = re.compile(rf"[{CHARACTER}]|[^\s{CHARACTER}]+")
SINGLE = re.compile(rf"[{CHARACTER}]")


def split_mixed(text: str) -> list[str]:
    """Return the tokens of a text: its words, and each character of scripts without spaces."""
    return PIECE.findall(text)


def is_character(token: str) -> bool:
    """Say whether a token is a character of a script without spaces."""
    return SINGLE.fullmatch(token) is not None


def join_mixed(tokens: Sequence[str]) -> str:
    """Return the text of tokens or words, with spaces where no such character stands."""
    parts: list[str] = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        spaced = before and not is_character(before[-1]) and not is_character(token[0])
        parts += [" ", token] if spaced else [token]
    return "".join(parts)
