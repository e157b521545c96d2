"""How fast an engine reads prompts and writes answers."""

from dataclasses import dataclass


@dataclass
class Timing:
    """Tokens and seconds of the two phases: reading the prompts, and writing after them."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    """Of all answers, with the token that ends one."""
    further_tokens: int = 0
    """The new ones but the first of each answer, which comes out of the pass of its prompt."""
    decode_s: float = 0.0
    """Taken by the further tokens."""

    def __str__(self) -> str:
        read = self.prompt_tokens / max(self.prefill_s, 1e-9)
        line = f"prompt {_tokens(self.prompt_tokens)}, {read:,.0f} tokens/s"
        line += f"; new {_tokens(self.new_tokens)}"
        if self.decode_s:
            line += f", {self.further_tokens / self.decode_s:,.1f} tokens/s"
        return line


def _tokens(number: int) -> str:
    return f"{number} token{'s' * (number != 1)}"
