"""The special tokens of text correction: by their names, or as free tokens of Nemotron 3's."""

from dataclasses import astuple, dataclass, fields

from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError

FREE = {
    "mask": "<SPECIAL_18>",
    "void": "<SPECIAL_19>",
    "truth": "<SPECIAL_20>",
    "blank": "<SPECIAL_21>",
    "sep": "<SPECIAL_22>",
}
"""The free token of Nemotron 3's tokenizer that stands for each mark."""
NAMES = {mark: f"<{mark}>" for mark in FREE}
"""The name of each mark in a tokenizer of characters."""


@dataclass(frozen=True)
class Marks:
    """Ids of the special tokens of text correction."""

    mask: int
    """In place of a source token that is hidden in training."""
    void: int
    """A hole in a column: this candidate, or the target, has no token there."""
    truth: int
    """The answer of a detector that a token is right."""
    blank: int
    """The blank of CTC."""
    sep: int
    """Between the source and its next reading."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them."""
        return astuple(self)


def marks_of(tokenizer: Tokenizer, vocab_size: int | None = None) -> Marks:
    """Return the marks of a tokenizer; `vocab_size` is the number that every id must be below.

    Raises:
        UserError: when the tokenizer lacks one, or the vocabulary ends before it.
    """
    found = {}
    for field in fields(Marks):
        name = _name_in(tokenizer, field.name)
        found[field.name] = tokenizer.id(name)
        if vocab_size is not None and found[field.name] >= vocab_size:
            raise UserError(
                f"is too small: the tokenizer has {name} as {found[field.name]}; use "
                f"{tokenizer.vocab_size} or more.",
                key="model.vocab_size",
                value=vocab_size,
            )
    return Marks(**found)


def _name_in(tokenizer: Tokenizer, mark: str) -> str:
    for name in (NAMES[mark], FREE[mark]):
        try:
            tokenizer.id(name)
        except UserError:
            continue
        return name
    raise UserError(
        f"the tokenizer has no token {NAMES[mark]}, nor {FREE[mark]}, which text correction needs; "
        "make one with `nemotron data characters`, or use one of Nemotron 3's."
    )
