"""What reinforcement learning minimizes: the policy loss of sampled answers."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.config import PolicyConfig
from nemotron.posttrain.policy import Answers, correction, kl_divergence, policy_loss
from nemotron.train.auxiliary import Auxiliary, LanguageObjective, total_weight

ADVANTAGE, OLD, SAMPLED, REFERENCE = (
    "advantages",
    "old_logprobs",
    "sampled_logprobs",
    "reference_logprobs",
)
"""Names of `Batch.extras` that the policy loss reads, all float32 [B, T], lined up with labels:
the advantage of the answer; log-probabilities of the label for the trainer before the update, for
the policy that sampled it, and for the weights that the run began with."""


@dataclass(frozen=True)
class PolicyObjective(LanguageObjective):
    """The policy loss, the divergence from a reference, and the auxiliary terms.

    Labels are the tokens that the policy sampled; all other positions have none. `loss_weight`
    makes the average: absent, every token counts alike; with one over the length of its answer at
    each token, every answer does.
    """

    policy: PolicyConfig
    auxiliary: Auxiliary
    temperature: float = 1.0
    """Temperature at which answers were sampled, and are scored."""

    @property
    def factors(self) -> dict[str, float]:
        """`policy`, and `kl` where it is weighed."""
        return {"policy": 1.0, **({"kl": self.policy.kl_coefficient} if self._has_kl else {})}

    @property
    def _has_kl(self) -> bool:
        return self.policy.kl_coefficient > 0

    def own_counts(self, batch: Batch) -> list[float]:
        """Return the sampled tokens, or answers; the divergence is averaged over the same."""
        return [total_weight(batch.labels, batch.loss_weight)] * (1 + self._has_kl)

    def own_sums(
        self, model: HybridLM, hidden: Float[Tensor, "B T D"], batch: Batch
    ) -> list[Float[Tensor, ""]]:
        """Return the weighted sums over the sampled tokens of these rows."""
        logprobs = model.lm_head.token_logprobs(hidden, batch.labels, self.temperature)
        answers = answers_of(batch)
        old, sampled = batch.extras[OLD], batch.extras[SAMPLED]
        loss = policy_loss(logprobs, old, batch.extras[ADVANTAGE], answers, self.policy)
        loss = loss * correction(
            old,
            sampled,
            answers,
            self.policy.correction,
            whole_answers=self.policy.kind == "gspo",
        )
        terms = [loss]
        if self._has_kl:
            divergence = kl_divergence(logprobs, batch.extras[REFERENCE], self.policy.kl_kind)
            # its value is 1; with it the gradient is that of the expectation over the policy
            ratio = (logprobs - logprobs.detach()).exp()
            terms.append(torch.where(answers.mask, ratio * divergence, 0))
        weight = batch.loss_weight
        return [(term if weight is None else term * weight).sum() for term in terms]


def answers_of(batch: Batch) -> Answers:
    """Return which labels belong to the same answer: those of one document of a row."""
    rows, length = batch.labels.shape
    device = batch.labels.device
    number = torch.arange(rows, device=device).unsqueeze(1).expand(-1, length)
    if batch.seq_idx is not None:
        # a document's number is below the length of its row
        number = number * length + batch.seq_idx
    count = rows if batch.seq_idx is None else rows * length
    return Answers(number, count, batch.labels != NO_LABEL)
