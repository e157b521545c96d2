"""Which language each token of a batch is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron.data.batch import Batch


class Languages(Protocol):
    """What says which language tokens are."""

    def label(self, batch: Batch, sources: Sequence[str], step: int) -> Batch:
        """Return the batch with the language of each token, given the source of each row."""
        ...


@dataclass(frozen=True)
class ScriptLanguages:
    """The language of each token by its id; -1 where it is not known."""

    numbers: Int[Tensor, " V"]
    oracle_steps: int = 0
    """First steps in which the languages choose the experts."""

    def label(self, batch: Batch, sources: Sequence[str], step: int) -> Batch:
        """Return the batch with the language of each token."""
        labels = self.numbers[batch.input_ids]
        return replace(batch, languages=labels, languages_decide=step < self.oracle_steps)


@dataclass(frozen=True)
class SourceLanguages:
    """The language of each source, by its number; -1 for a mixed one."""

    numbers: Mapping[str, int]
    oracle_steps: int = 0
    """First steps in which the languages choose the experts."""

    def label(self, batch: Batch, sources: Sequence[str], step: int) -> Batch:
        """Return the batch with the language of each row, given the source of each."""
        numbers = torch.tensor([self.numbers[name] for name in sources])
        labels = numbers.unsqueeze(1).expand_as(batch.input_ids).contiguous()
        return replace(batch, languages=labels, languages_decide=step < self.oracle_steps)
