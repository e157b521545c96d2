"""What restricts an answer to a form, such as that of a JSON schema."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class Guide(Protocol):
    """Follows one answer, and allows at each place some tokens to come next."""

    def restrict(self, logits: Float[Tensor, " V"]) -> None:
        """Set the logits (float32) of tokens that may not come next to -inf, in place."""

    def push(self, token: int) -> bool:
        """Take the next token, drawn or forced; False when the answer cannot be followed further.

        The answer then ends, as one that reached its longest length does.
        """


class Grammar(Protocol):
    """A form of answers; many answers may be written in it at the same time."""

    def begin(self) -> Guide:
        """Return what follows a new answer."""
