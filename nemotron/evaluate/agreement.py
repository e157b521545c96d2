"""How far a model is from another one that it should replace, over the tokens of some text."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM

POSITIONS = 512
"""Places whose distributions over the vocabulary are in memory at once."""


@dataclass(frozen=True)
class Agreement:
    """What replacing the reference by the model changes; means over the tokens, in nats."""

    loss: float
    """Cross entropy of the model."""
    reference_loss: float
    """Cross entropy of the reference."""
    kl: float
    """KL(reference || model)."""
    top1: float
    """Share of the tokens for which both find the same one likeliest."""
    tokens: int
    error: float
    """Standard error of `change`, from the rows, within which tokens depend on each other."""

    @property
    def change(self) -> float:
        """Loss of the model minus that of the reference, on the same tokens."""
        return self.loss - self.reference_loss

    def __str__(self) -> str:
        return (
            f"loss {self.reference_loss:.5f} -> {self.loss:.5f} "
            f"({self.change:+.5f} ± {self.error:.5f})  KL {self.kl:.6f} nats a token  "
            f"same likeliest token {self.top1:.2%}  {self.tokens} tokens"
        )


@torch.no_grad()
def agreement(model: HybridLM, reference: HybridLM, batches: Iterable[Batch]) -> Agreement:
    """Compare what two models predict wherever a batch has a label.

    Each model computes on the device and in the dtype that it is in; distributions are float32,
    sums float64.

    Raises:
        UserError: when the vocabularies differ, or no batch has a label.
    """
    if model.config.vocab_size != reference.config.vocab_size:
        raise UserError(
            f"the models have vocabularies of {model.config.vocab_size} and "
            f"{reference.config.vocab_size} tokens; compare models with one tokenizer."
        )
    rows: list[Tensor] = []
    for batch in batches:
        labels = batch.labels[batch.labels != NO_LABEL]
        ours, theirs = _labeled(model, batch), _labeled(reference, batch)
        parts = (some.split(POSITIONS) for some in (ours, theirs, labels))
        terms = []
        for mine, other, right in zip(*parts, strict=True):
            found = _logprobs(model, mine)
            terms.append(_terms(found, _logprobs(reference, other).to(found.device), right))
        if terms:
            lengths = (batch.labels != NO_LABEL).sum(1).tolist()
            rows += [row.sum(0) for row in torch.cat(terms).split(lengths)]
    if not rows:
        raise UserError("there is no text to compare the models on; give at least one token.")
    return _agreement(torch.stack(rows))


def _agreement(rows: Float[Tensor, "rows 5"]) -> Agreement:
    """Return the means, from the sums of `_terms` over each row."""
    tokens = rows[:, -1].sum()
    means = rows.sum(0) / tokens
    changes = rows[:, 0] - rows[:, 1] - (means[0] - means[1]) * rows[:, -1]
    error = changes.square().sum().sqrt() / tokens
    loss, reference_loss, kl, same, _ = means.tolist()
    return Agreement(loss, reference_loss, kl, same, int(tokens), error.item())


def pooled(parts: Iterable[Agreement]) -> Agreement:
    """Return the agreement over the tokens of all parts, whose rows differ."""
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)

    def mean(values: Iterable[float]) -> float:
        pairs = zip(values, parts, strict=True)
        return sum(value * part.tokens for value, part in pairs) / tokens

    return Agreement(
        mean(part.loss for part in parts),
        mean(part.reference_loss for part in parts),
        mean(part.kl for part in parts),
        mean(part.top1 for part in parts),
        tokens,
        sqrt(sum((part.error * part.tokens) ** 2 for part in parts)) / tokens,
    )


def _terms(
    found: Float[Tensor, "M V"], wanted: Float[Tensor, "M V"], labels: Int[Tensor, " M"]
) -> Float[Tensor, "M 5"]:
    """Return both cross entropies, the divergence, whether the first choices are equal, and 1."""
    picked = labels.to(found.device).unsqueeze(-1)
    terms = (
        -found.gather(-1, picked).squeeze(-1),
        -wanted.gather(-1, picked).squeeze(-1),
        (wanted.exp() * (wanted - found)).sum(-1, dtype=torch.float64),
        wanted.argmax(-1) == found.argmax(-1),
        torch.ones_like(labels, device=found.device),
    )
    return torch.stack([term.double() for term in terms], dim=-1).cpu()


def _labeled(model: HybridLM, batch: Batch) -> Float[Tensor, "M D"]:
    """Return the hidden states at the places that have a label."""
    batch = batch.to(model.backbone.embeddings.weight.device)
    return model(batch.input_ids, batch.seq_idx)[batch.labels != NO_LABEL]


def _logprobs(model: HybridLM, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
    return model.logits(hidden).float().log_softmax(-1)
