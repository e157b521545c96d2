"""How many drafts were accepted, in both forms in which that is published."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemotron.generate.request import DraftedPass


@dataclass
class Acceptance:
    """Counts over all passes with drafts, and over the answers that have ended.

    Sources: NVIDIA-NeMo/Gym: resources_servers/speed_bench (counters of vLLM);
    NVIDIA/Model-Optimizer: examples/specdec_bench (mean over answers).
    """

    num_passes: int = 0
    """Passes that read at least one draft."""
    num_drafts: int = 0
    num_accepted: int = 0
    drafted_at: Counter[int] = field(default_factory=Counter)
    """How often a token was drafted at each place of a draft, from 0 on."""
    accepted_at: Counter[int] = field(default_factory=Counter)
    histogram: Counter[int] = field(default_factory=Counter)
    """Passes by the tokens that they brought, those without drafts included."""
    num_answers: int = 0
    """Those that have ended and had a pass."""
    sum_of_lengths: float = 0.0
    """Tokens for each pass, added up over these answers."""

    def count(self, done: DraftedPass) -> None:
        """Count a pass."""
        self.histogram[done.num_accepted + 1] += 1
        if done.num_drafts:
            self.num_passes += 1
            self.num_drafts += done.num_drafts
            self.num_accepted += done.num_accepted
            self.drafted_at.update(range(done.num_drafts))
            self.accepted_at.update(range(done.num_accepted))

    def end(self, passes: Sequence[DraftedPass]) -> None:
        """Count an answer; one that ended with its first token had no pass."""
        if passes:
            tokens = sum(done.num_accepted + 1 for done in passes)
            self.num_answers += 1
            self.sum_of_lengths += tokens / len(passes)

    @property
    def length(self) -> float:
        """Tokens that a pass with drafts brings, over all passes (vLLM's form)."""
        return 1 + self.num_accepted / max(self.num_passes, 1)

    @property
    def mean_answer_length(self) -> float:
        """Tokens that a pass of an answer brings, over all answers (specdec_bench's form)."""
        return self.sum_of_lengths / max(self.num_answers, 1)

    @property
    def rate(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.num_accepted / max(self.num_drafts, 1)

    @property
    def joint(self) -> list[float]:
        """For each place of a draft, in which share of all drafts all up to it were accepted."""
        places = range(len(self.drafted_at))
        return [self.accepted_at[place] / self.num_passes for place in places]

    @property
    def conditional(self) -> list[float]:
        """For each place, how often it was accepted where it was drafted and those before were."""
        result = []
        for place in range(len(self.drafted_at)):
            before = self.accepted_at[place - 1] if place else self.num_passes
            result.append(self.accepted_at[place] / max(before, 1))
        return result

    def __str__(self) -> str:
        joint = " ".join(f"{share:.2f}" for share in self.joint)
        return (
            f"drafts {self.num_drafts} tokens in {self.num_passes} passes, {self.rate:.1%} "
            f"accepted; {self.length:.2f} tokens a pass, {self.mean_answer_length:.2f} as the mean "
            f"of answers; accepted up to each place: {joint or 'none'}"
        )
