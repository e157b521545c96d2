"""The tokens of a conversation, and what is known of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron.generate.request import Answer


@dataclass
class Transcript:
    """A prompt, and what follows it: answers of a model, and what was put between them."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    """All that follows the prompt."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token when it was sampled; 0 if forced."""
    forced: list[bool] = field(default_factory=list)
    """Whether a token was not the model's choice."""
    num_sampled: int = 0
    """Tokens of the answers, without what was put between them."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """From which of the tokens on which version of the weights was used."""
    _experts: list[Int[Tensor, "tokens layers K"]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens."""
        return (*self.prompt, *self.tokens)

    @property
    def experts(self) -> Int[Tensor, "tokens layers K"] | None:
        """Experts of all tokens but the last; None if not recorded.

        As each was first read, or as the newest weights read it where the text went on with others.
        """
        return torch.cat(self._experts) if self._experts else None

    def add_answer(self, answer: Answer) -> None:
        """Append what a model answered to all tokens so far."""
        for at, version in answer.versions:
            if not self.versions or version != self.versions[-1][1]:
                if self.versions:
                    self._experts.clear()
                self.versions.append((len(self.tokens) + at, version))
        if answer.experts is not None:
            # an earlier answer's tokens keep the experts that they were sampled with
            self.add_experts(answer.experts)
        self.tokens += answer.tokens
        self.logprobs += answer.logprobs
        self.forced += answer.forced
        self.num_sampled += len(answer.tokens)

    def add_experts(self, experts: Int[Tensor, "tokens layers K"]) -> None:
        """Record the experts of all tokens so far but those that are recorded."""
        self._experts.append(experts[sum(map(len, self._experts)) :])

    def add_forced(self, tokens: Sequence[int]) -> None:
        """Append tokens that no model chose."""
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.forced += [True] * len(tokens)
