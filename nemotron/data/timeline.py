"""When a run changes what it reads: phases, each with its tokens, its batch and its blend."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from nemotron.data.config import Leaf


@dataclass(frozen=True)
class RowLength:
    """Rows of one length in a phase, and what they are made of."""

    seq_len: int
    share: float
    """Share of the phase's steps, relative to the other lengths."""
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class Phase:
    """A stretch of steps of one size, over one blend for each length of row."""

    name: str
    num_steps: int
    tokens_per_step: int
    lengths: tuple[RowLength, ...]


class Timeline:
    """The phases of a run, end to end; a change comes exactly between two steps."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)
        self.first_steps = [0]
        self.first_tokens = [0]
        for phase in phases:
            self.first_steps.append(self.first_steps[-1] + phase.num_steps)
            self.first_tokens.append(
                self.first_tokens[-1] + phase.num_steps * phase.tokens_per_step
            )

    @property
    def leaves(self) -> list[Leaf]:
        """Every source of every phase, as often as it is named."""
        lengths = [length for phase in self.phases for length in phase.lengths]
        return [leaf for length in lengths for leaf in length.leaves]

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.first_steps[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.first_tokens[-1]

    def phase_of(self, step: int) -> int:
        """Return the number of the phase to which a step belongs; the last has no end."""
        last = len(self.phases) - 1
        return min(last, bisect.bisect_right(self.first_steps, step) - 1)

    def tokens_per_step(self, step: int) -> int:
        """Return the tokens of a step."""
        return self.phases[self.phase_of(step)].tokens_per_step

    def tokens_before(self, step: int) -> int:
        """Return the tokens of all steps before this one."""
        number = self.phase_of(step)
        inside = (step - self.first_steps[number]) * self.phases[number].tokens_per_step
        return self.first_tokens[number] + inside


def single_phase(
    leaves: Sequence[Leaf], seq_len: int, tokens_per_step: int, num_steps: int = 1
) -> Timeline:
    """Return the timeline of a run that reads one blend in rows of one length."""
    length = RowLength(seq_len, 1.0, tuple(leaves))
    return Timeline([Phase("all", num_steps, tokens_per_step, (length,))])
