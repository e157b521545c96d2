"""What changed when stored answers were judged again."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemotron.exit_codes import DONE, FAILED
from nemotron.posttrain.environments.base import Verdict
from nemotron.terminal import print_text


@dataclass
class Count:
    """Answers that are judged again, of one environment or task."""

    judged: int = 0
    changed: int = 0
    """Those with another reward than is stored, or with a fault now or then alone."""
    faults: int = 0
    before: float = 0.0
    after: float = 0.0
    """Sums of rewards."""

    def add(self, first: Verdict, second: Verdict) -> None:
        """Count a verdict as it is stored, and as it is now."""
        self.judged += 1
        self.faults += second.error is not None
        had, has = first.error is not None, second.error is not None
        self.changed += had != has or (not has and first.reward != second.reward)
        self.before += first.reward
        self.after += second.reward


def print_counts(counts: Mapping[str, Count], what: str) -> int:
    """Print what changed; returns exit code 1 if a verdict did, else 0."""
    for name, count in counts.items():
        print_text(
            f"{name:<16} {count.judged} {what}  {count.changed} changed  {count.faults} faults  "
            f"mean reward {count.before / count.judged:.4f} -> {count.after / count.judged:.4f}"
        )
    return FAILED if any(count.changed for count in counts.values()) else DONE
