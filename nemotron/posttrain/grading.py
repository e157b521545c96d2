"""What each answer of a batch is worth: its probabilities, its advantage, whether it counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemotron.model.hybrid import HybridLM
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.advantages import advantages
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.replay import Differences, Experts
from nemotron.posttrain.rollout import Rollout
from nemotron.posttrain.rows import pack_answers
from nemotron.posttrain.scoring import score


@dataclass(frozen=True)
class Grading:
    """Scores the answers of a batch on all ranks together."""

    config: RlConfig
    local: LocalModel
    ranks: Ranks
    eod_id: int
    experts: Experts | None = None
    """Those that the trainer replays."""
    reference: HybridLM | None = None
    teacher: HybridLM | None = None

    def score(self, rollouts: Sequence[Rollout]) -> Differences:
        """Have the trainer's weights, and those of the frozen models, score all answers.

        Returns how the trainer's choice of experts differs from the one that it replays.
        """
        [model] = self.local.models
        found, differences = self._scores(rollouts, model, self.experts)
        for rollout, values in zip(rollouts, found, strict=True):
            rollout.old_logprobs = values
        self.local.drop_gathered()
        if self.reference is not None:
            found, _ = self._scores(rollouts, self.reference)
            for rollout, values in zip(rollouts, found, strict=True):
                rollout.reference_logprobs = values
        if self.teacher is not None:
            found, _ = self._scores(rollouts, self.teacher)
            for rollout, values in zip(rollouts, found, strict=True):
                rollout.teacher_logprobs = values
        return differences

    def _scores(
        self, rollouts: Sequence[Rollout], model: HybridLM, experts: Experts | None = None
    ) -> tuple[list[list[float]], Differences]:
        """Return the log-probabilities of each answer's tokens; every rank scores a share.

        Models with other weights choose their own experts.
        """
        ranks = self.ranks
        rows = pack_answers(rollouts, self.config, ranks.world)
        share = len(rows.answers) // ranks.world
        own = rows.part(ranks.rank * share, share)
        batch = own.batch(self.eod_id, self.config.policy.average, experts)
        found = score(self.config, model, self.local.device, batch)
        numbers = {id(rollout): number for number, rollout in enumerate(rollouts)}
        scores = {numbers[key]: each for key, each in own.take_apart(found.logprobs).items()}
        parts = ranks.gather((scores, found.differences))
        every = {number: values for own, _ in parts for number, values in own.items()}
        differences = sum((differences for _, differences in parts), Differences())
        return [every[number] for number in range(len(rollouts))], differences


def compare(rollouts: Sequence[Rollout], config: RlConfig) -> None:
    """Give each scored answer its advantage over the others, and say which have no loss."""
    shape = (-1, config.rollout.num_generations_per_prompt)
    rewards = torch.tensor([r.verdict.reward for r in rollouts], dtype=torch.float64)
    lengths = torch.tensor([len(r.tokens) - sum(r.forced) for r in rollouts]).double()
    found = advantages(rewards.view(shape), lengths.view(shape), config.advantage).flatten()
    # a fault has no reward, so the others to that prompt have nothing to be compared with
    faulty = {rollout.group for rollout in rollouts if rollout.verdict.error is not None}
    limit = config.policy.correction.max_sequence_error
    for rollout, value in zip(rollouts, found.tolist(), strict=True):
        rollout.advantage = value
        rollout.is_masked = (
            rollout.group in faulty
            or rollout.verdict.mask
            or (rollout.is_truncated and config.rollout.truncated == "mask")
            # trainer and rollout policy give it too different probabilities
            or (limit is not None and sequence_error(rollout) > limit)
        )


def sequence_error(rollout: Rollout) -> float:
    """Return the mean `exp |log trainer - log sampled|` over the policy's own tokens."""
    pairs = zip(rollout.old_logprobs, rollout.logprobs, rollout.forced, strict=True)
    errors = [abs(old - sampled) for old, sampled, forced in pairs if not forced]
    return float(np.exp(errors).mean()) if errors else 1.0
