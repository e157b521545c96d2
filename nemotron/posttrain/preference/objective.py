"""What preference optimization minimizes: the loss of pairs of answers (DPO)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.preference.config import DpoOptions
from nemotron.train.auxiliary import Auxiliary, LanguageObjective

REFERENCE = "reference_logprobs"
"""Name in `Batch.extras`: the log-probability of each label for the reference, [B, T]."""

FIGURES = (
    "dpo/accuracy",
    "dpo/rewards_chosen",
    "dpo/rewards_rejected",
    "dpo/rewards_margin",
)
"""What is logged beside the loss: the share of pairs whose chosen answer has the higher reward, and
mean rewards: beta times the difference of log-probabilities, as TRL logs them."""


@dataclass(frozen=True)
class RowRanks:
    """The ranks that share the tokens of a row, each with its part of them."""

    size: int = 1
    add_up: Callable[[Tensor], Tensor] = lambda values: values
    """Adds up over these ranks, with a gradient."""


@dataclass(frozen=True)
class DpoObjective(LanguageObjective):
    """The loss of pairs, cross entropy of chosen answers if it is weighed, and auxiliary terms.

    Documents of a row are a chosen answer, its rejected one, and so on. Terms are means over pairs.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", equation 7; with label smoothing
    Mitchell 2023, "A note on DPO with noisy preferences", equation 3; names and averages as in
    NVIDIA-NeMo/RL: nemo_rl/algorithms/loss/loss_functions.py, DPOLossFn.
    """

    options: DpoOptions
    auxiliary: Auxiliary
    row: RowRanks = RowRanks()

    @property
    def factors(self) -> dict[str, float | None]:
        """`main` (of pairs), `sft` where it is weighed, and the figures, which have no weight."""
        options = self.options
        sft = {"sft": options.sft_loss_weight} if options.sft_loss_weight else {}
        return {"main": options.preference_loss_weight, **sft, **dict.fromkeys(FIGURES)}

    def own_counts(self, batch: Batch) -> list[float]:
        """Return the number of pairs for each term."""
        has_label = (batch.labels != NO_LABEL).double()
        pairs = float(_whole_pairs(_by_answer(has_label[None], batch, 1)[0]).sum())
        return [pairs] * len(self.factors)

    def own_sums(
        self, model: HybridLM, hidden: Float[Tensor, "B T D"], batch: Batch
    ) -> list[Float[Tensor, ""]]:
        """Return sums over the pairs of these rows; ranks that share them return equal parts."""
        logprobs = model.lm_head.token_logprobs(hidden, batch.labels)
        options = self.options
        has_label = batch.labels != NO_LABEL
        gains = torch.where(has_label, logprobs - batch.extras[REFERENCE], 0)
        values = torch.stack([gains, logprobs, has_label.to(logprobs.dtype)])
        gain, likelihood, count = self.row.add_up(_by_answer(values, batch, self.row.size))
        is_pair = _whole_pairs(count)
        length = count.clamp(min=1)
        if options.preference_average_log_probs:
            gain = gain / length
        rewards = options.reference_policy_kl_penalty * gain  # [pairs, 2]
        chosen, rejected = rewards.unbind(-1)
        terms = [preference_loss(chosen - rejected, options.label_smoothing)]
        if options.sft_loss_weight:
            average = options.sft_average_log_probs
            terms.append(-(likelihood / length if average else likelihood)[..., 0])
        chosen, rejected = chosen.detach(), rejected.detach()
        terms += [(chosen > rejected).to(chosen.dtype), chosen, rejected, chosen - rejected]
        return [torch.where(is_pair, term, 0).sum() / self.row.size for term in terms]


def preference_loss(
    margin: Float[Tensor, " pairs"], label_smoothing: float
) -> Float[Tensor, " pairs"]:
    """Return the loss of pairs in nats, given the reward of the chosen answer minus the other's."""
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    return loss - label_smoothing * F.logsigmoid(-margin) if label_smoothing else loss


def _by_answer(
    values: Float[Tensor, "N B T"], batch: Batch, row_ranks: int
) -> Float[Tensor, "N pairs 2"]:
    """Add up values over the tokens of each answer; pairs that a row does not have are 0."""
    rows, length = batch.labels.shape
    size = length * row_ranks  # a row has fewer documents than tokens
    size += size % 2
    index = _documents(batch) + size * torch.arange(rows, device=values.device).unsqueeze(1)
    sums = values.new_zeros(values.shape[0], rows * size)
    sums = sums.index_add(1, index.flatten(), values.flatten(1))
    return sums.unflatten(1, (-1, 2))


def _documents(batch: Batch) -> Int[Tensor, "B T"]:
    assert batch.seq_idx is not None, "answers do not see each other"
    return batch.seq_idx.long()


def _whole_pairs(count: Float[Tensor, "pairs 2"]) -> Tensor:
    return (count > 0).all(-1)
