"""Tokens of a text with what the model thinks of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron.generate.request import TokenScore


@dataclass(frozen=True)
class Scored:
    """A token of an answer, or of the prompt before it, with its log-probability."""

    token: int
    logprob: float | None
    """In nats; None for the first token of a prompt."""
    begin: int
    """Where in the text it begins."""
    top: Sequence[TokenScore]
    """The likeliest tokens in its place."""
